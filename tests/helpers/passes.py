"""How many tokens pass a model: what a computation costs, in a unit that no clock changes."""

from __future__ import annotations

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
