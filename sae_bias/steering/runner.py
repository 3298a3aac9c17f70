"""The sweep's runner over plain batches: layers up to the site run once per prompt, later layers once per cell.

The residual at the site is kept for every prompt. A cell computes its delta on it and runs only the later layers; a prompt
on which no position changes is not run again. Cells that edit the same one site are stacked: their changed rows go through the
later layers together, up to a budget of tokens. Which cells are stacked is decided by the list of cells alone, never by
what is left to do. The numbers are those of a plain hooked forward pass (tested to float32 rounding on every architecture). Where
the model carries hooks that are not ours, the whole pass runs, so that they fire; so it does for edits inside a layer (`attn_out`, `mlp_out`, `z`). `steering.shared` does the same on a tree of prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.forward import Batch, Final, Kept, forward, row_positions
from sae_bias.models.model import Model
from sae_bias.models.reads import Reads
from sae_bias.steering.context import PassInfo
from sae_bias.steering.donors import Sources
from sae_bias.steering.hooks import SiteEdit, add_delta, compile_edits, intervene, warn_written_inactive
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.receipt import EditReceipt, Receipt

VisitCell = Callable[[int, int, Tensor, Final], None]
STACK = 8  # cells whose rows may share a pass; a sweep's cells are run and kept in groups of so many
STACK_TOKENS = {
    "cpu": 1024,
    "cuda": 32768,
}  # memory budget of a shared pass; on a CPU larger ones are slower (7 % at 4,032)


@dataclass
class _Rows:
    """The rows of one batch that a cell changes."""

    number: int
    changed: Tensor
    tokens: Tensor
    resid: Tensor


class CellRunner:
    """Sequences as they are, those of one length together, whose upstream layers run once for any number of interventions."""

    def __init__(self, reads: Reads):
        refuse_open_block(reads.model)
        self.model, self.reads, self.batches = reads.model, reads, reads.batches
        self._kept: dict[int, list[Tensor]] = {}
        self._sources: dict[int, Sources] = {}

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where the prompts of a batch end, and where their subjects start."""
        ends, starts = self.reads.ends, self.reads.starts
        assert ends is not None and starts is not None
        return torch.tensor([ends[i] for i in batch.index]), torch.tensor([starts[i] for i in batch.index])

    def kept(self, layer: int) -> list[Tensor]:
        """resid_post at `layer` of every batch, run once."""
        if layer not in self._kept:
            self._kept[layer] = [self.reads.batched(layer, k) for k in range(len(self.batches))]
        return self._kept[layer]

    def run_many(self, cells: Sequence[Sequence[Intervention]], visit: VisitCell) -> list[Receipt]:
        """Run several cells; `visit(cell, batch number, changed rows [batch], Final)` sees what each of them changes.

        Cells of one site are stacked, at most `STACK` of those that follow each other; the others run alone.
        """
        refuse_open_block(self.model)
        receipts: list[Receipt] = []
        whole = self.model.foreign_hooks()
        compiled = [compile_edits(self.model, edits) for edits in cells]
        for group in stacks(compiled, cells, whole):
            first = group[0]
            if not cells[first]:
                receipts.append(Receipt())
            elif (
                whole
                or not all(site.is_resid_post for site in compiled[first])
                or _reads_pairs_later(compiled[first])
            ):
                receipts.append(self._whole(first, cells[first], visit))
            else:
                receipts += self._stack(group, [compiled[i] for i in group], visit)
        return receipts

    def _whole(self, number: int, edits: Sequence[Intervention], visit: VisitCell) -> Receipt:
        """The plain hooked pass, layer 0 to the end."""
        with intervene(self.model, *edits) as receipt:
            for k, batch in enumerate(self.batches):
                with row_positions(self.model, *self.rows_of(batch), self.reads.partners_of(batch.index)):
                    visit(number, k, torch.ones(batch.n, dtype=torch.bool), forward(self.model, batch.tokens))
        return receipt

    def _stack(
        self, numbers: Sequence[int], sites: Sequence[dict[Site, SiteEdit]], visit: VisitCell
    ) -> list[Receipt]:
        """Cells of one first site: its deltas on the kept residual, their changed rows through the later layers together; a cell with
        later sites is alone, and their edits are hooks on the way.
        """
        edits = [s[min(s)] for s in sites]
        found = [edit.receipts() for edit in edits]
        later = [e for s in sites for site in sorted(s)[1:] for e in s[site].edits]
        budget = STACK_TOKENS.get(self.model.device.type, STACK_TOKENS["cpu"])
        layer = edits[0].site.layer
        self.kept(layer)  # before edits are open
        with intervene(self.model, *later) as live:
            for k in range(len(self.batches)):
                waiting: list[_Rows] = []
                for number, edit, receipts in zip(numbers, edits, found):
                    rows = self._changed(number, edit, receipts, k, every=bool(later))
                    if rows is None:
                        continue
                    if sum(r.tokens.numel() for r in waiting) + rows.tokens.numel() > budget and waiting:
                        self._forward(k, layer, waiting, visit)
                        waiting = []
                    waiting.append(rows)
                if waiting:
                    self._forward(k, layer, waiting, visit)
        out = [Receipt(receipts, hook_calls=len(self.batches)) for receipts in found]
        for receipt in out:
            warn_written_inactive(receipt)
        return [Receipt([*out[0].edits, *live.edits], hook_calls=len(self.batches))] if later else out

    def _changed(
        self, number: int, edit: SiteEdit, receipts: list[EditReceipt], k: int, *, every: bool
    ) -> _Rows | None:
        """The rows of batch k that a cell changes (or every one), edited; None where it changes none."""
        batch = self.batches[k]
        x = self.kept(edit.site.layer)[k]
        prompt_len, subject_start = self.rows_of(batch)
        if k not in self._sources:
            self._sources[k] = Sources(self.model, batch.tokens, self.reads.partners_of(batch.index))
        info = PassInfo(
            batch.tokens, prompt_len=prompt_len, subject_start=subject_start, sources=self._sources[k]
        )
        delta = edit.delta(x, info, receipts)
        if delta is None and not every:
            return None
        changed = torch.ones(batch.n, dtype=torch.bool, device=x.device)
        if delta is not None:
            if not every:
                changed = (delta != 0).any(-1).any(-1)
            x = add_delta(x[changed], delta[changed])
        rows = changed.cpu()
        return _Rows(number, rows, batch.tokens[rows.to(batch.tokens.device)], x)

    def _forward(self, k: int, layer: int, parts: Sequence[_Rows], visit: VisitCell) -> None:
        """Run the later layers over the rows of several cells, and hand each cell its own."""
        prompt_len, subject_start = self.rows_of(self.batches[k])
        changed = [p.changed for p in parts]
        lens, starts = (torch.cat([v[c] for c in changed]) for v in (prompt_len, subject_start))
        tokens, resid = (torch.cat(list(ts)) for ts in zip(*[(p.tokens, p.resid) for p in parts]))
        with row_positions(self.model, lens, starts):
            final = forward(self.model, tokens, resume=Kept(layer, resid))
        start = 0
        for part in parts:
            stop = start + len(part.tokens)
            visit(part.number, k, part.changed, final[start:stop])
            start = stop


def stacks(
    compiled: Sequence[dict[Site, SiteEdit]], cells: Sequence[Sequence[Intervention]], whole: bool
) -> list[list[int]]:
    """Runs of neighboring cells that edit the same one site, at most STACK long; other cells alone."""
    groups: list[list[int]] = []
    for i, sites in enumerate(compiled):
        before = groups[-1] if groups else []
        same = before and list(compiled[before[-1]]) == list(sites)
        resumed = len(sites) == 1 and next(iter(sites)).is_resid_post
        if not whole and resumed and same and len(before) < STACK:
            before.append(i)
        else:
            groups.append([i])
    return groups


def _reads_pairs_later(sites: dict[Site, SiteEdit]) -> bool:
    """Whether an edit reads from elsewhere at a site that is not the first: then the whole pass runs."""
    later = [s for site, s in sites.items() if site != min(sites)]
    return any(e.looks_elsewhere for s in later for e in s.edits)


def refuse_open_block(model: Model) -> None:
    if model._edits is not None:
        raise RequestError("an intervene block is open on this model; run sweeps and rankings outside it.")
