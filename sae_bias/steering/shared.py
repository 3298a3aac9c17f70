"""Cells on a tree of prefixes: layers up to the site once for each distinct prefix, later layers once a cell for the prefixes it changes.

An edit changes some tokens of the tree; the sequences that pass through one of them run again from the site on, with what they
share computed once. Where edits act at some positions only, tokens are kept apart by the part they play there, and read their
residual from the one tree. What the tree cannot do (`models.tree`) the plain `CellRunner` does: edits that look elsewhere, foreign
hooks, sequences that share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sae_bias.core.site import Site
from sae_bias.models.forward import Final, Kept, Partners, plan_batches
from sae_bias.models.model import Model
from sae_bias.models.tree import (
    PADDED,
    Reader,
    Reads,
    Row,
    Spot,
    Tree,
    in_passes,
    pack,
    packs,
    run_packed,
    spots_by,
    take_all,
)
from sae_bias.steering import runner
from sae_bias.steering.context import PassInfo
from sae_bias.steering.hooks import SiteEdit, add_delta, compile_edits, intervene, warn_written_inactive
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.receipt import EditReceipt, Receipt

VisitSpots = Callable[[int, Sequence[Sequence[Spot]], Final], None]
"""(cell, spots that each row stands for, the end of the pass [n, 1] there)"""


class View:
    """The sequences as a tree in which some positions keep tokens apart, each token read off the tree of the base."""

    def __init__(self, reads: Reads, roles: frozenset[str]):
        self.reads = reads
        self.tree = Tree(reads.sequences, reads.ends, reads.starts, roles=roles) if roles else reads.tree
        tree, paths, device = self.tree, reads.tree.paths, reads.model.device
        self.base = torch.tensor([paths[i][p] for i, p in zip(tree.maker, tree.place)], device=device)
        results = [[path[p] for p in wanted] for path, wanted in zip(tree.paths, reads.wanted)]
        self.spots = spots_by(results, reads.wanted)
        self._flat = np.concatenate([np.array(path) for path in tree.paths])
        self._starts = np.cumsum([0, *map(len, tree.paths)])[:-1]

    @cached_property
    def rows(self) -> list[Row]:
        """Every sequence."""
        return self.tree.rows(self.reads.price)

    @cached_property
    def info(self) -> PassInfo:
        """What an edit sees of all tokens, as one row."""
        tree = self.tree
        weight = np.bincount(self._flat, minlength=len(tree))
        ends = [tree.ends[i] for i in tree.maker]
        starts = None if tree.starts is None else [tree.starts[i] for i in tree.maker]
        tokens, place, times, end, start = (
            None if v is None else torch.tensor(np.array(v)[None], device=self.reads.model.device)
            for v in (tree.token, tree.place, weight, ends, starts)
        )
        assert tokens is not None
        return PassInfo(tokens, prompt_len=end, subject_start=start, place=place, weight=times)

    def changed_rows(self, changed: np.ndarray) -> list[Row]:
        """Rows of the sequences that pass through a changed token."""
        hit = np.logical_or.reduceat(changed[self._flat], self._starts)
        if hit.all():
            return self.rows
        return self.tree.rows(self.reads.price, among=set(np.flatnonzero(hit).tolist()))


@dataclass
class _Cell:
    """One cell at one site: its tokens' edited residuals, and the rows it changes."""

    number: int
    view: View
    site_edit: SiteEdit
    receipts: list[EditReceipt]
    resid: Tensor
    rows: list[Row]


class SharedRunner:
    """Sequences to read whose upstream layers run once, for any number of interventions."""

    def __init__(self, model: Model, reader: Reader, *, batch_size: int | None = None):
        runner.refuse_open_block(model)
        self.model, self.reader, self.batch_size = model, reader, batch_size
        self.reads = Reads(
            model, reader.sequences, reader.positions,
            ends=reader.ends, starts=reader.starts, partners=reader.partners, batch_size=batch_size,
        )  # fmt: skip
        self._views: dict[frozenset[str], View] = {}

    @cached_property
    def plain(self) -> runner.CellRunner:
        """The sequences as they are, those of one length together."""
        batches = plan_batches(self.reader.sequences, self.model.device, batch_size=self.batch_size)
        reader = self.reader

        def rows_of(batch: runner.Batch) -> tuple[Tensor, Tensor]:
            return torch.tensor([reader.ends[i] for i in batch.index]), torch.tensor([reader.starts[i] for i in batch.index])  # fmt: skip

        def partners_of(batch: runner.Batch) -> Partners | None:
            return self.reads.partners_of(batch.index)

        return runner.CellRunner(self.model, batches, rows_of, partners_of)

    def base(self, layers: Sequence[int] = (), *, progress: bool = False, describe: str = "") -> None:
        """Read every sequence without edits; resid_post at `layers` is kept on the way."""
        if self.reads.packed:
            take_all(self.reads, [self.reader], keep=layers, progress=progress, describe=describe)
            return
        for batch, final in zip(self.plain.batches, self.plain.base(layers)):
            self.reader.take(*self._spots(batch.index, final))

    def kept(self, layer: int) -> list[Tensor]:
        """resid_post at `layer` of every plain batch, run once."""
        if self.reads.packed and layer not in self.plain._kept:
            x, paths = self.reads.keep(layer), self.reads.tree.paths
            self.plain._kept[layer] = [x[torch.tensor([paths[i] for i in b.index])] for b in self.plain.batches]  # fmt: skip
        return self.plain.kept(layer)

    def run_many(self, cells: Sequence[Sequence[Intervention]], visit: VisitSpots) -> list[Receipt]:
        """Run several cells; `visit` sees what each of them changes. Cells of one site share passes, at most `STACK` that follow each other."""
        runner.refuse_open_block(self.model)
        compiled = [compile_edits(self.model, edits) for edits in cells]
        receipts: list[Receipt] = []
        usable = self.reads.packed and packs(self.model)
        for group in runner.stacks(compiled, cells, self.model.foreign_hooks()):
            sites = [compiled[i] for i in group]
            if not cells[group[0]]:
                receipts.append(Receipt())
            elif not usable or any(not _on_tree(s) for s in sites):
                receipts += self._plainly(group, [cells[i] for i in group], visit)
            else:
                receipts += self._stack(group, sites, visit)
        return receipts

    def _plainly(
        self, numbers: Sequence[int], cells: Sequence[Sequence[Intervention]], visit: VisitSpots
    ) -> list[Receipt]:
        """What the tree cannot do, over the sequences as they are."""
        for sites in (compile_edits(self.model, edits) for edits in cells):
            if sites and not self.model.foreign_hooks():
                self.kept(min(sites).layer)

        def one(cell: int, k: int, rows: Tensor, final: Final) -> None:
            index = [i for i, row in zip(self.plain.batches[k].index, rows.tolist()) if row]
            visit(numbers[cell], *self._spots(index, final))

        return self.plain.run_many(cells, one)

    def _spots(self, index: Sequence[int], final: Final) -> tuple[list[list[Spot]], Final]:
        """The wanted spots of some sequences, whose whole rows `final` holds."""
        spots = [(row, i, p) for row, i in enumerate(index) for p in self.reader.positions[i]]
        return [[(i, p)] for _, i, p in spots], final.spots([s[0] for s in spots], [s[2] for s in spots])

    # --- on the tree ---
    def _stack(
        self, numbers: Sequence[int], sites: Sequence[dict[Site, SiteEdit]], visit: VisitSpots
    ) -> list[Receipt]:
        """Cells of one first site, their changed rows through the later layers together; later sites' edits by hooks on the way."""
        cells = [self._cell(n, s) for n, s in zip(numbers, sites)]
        later = [e for s in sites for site in sorted(s)[1:] for e in s[site].edits]
        with intervene(self.model, *later) as live:
            for group in self._groups([(cell, row) for cell in cells for row in cell.rows]):
                self._forward(group, visit)
        out = [Receipt(cell.receipts, hook_calls=1) for cell in cells]
        for receipt in out:
            warn_written_inactive(receipt)
        return [Receipt([*out[0].edits, *live.edits], hook_calls=1)] if later else out

    def _groups(self, parts: Sequence[tuple[_Cell, Row]]) -> Iterator[list[tuple[_Cell, Row]]]:
        """Rows of about one length together, of whatever cells, within the budget of a stacked pass."""
        kind = self.model.device.type
        padded = PADDED.get(kind, PADDED["cpu"])
        budget = runner.STACK_TOKENS.get(kind, runner.STACK_TOKENS["cpu"])
        views = list(dict.fromkeys(cell.view for cell, _ in parts))
        for view in views:
            mine = sorted((p for p in parts if p[0].view is view), key=lambda p: -len(p[1].nodes))
            yield from in_passes(mine, lambda p: len(p[1].nodes), budget, padded)

    def _cell(self, number: int, sites: dict[Site, SiteEdit]) -> _Cell:
        roles = frozenset(e.positions for s in sites.values() for e in s.edits) - {"all"}
        if roles not in self._views:
            self._views[roles] = View(self.reads, roles)
        view, site_edit = self._views[roles], sites[min(sites)]
        receipts = site_edit.receipts()
        x = self.reads.keep(site_edit.site.layer)[view.base]
        delta = site_edit.delta(x[None], view.info, receipts)
        if delta is None and len(sites) == 1:
            return _Cell(number, view, site_edit, receipts, x, [])
        if delta is not None:
            x = add_delta(x, delta[0])
        if len(sites) > 1:
            return _Cell(number, view, site_edit, receipts, x, view.rows)
        assert delta is not None
        changed = (delta[0] != 0).any(-1).cpu().numpy()
        return _Cell(number, view, site_edit, receipts, x, view.changed_rows(changed))

    def _forward(self, parts: Sequence[tuple[_Cell, Row]], visit: VisitSpots) -> None:
        """Run the later layers over rows of several cells, and hand each cell its own."""
        cell = parts[0][0]
        packed = pack(cell.view.tree, [row for _, row in parts], self.model.device)
        resid = cell.resid.new_zeros(*packed.tokens.shape, cell.resid.shape[-1])
        for b, (part, row) in enumerate(parts):
            resid[b, : len(row.nodes)] = part.resid[row.nodes]
        final = run_packed(self.model, packed, Kept(cell.site_edit.site.layer, resid))
        spots: dict[int, list[tuple[int, int, list[Spot]]]] = {}
        for b, (part, row) in enumerate(parts):
            here = set(row.sequences)
            for c, node in enumerate(row.nodes):
                if mine := [s for s in part.view.spots.get(node, ()) if s[0] in here]:
                    spots.setdefault(part.number, []).append((b, c, mine))
        for number, found in spots.items():
            rows, columns, wanted = zip(*found)
            visit(number, wanted, final.spots(list(rows), list(columns)))


def _on_tree(sites: dict[Site, SiteEdit]) -> bool:
    return all(e.by_position and not e.looks_elsewhere for s in sites.values() for e in s.edits)
