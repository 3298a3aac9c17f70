"""Learned edits in every trained SAE of further seeds: `python experiments/organisms/learned.py --seeds 3 --out runs/calibration`.

Fits learned scales and a gated counterfactual (docs/method.md#learned-edits) in each trained SAE and in its randomized twin, reads them on the
report templates and the half of the valence bank that the fit never saw, and prints the marks. Organisms and SAEs in OUT/organisms are
trained where they are missing; a row in OUT/learned.csv is never fitted again.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sae_bias as sb
from organisms.further import further_saes
from sae_bias.measures.costs import CostEngine
from sae_bias.steering.controls import randomized_control
from sae_bias.validation.definitions import learned_marks
from sae_bias.validation.marks import marks_frame
from sae_bias.workflows.fit import fit_feature_set, fit_report

KINDS = ("scales", "gated")


def measure(model: sb.Model, sae: sb.Sae, kind: str, pairs: sb.PromptPairs) -> dict[str, object]:
    """One fit: its figures on report, and KL_off by kind of text."""
    start = time.process_time()
    edit = fit_feature_set(model, sae, pairs, kind=kind)
    seconds = time.process_time() - start
    row = fit_report(model, edit, pairs).set_index("split").loc["report"]
    costs = CostEngine(model, sites=[sae.site]).run([edit]).set_index("kind")["kl_off"]
    facts: dict[str, object] = {"n_features": len(edit.features), "seconds": seconds}
    facts |= {str(name): value for name, value in row.items()}
    return facts | {f"kl_off_{name}": float(value) for name, value in costs.items()}


def measure_all(seeds: range, out: Path) -> pd.DataFrame:
    """Every SAE of these seeds, its randomized twin beside it; rows that stand in the table are kept."""
    table = out / "learned.csv"
    rows: list[Any] = pd.read_csv(table).to_dict("records") if table.is_file() else []
    done = {(r["seed"], r["sae"], r["kind"], r["weights"]) for r in rows}
    pairs = sb.load_pairs()
    for seed in seeds:
        folders = further_saes("planted", seed, out / "organisms", progress=False)
        model = sb.load_model(out / "organisms" / f"seed_{seed}" / "planted" / "model")
        for folder in folders:
            sae = sb.load_sae(folder)
            for weights in ("trained", "randomized"):
                if all((seed, folder.name, kind, weights) in done for kind in KINDS):
                    continue
                chosen = sae if weights == "trained" else randomized_control(model, sae, pairs)
                for kind in KINDS:
                    key = {"seed": seed, "sae": folder.name, "kind": kind, "weights": weights}
                    if tuple(key.values()) in done:
                        continue
                    rows.append(key | measure(model, chosen, kind, pairs))
                    pd.DataFrame(rows).to_csv(table, index=False, float_format="%.4f")
                    print(key, f"SR {rows[-1]['specific']:.3f}", flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Parse, fit what is missing, print the marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    table = measure_all(range(1, args.seeds + 1), args.out)
    columns = ["mark", "organism", "required", "measured", "verdict", "note"]
    print(marks_frame(learned_marks(table, "planted"))[columns].to_string(index=False))


if __name__ == "__main__":
    main()
