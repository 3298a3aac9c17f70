"""Interchange between the two prompts of a pair: positions matched from the right over their identical suffix.

    x'_p = x_p + (g(y)_q - g(x)_p)      p, q equally far from the end, both within the suffix the two prompts share

with x one side's residual at a layer, y the other side's, and g what is interchanged: the residual itself, the SAE's error, its
reconstruction, or one feature's part a·δ (Geiger et al. 2021, arXiv:2106.02997, interchange interventions). Subjects may differ
in length; they are left alone, so what is exchanged is what the subject has already written into the words after it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.models.forward import Batch, Kept, forward, row_positions
from sae_bias.probe.reading import Read, ReadingPlan
from sae_bias.steering.engine import ProbeEngine

HUMAN, AI = 0, 1
Part = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n d_model"]]
"""What of a residual is interchanged, row by row."""
Scale = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n"] | None]
"""How much a normalizing SAE multiplies its decoder rows by, at each residual; None where it is 1 everywhere."""


class Interchange:
    """The pairs of a probe engine, each side of which can be given parts of the other's residual."""

    def __init__(self, engine: ProbeEngine):
        self.engine, self.model = engine, engine.model
        plan = engine.reading.plan
        self.places = np.asarray(engine.reading._place)  # [n_pairs, 2]: place of each prompt in the plan
        self.n_prefixes = len(plan.prefixes)
        self.plans = [
            ReadingPlan(
                self.model, [plan.prompts[i] for i in side], plan.words, normalise=plan.normalise, softcap=plan.softcap
            )
            for side in self.places.T
        ]  # fmt: skip
        self.suffix = np.array(
            [common_suffix(plan.prompts[h].ids, plan.prompts[a].ids) for h, a in self.places]
        )
        self._where = {
            sequence: (k, row) for k, batch in enumerate(plan.batches) for row, sequence in enumerate(batch.index)
        }  # fmt: skip
        self._stores: dict[tuple[int, str], list[Tensor]] = {}

    @property
    def longest(self) -> int:
        """The longest identical suffix, in tokens."""
        return int(self.suffix.max())

    def bias(
        self,
        layer: int,
        side: int,
        part: Part | None,
        name: str,
        *,
        offset: int | None = None,
        scale: Scale | None = None,
    ) -> Float[np.ndarray, "n_pairs"]:
        """s(human) - s(AI) of each pair when `side` takes over the other side's part at `layer`.

        offset: only the position this far from the prompt's last token (0 is the last); None is the whole suffix. `name`
        says which part is meant, so that it is computed once. `scale` of the edited residual multiplies what is exchanged.
        """
        base = self.engine.base
        values = self._values(layer, side, part, name, offset, scale)
        score = base.probe.score_values(values, base.positive)
        return base.score_human - score if side == AI else score - base.score_ai

    def forget(self) -> None:
        """Drop what was computed of the residuals so far: many features are asked for one after another."""
        self._stores.clear()

    def _values(
        self, layer: int, side: int, part: Part | None, name: str, offset: int | None, scale: Scale | None
    ) -> np.ndarray:
        plan = self.plans[side]

        def one(batch: Batch) -> Read:
            resid = self.exchanged(layer, side, batch, part, name, offset=offset, scale=scale)
            with row_positions(self.model, *plan.rows(batch)):
                return plan.read(forward(self.model, batch.tokens, resume=Kept(layer, resid)))

        return plan.assemble(one).values

    def own(self, layer: int, side: int, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
        """One side's unedited residuals of a batch of its plan."""
        kept = self.engine.engine.runner.kept(layer)
        return torch.stack([kept[k][row] for k, row in (self._at(i, side) for i in batch.index)])

    def exchanged(
        self, layer: int, side: int, batch: Batch, part: Part | None, name: str, *, offset: int | None = None, scale: Scale | None = None
    ) -> Float[Tensor, "batch pos d_model"]:  # fmt: skip
        """The same with the other side's part in the positions that the two prompts share."""
        plan, kept, store = (
            self.plans[side],
            self.engine.engine.runner.kept(layer),
            self._store(layer, part, name),
        )
        rows = []
        for sequence in batch.index:
            pair = sequence // self.n_prefixes
            (k, row), (k_other, row_other) = (self._at(sequence, of) for of in (side, 1 - side))
            x = kept[k][row].float().clone()
            first, last = self._span(pair, batch.tokens.shape[1], plan.prompts[pair].ids, offset)
            if first < last:
                shift = store[k_other].shape[1] - x.shape[0]
                own = x[first:last].clone()
                size = None if scale is None else scale(own)
                size = 1.0 if size is None else size[:, None]
                x[first:last] += store[k_other][row_other, first + shift : last + shift] * size
                x[first:last] -= store[k][row, first:last] * size
            rows.append(x.to(kept[k].dtype))
        return torch.stack(rows)

    def _at(self, sequence: int, of: int) -> tuple[int, int]:
        """Batch and row at which a pair's residual of one side is kept."""
        pair, prefix = divmod(sequence, self.n_prefixes)
        return self._where[int(self.places[pair, of]) * self.n_prefixes + prefix]

    def _span(self, pair: int, length: int, prompt: tuple[int, ...], offset: int | None) -> tuple[int, int]:
        """Positions [first, last) that are interchanged; a prompt's scored word pieces belong to the whole suffix."""
        end, n = len(prompt), int(self.suffix[pair])
        if offset is None:
            return end - n, length
        return (end - 1 - offset, end - offset) if offset < n else (0, 0)

    def _store(self, layer: int, part: Part | None, name: str) -> list[Tensor]:
        """`part` of every kept residual, batch by batch."""
        key = (layer, name)
        if key not in self._stores:
            kept = [x.float() for x in self.engine.engine.runner.kept(layer)]
            if part is not None:
                sizes = [x.shape[:2] for x in kept]
                flat = part(torch.cat([x.flatten(0, 1) for x in kept]))
                pieces = flat.split([b * p for b, p in sizes])
                kept = [piece.unflatten(0, size) for piece, size in zip(pieces, sizes)]
            self._stores[key] = kept
        return self._stores[key]


def common_suffix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two prompts share from the end."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
