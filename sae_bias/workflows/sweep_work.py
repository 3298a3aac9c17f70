"""Running groups of a sweep's cells, wherever that is: here (the default), or in actors on other machines (`cluster`).

    executor(work, groups) -> one (group, its cells' results) after another, in whatever order they are done

What is run together is decided by the plan, so an executor changes where a cell is run and how soon, never with which others.
Results come back to the one process that writes the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.costs import CostEngine
from sae_bias.models.model import Model
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.hooks import edit_site
from sae_bias.steering.receipt import Receipt
from sae_bias.workflows.cells import Cell

PAIR_COLUMNS = ["template", "entity", "score_human", "score_ai", "bias"]
Group = list[int]
"""Numbers of the cells that are run together."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """One cell's pairs, and its facts: receipt, costs, bank scores."""

    pairs: pd.DataFrame
    facts: dict[str, Any]


Results = Iterator[tuple[Group, list[CellResult]]]


@dataclass(frozen=True, eq=False)
class Work:
    """All that groups of cells need: the model, the prompts, the probe, and the cells with their features' weights."""

    model: Model
    pairs: PromptPairs
    probe: Probe
    cells: tuple[Cell, ...]
    costed: tuple[bool, ...]
    """Of each cell, whether costs and the collapse test are measured for it."""

    @cached_property
    def engines(self) -> tuple[ProbeEngine, CostEngine | None, CollapseEngine | None]:
        """The probe, the costs and the valence banks, each run once without edits."""
        sites = sorted({min(edit_site(e) for e in c.edits) for c in self.cells if c.edits})
        costs = CostEngine(self.model, sites=sites) if any(self.costed) else None
        banked = any(self.costed) or any(c.kind == "control" for c in self.cells)
        collapse = CollapseEngine(self.model, self.probe, sites=sites) if banked else None
        return ProbeEngine(self.model, self.pairs, self.probe, sites=sites), costs, collapse

    def run(self, group: Sequence[int]) -> list[CellResult]:
        """Pairs and facts of some cells, run together."""
        cells = [self.cells[i] for i in group]
        edits = [c.edits for c in cells]
        probe, costs, collapse = self.engines
        out = []
        for cell, (after, receipt) in zip(cells, probe.run_many(edits)):
            out.append(CellResult(_pairs(after), {**cell.facts(), **_receipt_facts(receipt)}))
        if costs is not None and self.costed[group[0]]:
            for result, table in zip(out, costs.run_many(edits)):
                result.facts.update(_cost_facts(table))
        if collapse is not None and not any(c.needs_pairs for c in cells):
            for result, scores in zip(out, collapse.scores(edits)):
                result.facts["bank"] = scores.tolist()
        return out


Executor = Callable[[Work, Sequence[Group]], Results]


def run_here(work: Work, groups: Sequence[Group]) -> Results:
    """One group after another in this process."""
    for group in groups:
        yield group, work.run(group)


def _pairs(result: ProbeResult) -> pd.DataFrame:
    templates, entities = result.clusters
    columns = (templates, entities, result.score_human, result.score_ai, result.pair_bias)
    return pd.DataFrame(dict(zip(PAIR_COLUMNS, columns)))


def _cost_facts(table: pd.DataFrame) -> dict[str, float]:
    names = {"kl": "kl_mean", "kl_p95": "kl_p95", "kl_last": "kl_last", "nll": "nll_change", "fired": "changed_share"}  # fmt: skip
    return {f"{short}_{row['kind']}": row[name] for row in table.to_dict("records") for short, name in names.items()}  # fmt: skip


def _receipt_facts(receipt: Receipt) -> dict[str, Any]:
    """The receipt's scalars, in one cell's facts."""
    top = [e.max_act for e in receipt.edits if e.max_act == e.max_act]
    return {
        "hook_calls": receipt.hook_calls,
        "positions_changed": receipt.positions_changed,
        "written_inactive": sum(e.written_inactive for e in receipt.edits),
        "max_act": max(top) if top else None,
        "receipt": receipt.rows(),
    }
