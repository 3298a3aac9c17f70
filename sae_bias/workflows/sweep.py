"""Sweeps: many interventions on one set of pairs, each cell kept on disk as soon as it is done.

A cell is identified by a hash of everything that determines its numbers (`sweep_plan`). A resumed sweep recomputes nothing; a
changed input gives other cells and is never mixed with old results. `sweep.json` in the run folder lists the cells of the latest
sweep in order, so that its table can be made again from the folder alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.labels import columns_of
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPair, PromptPairs
from sae_bias.runs.copies import directions_of, edit_facts, probe_facts
from sae_bias.runs.folder import RunFolder, merge_shards, reading
from sae_bias.runs.manifest import manifest, write_manifest
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Sae
from sae_bias.steering.intervention import FeatureEdit
from sae_bias.workflows.best_strength import BestStrength, choose_strength
from sae_bias.workflows.cells import Plan, Sweep, edits_of
from sae_bias.workflows.sweep_rows import cell_rows
from sae_bias.workflows.sweep_work import PAIR_COLUMNS, Executor, LocalWorkers, Work

if TYPE_CHECKING:
    import plotly.graph_objects as go


FORMAT = 3  # of a cell's file; part of every cell's name


@dataclass(frozen=True, eq=False)
class SweepResult:
    """One row a cell and split; every figure can be recomputed from the run folder's cells."""

    frame: pd.DataFrame
    cells: dict[str, pd.DataFrame] = field(repr=False)
    """Pairs of each cell: template, entity, score_human, score_ai, bias; facts in attrs."""
    path: Path | None = None

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def best_strength(self, tune: str = "tune", report: str = "report") -> BestStrength:
        """The candidate of largest specific reduction on `tune` under KL_off, with its figures there and on `report`.

        Where none can be named (no costs, a bias that may be 0, no strength that keeps β), `cell` is empty and `reason` says why.

        Raises:
            RequestError: the sweep held no templates out; give Sweep(splits=…), or the one split's name for both.
        """
        return choose_strength(self.frame, tune, report)

    def plot(self) -> go.Figure:
        """Bias against strength, with its interval."""
        from sae_bias.figures.sweep import sweep_curve

        return sweep_curve(self.frame)

    def frontier(self) -> go.Figure:
        """Bias removed against cost: the worst KL, or 1 − β where that is more (needs costs=True)."""
        from sae_bias.figures.sweep import frontier

        if "kl_neutral" not in self.frame:
            raise RequestError("the sweep measured no costs; run it with Sweep(..., costs=True).")
        return frontier(self.frame)

    def __repr__(self) -> str:
        columns = columns_of(
            "intervention; strength; positions; split; bias; ci_low; ci_high; change; mean_abs_change"
        )
        shown = self.frame[self.frame["kind"] != "control"]
        where = f" in {self.path}" if self.path else ""
        return f"SweepResult: {self.frame['cell'].nunique()} cells{where}\n{shown[list(columns)].round(4).to_string(index=False)}"

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
    executor: Executor | None = None,
    progress: bool = False,
) -> SweepResult:
    """Run the base and every cell of `sweep`; cells already in `out` are read, not run again.

    Args:
        out: run folder; None keeps everything in memory.
        shard: (i, n) runs every n-th group of cells into a folder of its own, joined by `merge_run`.
        executor: where groups of cells are run: in this process by default, in `LocalWorkers(n).run`, or on a `cluster.Cluster`.

    Raises:
        RequestError: another process is writing `out`, or an edit that does not fit the model.
        MissingError: the disk is full; finished cells are kept and the same call resumes.
    """
    pairs = pairs if isinstance(pairs, PromptPairs) else PromptPairs(tuple(pairs))
    probe = probe or default_probe(pairs)
    runner = _Runner(model, pairs, probe, _under_split(sweep))
    executor = executor or LocalWorkers().run
    if out is None:
        return runner.run(None, None, progress, executor)
    folder = RunFolder(out, shard=shard)
    with folder.writing():
        facts = manifest(
            model, pairs=pairs, vocabulary=runner.vocabulary, saes=runner.saes(), seed=sweep.seed
        )
        write_manifest(folder, facts, replace=True)
        _write_plan(folder, runner.facts(shard))
        result = runner.run(folder, shard, progress, executor)
        folder.write_table("sweep", result.frame)
    return result


def _under_split(sweep: Sweep) -> Sweep:
    """The sweep under the split that its feature was found with, where it has none of its own; a conflict is said."""
    parts = [part for given in sweep.interventions for e in edits_of(given) for part in e.parts]
    found = [part.ref.split for part in parts if isinstance(part, FeatureEdit) and part.ref.split]
    if not found:
        return sweep
    if sweep.splits is None:
        return replace(sweep, splits={n: found[0][n] for n in ("tune", "report") if n in found[0]})
    read = set(found[0].get("discover", ())) & set(sweep.splits.get("report", ()))
    if read:
        warnings.warn(
            f"{len(read)} report templates of this sweep, such as {sorted(read)[0]!r}, discovered its feature: their figure is in-sample. "
            "Give the ranking's split, or none.",
            stacklevel=3,
        )
    return sweep


def _write_plan(folder: RunFolder, plan: dict[str, Any]) -> None:
    """sweep.json; says so where another sweep's table and report give way to this one's."""
    if folder.has_json("sweep"):
        old = folder.read_json("sweep")
        if old.get("key") != plan["key"]:
            n = len(old.get("cells") or [])
            place = "this one takes its place in table and report, and those cells are kept"
            warnings.warn(f"{folder.path} holds another sweep of {n} cells; {place}. Choose another folder to keep both.", stacklevel=3)  # fmt: skip
    folder.write_json("sweep", plan)


class _Runner:
    def __init__(self, model: Model, pairs: PromptPairs, probe: Probe, sweep: Sweep):
        self.model, self.pairs, self.probe, self.sweep = model, pairs, probe, sweep
        self.vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
        kept = self.vocabulary.kept
        words = [w.word for w in kept], [w.positive for w in kept]
        where = model_digest(model), str(model.dtype), model.device.type
        shared = (FORMAT, *where, pairs.digest, *words, probe.score, probe.softcap, probe.tokens)
        self.plan = Plan(sweep, model, pairs, shared)
        self.splits = {k: list(v) for k, v in (sweep.splits or {"all": pairs.templates}).items()}
        self.costed = tuple(self.plan.costed(cell) for cell in self.plan.cells)

    def facts(self, shard: tuple[int, int] | None) -> dict[str, Any]:
        """sweep.json: every cell of the sweep in order, and how its table is cut."""
        gates = self.plan.gates
        listed = [
            {"cell": n, **c.facts(), "edits": [edit_facts(e, gates) for e in c.edits]}
            for n, c in zip(self.plan.names, self.plan.cells)
        ]
        mine = sorted(i for group in self.plan.groups(shard) for i in group)
        return {
            "format": FORMAT,
            "key": self.plan.key,
            "costs": self.sweep.costs,
            "splits": self.splits,
            "probe": probe_facts(self.probe, self.vocabulary),
            "cells": listed,
            "directions": directions_of([e for c in self.plan.cells for e in c.edits]),
            "shard": None if shard is None else {"i": shard[0], "n": shard[1], "cells": [self.plan.names[i] for i in mine]},
        }  # fmt: skip

    def saes(self) -> list[Sae]:
        """The SAEs that the edits name, where they can be found by that name."""
        found: dict[str, Sae] = {}
        for name in dict.fromkeys(t.partition("#")[0] for c in self.plan.cells for t in c.targets):
            with suppress(SaeBiasError):
                found[name] = load_sae(name)
        return list(found.values())

    def run(
        self, folder: RunFolder | None, shard: tuple[int, int] | None, progress: bool, executor: Executor
    ) -> SweepResult:
        names, groups = self.plan.names, self.plan.groups(shard)
        done: dict[str, pd.DataFrame] = {}
        mine = sorted(i for group in groups for i in group)
        there = {names[i] for i in mine if folder is not None and folder.has_cell(names[i])}
        at_start = sum(names[i] in there for i in mine)
        options: dict[str, Any] = {"total": len(mine), "initial": at_start, "disable": not progress}
        with tqdm(desc="sweep", unit="cell", leave=False, **options) as bar:
            # a whole group runs again if one of its cells is missing: batched identically, the result is identical
            todo = [group for group in groups if any(names[i] not in there for i in group)]
            work = Work(self.model, self.pairs, self.probe, tuple(self.plan.cells), self.costed)
            for group, results in executor(work, todo) if todo else ():
                missing = [i for i in group if names[i] not in there]
                for i, result in zip(group, results):
                    result.pairs.attrs = dict(result.facts)  # pyright: ignore[reportAttributeAccessIssue]
                    if i in missing and folder is not None:
                        folder.write_cell(names[i], result.pairs, result.facts)
                    if i in missing:
                        done[names[i]] = result.pairs
                bar.update(len(missing))
        for name in there:
            assert folder is not None
            done[name] = folder.read_cell(name)
        listed = [{"cell": names[i], **self.plan.cells[i].facts()} for i in mine]
        frame = cell_rows(listed, done, self.splits, costs=self.sweep.costs)
        return SweepResult(frame, done, None if folder is None else folder.path)


# --- from a folder to the table ---
def collect(path: str | Path) -> SweepResult:
    """The table of the latest sweep in a run folder, made from its cells alone.

    Raises:
        RequestError: no sweep there, or cells of it missing (run the same command again to finish them).
    """
    folder = RunFolder(path)
    facts = read_sweep(folder)
    listed = facts["cells"]
    missing = [c["cell"] for c in listed if not folder.has_cell(c["cell"])]
    if missing:
        raise RequestError(
            f"{folder.path} lacks {len(missing)} of the sweep's {len(listed)} cells; run the same command again to finish it."
        )
    with reading(f"the sweep in {folder.path}"):
        cells = {c["cell"]: _checked_cell(folder.read_cell(c["cell"])) for c in listed}
        if len({len(c) for c in cells.values()}) > 1:
            raise RequestError(f"the cells in {folder.path} are of different numbers of pairs.")
        frame = cell_rows(listed, cells, facts["splits"], costs=facts["costs"])
    return SweepResult(frame, cells, folder.path)


_CELL_TEXTS = ("cell", "intervention", "rule", "feature", "positions", "kind", "label")


def read_sweep(folder: RunFolder) -> dict[str, Any]:
    """sweep.json, with the cells and splits that it must list.

    Raises:
        RequestError: it is not there, or not what `run_sweep` writes.
    """
    facts = folder.read_json("sweep")
    listed, splits, where = facts.get("cells"), facts.get("splits"), f"{folder.path}/sweep.json"
    if not isinstance(listed, list) or not listed or not all(isinstance(c, dict) for c in listed):
        raise RequestError(f"{where} lists no cells.")
    for cell in listed:
        named = all(isinstance(cell.get(k), str) for k in _CELL_TEXTS)
        if not named or not isinstance(cell.get("strength"), int | float | None):
            raise RequestError(f"{where} lists a cell without its name, rule or strength.")
    if not isinstance(splits, dict) or not splits or not all(isinstance(t, list) for t in splits.values()):
        raise RequestError(f"{where} names no splits.")
    return {**facts, "costs": bool(facts.get("costs"))}


def _checked_cell(frame: pd.DataFrame) -> pd.DataFrame:
    """A cell's file with its columns, numbers where they belong."""
    scores = frame[PAIR_COLUMNS[2:]].astype(float)
    if not len(frame) or not np.isfinite(scores.to_numpy()).all():
        raise ValueError("a cell without pairs, or with a score that is not a number")
    return frame[PAIR_COLUMNS[:2]].astype(str).join(scores) if list(frame.columns) != PAIR_COLUMNS else frame


def merge_run(path: str | Path) -> tuple[int, SweepResult | None]:
    """Join the shards of a sweep; where that completes it, its table is written too.

    Returns:
        How many cells were new, and the whole sweep's result (None while cells are missing).
    """
    moved = merge_shards(path)
    folder = RunFolder(path)
    if not (folder.path / "sweep.json").is_file():
        return moved, None
    listed = read_sweep(folder)["cells"]
    if not all(folder.has_cell(c["cell"]) for c in listed):
        return moved, None
    result = collect(path)
    with folder.writing():
        folder.write_table("sweep", result.frame)
    return moved, result
