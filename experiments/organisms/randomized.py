"""How often does a randomized SAE yield a causal AI-speech call? `python experiments/organisms/randomized.py --runs 200 --out runs/calibration`.

One run a seed: a trained SAE of `planted` is randomized (docs/method.md#controls), its features are called on the bundled grid as
`sae-bias rank --by interaction` calls them, and of those called AI-speech the five of largest ablation effect on held-out pairs are put to 99
controls each, Holm-corrected, as `rank --by ablation --controls 99` does. Controls are drawn block by block and a run ends as soon as no
feature can pass any more, which changes no decision. A row of OUT/randomized.csv is never run again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sae_bias as sb
from sae_bias.discovery.ranking import MOST_CAUSAL
from sae_bias.stats.design import sign_test
from sae_bias.stats.features import holm
from sae_bias.steering.banks import BankEngine, specific_reductions
from sae_bias.steering.controls import ALPHA, ControlTest, control_edits, control_test, randomized_control
from sae_bias.steering.engine import ProbeEngine

SAE = "organism:planted/resid_post/layer_3_width_512_l0_small"
N_CONTROLS, BLOCK = 99, 11


def causal_calls(engine: ProbeEngine, banks: BankEngine, called: list[sb.FeatureRef], seed: int) -> dict[str, object]:  # fmt: skip
    """How many of the features called AI-speech are called causal, and the largest specific reduction among them."""
    if not called:
        return {"causal": 0, "largest_sr": float("nan"), "controls": 0}
    after = [result.bias for result, _ in engine.run_many([[sb.Ablate(f)] for f in called])]
    first = [called[i] for i in np.argsort(after, kind="stable")[:MOST_CAUSAL]]
    edits = [sb.Ablate(f) for f in first]
    own = specific_reductions(engine, banks, [[e] for e in edits])
    controls = [control_edits(engine.model, e, engine.reading.pairs, N_CONTROLS, seed, family=called) for e in edits]  # fmt: skip
    values: list[list[float]] = [[] for _ in first]
    alive = True
    while alive and len(values[0]) < N_CONTROLS:
        for k, drawn in enumerate(controls):
            block = drawn[len(values[k]) : len(values[k]) + BLOCK]
            values[k] += specific_reductions(engine, banks, [[e] for e, _ in block]).tolist()
        alive = any(_can_pass(sr, v, drawn, len(first)) for sr, v, drawn in zip(own, values, controls))
    result = {"causal": 0, "largest_sr": float(own.max()), "controls": sum(map(len, values))}
    if alive:
        tests = [control_test(float(sr), v, [kind for _, kind in drawn]) for sr, v, drawn in zip(own, values, controls)]  # fmt: skip
        result["causal"] = _causal(tests)
    return result


def _can_pass(own: float, values: list[float], drawn: list, n_tested: int) -> bool:
    """Whether the smallest p that its controls still allow is significant after Holm's first step."""
    beaten = sum(v >= own for v in values)
    return own > 0 and (1 + beaten) / (1 + len(drawn)) * n_tested <= ALPHA


def _causal(tests: list[ControlTest]) -> int:
    """As `rank_features` decides it."""
    return sum(t.verdict == "yes" and p <= ALPHA for t, p in zip(tests, holm([t.p for t in tests])))


def run(seed: int, model: sb.Model, sae: sb.Sae, engine: ProbeEngine, banks: BankEngine) -> dict[str, object]:
    """One randomized SAE through the search."""
    twin = randomized_control(model, sae, engine.reading.pairs, seed)
    ranking = sb.rank_features(model, twin, sb.load_grid(), by="interaction", seed=seed)
    called = ranking.called("ai_speech")
    return {"seed": seed, "called": len(called)} | causal_calls(engine, banks, called, seed)


def main() -> None:
    """Parse, run what is missing, print the rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "randomized.csv"
    rows: list[Any] = pd.read_csv(table).to_dict("records") if table.is_file() else []
    model, sae = sb.load_model("organism:planted"), sb.load_sae(SAE)
    engine = ProbeEngine(model, sb.load_pairs().select(corpus=False), sb.Probe(), sites=[sae.site])
    banks = BankEngine(model, sb.Probe(), sites=[sae.site])
    for seed in sorted(set(range(args.runs)) - {r["seed"] for r in rows}):
        rows.append(run(seed, model, sae, engine, banks))
        pd.DataFrame(rows).to_csv(table, index=False, float_format="%.4f")
    found = pd.DataFrame(rows)
    yes = sign_test(int((found["causal"] > 0).sum()), len(found))
    print(
        f"{yes.successes} of {yes.n} randomized SAEs yield a causal AI-speech call: {yes.share:.1%} "
        f"[{yes.ci_low:.1%}, {yes.ci_high:.1%}] (mark: at most 5%); {int((found['called'] > 0).sum())} have an AI-speech call, "
        f"{int(found['called'].sum())} features in all; largest specific reduction {found['largest_sr'].max():.3f}"
    )


if __name__ == "__main__":
    main()
