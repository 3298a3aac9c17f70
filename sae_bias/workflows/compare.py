"""The feature against its baselines at equal cost: how much of the bias does each method remove at the same KL?

Every method has a strength axis: the share s of its part that is taken out (a' = (1 - s)·a for features, x' = x - s·P(x - μ) for
directions; s = 1 takes all of it out, s < 0 is the opposite sign). Bias removed is 1 - |B_s/B_0|: a bias turned round is not removed.
Its curve against KL, the worst of the three text kinds, is walked from s = 0 and read at common levels of KL by linear interpolation;
where the curve has not reached a level, the most it removed before stands there, and `reached` is False. Directions are found and strengths laid out on the discover templates;
every reduction is of the report templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.measures.costs import TEXT_KINDS
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature
from sae_bias.stats.design import split_templates
from sae_bias.steering.controls import control_edits
from sae_bias.steering.directions import (
    Direction,
    difference_of_means,
    difference_subspace,
    random_direction,
    random_subspace,
)
from sae_bias.steering.edits import ProjectOut, Scale, Steer
from sae_bias.steering.intervention import FeatureLike, Intervention
from sae_bias.steering.ridge import RidgeProbe, ridge_probe
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.sweep import SweepResult, run_sweep

if TYPE_CHECKING:
    import plotly.graph_objects as go


SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
KL_LEVELS = (0.003, 0.01, 0.03, 0.1)
NORM_SHARES = (-0.02, -0.05, -0.1, -0.2)
SUBSPACE_K = 5
N_RANDOM = 3
SPLITS = {"discover": 0.5, "report": 0.5}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every method's curve, and its reduction at equal KL."""

    frame: pd.DataFrame
    """One row a method and share, on the report templates: method, share, kl (worst text kind), reduction with its interval …"""
    table: pd.DataFrame
    """One row a method: bias removed at each KL level (`kl_0.01`), whether it got there (`reached_0.01`), what it reads."""
    ridge: RidgeProbe = field(repr=False)
    path: Path | None = None

    def to_frame(self) -> pd.DataFrame:
        return self.table.copy()

    def plot(self) -> go.Figure:
        """The frontier: bias removed against KL, a line a method."""
        return frontier_of(self.frame)

    def __repr__(self) -> str:
        levels = [str(c) for c in self.table if str(c).startswith("kl_")]
        shown = self.table[["method", *levels]].copy()
        for level in levels:
            reached = self.table["reached_" + level.removeprefix("kl_")]
            shown[level] = [f"{v:.1%}{'' if r else ' *'}" for v, r in zip(shown[level], reached)]
        shown.columns = ["method", *(f"at KL {level.removeprefix('kl_')}" for level in levels)]
        return (
            "Comparison: share of the bias removed (* the method did not reach this KL)\n"
            + shown.to_string(index=False)
        )

    def _repr_html_(self) -> str:
        return self.table.round(4).to_html(escape=True, index=False)


def compare_methods(
    model: Model,
    feature: FeatureLike,
    pairs: PromptPairs,
    probe: Probe | None = None,
    *,
    discover: Sequence[str] | None = None,
    report: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    kl_levels: Sequence[float] = KL_LEVELS,
    k: int = SUBSPACE_K,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Suppress the feature and its baselines by steps, and read each at equal KL.

    Args:
        discover: templates the directions are found on; half of them, drawn from `seed`, where neither list is given.
        report: templates the reductions are of.
        k: dimensions of the subspace.

    Raises:
        RequestError: templates in both lists, only one list given, or an edit that does not fit the model.
    """
    loaded = as_feature(feature)
    found_on, reported = _templates(pairs, discover, report, seed)
    ridge = ridge_probe(model, found_on, folds=min(5, len(found_on.templates)), seed=seed)
    methods = _methods(model, loaded, found_on, ridge, k, seed)
    cells = [
        Cell((edit,), "candidate" if name == "feature" else "direction", f"{name} | {share:g}")
        for name, edits in methods.items()
        for share, edit in edits(shares)
    ]
    sweep = Sweep(cells, costs=True, splits={"report": list(reported)}, seed=seed)
    result = run_sweep(model, pairs, sweep, probe=probe, out=out, progress=progress)
    frame = _curves(result)
    return Comparison(frame, equal_kl(frame, kl_levels), ridge, result.path)


# --- the methods ---
class _Steps:
    """A method as a function of the share taken out."""

    def __init__(self, target: Feature | Direction, *, norm_relative: bool = False):
        self.target, self.norm_relative = target, norm_relative

    def __call__(self, shares: Sequence[float]) -> list[tuple[float, Intervention]]:
        if self.norm_relative:
            assert isinstance(self.target, Direction)
            return [(a, Steer(self.target, a, norm_relative=True)) for a in NORM_SHARES]
        if isinstance(self.target, Direction):
            return [(s, ProjectOut(self.target, share=s)) for s in shares]
        return [(s, Scale(self.target, 1.0 - s)) for s in shares]


class _Opposite(_Steps):
    """The feature turned up instead of down."""

    def __call__(self, shares: Sequence[float]) -> list[tuple[float, Intervention]]:
        return super().__call__([-s for s in shares])


def _methods(
    model: Model, feature: Feature, pairs: PromptPairs, ridge: RidgeProbe, k: int, seed: int
) -> dict[str, _Steps]:
    site = feature.site
    means = difference_of_means(model, pairs, site)
    methods: dict[str, _Steps] = {
        "feature": _Steps(feature),
        "feature, opposite sign": _Opposite(feature),
        "difference of means": _Steps(means),
        "difference of means without massive dimensions": _Steps(
            difference_of_means(model, pairs, site, without_massive=True)
        ),
        "probe direction": _Steps(ridge.direction(site.layer)),
        "probe direction, norm-relative steering": _Steps(ridge.direction(site.layer), norm_relative=True),
    }
    rank = min(k, len(pairs.templates))
    methods[f"subspace of {rank}"] = _Steps(difference_subspace(model, pairs, site, rank))
    methods[f"random subspace of {rank}"] = _Steps(random_subspace(model.d_model, site, rank, seed))
    for layer in _other_layers(model, site):
        methods[f"difference of means, layer {layer}"] = _Steps(difference_of_means(model, pairs, layer))
    for i in range(N_RANDOM):
        methods[f"random direction {i}"] = _Steps(random_direction(model.d_model, site, seed + i))
    for i, (edit, label) in enumerate(
        control_edits(model, Scale(feature, 0.0), pairs, N_RANDOM, seed)[:N_RANDOM]
    ):
        methods[f"{label} {i}"] = _Steps(as_feature(edit.feature))
    return methods


def _other_layers(model: Model, site: Site) -> list[int]:
    """One layer well before the site and one well after, where the model has them."""
    step = max(1, model.n_layers // 4)
    return [layer for layer in (site.layer - step, site.layer + step) if 0 <= layer < model.n_layers]


def _kind(method: str) -> str:
    if method.startswith(("random", "matched")):
        return "control"
    if method.endswith("opposite sign"):
        return "opposite"
    return "candidate" if method == "feature" else "direction"


def _templates(
    pairs: PromptPairs, discover: Sequence[str] | None, report: Sequence[str] | None, seed: int
) -> tuple[PromptPairs, tuple[str, ...]]:
    if (discover is None) != (report is None):
        raise RequestError("give both discover and report templates, or neither.")
    if discover is None or report is None:
        if len(pairs.templates) < 4:
            raise RequestError(
                f"{len(pairs.templates)} templates cannot be split into discover and report; at least 4 are needed."
            )
        families = {p.template: p.family for p in pairs}
        split = split_templates(pairs.templates, SPLITS, seed, families=families)
        discover, report = split["discover"], split["report"]
    both = sorted(set(discover) & set(report))
    if both:
        raise RequestError(f"template {both[0]!r} stands in both discover and report.")
    return pairs.select(templates=discover), tuple(report)


# --- equal KL ---
def _curves(result: SweepResult) -> pd.DataFrame:
    """The sweep's rows with their method and share, and the worst KL of the text kinds."""
    frame = result.frame[result.frame["kind"] != "base"].copy()
    label = frame["label"].str.rsplit(" | ", n=1, expand=True)
    frame.insert(0, "method", label[0])
    frame.insert(1, "share", label[1].astype(float))
    frame["kind"] = frame["method"].map(_kind)
    frame.insert(2, "kl", frame[[f"kl_{kind}" for kind in TEXT_KINDS]].max(axis=1))
    return frame.reset_index(drop=True)


def equal_kl(frame: pd.DataFrame, levels: Sequence[float] = KL_LEVELS) -> pd.DataFrame:
    """Bias removed by each method at each level of KL; rows need method, share, kl, reduction."""
    rows = []
    for method, part in frame.groupby("method", sort=False):
        part = part.reindex(part["share"].abs().sort_values(kind="stable").index)
        kl = np.concatenate([[0.0], part["kl"].to_numpy()])
        removed = np.concatenate([[0.0], 1 - np.abs(1 - part["reduction"].to_numpy())])
        row: dict[str, object] = {"method": method, "kind": part["kind"].iloc[0] if "kind" in part else ""}
        for level in levels:
            row[f"kl_{level:g}"], row[f"reached_{level:g}"] = at_kl(kl, removed, level)
        rows.append(row)
    return pd.DataFrame(rows)


def at_kl(kl: np.ndarray, removed: np.ndarray, level: float) -> tuple[float, bool]:
    """Most bias removed on the curve up to the point where KL first passes `level`, and whether it passes it."""
    best = removed[0]
    for i in range(1, len(kl)):
        if kl[i] > level:
            step = kl[i] - kl[i - 1]
            part = (level - kl[i - 1]) / step if step > 0 else 0.0
            return float(max(best, removed[i - 1] + part * (removed[i] - removed[i - 1]))), True
        best = max(best, removed[i])
    return float(best), False


def frontier_of(frame: pd.DataFrame) -> go.Figure:
    """Bias removed against KL, a line a method."""
    from sae_bias.figures.sweep import methods_at_cost

    return methods_at_cost(frame)
