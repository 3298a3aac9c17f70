"""Positions of token sequences read off a model, each distinct prefix computed once (`models.tree`).

`Reads` cuts sequences into passes and numbers what they compute: a node is a distinct prefix where the passes may be packed, and
a position of one sequence where they may not. Residuals are matrices over nodes: kept of one run, changed, and run on from there.
Inside a `knowing` block what an unedited model has said is kept by prefix, and no engine passes a prompt that another has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.site import Site
from sae_bias.core.types import Tokens
from sae_bias.models import tree as trees
from sae_bias.models.forward import (
    BATCH_TOKENS,
    ROWS,
    Batch,
    Final,
    Kept,
    Partners,
    capture_layers,
    forward,
    forward_with_grad,
    keeping,
    plan_batches,
    row_positions,
)
from sae_bias.models.model import Model
from sae_bias.models.tree import PADDED, Packed, Row, Tree, pack, packs, passes_of

T = TypeVar("T")
Partner = tuple[Sequence[int], int]
"""The paired prompt of a sequence, and how many positions from the right stand for each other."""
Spot = tuple[int, int]
"""(sequence, position) of one reader."""
Place = int | Site
"""A layer, whose resid_post is meant, or a site."""
Nodes = Float[Tensor, "n_nodes d_model"]
MOST_KNOWN = 1 << 30  # bytes of residuals that a `knowing` block keeps


class Known:
    """Residuals of an unedited model by prefix and layer; of the last layer those that were read, of `layers` all that pass."""

    def __init__(self) -> None:
        self.layers: frozenset[Site] = frozenset()
        self.n_bytes = 0
        self._nodes: dict[tuple[int, int], int] = {}
        self._rows: dict[Site, np.ndarray] = {}
        self._kept: dict[Site, list[Tensor]] = {}

    def keep_at(self, layers: Iterable[Place]) -> None:
        """From now on residuals of these layers are kept of whatever passes."""
        self.layers = frozenset(map(Site.parse, layers))

    def nodes(self, tree: Tree) -> np.ndarray:
        """Number of each of a tree's prefixes among all that were asked for."""
        out: list[int] = []
        for token, place, maker in zip(tree.token, tree.place, tree.maker):
            above = out[tree.paths[maker][place - 1]] if place else -1
            out.append(self._nodes.setdefault((above, token), len(self._nodes)))
        return np.array(out)

    def _row(self, layer: Site, nodes: np.ndarray) -> np.ndarray:
        """Row of each prefix in what is kept of a layer; -1 where it is not."""
        rows = self._rows.get(layer, np.empty(0, dtype=np.int64))
        if len(rows) < len(self._nodes):
            rows = np.concatenate([rows, np.full(len(self._nodes) - len(rows), -1)])
            self._rows[layer] = rows
        return rows[nodes]

    def has(self, layer: Site, nodes: np.ndarray) -> np.ndarray:
        return self._row(layer, nodes) >= 0

    def get(self, layer: Site, nodes: np.ndarray) -> Nodes:
        """Residuals of prefixes that are known."""
        kept = self._kept[layer]
        if len(kept) > 1:
            kept[:] = [torch.cat(kept)]
        return kept[0][torch.from_numpy(self._row(layer, nodes)).to(kept[0].device)]

    def put(self, layer: Site, nodes: np.ndarray, x: Nodes) -> None:
        """Keep what is new, while there is room."""
        nodes, first = np.unique(nodes, return_index=True)
        new = ~self.has(layer, nodes)
        x = x[torch.from_numpy(first[new]).to(x.device)]
        if not len(x) or self.n_bytes + x.nbytes > MOST_KNOWN:
            return
        kept = self._kept.setdefault(layer, [])
        self._rows[layer][nodes[new]] = sum(map(len, kept)) + np.arange(len(x))
        kept.append(x)
        self.n_bytes += x.nbytes


@contextmanager
def knowing(model: Model, layers: Iterable[Place] = ()) -> Iterator[Known]:
    """Keep what the unedited model says inside the block, and its residuals at `layers`; its weights must not change there."""
    before, model.known = model.known, Known()
    model.known.keep_at(layers)
    try:
        yield model.known
    finally:
        model.known = before


@dataclass(frozen=True)
class Pass:
    """One pass: nodes of each row, and the sequences that end in it."""

    rows: Sequence[Sequence[int]]
    sequences: Sequence[Sequence[int]]
    tokens: Tokens
    packed: Packed | None
    ends: Tensor | None
    starts: Tensor | None

    def of(self, x: Nodes) -> Tensor:
        """[batch, pos, d_model] of some nodes' residuals; padded columns hold the first node's."""
        columns = torch.zeros(self.tokens.shape, dtype=torch.long)
        for b, nodes in enumerate(self.rows):
            columns[b, : len(nodes)] = torch.tensor(nodes)
        return x[columns.to(x.device)]


class Reads:
    """Positions of sequences to be read, each distinct prefix computed and handed over once.

    slots: of each sequence, the number of the result of each of its wanted positions; n: how many results there are.
    """

    def __init__(
        self,
        model: Model,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]] | None = None,
        *,
        ends: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        partners: Sequence[Partner | None] | None = None,
        apart: Sequence[Sequence[Any]] | None = None,
        batch_size: int | None = None,
    ):
        """`positions`: those read of each sequence (its last by default); `apart`: what keeps tokens apart beside what is before them."""
        self.model, self.sequences = model, sequences
        self.wanted = [[len(s) - 1] for s in sequences] if positions is None else positions
        self.ends, self.starts, self.partners = ends, starts, partners
        self.batches = plan_batches(sequences, model.device, batch_size=batch_size)
        self._packed: list[list[Row]] = []
        self._batch_size = batch_size
        self._known, self._ids = None, np.empty(0)
        self.flat = not len(sequences) or not packs(model)
        if not self.flat:
            roles = trees.open_roles(model) or frozenset()
            self.tree = Tree(sequences, ends, starts, roles=roles, apart=apart)
            self.paths, self.n_nodes = self.tree.paths, len(self.tree)
            self._packed = self._choose()
            if model.known is not None and apart is None and model._edits is None:
                self._known, self._ids = model.known, model.known.nodes(self.tree)
        else:
            self.paths, self.n_nodes = self._flat()
        number: dict[int, int] = {}
        self.slots = [[number.setdefault(path[p], len(number)) for p in wanted] for path, wanted in zip(self.paths, self.wanted)]  # fmt: skip
        self._number, self.n = number, len(number)
        self.done = 0  # tokens computed so far
        self.kept: dict[Site, Tensor] = {}
        """resid_post [n_nodes, d_model] by layer, or what stands at a site."""

    def _flat(self) -> tuple[list[list[int]], int]:
        """A node for each position of each sequence, batch by batch."""
        paths: list[list[int]] = [[] for _ in self.sequences]
        n = 0
        for batch in self.batches:
            for i in batch.index:
                paths[i] = list(range(n, n + len(self.sequences[i])))
                n += len(paths[i])
        return paths, n

    @property
    def packed(self) -> bool:
        """Whether the sequences run as a tree."""
        return bool(self._packed)

    @property
    def n_tokens(self) -> int:
        """Tokens that the passes compute, padding included."""
        return sum(_size(p) for p in self._todo(()))

    def node_tokens(self) -> Tensor:
        """[n_nodes] token ids."""
        out = torch.zeros(self.n_nodes, dtype=torch.long)
        for path, sequence in zip(self.paths, self.sequences):
            out[path] = torch.tensor(list(sequence))
        return out.to(self.model.device)

    def _choose(self) -> list[list[Row]]:
        """The packed passes that cost least; none where sequences of one length together cost less.

        Which sequences stand in a row does not hang on `batch_size`, which bounds the rows of a pass.
        """
        self.price = trees.price_of(self.model)
        rows = self.tree.rows(self.price)
        packed = [(len(p), len(p[0].nodes)) for p in self._in_passes(rows, None)]
        if self._cost(packed) >= self._cost([(b.n, b.tokens.shape[1]) for b in self.batches]):
            return []
        return self._in_passes(rows, self._batch_size)

    def _in_passes(self, rows: Sequence[Row], batch_size: int | None) -> list[list[Row]]:
        kind = self.model.device.type
        budget, padded = BATCH_TOKENS.get(kind, BATCH_TOKENS["cpu"]), PADDED.get(kind, PADDED["cpu"])
        longest = max(map(len, self.sequences))
        return passes_of(rows, min(budget, batch_size * longest) if batch_size else budget, padded)

    def _cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Of passes of [rows, length], in tokens through the weights."""
        return sum(b * n * (1 + self.price * n) for b, n in shapes)

    # --- which passes
    def _among(self, among: Collection[int] | None) -> Sequence[list[Row] | Batch]:
        """Passes of some sequences; of all where None."""
        if among is None:
            return self._packed or self.batches
        if not among:
            return []
        if self._packed:
            return self._in_passes(self.tree.rows(self.price, among=set(among)), self._batch_size)
        some = sorted(among)
        found = plan_batches(
            [self.sequences[i] for i in some], self.model.device, batch_size=self._batch_size
        )
        return [Batch(tuple(some[k] for k in b.index), b.tokens) for b in found]

    def _todo(self, keep: Collection[Site], *, read: bool = True) -> Sequence[list[Row] | Batch]:
        """Passes of the sequences of which something is not known."""
        if self._known is None:
            return self._among(None)
        there = np.all([self._known.has(layer, self._ids) for layer in keep], axis=0) if keep else np.ones(self.n_nodes, bool)  # fmt: skip
        last = self._known.has(self._last, self._ids)
        lacking = [
            i for i, (path, wanted) in enumerate(zip(self.paths, self.wanted))
            if not there[path].all() or (read and not last[[path[p] for p in wanted]].all())
        ]  # fmt: skip
        return self._among(None if len(lacking) == len(self.sequences) else lacking)

    def _open(self, rows: list[Row] | Batch) -> Pass:
        if isinstance(rows, Batch):
            index = rows.index
            ends, starts = (None if v is None else torch.tensor([v[i] for i in index]) for v in (self.ends, self.starts))  # fmt: skip
            return Pass([self.paths[i] for i in index], [[i] for i in index], rows.tokens.clone(), None, ends, starts)  # fmt: skip
        packed = pack(self.tree, rows, self.model.device)
        return Pass([r.nodes for r in rows], [r.sequences for r in rows], packed.tokens, packed, packed.prompt_len, packed.subject_start)  # fmt: skip

    # --- running them
    def run(self, keep: Iterable[Place] = ()) -> Iterator[tuple[list[int], Final]]:
        """Numbers of the results of each pass, and its end [n, 1] at those positions, under whatever is open on the model.

        keep: layers whose residuals stay in `kept`.
        """
        last, known, sites = self._last, self._known, frozenset(map(Site.parse, keep))
        done: set[int] = set()
        todo = self._todo(sites)
        if known is not None:
            self._recall(sites)
            nodes = np.array(list(self._number), dtype=np.int64)
            nodes = nodes[known.has(last, self._ids[nodes])]
            if len(nodes):
                done.update(nodes.tolist())
                yield [self._number[v] for v in nodes.tolist()], Final(self.model, known.get(last, self._ids[nodes])[:, None])  # fmt: skip
        for rows in todo:
            one = self._open(rows)
            where = {
                v: (b, c) for b, nodes in enumerate(one.rows) for c, v in enumerate(nodes)
            }  # once, also where rows share a prefix
            spots = [
                (self._number[v], *at, v) for v, at in where.items() if v in self._number and v not in done
            ]
            with keeping(
                self.model, sorted(sites | (frozenset() if known is None else known.layers))
            ) as seen:
                final = self._final(one)
            self._store(one, seen, sites)
            self.done += _size(rows)
            if not spots:
                continue
            numbers, at, columns, nodes = map(list, zip(*spots))
            done.update(nodes)
            final = final.spots(at, columns)
            if one.packed is None or final.resid is None or bool(torch.isfinite(final.resid).all()):
                if known is not None and final.resid is not None:
                    known.put(last, self._ids[nodes], final.resid[:, 0])
                yield numbers, final
            else:  # one NaN would reach all of its row
                yield from self._alone([i for group in one.sequences for i in group], set(numbers))

    @torch.no_grad()
    def _final(self, one: Pass) -> Final:
        if one.packed is not None:
            return run_packed(self.model, one.packed)
        partners = self.partners_of([i for (i,) in one.sequences])
        with row_positions(self.model, one.ends, one.starts, partners):
            return forward(self.model, one.tokens)

    def _alone(self, sequences: Sequence[int], wanted: set[int]) -> Iterator[tuple[list[int], Final]]:
        """The wanted results of some sequences, run as they are: what is not finite stays where it is."""
        for i in sequences:
            spots = [(slot, p) for slot, p in zip(self.slots[i], self.wanted[i]) if slot in wanted]
            wanted -= {slot for slot, _ in spots}
            if spots:
                one = self._open(Batch((i,), torch.tensor([list(self.sequences[i])], device=self.model.device)))  # fmt: skip
                yield [slot for slot, _ in spots], self._final(one).spots([0] * len(spots), [p for _, p in spots])  # fmt: skip

    def keep(self, *layers: Place) -> Nodes:
        """resid_post [n_nodes, d_model] at the first of some layers (or what stands at a site), run where one is not kept yet."""
        sites = [Site.parse(layer) for layer in layers]
        if any(site not in self.kept for site in sites):
            todo = self._todo(sites, read=False)
            if self._known is not None:
                self._recall(sites)
            for rows in todo:
                one = self._open(rows)
                self._store(one, capture_layers(self.model, one.tokens, sites, packed=one.packed), sites)
        return self.kept[sites[0]]

    def batched(self, layer: Place, k: int) -> Tensor:
        """The same of batch k of `batches`: the sequences as they are, those of one length together."""
        index = self.batches[k].index
        if self.flat:
            first, n = self.paths[index[0]][0], self.batches[k].tokens.numel()
            return self.keep(layer)[first : first + n].unflatten(0, (len(index), -1))
        return self.keep(layer)[torch.tensor([self.paths[i] for i in index])]

    @property
    def _last(self) -> Site:
        return Site(self.model.n_layers - 1)

    def _recall(self, layers: Collection[Site]) -> None:
        """What is known of some layers."""
        assert self._known is not None
        for layer in layers:
            here = np.flatnonzero(self._known.has(layer, self._ids))
            if len(here):
                x = self._known.get(layer, self._ids[here])
                self._of(layer, x)[here] = x

    def _store(self, one: Pass, seen: Mapping[Site, Tensor], wanted: Collection[Site]) -> None:
        nodes = [v for row in one.rows for v in row]
        for layer, x in seen.items():
            rows = torch.cat([x[b, : len(row)] for b, row in enumerate(one.rows)])
            if layer in wanted:
                self._of(layer, rows)[nodes] = rows
            if self._known is not None and layer in self._known.layers and bool(torch.isfinite(rows).all()):
                self._known.put(layer, self._ids[nodes], rows)

    def _of(self, layer: Site, like: Tensor) -> Tensor:
        if layer not in self.kept:
            self.kept[layer] = like.new_empty(self.n_nodes, like.shape[-1])
        return self.kept[layer]

    def resume(
        self, layer: int, resid: Nodes, visit: Visit, *, among: Collection[int] | None = None, grad: bool = False
    ) -> None:  # fmt: skip
        """Run the later layers from `resid` over some sequences (all where None); `visit` sees the wanted spots of each pass."""
        for rows in self._among(among):
            one = self._open(rows)
            wanted, at, columns = self._ending(one)
            with (
                torch.set_grad_enabled(grad),
                row_positions(self.model, one.ends, one.starts, packed=one.packed),
            ):
                kept = Kept(layer, one.of(resid))
                if grad or (one.packed is not None and not self.model.foreign_hooks()):
                    final = forward_with_grad(self.model, one.tokens, packed=one.packed, resume=kept)
                else:
                    final = forward(self.model, one.tokens, resume=kept)
                visit(wanted, final.spots(at, columns))

    def _ending(self, one: Pass) -> tuple[list[list[Spot]], list[int], list[int]]:
        """The wanted spots of the sequences that end in a pass, and the row and column of each."""
        wanted, at, columns = [], [], []
        for b, (nodes, sequences) in enumerate(zip(one.rows, one.sequences)):
            column = {v: c for c, v in enumerate(nodes)}
            for i in sequences:
                for p in self.wanted[i]:
                    wanted.append([(i, p)])
                    at.append(b)
                    columns.append(column[self.paths[i][p]])
        return wanted, at, columns

    def partners_of(self, rows: Sequence[int]) -> Partners | None:
        """The paired prompts of some sequences; None where one has none."""
        found = [None if self.partners is None else self.partners[i] for i in rows]
        known = [f for f in found if f is not None]
        if len(known) < len(found):
            return None
        return Partners(tuple(tuple(ids) for ids, _ in known), torch.tensor([n for _, n in known]))


Visit = Callable[[Sequence[Sequence[Spot]], Final], None]
"""(spots that each row stands for, the end of the pass [n, 1] there)"""


def _size(rows: list[Row] | Batch) -> int:
    return rows.tokens.numel() if isinstance(rows, Batch) else len(rows) * len(rows[0].nodes)


class Reader:
    """Something that is read off a model: the sequences it needs, where, and what it takes from the end of the pass."""

    sequences: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int]]
    ends: Sequence[int]
    """Of each sequence, the end of its prompt."""
    starts: Sequence[int]
    """And the start of its subject."""
    partners: Sequence[Partner | None]

    def take(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        """Some results: `final` [n, 1], and the spots that each row of it stands for."""
        raise NotImplementedError


def spots_by(results: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> dict[int, list[Spot]]:
    """The spots that each result stands for."""
    out: dict[int, list[Spot]] = {}
    for i, (numbers, wanted) in enumerate(zip(results, positions)):
        for number, position in zip(numbers, wanted):
            out.setdefault(number, []).append((i, position))
    return out


def read_together(
    model: Model, readers: Sequence[Reader], *, progress: bool = False, describe: str = "", batch_size: int | None = None
) -> None:  # fmt: skip
    """Hand every reader what it wants, each distinct prefix of all their sequences computed once."""
    each = [[list(getattr(r, name)) for r in readers] for name in ("sequences", "positions", "ends", "starts", "partners")]  # fmt: skip
    sequences, positions, ends, starts, partners = ([v for part in parts for v in part] for parts in each)
    reads = Reads(model, sequences, positions, ends=ends, starts=starts, partners=partners, batch_size=batch_size)  # fmt: skip
    take_all(reads, readers, progress=progress, describe=describe)


def take_all(
    reads: Reads, readers: Sequence[Reader], *, keep: Sequence[Place] = (), progress: bool = False, describe: str = ""
) -> None:  # fmt: skip
    """Run the passes, and hand each reader (their sequences stand one after another) what it wants of them."""
    owners: list[dict[int, list[Spot]]] = []
    first = 0
    for reader in readers:
        rows = slice(first, first + len(reader.sequences))
        owners.append(spots_by(reads.slots[rows], reads.wanted[rows]))
        first = rows.stop
    with tqdm(total=reads.n_tokens, desc=describe, unit="token", unit_scale=True, disable=not progress, leave=False) as bar:  # fmt: skip
        waiting = [_Waiting(reader) for reader in readers]
        for numbers, final in reads.run(keep):
            for one, owned in zip(waiting, owners):
                rows = [row for row, number in enumerate(numbers) if number in owned]
                if rows:
                    mine = final if len(rows) == len(numbers) else final.spots(rows, [0] * len(rows))
                    one.add([owned[numbers[row]] for row in rows], mine)
            bar.update(reads.done - bar.n)
        for one in waiting:
            one.hand_over(len(one.wanted))


class _Waiting:
    """What a reader is owed, kept until it fills a block of logits: a few rows at a time read the whole unembedding for each."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.wanted: list[Sequence[Spot]] = []
        self.parts: list[Tensor] = []
        self.model: Model | None = None

    def add(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        if final.resid is None:  # whole logits, which foreign hooks wanted
            self.reader.take(wanted, final)
            return
        self.wanted += wanted
        self.parts.append(final.resid)
        self.model = final.model
        self.hand_over(len(self.wanted) // ROWS * ROWS)

    def hand_over(self, n: int) -> None:
        """The first n results."""
        if n and self.model is not None:
            resid = torch.cat(self.parts)
            self.reader.take(self.wanted[:n], Final(self.model, resid[:n]))
            self.wanted, self.parts = self.wanted[n:], [resid[n:]]


@dataclass(frozen=True)
class Asked(Generic[T]):
    """What a figure needs read off the model, and the figure once it is read: several are read together."""

    readers: tuple[Reader, ...]
    finish: Callable[[], T]

    def read(self, model: Model, *, progress: bool = False, describe: str = "", batch_size: int | None = None) -> T:  # fmt: skip
        """Read alone."""
        read_together(model, self.readers, progress=progress, describe=describe, batch_size=batch_size)
        return self.finish()


@torch.no_grad()
def run_packed(model: Model, packed: Packed, resume: Kept | None = None) -> Final:
    """The end of one packed pass."""
    with row_positions(model, packed.prompt_len, packed.subject_start, packed=packed):
        return forward_with_grad(model, packed.tokens, packed=packed, resume=resume)
