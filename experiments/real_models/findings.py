"""One question on one packaged model, from the probe to the causal analysis, with small tables of every figure.

    python experiments/real_models/findings.py gemma-3-270m-q4 runs/gemma_3_270m/sae/resid_post/layer_12_width_8k_l0_medium \\
        --pairs treatment --randomized runs/gemma_3_270m/sae/resid_post_randomized/layer_12_width_8k_l0_medium --out runs/treatment

Templates are split into discover and report; features are found on the one and every reduction is measured on the other. The
randomized SAE goes through the same search: what it removes is the search's own yield.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import sae_bias as sb
from sae_bias.discovery.attribution import (
    attribution,
    attribution_agreement,
    cumulative_ablation,
    exact_ablation,
)
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.probe.words import default_probe
from sae_bias.stats.design import split_templates
from sae_bias.steering.controls import random_twin
from sae_bias.steering.engine import ProbeEngine

SHARES = {"discover": 0.5, "report": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("sae")
    parser.add_argument(
        "--pairs", default=None, help="bundled name or file of the question (default: the bundled 280)"
    )
    parser.add_argument("--randomized", default=None, help="the randomized twin of the SAE")
    parser.add_argument(
        "--entities", type=int, default=0, help="use so many of the subject pairs (default all)"
    )
    parser.add_argument("--exact", type=int, default=24, help="features ablated exactly (default 24)")
    parser.add_argument(
        "--joint", type=int, default=10, help="features ablated together, at most (default 10)"
    )
    parser.add_argument(
        "--controls", type=int, default=19, help="sets of random directions with the same gates (default 19)"
    )
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    run(given, Path(given.out))


def run(given: argparse.Namespace, out: Path) -> None:
    torch.set_grad_enabled(False)
    out.mkdir(parents=True, exist_ok=True)
    model, pairs = sb.load_model(given.model), sb.load_pairs(given.pairs)
    if given.entities:
        step = max(1, len(pairs.entities) // given.entities)
        pairs = pairs.select(entities=pairs.entities[::step][: given.entities])
    probe = default_probe(pairs)
    split = split_templates(list(pairs.templates), SHARES, seed=0)
    discover, report = (pairs.select(templates=split[name]) for name in ("discover", "report"))
    sae = sb.load_sae(given.sae)
    engine = ProbeEngine(model, discover, probe, sites=[sae.site])
    held = ProbeEngine(model, report, probe, sites=[sae.site])
    say(f"{model.label}: bias {held.base.bias:+.3f} on report, {engine.base.bias:+.3f} on discover")

    ranking = search(engine, sae, given.exact)
    agreement = attribution_agreement(
        ranking["attribution"].to_numpy(), ranking["ablation"].to_numpy(), engine.base.bias
    )
    separation = sb.rank_features(model, sae, discover, by="separation").to_frame()
    ranking = ranking.merge(
        separation[["feature", "auroc", "mean_ai", "mean_human", "fire_ai", "fire_human"]],
        on="feature",
        how="left",
    )
    ranking.to_csv(out / "ranking.csv", index=False, float_format="%.4f")
    say(ranking.head(8).round(3).to_string(index=False))
    say(str(agreement))

    best = list(
        ranking.sort_values("ablation", ascending=False).query("ablation > 0")["feature"][: given.joint]
    )
    joint = cumulative_ablation(held, best).assign(sae="trained")
    curves = [joint]
    rows = [methods(model, held, probe, sae, best, discover)]
    if given.randomized:
        twin = sb.load_sae(given.randomized)
        lucky = (
            search(engine, twin, given.exact)
            .sort_values("ablation", ascending=False)
            .query("ablation > 0")["feature"]
        )
        if len(lucky):
            curves.append(cumulative_ablation(held, list(lucky[: given.joint])).assign(sae="randomized"))
    curve = pd.concat(curves, ignore_index=True)
    curve.to_csv(out / "joint.csv", index=False, float_format="%.4f")
    say(curve.round(3).to_string(index=False))

    rows.append(controls(held, best, given.controls))
    table = pd.concat(rows, ignore_index=True)
    table.to_csv(out / "methods.csv", index=False, float_format="%.4f")
    say(table.round(4).to_string(index=False))
    torch.set_grad_enabled(True)
    ladder = sb.causal_ladder(model, best[0], report, probe, layers=[sae.site.layer], positions=0)
    ladder.to_frame().drop(columns="meaning").to_csv(out / "causal.csv", index=False, float_format="%.4f")
    say(str(ladder))


def say(text: str) -> None:
    print(text, flush=True)


def search(engine: ProbeEngine, sae: sb.Sae, n_exact: int) -> pd.DataFrame:
    """Attribution of every feature and exact ablation of the first ones, on discover."""
    with torch.enable_grad():
        predicted = attribution(engine, sae)
    first = np.argsort(-np.abs(predicted))[:n_exact]
    names = [f"{sae.id}#{i}" for i in first]
    frame = pd.DataFrame({"feature": names, "index": first, "attribution": predicted[first]})
    return frame.assign(ablation=np.asarray(exact_ablation(engine, names))).sort_values(
        "ablation", ascending=False, key=np.abs
    )


def methods(
    model: sb.Model,
    held: ProbeEngine,
    probe: sb.Probe,
    sae: sb.Sae,
    best: list[str],
    discover: sb.PromptPairs,
) -> pd.DataFrame:
    """The best feature, the best set and the difference of means at all and at last positions, measured on report."""
    direction = sb.difference_of_means(model, discover, sae.site)
    edits: dict[str, list[Any]] = {
        "best feature, ablated": [sb.Ablate(best[0])],
        f"best {len(best)} features, ablated": [sb.Ablate(f) for f in best],
        "difference of means, projected out at all positions": [sb.ProjectOut(direction)],
        "difference of means, projected out at the last position": [
            sb.ProjectOut(direction, positions="last")
        ],
    }
    collapse = CollapseEngine(model, probe, sites=[sae.site])
    rows = []
    for name, edit in edits.items():
        after, _ = held.run(edit)
        reduction = after.reduction_from(held.base)
        found = collapse.run(edit, held.base, after)
        rows.append(
            {
                "method": name,
                "bias": after.bias,
                "reduction": reduction.estimate,
                "low": reduction.ci_low,
                "high": reduction.ci_high,
                "beta": found.specific.beta,
                "specific": found.specific.estimate,
                "human_moved": float((after.score_human - held.base.score_human).mean()),
                "ai_moved": float((after.score_ai - held.base.score_ai).mean()),
            }
        )
    return pd.DataFrame(rows)


def controls(held: ProbeEngine, best: list[str], n: int) -> pd.DataFrame:
    """Sets of random directions with the same gates and sizes as the best set: median and largest reduction, empirical p."""
    features = [sb.load_feature(name) for name in best]
    values = []
    for k in range(n):
        edit = [sb.Ablate(random_twin(feature, 1000 * k + i)) for i, feature in enumerate(features)]
        values.append(held.run(edit)[0].reduction_from(held.base).estimate)
    candidate = held.run([sb.Ablate(f) for f in best])[0].reduction_from(held.base).estimate
    p = (1 + sum(v >= candidate for v in values)) / (1 + n)
    return pd.DataFrame(
        [
            {
                "method": f"{n} sets of random directions, same gates: median (p of the set = {p:.3f})",
                "reduction": float(np.median(values)),
            }
        ]
    )


if __name__ == "__main__":
    main()
