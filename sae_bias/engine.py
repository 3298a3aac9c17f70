"""The sweep's engine: layers up to the site run once per prompt, later layers once per cell.

The residual at the site is kept for every prompt. A cell computes its delta on it and runs only the later layers; a prompt
on which no position changes is not run again. The numbers are those of a plain hooked forward pass (tested to float32
rounding on every architecture). Where the model carries hooks that are not ours, the whole pass runs, so that they fire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sae_bias.activations import Batch, Final, Kept, capture_layers, forward, row_positions
from sae_bias.errors import RequestError
from sae_bias.hooks import (
    EditReceipt,
    PassInfo,
    Receipt,
    SiteEdit,
    add_delta,
    compile_edits,
    intervene,
    warn_written_inactive,
)
from sae_bias.interventions import Intervention
from sae_bias.model import Model
from sae_bias.probe import PairReading, Probe, ProbeResult
from sae_bias.prompts import PromptPairs
from sae_bias.reading import Read, Reading, ReadingPlan

RowsOf = Callable[[Batch], tuple[Tensor, Tensor]]
Visit = Callable[[int, Tensor, Final], None]


class CellRunner:
    """Batches of prompts whose upstream layers run once, for any number of interventions."""

    def __init__(self, model: Model, batches: Sequence[Batch], rows_of: RowsOf):
        _refuse_open_block(model)
        self.model, self.batches, self.rows_of = model, list(batches), rows_of
        self._kept: dict[int, list[Tensor]] = {}

    def kept(self, layer: int) -> list[Tensor]:
        """resid_post at `layer` of every batch, run once."""
        if layer not in self._kept:
            self._kept[layer] = [capture_layers(self.model, b.tokens, [layer])[layer] for b in self.batches]
        return self._kept[layer]

    def run(self, edits: Sequence[Intervention], visit: Visit) -> Receipt:
        """Run the rows that `edits` change; `visit(batch number, changed rows [batch], Final)` sees each batch's."""
        if not edits:
            return Receipt()
        _refuse_open_block(self.model)
        if self.model.foreign_hooks():
            with intervene(self.model, *edits) as receipt:
                for k, batch in enumerate(self.batches):
                    with row_positions(self.model, *self.rows_of(batch)):
                        visit(k, torch.ones(batch.n, dtype=torch.bool), forward(self.model, batch.tokens))
            return receipt
        sites = compile_edits(self.model, edits)
        first = sites[min(sites)]
        later = [e for site_edit in sites.values() if site_edit is not first for e in site_edit.edits]
        receipts = {edit: EditReceipt(edit) for edit in first.edits}
        with intervene(self.model, *later) if later else nullcontext(Receipt()) as live:
            for k, batch in enumerate(self.batches):
                self._batch(k, batch, first, receipts, bool(later), visit)
        warn_written_inactive(Receipt(list(receipts.values())))
        return Receipt([*receipts.values(), *live.edits], hook_calls=len(self.batches))

    def _batch(
        self,
        k: int,
        batch: Batch,
        site_edit: SiteEdit,
        receipts: dict[Intervention, EditReceipt],
        later: bool,
        visit: Visit,
    ) -> None:
        layer = site_edit.site.layer
        x = self.kept(layer)[k]
        prompt_len, subject_start = self.rows_of(batch)
        info = PassInfo(batch.tokens, prompt_len=prompt_len, subject_start=subject_start)
        delta = site_edit.delta(x, info, receipts)
        if delta is None and not later:
            return
        rows = torch.ones(batch.n, dtype=torch.bool)
        if delta is not None:
            x = add_delta(x, delta)
            if not later:
                rows = (delta != 0).any(-1).any(-1).cpu()
        on_device = rows.to(x.device)
        with row_positions(self.model, prompt_len[rows], subject_start[rows]):
            final = forward(self.model, batch.tokens[on_device], resume=Kept(layer, x[on_device]))
        visit(k, rows, final)


class ReadingEngine:
    """A reading plan run once without edits and then once per cell."""

    def __init__(self, model: Model, plan: ReadingPlan):
        self.plan = plan
        self.runner = CellRunner(model, plan.batches, plan.rows)
        self._reads = [plan.read(forward(model, batch.tokens)) for batch in plan.batches]
        self.base = self._assemble(self._reads)

    def run(self, edits: Sequence[Intervention]) -> tuple[Reading, Receipt]:
        """The reading under `edits` (the base one itself where nothing changed), and what they did."""
        reads = list(self._reads)

        def visit(k: int, rows: Tensor, final: Final) -> None:
            reads[k] = _replaced(reads[k], rows, self.plan.read(final))

        receipt = self.runner.run(edits, visit)
        same = all(new is old for new, old in zip(reads, self._reads))
        return (self.base if same else self._assemble(reads)), receipt

    def _assemble(self, reads: list[Read]) -> Reading:
        place = {batch.index: read for batch, read in zip(self.plan.batches, reads)}
        return self.plan.assemble(lambda batch: place[batch.index])


class ProbeEngine:
    """One model, one set of pairs, one probe; any number of interventions, each for the price of the later layers."""

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        probe: Probe,
        *,
        levels: bool = False,
        batch_size: int | None = None,
    ):
        self.model = model
        self.reading = PairReading(model, pairs, probe, levels=levels, batch_size=batch_size)
        self.engine = ReadingEngine(model, self.reading.plan)
        self.base: ProbeResult = self.reading.result(self.engine.base)

    def run(self, edits: Sequence[Intervention]) -> tuple[ProbeResult, Receipt]:
        """The probe under `edits`, and what they did."""
        reading, receipt = self.engine.run(edits)
        return (self.base if reading is self.engine.base else self.reading.result(reading)), receipt


def _refuse_open_block(model: Model) -> None:
    if model._edits is not None:
        raise RequestError("an intervene block is open on this model; run sweeps and rankings outside it.")


def _replaced(base: Read, rows: Tensor, new: Read) -> Read:
    """`base` with some rows read anew."""
    if bool(rows.all()):
        return new
    z, norm = base.z.clone(), base.log_normaliser
    z[rows] = new.z
    if norm is not None and new.log_normaliser is not None:
        norm = norm.clone()
        norm[rows] = new.log_normaliser
    return Read(z, norm)
