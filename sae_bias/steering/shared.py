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
from sae_bias.models.forward import Final, Kept
from sae_bias.models.model import Model
from sae_bias.models.reads import Reader, Reads, Spot, run_packed, spots_by, take_all
from sae_bias.models.tree import PADDED, Row, Tree, in_passes, pack, packs
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

    def reached(self, changed: np.ndarray) -> np.ndarray:
        """The changed tokens and those after them."""
        out = changed.copy()
        for path in self.tree.paths:
            hit = changed[path]
            if hit.any():
                out[path[int(hit.argmax()) :]] = True
        return out

    def changed_rows(self, changed: np.ndarray) -> list[Row]:
        """Rows of the sequences that pass through a changed token."""
        hit = np.logical_or.reduceat(changed[self._flat], self._starts)
        if hit.all() or not hit.any():
            return self.rows if hit.all() else []
        return self.tree.rows(self.reads.price, among=set(np.flatnonzero(hit).tolist()))


@dataclass
class _Cell:
    """One cell at one site: the tokens it changes, and the rows they stand in."""

    number: int
    view: View
    site_edit: SiteEdit
    receipts: list[EditReceipt]
    base: Tensor
    """resid_post [n_nodes, d_model] of the reads' tree."""
    rows: list[Row]
    reached: np.ndarray
    """Which tokens differ from the unedited model's: the changed ones and what comes after them."""
    place: Tensor
    """Of each token, its row in `edited`; -1 where it is not changed."""
    edited: Tensor

    def resid(self, nodes: Sequence[int]) -> Tensor:
        """Residuals of some of the view's tokens, as the edit leaves them."""
        x, place = self.base[self.view.base[nodes]], self.place[nodes]
        x[place >= 0] = self.edited[place[place >= 0]]
        return x


class SharedRunner:
    """Sequences to read whose upstream layers run once, for any number of interventions."""

    def __init__(self, model: Model, reader: Reader, *, batch_size: int | None = None):
        runner.refuse_open_block(model)
        self.model, self.reader = model, reader
        self.reads = Reads(
            model, reader.sequences, reader.positions,
            ends=reader.ends, starts=reader.starts, partners=reader.partners, batch_size=batch_size,
        )  # fmt: skip
        self._views: dict[frozenset[str], View] = {}

    @cached_property
    def plain(self) -> runner.CellRunner:
        """The sequences as they are."""
        return runner.CellRunner(self.reads)

    def base(self, layers: Sequence[int] = (), *, progress: bool = False, describe: str = "") -> None:
        """Read every sequence without edits; resid_post at `layers` is kept on the way."""
        take_all(self.reads, [self.reader], keep=layers, progress=progress, describe=describe)

    def kept(self, layer: int) -> list[Tensor]:
        """resid_post at `layer` of every plain batch, run once."""
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
        receipts, base = site_edit.receipts(), self.reads.keep(site_edit.site.layer)
        x = base[view.base]
        delta = site_edit.delta(x[None], view.info, receipts)
        changed = torch.zeros(len(x), dtype=torch.bool, device=x.device) if delta is None else (delta[0] != 0).any(-1)  # fmt: skip
        edited = x[changed] if delta is None else add_delta(x[changed], delta[0][changed])
        place = torch.where(changed, changed.cumsum(0) - 1, -1)
        hit = changed.cpu().numpy() if len(sites) == 1 else np.ones(len(x), dtype=bool)
        return _Cell(number, view, site_edit, receipts, base, view.changed_rows(hit), view.reached(hit), place, edited)  # fmt: skip

    def _forward(self, parts: Sequence[tuple[_Cell, Row]], visit: VisitSpots) -> None:
        """Run the later layers over rows of several cells, and hand each cell its own."""
        cell = parts[0][0]
        packed = pack(cell.view.tree, [row for _, row in parts], self.model.device)
        resid = cell.base.new_zeros(*packed.tokens.shape, cell.base.shape[-1])
        for b, (part, row) in enumerate(parts):
            resid[b, : len(row.nodes)] = part.resid(row.nodes)
        final = run_packed(self.model, packed, Kept(cell.site_edit.site.layer, resid))
        spots: dict[int, list[tuple[int, int, list[Spot]]]] = {}
        for b, (part, row) in enumerate(parts):
            here = set(row.sequences)
            for c, node in enumerate(row.nodes):
                if not part.reached[node]:
                    continue
                if mine := [s for s in part.view.spots.get(node, ()) if s[0] in here]:
                    spots.setdefault(part.number, []).append((b, c, mine))
        for number, found in spots.items():
            rows, columns, wanted = zip(*found)
            visit(number, wanted, final.spots(list(rows), list(columns)))


def _on_tree(sites: dict[Site, SiteEdit]) -> bool:
    return all(
        site.is_resid_post and e.by_position and not e.looks_elsewhere
        for site, s in sites.items()
        for e in s.edits
    )
