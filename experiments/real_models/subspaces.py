"""Baselines without an SAE, on the treatment question: ridge probes of every layer, and subspaces of k directions projected out.

    python experiments/real_models/subspaces.py gemma-3-270m-q4 --layer 12 --out experiments/gemma_3_270m/results

Directions come from half of the templates, every reduction is measured on the other half, at the last position; random subspaces of
the same k stand beside them. Rows B1 and B2 of docs/published.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import sae_bias as sb
from sae_bias.core.site import Site
from sae_bias.probe.words import default_probe
from sae_bias.stats.design import split_templates
from sae_bias.steering.directions import difference_of_means, difference_subspace, random_subspace
from sae_bias.steering.engine import ProbeEngine

N_RANDOM = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    model, pairs = sb.load_model(given.model), sb.load_pairs("treatment")
    pairs = pairs.select(entities=pairs.entities[::2])
    split = split_templates(list(pairs.templates), {"discover": 0.5, "report": 0.5}, seed=0)
    discover, report = (pairs.select(templates=split[name]) for name in ("discover", "report"))
    out = Path(given.out)
    ridge = sb.ridge_probe(model, pairs)
    print(ridge)
    ridge.to_frame().to_csv(out / "treatment_ridge.csv", index=False, float_format="%.4g")
    site = Site(given.layer)
    engine = ProbeEngine(model, report, default_probe(report), sites=[site])
    directions = {"difference of means": difference_of_means(model, discover, site)}
    for k in given.k:
        directions[f"subspace of {k}"] = difference_subspace(model, discover, site, k)
        for seed in range(N_RANDOM):
            drawn = random_subspace(model.d_model, site, k, seed)
            directions[f"random subspace of {k}, seed {seed}"] = drawn
    table = pd.DataFrame(_row(engine, name, direction) for name, direction in directions.items())
    table.to_csv(out / "treatment_subspaces.csv", index=False, float_format="%.4g")
    print(table.round(3).to_string(index=False))


def _row(engine: ProbeEngine, name: str, direction: sb.Direction) -> dict[str, object]:
    """One subspace projected out at the last position of the report templates."""
    after, _ = engine.run([sb.ProjectOut(direction, positions="last")])
    cut = after.reduction_from(engine.base)
    moved = {
        f"{side}_moved": float(
            (getattr(after, f"score_{side}") - getattr(engine.base, f"score_{side}")).mean()
        )
        for side in ("human", "ai")
    }
    removed = {
        "removed_nats": cut.change.mean,
        "removed_low": cut.change.ci_low,
        "removed_high": cut.change.ci_high,
    }
    figures = {"projected out": name, "bias before": engine.base.bias, "bias after": after.bias} | removed
    return figures | {"reduction": cut.estimate, "low": cut.ci_low, "high": cut.ci_high} | moved


if __name__ == "__main__":
    main()
