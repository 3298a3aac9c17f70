"""The feature against its baselines at equal cost: how much of the bias does each method remove, for the same damage?

Every method has a strength axis: the share s of its part that is taken out (a' = (1 - s)·a for features, x' = x - s·P(x - μ) for
directions; s = 1 takes all of it out, s < 0 is the opposite sign), and acts once at all positions and once at the last alone: the same
difference of means can remove 15 % at all and 99.6 % at the last, so methods are compared at the same positions only.

Beside directions stand edits that are fitted to be specific (`fit`): a learned set of scales, a gated counterfactual and two directions learned at
the same positions, DAS and ReFT-r1; and a plain instruction before every prompt, which has one strength.

Three splits: directions and fits are found on discover, the strength is chosen on tune, every figure is of report. At a cost c,

    u* = the point of the tune curve with cost ≤ c and the smallest |B|;   removed = 1 - |B_u*/B_0| on report

with B the primary figure of the report pairs (the difference in differences where they have mundane twins, else the bias),
cost = max(KL, KL_off, 1 - β) and B interpolated linearly between strengths first and folded after: a bias turned round is not removed. The curve is walked from s = 0; where it never reaches the cost, the best it has stands there and `reached` is False.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.text import bracket, number, percent, signed
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.effect_lines import cost_note
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature
from sae_bias.stats.reduction import fieller_reduction
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
from sae_bias.steering.learned import RectifiedProjectOut
from sae_bias.steering.ridge import RidgeProbe, ridge_probe
from sae_bias.workflows.best_strength import choose_strength
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.fit import fit_direction, fit_feature_set
from sae_bias.workflows.fit_loss import STEPS
from sae_bias.workflows.prompting import INSTRUCTION, prompted_cell
from sae_bias.workflows.sweep import run_sweep
from sae_bias.workflows.sweep_rows import cell_rows, twin_difference

if TYPE_CHECKING:
    import plotly.graph_objects as go


SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
LEVELS = (0.01, 0.03, 0.1, 0.3)
POSITIONS = {"all": "all positions", "last": "last token"}
NORM_SHARES = (-0.02, -0.05, -0.1, -0.2)
SUBSPACE_K = 5
N_RANDOM = 3


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every method's curve, and its reduction at equal KL."""

    frame: pd.DataFrame
    """One row a method, positions, share and split: cost, bias removed, specific reduction, each with its interval …"""
    table: pd.DataFrame
    """One row a method and positions: the strength chosen on tune with its figures on report, and the share of the primary figure (`of`)
    removed at each cost (`at_0.01` with its interval, `reached_0.01`)."""
    ridge: RidgeProbe = field(repr=False)
    path: Path | None = None

    def to_frame(self) -> pd.DataFrame:
        return self.table.copy()

    def plot(self) -> go.Figure:
        """The frontier: share removed against cost, a line a method."""
        return frontier_of(self.frame)

    def __repr__(self) -> str:
        shown, columns = table_in_words(self.table)
        return (
            f"Comparison: {share_of(self.table)}\n"
            + shown[list(columns)].rename(columns=columns).to_string(index=False)
            + "".join(f"\n{line}" for line in (NOT_REACHED, cost_note(self.frame)) if line)
        )

    def _repr_html_(self) -> str:
        shown, columns = table_in_words(self.table)
        return shown[list(columns)].rename(columns=columns).to_html(escape=True, index=False)


def share_of(table: pd.DataFrame) -> str:
    """What the shares of a table are of, in words."""
    return f"share of the {table['of'].iloc[0]} removed at equal cost, on templates held out"


NOT_REACHED = "* not reached: no strength of the method costs so much; its best below that cost stands there."


def table_in_words(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table as texts, with the mark * where a cost was not reached, and its columns' names."""
    levels = [c.removeprefix("reached_") for c in map(str, table) if c.startswith("reached_")]
    shown = table[["method", "kind"]].copy()
    for level in levels:
        cells = table[[f"at_{level}", f"low_{level}", f"high_{level}", f"reached_{level}"]]
        shown[f"at_{level}"] = [
            f"{percent(v)} {bracket(low, high, share=True)}{'' if reached else ' *'}"
            for v, low, high, reached in cells.itertuples(index=False)
        ]
    shown["best"] = [
        f"{number(r.share)}: {percent(r.specific_reduction)} (β {number(r.beta)})"
        if not r.undefined
        else "none"
        for r in table.itertuples()
    ]
    for side in ("human_shift", "ai_shift"):
        shown[side] = [signed(v) for v in table[side]]
    did = table[["did_removed_nats", "did_removed_nats_low", "did_removed_nats_high"]]
    with_twins = bool(did.notna().to_numpy().any())
    if with_twins:
        shown["did"] = [f"{number(v)} {bracket(low, high)}" for v, low, high in did.itertuples(index=False)]
    names = {"method": "method"} | {f"at_{level}": f"at cost {level}" for level in levels}
    names |= {"best": "tuned share: specific", "human_shift": "human moved", "ai_shift": "AI moved"}
    return shown, names | ({"did": "beyond mundane content, nats removed"} if with_twins else {})


def compare_methods(
    model: Model,
    feature: FeatureLike,
    pairs: PromptPairs,
    probe: Probe | None = None,
    *,
    discover: Sequence[str] | None = None,
    tune: Sequence[str] | None = None,
    report: Sequence[str] | None = None,
    shares: Sequence[float] = SHARES,
    kl_levels: Sequence[float] = LEVELS,
    k: int = SUBSPACE_K,
    fit_steps: int = STEPS,
    instruction: str = INSTRUCTION,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Suppress the feature and its baselines by steps, and read each at equal cost.

    Args:
        discover: templates the directions are found on. Without any list, templates are split from `seed`.
        tune: templates the strength is chosen on; those of `discover` where it is not given beside the others.
        report: templates the figures are of.
        kl_levels: the costs to compare at.
        k: dimensions of the subspace.
        fit_steps: of each fitted edit; 0 leaves them out, and so does another score than mean_logit.
        instruction: put before every prompt as a method of its own; empty leaves it out.

    Raises:
        RequestError: templates in two lists, only one list given, or an edit that does not fit the model.
    """
    loaded, probe = as_feature(feature), probe or default_probe(pairs)
    if (discover, tune, report) == (
        None,
        None,
        None,
    ) and loaded.ref.split:  # the split that its ranking found it under
        discover, tune, report = (loaded.ref.split.get(name) for name in ("discover", "tune", "report"))
    splits = _splits(pairs, discover, tune, report, seed)
    found_on = pairs.select(templates=splits["discover"])
    ridge = ridge_probe(model, found_on, folds=min(5, len(found_on.templates)), seed=seed)
    methods = _methods(model, loaded, found_on, ridge, k, seed)
    if fit_steps and probe.score == "mean_logit":
        methods |= _fitted(model, loaded, found_on, probe, fit_steps, seed, progress)
    cells = _cells(methods, shares)
    held = {name: list(splits[name]) for name in ("tune", "report")}
    sweep = Sweep(cells, costs=True, splits=held, seed=seed)
    result = run_sweep(model, pairs, sweep, probe=probe, out=out, progress=progress)
    rows, measured = result.frame, dict(result.cells)
    if instruction:
        measured[PROMPT] = prompted_cell(model, pairs, probe, instruction)
        base = next(name for name, f in measured.items() if f.attrs.get("kind") == "base")
        listed = [dict(_PROMPT_FACTS, cell=name) for name in (base, PROMPT)]
        listed[1]["rule"] = f'the instruction "{instruction}" before every prompt'
        added = cell_rows(listed, measured, held, costs=True)
        rows = pd.concat([rows, added[added["cell"] == PROMPT]], ignore_index=True)
    frame = _curves(rows)
    return Comparison(frame, equal_cost(frame, measured, splits, kl_levels), ridge, result.path)


def _cells(methods: Mapping[str, Any], shares: Sequence[float]) -> list[Cell]:
    """Every method × share × positions."""
    return [
        Cell(
            (replace(edit, positions=where),),
            "candidate" if name == "feature" else "direction",
            f"{name}, {words} | {share:g}",
        )
        for where, words in POSITIONS.items()
        for name, edits in methods.items()
        for share, edit in edits(shares, where)
    ]


PROMPT = "prompt"
_PROMPT_FACTS: dict[str, Any] = {
    "intervention": PROMPT, "rule": "none", "feature": "", "strength": None, "positions": PROMPT, "kind": "direction",
    "label": "instruction, before the prompt | 1",
}  # fmt: skip


# --- the methods ---
Steps = Callable[[Sequence[float], str], list[tuple[float, Intervention]]]
"""A method as a function of the shares taken out and the positions it acts at: each share with its edit."""


def _taken_out(target: Feature | Direction, sign: float = 1.0) -> Steps:
    if isinstance(target, Direction):
        return lambda shares, _: [(s, ProjectOut(target, share=s)) for s in shares]
    return lambda shares, _: [(sign * s, Scale(target, 1.0 - sign * s)) for s in shares]


def _fitted(
    model: Model, feature: Feature, pairs: PromptPairs, probe: Probe, steps: int, seed: int, progress: bool
) -> dict[str, Steps]:
    """Edits fitted on `pairs` to be specific, each taken by shares of the way from no edit; one that cannot be fitted is left out, with a warning."""
    options: dict[str, Any] = {"probe": probe, "steps": steps, "seed": seed, "progress": progress}
    found: dict[str, Steps] = {}
    for kind in ("scales", "gated"):
        try:
            edit = fit_feature_set(
                model, feature.ref.sae, pairs, kind=kind, discover=pairs.templates, **options
            )
        except RequestError as error:
            warnings.warn(f"the comparison has no {kind} edit: {error}", stacklevel=3)
            continue
        name = f"learned set of {len(edit.features)}" if kind == "scales" else "gated counterfactual"
        found[name] = lambda shares, _, edit=edit: [(s, replace(edit, share=s)) for s in shares]
    learned: dict[str, Direction] = {}
    for name, rule in (("learned direction (DAS, rank 1)", ProjectOut), ("ReFT-r1", RectifiedProjectOut)):
        learned = {
            at: fit_direction(model, feature.site, pairs, positions=at, rectified=rule is not ProjectOut, start=learned.get(at), **options)
            for at in POSITIONS
        }  # fmt: skip
        found[name] = lambda shares, where, rule=rule, learned=learned: [(s, rule(learned[where], share=s)) for s in shares]  # fmt: skip
    return found


def _methods(
    model: Model, feature: Feature, pairs: PromptPairs, ridge: RidgeProbe, k: int, seed: int
) -> dict[str, Steps]:
    site = feature.site
    steered = ridge.direction(site.resid_layer)
    methods: dict[str, Steps] = {
        "feature": _taken_out(feature),
        "feature, opposite sign": _taken_out(feature, -1.0),
        "difference of means": _taken_out(difference_of_means(model, pairs, site)),
        "difference of means without massive dimensions": _taken_out(
            difference_of_means(model, pairs, site, without_massive=True)
        ),
        "probe direction": _taken_out(steered),
        "probe direction, norm-relative steering": lambda _shares, _: [
            (a, Steer(steered, a, norm_relative=True)) for a in NORM_SHARES
        ],
    }
    rank = min(k, len(pairs.templates))
    methods[f"subspace of {rank}"] = _taken_out(difference_subspace(model, pairs, site, rank))
    methods[f"random subspace of {rank}"] = _taken_out(random_subspace(model.d_model, site, rank, seed))
    for layer in _other_layers(model, site):
        methods[f"difference of means, layer {layer}"] = _taken_out(difference_of_means(model, pairs, layer))
    for i in range(N_RANDOM):
        methods[f"random direction {i}"] = _taken_out(random_direction(model.d_model, site, seed + i))
    for i, (edit, label) in enumerate(
        control_edits(model, Scale(feature, 0.0), pairs, N_RANDOM, seed)[:N_RANDOM]
    ):
        methods[f"{label} {i}"] = _taken_out(as_feature(edit.feature))
    return methods


def _other_layers(model: Model, site: Site) -> list[int]:
    """One layer well before the site and one well after, where the model has them."""
    step = max(1, model.n_layers // 4)
    return [
        layer for layer in (site.resid_layer - step, site.resid_layer + step) if 0 <= layer < model.n_layers
    ]


def _kind(method: str) -> str:
    if method.startswith(("random", "matched")):
        return "control"
    if method.endswith("opposite sign"):
        return "opposite"
    return "candidate" if method == "feature" else "direction"


def _splits(
    pairs: PromptPairs,
    discover: Sequence[str] | None,
    tune: Sequence[str] | None,
    report: Sequence[str] | None,
    seed: int,
) -> dict[str, tuple[str, ...]]:
    if (discover is None) != (report is None) or (discover is None and tune is not None):
        raise RequestError("give both discover and report templates (and tune ones), or neither.")
    if discover is None or report is None:
        if len(pairs.templates) < FEWEST:
            raise RequestError(
                f"{len(pairs.templates)} templates cannot be split into discover, tune and report; at least {FEWEST} are needed."
            )
        return pairs.split(seed)
    given = {"discover": tuple(discover), "report": tuple(report)} | ({"tune": tuple(tune)} if tune else {})
    for first, second in itertools.combinations(given, 2):
        both = sorted(set(given[first]) & set(given[second]))
        if both:
            raise RequestError(f"template {both[0]!r} stands in both {first} and {second}.")
    return {"tune": given["discover"], **given}


# --- equal cost ---
def _curves(rows: pd.DataFrame) -> pd.DataFrame:
    """A sweep's rows with their method and share."""
    frame = rows[rows["kind"] != "base"].copy()
    label = frame["label"].str.rsplit(" | ", n=1, expand=True)
    frame.insert(0, "method", label[0])
    frame.insert(1, "share", label[1].astype(float))
    frame["kind"] = frame["method"].str.rsplit(", ", n=1).str[0].map(_kind)
    return frame.reset_index(drop=True)


def equal_cost(
    frame: pd.DataFrame,
    cells: Mapping[str, pd.DataFrame],
    splits: Mapping[str, Sequence[str]],
    levels: Sequence[float] = LEVELS,
) -> pd.DataFrame:
    """One row a method: its tuned strength on report, and the share of the primary figure removed at each cost."""
    base = next(f for f in cells.values() if f.attrs.get("kind") == "base")
    keep = {name: base["template"].isin(list(splits[name])).to_numpy() for name in ("tune", "report")}
    known = np.isfinite(twin_difference(base))
    of, figure = "bias", lambda f: f["bias"].to_numpy(float)
    if all((known & rows).any() for rows in keep.values()):  # pairs without a twin are left out
        of, figure, keep = DID, twin_difference, {name: rows & known for name, rows in keep.items()}
    rows = []
    for method, part in frame.groupby("method", sort=False):
        best = choose_strength(part.assign(kind="candidate"), "tune", "report")
        report = part[part["split"] == "report"]
        held: Any = report[report["cell"] == best.cell].iloc[0] if best.cell else {}
        row = {
            "method": method,
            "kind": part["kind"].iloc[0],
            "positions": part["positions"].iloc[0],
            "of": of,
            "undefined": best.reason,
        }
        row |= {name: held.get(name, float("nan")) for name in TUNED}
        on_report = report.reindex(report["share"].abs().sort_values(kind="stable").index)
        curve = Curve.of(on_report, cells, base, figure)
        curve = replace(curve, between=row["positions"] != PROMPT)
        for level in levels:
            row |= curve.at(level, keep["tune"], keep["report"])
        rows.append(row)
    return pd.DataFrame(rows)


DID = "difference in differences"
TUNED = (
    "share", "removed_nats", "removed_nats_low", "removed_nats_high", "did_removed_nats", "did_removed_nats_low", "did_removed_nats_high", "did_reduction", "reduction", "red_low", "red_high", "specific_reduction", "spec_low",
    "spec_high", "beta", "human_shift", "ai_shift", "kl_off", "cost",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Curve:
    """A method walked from no change outwards: the cost and every pair's primary figure at each strength."""

    cost: Float[np.ndarray, "n_steps"]
    bias: Float[np.ndarray, "n_steps n_pairs"]
    """The first step is the unsteered model, at cost 0."""
    clusters: tuple[list[str], list[str]]
    between: bool = True
    """Whether there is anything between two steps; an instruction is there or not."""

    @classmethod
    def of(
        cls, rows: pd.DataFrame, cells: Mapping[str, pd.DataFrame], base: pd.DataFrame, figure: Callable[[pd.DataFrame], np.ndarray]
    ) -> Curve:  # fmt: skip
        """`figure`: every pair's primary figure from a cell."""
        bias = [figure(f) for f in (base, *(cells[c] for c in rows["cell"]))]
        clusters = base["template"].tolist(), base["entity"].tolist()
        return cls(np.concatenate([[0.0], rows["cost"].to_numpy(float)]), np.stack(bias), clusters)

    def reach(self, level: float) -> tuple[float, bool]:
        """How far the curve can be walked (in steps) before its cost first passes `level`, and whether it does."""
        for i in range(1, len(self.cost)):
            if self.cost[i] > level:
                step = self.cost[i] - self.cost[i - 1]
                return i - 1 + (level - self.cost[i - 1]) / step, True
        return float(len(self.cost) - 1), False

    def biases(self, place: float) -> Float[np.ndarray, "n_pairs"]:
        """Every pair's bias at a place between two steps."""
        low = min(int(place), len(self.bias) - 2)
        return self.bias[low] + (place - low) * (self.bias[low + 1] - self.bias[low])

    def best_place(self, level: float, rows: np.ndarray) -> float:
        """The place within the cost where the mean bias of `rows` is nearest to 0: at a step, the end, or a zero between two."""
        end = self.reach(level)[0]
        means = self.bias[:, rows].mean(1)
        places = [*range(int(end) + 1), *([end] if self.between else [])]
        for i in range(len(means) - 1):
            if self.between and means[i] * means[i + 1] < 0:
                zero = i + means[i] / (means[i] - means[i + 1])
                places += [zero] if zero <= end else []
        return min(places, key=lambda place: abs(self.biases(place)[rows].mean()))

    def at(self, level: float, tune: np.ndarray, report: np.ndarray) -> dict[str, Any]:
        """Share of the bias removed on report at the place chosen on tune, with its interval folded at 0."""
        place = self.best_place(level, tune)
        labels = tuple(np.array(c)[report].tolist() for c in self.clusters)
        cut = fieller_reduction(self.bias[0][report], self.biases(place)[report], *labels)
        left = sorted(abs(1 - x) for x in cut.ci)
        low = 0.0 if cut.ci_low <= 1 <= cut.ci_high else left[0]
        return {
            f"at_{level:g}": 1 - abs(1 - cut.estimate),
            f"low_{level:g}": 1 - left[1],
            f"high_{level:g}": 1 - low,
            f"reached_{level:g}": self.reach(level)[1],
        }


FEWEST = 6


def frontier_of(frame: pd.DataFrame) -> go.Figure:
    """Bias removed against cost, a line a method."""
    from sae_bias.figures.sweep import methods_at_cost

    return methods_at_cost(frame[frame["split"] == "report"])
