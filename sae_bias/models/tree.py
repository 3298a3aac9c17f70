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

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_bias.core.types import Tokens
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
        apart: Sequence[Sequence[Any]] | None = None,
    ):
        """`ends`, `starts`: of each sequence the end of its prompt and the start of its subject; `roles`: which of them keep tokens apart.

        apart: what else does, for each token of each sequence; it must sort.
        """
        self.ends = [len(s) for s in sequences] if ends is None else list(ends)
        self.starts = None if starts is None else list(starts)
        keys = [self._key(i, s, roles) for i, s in enumerate(sequences)]
        if apart is not None:
            keys = [tuple(zip(key, more)) for key, more in zip(keys, apart)]
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
    return exact and model.arch.packs(model.config) and open_roles(model) is not None and not model.foreign_hooks()  # fmt: skip


def open_roles(model: Model) -> frozenset[str] | None:
    """Positions at which open edits act, other than all; None where one of them needs whole sequences."""
    return frozenset() if model._edits is None else model._edits.roles


def attention_price(weights: int, heads: int, d_model: int) -> float:
    """Multiplications of a token for each column that its row attends over, relative to those of its passage through a layer.

    Norms, rotations and sums take as long as some thousand multiplications for each of d_model (measured on Gemma 3 270M).
    weights: of a layer; heads: their number times their width.
    """
    return 2 * heads / (weights + 1000 * d_model)


def price_of(model: Model) -> float:
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


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many tokens two prompts share from the start: where the subject begins."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
