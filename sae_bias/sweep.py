"""Sweeps: many interventions on one set of pairs, each cell kept on disk as soon as it is done.

A cell is identified by a hash of everything that determines its numbers: the model's weights, the pairs, the probe, the
intervention with the weights it uses, and how it was run. A resumed sweep recomputes nothing; a changed input gives other cells
and is never mixed with old results.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_bias.controls import control_edits
from sae_bias.engine import ProbeEngine
from sae_bias.errors import RequestError
from sae_bias.hooks import Receipt
from sae_bias.interventions import KINDS, Direction, FeatureEdit, FeatureLike, Intervention
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.costs import CostEngine
from sae_bias.model import Model
from sae_bias.probe import Probe, default_probe
from sae_bias.prompts import PromptPair, PromptPairs
from sae_bias.provenance import manifest, model_digest
from sae_bias.sae import Feature, as_feature
from sae_bias.stats import clustered_mean, fieller_reduction
from sae_bias.store import RunFolder, digest

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Cell:
    """One intervention of a sweep (several edits are one cell), or none for the base."""

    edits: tuple[Intervention, ...]
    kind: str = "candidate"
    """base | candidate | control | direction | opposite"""
    label: str = ""

    @property
    def intervention(self) -> str:
        """Short name of the rule, such as "clamp"; a clamp everywhere is "clamp_always"."""
        return " + ".join(_short_name(e) for e in self.edits) or "none"

    @property
    def rule(self) -> str:
        """The rule in words."""
        return " + ".join(e.describe() for e in self.edits) or "none"

    @property
    def feature(self) -> str:
        return " + ".join(dict.fromkeys(e.target for e in self.edits))

    @property
    def strength(self) -> float:
        return self.edits[0].strength if len(self.edits) == 1 else float("nan")

    @property
    def positions(self) -> str:
        names = (e.positions + (" with BOS" if e.include_special else "") for e in self.edits)
        return " + ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Sweep:
    """What to run: the base and each of `interventions`, and what to measure beside the bias."""

    interventions: tuple[Intervention | tuple[Intervention, ...] | Cell, ...]
    """One cell each; a tuple of interventions is one cell that applies all of them."""
    controls: int = 0
    """At least so many matched controls for each ablated or clamped feature (0: none)."""
    costs: bool = False
    """Whether KL on three kinds of text and the collapse test are measured for each candidate."""
    splits: Mapping[str, Sequence[str]] | None = None
    """Templates of each split, such as {"tune": …, "report": …}; None reports all pairs as split "all"."""
    seed: int = 0

    def __init__(
        self,
        interventions: Sequence[Intervention | Sequence[Intervention] | Cell],
        *,
        controls: int = 0,
        costs: bool = False,
        splits: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
    ):
        if isinstance(interventions, (Intervention, Cell)):
            interventions = [interventions]
        cells = tuple(tuple(i) if isinstance(i, (list, tuple)) else i for i in interventions)
        for name, value in (
            ("interventions", cells),
            ("controls", controls),
            ("costs", costs),
            ("splits", splits),
            ("seed", seed),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def grid(
        cls,
        edits: Sequence[str],
        features: Sequence[FeatureLike],
        strengths: Sequence[float] = (),
        positions: Sequence[str] = ("all",),
        **options: Any,
    ) -> Sweep:
        """Every edit kind × feature × strength × positions; kinds without a strength (ablate) appear once."""
        cells: list[Intervention] = []
        for kind, feature, where in itertools.product(edits, features, positions):
            if kind not in KINDS or not (
                issubclass(KINDS[kind], FeatureEdit) or kind in ("steer", "project_out")
            ):
                raise RequestError(
                    f"edit kind {kind!r}; expected one of ablate, scale, clamp, cap, mean, steer, project_out."
                )
            if kind in ("ablate", "project_out"):
                cells.append(KINDS[kind](feature, positions=where))  # type: ignore[call-arg]
                continue
            if not strengths:
                raise RequestError(f"{kind} needs strengths.")
            cells += [KINDS[kind](feature, float(s), positions=where) for s in strengths]  # type: ignore[call-arg]
        return cls(cells, **options)

    def cells(self, model: Model, pairs: PromptPairs) -> list[Cell]:
        """The base, then every cell, controls last."""
        cells = [Cell((), "base", "base")]
        for given in self.interventions:
            cells.append(
                given if isinstance(given, Cell) else Cell(given if isinstance(given, tuple) else (given,))
            )
        if self.controls:
            singles = [c.edits[0] for c in cells if c.kind == "candidate" and len(c.edits) == 1]
            for edit in [e for e in singles if isinstance(e, FeatureEdit)][:1]:
                cells += [
                    Cell((c,), "control", label)
                    for c, label in control_edits(model, edit, pairs, self.controls, self.seed)
                ]
        return cells


@dataclass(frozen=True, eq=False)
class SweepResult:
    """One row a cell and split; every figure can be recomputed from the run folder's cells."""

    frame: pd.DataFrame
    cells: dict[str, pd.DataFrame] = field(repr=False)
    """Pairs of each cell: template, entity, score_human, score_ai, bias; facts in attrs."""
    path: Path | None = None

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def best(self, split: str) -> pd.Series:
        """The candidate row of lowest |bias| on a split: in-sample there, honest only on another."""
        rows = self.frame[(self.frame["split"] == split) & (self.frame["kind"] == "candidate")]
        if rows.empty:
            raise RequestError(f"the sweep has no candidate cell on split {split!r}.")
        return rows.loc[rows["bias"].abs().idxmin()]

    def plot(self) -> go.Figure:
        """Bias against strength, with its interval."""
        from sae_bias.plots import sweep_curve

        return sweep_curve(self.frame)

    def __repr__(self) -> str:
        columns = [
            "intervention",
            "strength",
            "positions",
            "split",
            "bias",
            "ci_low",
            "ci_high",
            "change",
            "mean_abs_change",
        ]
        shown = self.frame[self.frame["kind"] != "control"]
        where = f" in {self.path}" if self.path else ""
        return f"SweepResult: {self.frame['cell'].nunique()} cells{where}\n{shown[columns].round(4).to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self.frame[self.frame["kind"] != "control"].round(4).to_html(escape=True, index=False)


def run_sweep(
    model: Model,
    pairs: PromptPairs | Sequence[PromptPair],
    sweep: Sweep,
    *,
    probe: Probe | None = None,
    out: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    progress: bool = False,
) -> SweepResult:
    """Run the base and every cell of `sweep`; cells already in `out` are read, not run again.

    Args:
        out: run folder; None keeps everything in memory.
        shard: (i, n) runs every n-th cell into a folder of its own, joined by `merge_shards`.

    Raises:
        RequestError: another process is writing `out`, or an edit that does not fit the model.
        MissingError: the disk is full; finished cells are kept and the same call resumes.
    """
    pairs = pairs if isinstance(pairs, PromptPairs) else PromptPairs(tuple(pairs))
    probe = probe or default_probe(pairs)
    runner = _Runner(model, pairs, probe, sweep)
    if out is None:
        return runner.run(None, None, progress)
    folder = RunFolder(out, shard=shard)
    with folder.writing():
        if not (folder.path / "manifest.json").is_file():
            folder.write_json(
                "manifest", manifest(model, pairs=pairs, vocabulary=runner.vocabulary, seed=sweep.seed)
            )
        result = runner.run(folder, shard, progress)
        folder.write_table("sweep", result.frame)
    return result


class _Runner:
    def __init__(self, model: Model, pairs: PromptPairs, probe: Probe, sweep: Sweep):
        self.model, self.pairs, self.probe, self.sweep = model, pairs, probe, sweep
        self.cells = sweep.cells(model, pairs)
        self.vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
        self.shared = (
            model_digest(model),
            str(model.dtype),
            model.device.type,
            pairs.digest,
            [w.word for w in self.vocabulary.kept],
            [w.positive for w in self.vocabulary.kept],
            probe.score,
            probe.softcap,
            probe.tokens,
        )
        self._engines: tuple[ProbeEngine, CostEngine | None, CollapseEngine | None] | None = None

    def name(self, cell: Cell) -> str:
        costs = self.sweep.costs and cell.kind != "control"
        return digest(self.shared, [edit_key(e) for e in cell.edits], costs)

    def engines(self) -> tuple[ProbeEngine, CostEngine | None, CollapseEngine | None]:
        if self._engines is None:
            costs = CostEngine(self.model) if self.sweep.costs else None
            collapse = CollapseEngine(self.model, self.probe) if self.sweep.costs else None
            self._engines = ProbeEngine(self.model, self.pairs, self.probe), costs, collapse
        return self._engines

    def run(self, folder: RunFolder | None, shard: tuple[int, int] | None, progress: bool) -> SweepResult:
        done: dict[str, pd.DataFrame] = {}
        named = [(self.name(cell), cell) for cell in self.cells]
        if shard is not None:
            named = named[:1] + named[1:][shard[0] - 1 :: shard[1]]
        for name, cell in tqdm(named, desc="sweep", unit="cell", disable=not progress, leave=False):
            if folder is not None and folder.has_cell(name):
                done[name] = folder.read_cell(name)
                continue
            frame, facts = self._cell(cell)
            frame.attrs = facts
            if folder is not None:
                folder.write_cell(name, frame, facts)
            done[name] = frame
        rows = [row for name, cell in named for row in self._rows(name, cell, done[name], done[named[0][0]])]
        return SweepResult(pd.DataFrame(rows), done, None if folder is None else folder.path)

    def _cell(self, cell: Cell) -> tuple[pd.DataFrame, dict[str, Any]]:
        probe, costs, collapse = self.engines()
        after, receipt = probe.run(cell.edits)
        frame = after.to_frame()[["template", "entity", "score_human", "score_ai", "bias"]]
        facts: dict[str, Any] = {
            "intervention": cell.intervention,
            "feature": cell.feature,
            **_receipt_facts(receipt),
        }
        if costs is not None and collapse is not None and cell.edits and cell.kind != "control":
            for row in costs.run(cell.edits).itertuples():
                facts |= {
                    f"kl_{row.kind}": row.kl_mean,
                    f"kl_p95_{row.kind}": row.kl_p95,
                    f"kl_last_{row.kind}": row.kl_last,
                    f"nll_{row.kind}": row.nll_change,
                    f"fired_{row.kind}": row.changed_share,
                }
            test = collapse.run(cell.edits, probe.base, after)
            facts |= {
                "beta": test.specific.beta,
                "beta_other": test.specific.beta_other,
                "beta_ai": test.specific.beta_ai,
            }
            facts |= {f"bank_changed_{bank}": share for bank, share in test.changed_share.items()}
        return frame, facts

    def _rows(self, name: str, cell: Cell, frame: pd.DataFrame, base: pd.DataFrame) -> list[dict[str, Any]]:
        splits = self.sweep.splits or {"all": self.pairs.templates}
        rows = []
        for split, templates in splits.items():
            keep = base["template"].isin(list(templates)).to_numpy()
            if not keep.any():
                raise RequestError(f"split {split!r} holds none of the pairs' templates.")
            rows.append(self._row(name, cell, split, frame[keep], base[keep]))
        return rows

    def _row(
        self, name: str, cell: Cell, split: str, frame: pd.DataFrame, base: pd.DataFrame
    ) -> dict[str, Any]:
        clusters = frame["template"].tolist(), frame["entity"].tolist()
        after, before = frame["bias"].to_numpy(), base["bias"].to_numpy()
        stat = clustered_mean(after, *clusters)
        reduction = fieller_reduction(before, after, *clusters)
        facts = frame.attrs
        observed = facts.get("max_act")
        strong = cell.strength
        outside = (
            isinstance(observed, float)
            and np.isfinite(strong)
            and cell.edits[0].kind in ("clamp", "cap", "mean")
            and not 0 <= strong <= observed
        )
        row = {
            "cell": name,
            "intervention": cell.intervention,
            "rule": cell.rule,
            "feature": cell.feature,
            "strength": strong,
            "positions": cell.positions,
            "split": split,
            "n_pairs": len(frame),
            "bias": stat.mean,
            "ci_low": stat.ci_low,
            "ci_high": stat.ci_high,
            "change": float((after - before).mean()),
            "mean_abs_change": float(np.abs(after - before).mean()),
            "wrong_way_share": float((after > before).mean())
            if before.mean() > 0
            else float((after < before).mean()),
            "reduction": reduction.estimate,
            "red_low": reduction.ci_low,
            "red_high": reduction.ci_high,
            "overshoot": reduction.overshoot,
            "kind": cell.kind,
            "label": cell.label,
            "outside_observed": bool(outside),
        }
        beta = facts.get("beta")
        if self.sweep.costs:
            row["specific_reduction"] = float("nan") if beta is None else beta - 1 + reduction.estimate
            for key in FACT_COLUMNS:
                value = facts.get(key)
                row[key] = float("nan") if value is None else value
        row["positions_changed"] = facts.get("positions_changed", 0)
        return row


FACT_COLUMNS = [
    *(
        f"{name}_{kind}"
        for name in ("kl", "kl_p95", "kl_last", "nll", "fired")
        for kind in ("neutral", "ai_nonspeech", "ai_speech")
    ),
    "beta",
    "beta_other",
    "beta_ai",
    "bank_changed_other",
    "bank_changed_ai",
]


def _short_name(edit: Intervention) -> str:
    always = getattr(edit, "when", "") == "always"
    relative = bool(getattr(edit, "norm_relative", False))
    return edit.kind + ("_always" if always else "") + ("_relative" if relative else "")


def edit_key(edit: Intervention) -> dict[str, Any]:
    """Everything about an edit that decides its numbers, the weights it uses included."""
    key = edit.to_dict()
    along = getattr(edit, "feature", None) or getattr(edit, "along", None)
    if isinstance(along, Direction):
        key["weights"] = along.digest
    elif along is not None:
        key["weights"] = feature_digest(as_feature(along))
    return key


def feature_digest(feature: Feature) -> str:
    """Hash of a feature's weights."""
    sha = hashlib.sha256()
    for tensor in (feature.w_enc, feature.w_dec, feature.b_enc, feature.threshold):
        sha.update(tensor.detach().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _receipt_facts(receipt: Receipt) -> dict[str, Any]:
    """The receipt's scalars, in one cell's facts."""
    top = [e.max_act for e in receipt.edits if e.max_act == e.max_act]
    return {
        "hook_calls": receipt.hook_calls,
        "positions_changed": receipt.positions_changed,
        "written_inactive": sum(e.written_inactive for e in receipt.edits),
        "max_act": max(top) if top else None,
        "receipt": receipt.to_frame().to_dict(orient="records"),
    }
