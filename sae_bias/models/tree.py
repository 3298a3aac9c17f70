"""Token sequences as one tree of prefixes: each distinct prefix is computed once, whatever follows it.

A causal model's residual at a position depends on the tokens up to it alone, so sequences that begin alike share those positions. A
pass holds whole paths of the tree, one row after another: a token attends to its ancestors (in a sliding layer to those less than
a window above it) and its position is its depth, as in tree attention (Miao et al. 2024, "SpecInfer", arXiv:2305.09781):

    attends(q, k) = k ≤ q < end(k),  and place(q) - place(k) < window        (preorder: end(k) is where the subtree of k ends)

The numbers are those of one sequence at a time, to float32 rounding, on every architecture whose record names its masks (`Architecture.masks`);
on the others, under hooks that are not ours, and under edits that look elsewhere, sequences of one length run together, as they are.
An edit is causal too: where open edits act at some positions only (the last, the subject), a token is shared by the sequences in which it plays the same part.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.types import Tokens
from sae_bias.models.forward import (
    BATCH_TOKENS,
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

T = TypeVar("T")
R = TypeVar("R")
ROW_TOKENS = 1024
"""The longest row made of several sequences: its mask is this large squared."""
PADDED = {"cpu": 32, "cuda": 256}
"""Tokens of padding in a pass: starting another costs more."""
_ROLES = ("last", "subject", "prompt", "generated")


class Tree:
    """The distinct prefixes of some sequences, in preorder: node, parent's path, place, and the sequence that made it."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        ends: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        *,
        roles: frozenset[str] = frozenset(),
    ):
        """`ends`, `starts`: of each sequence the end of its prompt and the start of its subject; `roles`: which of them keep tokens apart."""
        self.ends = [len(s) for s in sequences] if ends is None else list(ends)
        self.starts = None if starts is None else list(starts)
        keys = [self._key(i, s, roles) for i, s in enumerate(sequences)]
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.token: list[int] = []
        self.place: list[int] = []
        self.maker: list[int] = []
        self.paths: list[list[int]] = [[] for _ in sequences]
        self.shared: list[int] = []
        """How much of each sequence, in `order`, the one before it begins with."""
        before: tuple[Any, ...] = ()
        path: list[int] = []
        for i in self.order:
            key = keys[i]
            n = common_prefix(before, key)
            new = range(len(self.token), len(self.token) + len(key) - n)
            self.token += sequences[i][n:]
            self.place += range(n, len(key))
            self.maker += [i] * len(new)
            path = path[:n] + list(new)
            self.paths[i] = path
            self.shared.append(n)
            before = key

    def __len__(self) -> int:
        """Distinct prefixes: what is computed once."""
        return len(self.token)

    def _key(self, i: int, sequence: Sequence[int], roles: frozenset[str]) -> tuple[Any, ...]:
        """The sequence's tokens, each with the part it plays where an open edit asks for it."""
        if not roles:
            return tuple(sequence)
        end, start = self.ends[i], 0 if self.starts is None else self.starts[i]
        plays = {"last": lambda p: p == end - 1, "subject": lambda p: p >= start, "prompt": lambda p: p < end, "generated": lambda p: p >= end}  # fmt: skip
        asked = [plays[role] for role in _ROLES if role in roles]
        return tuple((token, *(f(p) for f in asked)) for p, token in enumerate(sequence))

    def rows(
        self, price: float, *, longest: int = ROW_TOKENS, among: Container[int] | None = None
    ) -> list[Row]:
        """Whole paths (of the sequences `among` all) in rows of at most `longest` tokens, or of one longer path.

        Longer rows share more, shorter ones attend over less: of all cuts of the preorder into rows, the one in which Σ n (1 + price n)
        over the rows' lengths n is least. price: what attending to one more column costs a token, relative to its passage through the weights.
        """
        paths, common, owners = self._whole_paths(among)
        rows: list[Row] = []
        for start, stop in _cuts([len(p) for p in paths], common, price, longest):
            row, columns = Row(), []
            for k in range(start, stop):
                columns = row.add(paths[k], columns[: common[k]])
                row.sequences += owners[k]
            rows.append(row)
        return rows

    def _whole_paths(
        self, among: Container[int] | None
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """Paths that none other goes on from, what each shares with the one before it, and the sequences on it that end no earlier path."""
        paths: list[list[int]] = []
        common: list[int] = []
        owners: list[list[int]] = []
        shared = 0
        for k, i in enumerate(self.order):
            shared = min(shared, self.shared[k])
            if among is not None and i not in among:
                continue
            if paths and shared == len(paths[-1]):  # it goes on from there
                paths[-1] = self.paths[i]
                owners[-1].append(i)
            else:
                paths.append(self.paths[i])
                common.append(shared)
                owners.append([i])
            shared = len(paths[-1])
        return paths, common, owners


def _cuts(lengths: Sequence[int], common: Sequence[int], price: float, longest: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of paths, one a row, of least Σ n (1 + price n): least(b) = min over a of least(a) + cost of the row a..b."""
    own, shared = np.array(lengths), np.array(common)
    total = np.concatenate([[0], np.cumsum(own - shared)])
    least, cut = np.zeros(len(own) + 1), np.zeros(len(own), dtype=int)
    first = 0
    for b in range(len(own)):
        while total[b + 1] - total[first] + shared[first] > longest and first < b:
            first += 1
        sizes = total[b + 1] - total[first : b + 1] + shared[first : b + 1]
        cost = least[first : b + 1] + sizes * (1 + price * sizes)
        cost[:-1][sizes[:-1] > longest] = np.inf
        cut[b] = first + int(cost.argmin())
        least[b + 1] = cost[cut[b] - first]
    out, stop = [], len(own)
    while stop:
        out.append((int(cut[stop - 1]), stop))
        stop = out[-1][0]
    return out[::-1]


@dataclass
class Row:
    """One row of a packed pass."""

    nodes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Column of each node's parent; -1 at the first."""
    sequences: list[int] = field(default_factory=list)
    """Those whose whole path is here."""
    ids: np.ndarray | None = None
    """What `pack` makes of it, kept: tokens, places, weights, prompt ends, subject starts, ends of subtrees."""

    def add(self, path: Sequence[int], columns: list[int]) -> list[int]:
        """Append what `path` has after its nodes at `columns`; the columns of all of it."""
        start, n = len(self.nodes), len(path) - len(columns)
        new = list(range(start, start + n))
        self.parents += [columns[-1] if columns else -1, *new[:-1]] if n else []
        self.nodes += path[len(columns) :]
        return columns + new


@dataclass(frozen=True)
class Packed:
    """Rows of one pass; padded columns attend to themselves and are read by nobody."""

    tokens: Tokens
    place: Int[Tensor, "batch pos"]
    """Position of each token in its own sequence."""
    weight: Int[Tensor, "batch pos"]
    """Sequences that each token stands for; 0 where padded."""
    prompt_len: Int[Tensor, "batch pos"]
    subject_start: Int[Tensor, "batch pos"] | None
    attends: Bool[Tensor, "batch pos pos"]

    def arguments(self, model: Model) -> dict[str, Any]:
        """Position ids and masks, as the decoder takes them."""
        window = getattr(model.config, "sliding_window", None)
        near = self.place[:, :, None] - self.place[:, None, :] < (window or 1 << 60)
        if model.arch.masks == "by_type":
            masks: Any = {"full_attention": self._mask(model, self.attends)}
            masks["sliding_attention"] = self._mask(model, self.attends & near)
        else:
            masks = self._mask(model, self.attends & near)
        return {"position_ids": self.place, "attention_mask": masks}

    def _mask(self, model: Model, attends: Tensor) -> Tensor:
        closed = torch.finfo(model.dtype).min
        mask = torch.zeros(attends.shape, dtype=model.dtype, device=attends.device)
        return mask.masked_fill_(~attends, closed)[:, None]


def pack(tree: Tree, rows: Sequence[Row], device: torch.device) -> Packed:
    """The rows of one pass as tensors."""
    width = max(len(r.nodes) for r in rows)
    columns = np.arange(width)
    ids = np.zeros((6, len(rows), width), dtype=np.int64)
    ids[5] = columns + 1
    for b, row in enumerate(rows):
        if row.ids is None:
            row.ids = _ids(tree, row)
        ids[:, b, : len(row.nodes)] = row.ids
    ends = ids[5][:, None, :]
    attends = (columns[None, :] <= columns[:, None]) & (columns[:, None] < ends)
    tokens, place, weight, end, start = torch.from_numpy(ids[:5]).to(device)
    return Packed(tokens, place, weight, end, None if tree.starts is None else start, torch.from_numpy(attends).to(device))  # fmt: skip


def _ids(tree: Tree, row: Row) -> Int[np.ndarray, "6 n"]:
    makers = [tree.maker[v] for v in row.nodes]
    weight, end = _weights_and_ends(tree, row)
    starts = [0] * len(makers) if tree.starts is None else [tree.starts[i] for i in makers]
    tokens, places = [tree.token[v] for v in row.nodes], [tree.place[v] for v in row.nodes]
    return np.array([tokens, places, weight, [tree.ends[i] for i in makers], starts, end], dtype=np.int64)


def _weights_and_ends(tree: Tree, row: Row) -> tuple[list[int], list[int]]:
    """Of each column, the sequences of this row that pass through it, and the column after its subtree."""
    column = {v: c for c, v in enumerate(row.nodes)}
    weight, end = [0] * len(row.nodes), list(range(1, len(row.nodes) + 1))
    for i in row.sequences:
        weight[column[tree.paths[i][-1]]] += 1
    for c in range(len(row.nodes) - 1, 0, -1):
        if (above := row.parents[c]) >= 0:
            weight[above] += weight[c]
            end[above] = max(end[above], end[c])
    return weight, end


# ── which way a set of sequences is run
def packs(model: Model) -> bool:
    """Whether the model's passes can be packed now: float32 (in bfloat16 another order of sums is another number), a record that names
    its masks, no foreign hooks, edits that act position by position."""
    exact = model.dtype in (torch.float32, torch.float64) and model.device_map is None
    return exact and model.arch.packs(model.config) and _open_roles(model) is not None and not model.foreign_hooks()  # fmt: skip


def _open_roles(model: Model) -> frozenset[str] | None:
    """Positions at which open edits act, other than all; None where one of them needs whole sequences."""
    return frozenset() if model._edits is None else model._edits.roles


def attention_price(weights: int, heads: int, d_model: int) -> float:
    """Multiplications of a token for each column that its row attends over, relative to those of its passage through a layer.

    Norms, rotations and sums take as long as some thousand multiplications for each of d_model (measured on Gemma 3 270M).
    weights: of a layer; heads: their number times their width.
    """
    return 2 * heads / (weights + 1000 * d_model)


def _price(model: Model) -> float:
    n = model.config.num_attention_heads
    head = vars(model.config).get("head_dim") or model.d_model // n  # Gemma 4's differs between layers
    return attention_price(sum(p.numel() for p in model.layer(0).parameters()), n * head, model.d_model)


def passes_of(rows: Sequence[Row], budget: int, padded: int) -> list[list[Row]]:
    """Rows of about one length together, at most `budget` tokens a pass and `padded` of padding."""
    size = lambda row: len(row.nodes)  # noqa: E731
    return list(in_passes(sorted(rows, key=lambda row: -size(row)), size, budget, padded))


def in_passes(rows: Iterable[R], size: Callable[[R], int], budget: int, padded: int) -> Iterator[list[R]]:
    """Neighbors (the longest first) within `budget` tokens a pass, and `padded` of padding."""
    group: list[R] = []
    padding = 0
    for row in rows:
        widest = size(group[0]) if group else size(row)
        padding += widest - size(row)
        if group and ((len(group) + 1) * widest > budget or padding > padded):
            yield group
            group, padding = [], 0
        group.append(row)
    if group:
        yield group


Partner = tuple[Sequence[int], int]
"""The paired prompt of a sequence, and how many positions from the right stand for each other."""


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
        batch_size: int | None = None,
    ):
        """`positions`: those read of each sequence (its last by default)."""
        self.model, self.sequences = model, sequences
        self.wanted = [[len(s) - 1] for s in sequences] if positions is None else positions
        self.ends, self.starts, self.partners = ends, starts, partners
        self._plain = plan_batches(sequences, model.device, batch_size=batch_size)
        self._packed = self._choose(batch_size) if len(sequences) and packs(model) else []
        self.slots, self.n = self._numbered()
        self.done = 0  # tokens computed so far
        self.kept: dict[
            int, Tensor
        ] = {}  # resid_post [n_nodes, d_model] by layer, where the passes were packed

    @property
    def n_tokens(self) -> int:
        """Tokens that the passes compute, padding included."""
        if self._packed:
            return sum(len(rows) * len(rows[0].nodes) for rows in self._packed)
        return sum(b.tokens.numel() for b in self._plain)

    def _choose(self, batch_size: int | None) -> list[list[Row]]:
        """The packed passes that cost least; none where sequences of one length together cost less.

        Which sequences stand in a row does not hang on `batch_size`, which bounds the rows of a pass.
        """
        roles = _open_roles(self.model)
        self.tree = Tree(self.sequences, self.ends, self.starts, roles=roles or frozenset())
        longest = max(map(len, self.sequences))
        kind = self.model.device.type
        budget, padded = BATCH_TOKENS.get(kind, BATCH_TOKENS["cpu"]), PADDED.get(kind, PADDED["cpu"])
        self.price = _price(self.model)
        rows = self.tree.rows(self.price)
        packed = [(len(p), len(p[0].nodes)) for p in passes_of(rows, budget, padded)]
        if self._cost(packed) >= self._cost([(b.n, b.tokens.shape[1]) for b in self._plain]):
            return []
        return passes_of(rows, min(budget, batch_size * longest) if batch_size else budget, padded)

    def _cost(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Of passes of [rows, length], in tokens through the weights."""
        return sum(b * n * (1 + self.price * n) for b, n in shapes)

    def _numbered(self) -> tuple[list[list[int]], int]:
        if not self._packed:
            slots, n = [], 0
            for wanted in self.wanted:
                slots.append(list(range(n, n + len(wanted))))
                n += len(wanted)
            return slots, n
        number: dict[int, int] = {}
        paths = self.tree.paths
        slots = [[number.setdefault(path[p], len(number)) for p in wanted] for path, wanted in zip(paths, self.wanted)]  # fmt: skip
        self._number = number
        return slots, len(number)

    @property
    def packed(self) -> bool:
        """Whether the sequences run as a tree."""
        return bool(self._packed)

    def run(self, keep: Sequence[int] = ()) -> Iterator[tuple[list[int], Final]]:
        """Numbers of the results of each pass, and its end [n, 1] at those positions, under whatever is open on the model.

        keep: layers whose residuals stay in `kept`, where the passes are packed.
        """
        return self._run_packed(keep) if self._packed else self._run_plain()

    def keep(self, layer: int) -> Tensor:
        """resid_post [n_nodes, d_model] at one layer, run where it is not kept yet."""
        if layer not in self.kept:
            for rows in self._packed:
                packed = pack(self.tree, rows, self.model.device)
                self._store(rows, capture_layers(self.model, packed.tokens, [layer], packed=packed))
        return self.kept[layer]

    def _store(self, rows: Sequence[Row], seen: Mapping[int, Tensor]) -> None:
        for layer, x in seen.items():
            kept = self.kept.setdefault(layer, x.new_empty(len(self.tree), x.shape[-1]))
            for b, row in enumerate(rows):
                kept[row.nodes] = x[b, : len(row.nodes)]

    def _run_packed(self, keep: Sequence[int]) -> Iterator[tuple[list[int], Final]]:
        done: set[int] = set()
        for rows in self._packed:
            spots = []
            for b, row in enumerate(rows):
                spots += [
                    (self._number[v], b, c)
                    for c, v in enumerate(row.nodes)
                    if v in self._number and v not in done
                ]
                done.update(row.nodes)
            with keeping(self.model, keep) as seen:
                final = run_packed(self.model, pack(self.tree, rows, self.model.device))
            self._store(rows, seen)
            self.done += len(rows) * len(rows[0].nodes)
            if not spots:
                continue
            numbers, at, columns = map(list, zip(*spots))
            final = final.spots(at, columns)
            assert final.resid is not None
            if bool(torch.isfinite(final.resid).all()):
                yield numbers, final
            else:  # one NaN would reach all of its row
                yield from self._alone([i for row in rows for i in row.sequences], set(numbers))

    def _alone(self, sequences: Sequence[int], wanted: set[int]) -> Iterator[tuple[list[int], Final]]:
        """The wanted results of some sequences, run as they are: what is not finite stays where it is."""
        for i in sequences:
            spots = [(slot, p) for slot, p in zip(self.slots[i], self.wanted[i]) if slot in wanted]
            wanted -= {slot for slot, _ in spots}
            if spots:
                ends, starts = (None if v is None else torch.tensor([v[i]]) for v in (self.ends, self.starts))
                with row_positions(self.model, ends, starts):
                    final = forward(self.model, torch.tensor([list(self.sequences[i])], device=self.model.device))  # fmt: skip
                yield [slot for slot, _ in spots], final.spots([0] * len(spots), [p for _, p in spots])

    @torch.no_grad()
    def _run_plain(self) -> Iterator[tuple[list[int], Final]]:
        for batch in self._plain:
            ends = None if self.ends is None else torch.tensor([self.ends[i] for i in batch.index])
            starts = None if self.starts is None else torch.tensor([self.starts[i] for i in batch.index])
            with row_positions(self.model, ends, starts, self.partners_of(batch.index)):
                final = forward(self.model, batch.tokens)
            self.done += batch.tokens.numel()
            spots = [(slot, b, p) for b, i in enumerate(batch.index) for slot, p in zip(self.slots[i], self.wanted[i])]  # fmt: skip
            if spots:
                numbers, at, columns = map(list, zip(*spots))
                yield numbers, final.spots(at, columns)

    def partners_of(self, rows: Sequence[int]) -> Partners | None:
        """The paired prompts of some sequences; None where one has none."""
        found = [None if self.partners is None else self.partners[i] for i in rows]
        known = [f for f in found if f is not None]
        if len(known) < len(found):
            return None
        return Partners(tuple(tuple(ids) for ids, _ in known), torch.tensor([n for _, n in known]))


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


Spot = tuple[int, int]
"""(sequence, position) of one reader."""


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
    reads: Reads, readers: Sequence[Reader], *, keep: Sequence[int] = (), progress: bool = False, describe: str = ""
) -> None:  # fmt: skip
    """Run the passes, and hand each reader (their sequences stand one after another) what it wants of them."""
    owners: list[dict[int, list[Spot]]] = []
    first = 0
    for reader in readers:
        rows = slice(first, first + len(reader.sequences))
        owners.append(spots_by(reads.slots[rows], reads.wanted[rows]))
        first = rows.stop
    with tqdm(total=reads.n_tokens, desc=describe, unit="token", unit_scale=True, disable=not progress, leave=False) as bar:  # fmt: skip
        for numbers, final in reads.run(keep):
            for reader, owned in zip(readers, owners):
                rows = [row for row, number in enumerate(numbers) if number in owned]
                if rows:
                    mine = final if len(rows) == len(numbers) else final.spots(rows, [0] * len(rows))
                    reader.take([owned[numbers[row]] for row in rows], mine)
            bar.update(reads.done - bar.n)


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


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens two prompts share from the start: where the subject begins."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
