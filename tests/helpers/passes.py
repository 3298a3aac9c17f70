"""How many tokens pass a model: what a computation costs, in a unit that no clock changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sae_bias.models.model import ours


@dataclass
class Count:
    """Tokens that each counted layer saw."""

    by_layer: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Those of the first layer."""
        return self.by_layer.get(0, 0)


@contextmanager
def layer_tokens(model: Any, layers: tuple[int, ...] = (0,)) -> Iterator[Count]:
    """Counts every token, padding included, that passes the layers inside the block."""
    count = Count()

    def make(layer: int) -> Any:
        @ours
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            count.by_layer[layer] = count.by_layer.get(layer, 0) + x.shape[:2].numel()

        return hook

    handles = [model.layer(i).register_forward_pre_hook(make(i), with_kwargs=True) for i in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Unedited:
    """Prefixes that passed the first layer without edits."""

    seen: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How often each passed."""
    read: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Of those at the end of a row's path: whole sequences."""

    @property
    def tokens(self) -> int:
        return self.seen.total()

    @property
    def again(self) -> int:
        """Tokens of whole sequences that passed once already."""
        return sum(len(s) * (n - 1) for s, n in self.read.items())


def count_unedited(model: Any) -> Unedited:
    """Counts every prefix that passes the model unedited, from now on."""
    found, now = Unedited(), []

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        now[:] = [args[0] if args else kwargs["input_ids"], model.row_tree, model._edits is not None]

    def first(module: Any, args: Any, kwargs: Any) -> None:  # not called where a pass is resumed above it
        tokens, tree, edited = now
        if edited:
            return
        for b, row in enumerate(tokens.tolist()):
            places = range(len(row)) if tree is None else tree.place[b][tree.weight[b] > 0].tolist()
            path: list[int] = []
            for c, (token, place) in enumerate(zip(row, places)):
                path[place:] = [token]
                found.seen[tuple(path)] += 1
                if c + 1 == len(places) or places[c + 1] != place + 1:
                    found.read[tuple(path)] += 1

    model.base.register_forward_pre_hook(ours(begin), with_kwargs=True)
    model.layer(0).register_forward_pre_hook(ours(first), with_kwargs=True)
    return found
