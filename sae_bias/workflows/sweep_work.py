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
from sae_bias.measures.costs import CostEngine, pooled_kl_off
from sae_bias.models.model import Model
from sae_bias.models.workers import share_out
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.hooks import flat
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


@dataclass(frozen=True, eq=False)
class Engines:
    """What measures a cell; the last three only where costs are asked for (and pairs have twins)."""

    probe: ProbeEngine
    twins: ProbeEngine | None = None
    costs: CostEngine | None = None
    banks: CollapseEngine | None = None


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
    def engines(self) -> Engines:
        """The probe, the mundane twins, the costs and the valence banks, each run once without edits."""
        sites = sorted({min(e.site for e in flat(c.edits)) for c in self.cells if c.edits})
        probe = ProbeEngine(self.model, self.pairs, self.probe, sites=sites)
        if not any(self.costed):
            return Engines(probe)
        twins = self.pairs.controls()
        return Engines(
            probe,
            ProbeEngine(self.model, twins, self.probe, sites=sites) if len(twins) else None,
            CostEngine(self.model, probe=self.probe, sites=sites),
            CollapseEngine(self.model, self.probe, sites=sites),
        )

    def run(self, group: Sequence[int]) -> list[CellResult]:
        """Pairs and facts of some cells, run together.

        Costs and twins are measured for the costed cells; the valence banks for their controls too, whose specific
        reductions stand beside the candidate's.
        """
        cells = [self.cells[i] for i in group]
        edits, use = [c.edits for c in cells], self.engines
        out = []
        for cell, (after, receipt) in zip(cells, use.probe.run_many(edits)):
            out.append(CellResult(pair_frame(after), {**cell.facts(), **_receipt_facts(receipt)}))
        if use.costs is not None and self.costed[group[0]]:
            for result, table in zip(out, use.costs.run_many(edits)):
                result.facts.update(cost_facts(table))
            if use.twins is not None:
                for result, (after, _) in zip(out, use.twins.run_many(edits)):
                    result.facts["twins"] = twin_biases(self.pairs, after)
        if use.banks is not None:
            banked = [(r, c.edits) for r, c in zip(out, cells) if not c.needs_pairs]
            for (result, _), scores in zip(banked, use.banks.scores([e for _, e in banked])):
                result.facts["bank"] = scores.tolist()
        return out


Executor = Callable[[Work, Sequence[Group]], Results]


@dataclass(frozen=True)
class LocalWorkers:
    """The executor of this machine: groups of cells one after another, or in n processes of one thread each.

    Processes are forked from this one once it has run the prompts without edits, and share its weights (Linux, a model on the CPU).
    """

    n: int = 1

    def run(self, work: Work, groups: Sequence[Group]) -> Results:
        """Each group as it is done.

        Raises:
            RequestError: the model is not on the CPU, or the system cannot fork.
            MissingError: a process was lost, such as for want of memory; what is finished is kept.
        """
        assert work.engines is not None  # run here, once
        for i, results in share_out(work.model, work.run, groups, self.n):
            yield groups[i], results


def pair_frame(result: ProbeResult) -> pd.DataFrame:
    templates, entities = result.clusters
    columns = (templates, entities, result.score_human, result.score_ai, result.pair_bias)
    return pd.DataFrame(dict(zip(PAIR_COLUMNS, columns)))


def twin_biases(pairs: PromptPairs, twins: ProbeResult) -> list[float | None]:
    """Bias of each pair's mundane twin, in the order of the pairs; None where it has none."""
    return [None if at is None else float(twins.pair_bias[at]) for at in pairs.twin_places(twins.pairs)]


def cost_facts(table: pd.DataFrame) -> dict[str, float]:
    names = {
        "kl": "kl_mean", "kl_p95": "kl_p95", "kl_last": "kl_last", "kl_off": "kl_off", "nll": "nll_change", "fired": "changed_share",
    }  # fmt: skip
    facts = {f"{short}_{row['kind']}": row[name] for row in table.to_dict("records") for short, name in names.items()}  # fmt: skip
    return facts | {"kl_off": pooled_kl_off(table), "kl_off_p95": table.attrs["kl_off_p95"]}


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
