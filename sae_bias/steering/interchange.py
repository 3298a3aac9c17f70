"""Interchange between the two prompts of a pair: positions matched from the right over their identical suffix.

    x'_p = x_p + (g(y)_q - g(x)_p)      p, q equally far from the end, both within the suffix the two prompts share

with x one side's residual at a layer, y the other side's, and g what is interchanged: the residual itself, the SAE's error, its
reconstruction, or one feature's part a·δ (Geiger et al. 2021, arXiv:2106.02997, interchange interventions). Subjects may differ
in length; they are left alone, so what is exchanged is what the subject has already written into the words after it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae_bias.models.reads import Reads
from sae_bias.probe.reading import PlanReader, ReadingPlan
from sae_bias.steering.engine import ProbeEngine

HUMAN, AI = 0, 1
Part = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n d_model"]]
"""What of a residual is interchanged, row by row."""
Scale = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n"] | None]
"""How much a normalizing SAE multiplies its decoder rows by, at each residual; None where it is 1 everywhere."""


class Side:
    """One side's sequences: tokens that would take over the same residual at the same distance from the end are one node."""

    def __init__(self, engine: ProbeEngine, places: np.ndarray, suffix: np.ndarray, side: int):
        plan, base = engine.reading.plan, engine.engine.runner.reads
        k = len(plan.prefixes)
        self.plan = ReadingPlan(
            engine.model, [plan.prompts[i] for i in places[:, side]], plan.words, normalise=plan.normalise, softcap=plan.softcap
        )  # fmt: skip
        self.sequences = (places[:, side, None] * k + np.arange(k)).ravel()
        """Of each sequence, its number among the engine's."""
        paths, apart = [], []
        for pair, (own, other) in enumerate(places[:, [side, 1 - side]]):
            end = len(plan.prompts[own].ids)
            for j in range(k):
                path, twin = base.paths[own * k + j], base.paths[other * k + j]
                first = end - int(suffix[pair])
                given = twin[len(twin) - len(path) + first :]
                paths.append(path)
                apart.append([(-1, 0)] * first + [(v, end - 1 - p) for p, v in enumerate(given, first)])
        self.reads = Reads(engine.model, self.plan.sequences, apart=apart)
        self.own, self.donor, self.distance = (np.zeros(self.reads.n_nodes, dtype=np.int64) for _ in range(3))
        for nodes, path, tags in zip(self.reads.paths, paths, apart):
            self.own[nodes] = path
            self.donor[nodes], self.distance[nodes] = np.array(tags).T

    def takes(self, offset: int | None) -> np.ndarray:
        """Nodes that take something over: the whole suffix, or the position this far from the prompt's last token."""
        return np.flatnonzero((self.donor >= 0) & (True if offset is None else self.distance == offset))

    def through(self, changed: np.ndarray) -> list[int]:
        """Sequences that pass through a changed node."""
        return [i for i, path in enumerate(self.reads.paths) if changed[path].any()]


class Interchange:
    """The pairs of a probe engine, each side of which can be given parts of the other's residual."""

    def __init__(self, engine: ProbeEngine):
        self.engine, self.model = engine, engine.model
        prompts = engine.reading.plan.prompts
        self.places = np.asarray(engine.reading._place)  # [n_pairs, 2]: place of each prompt in the plan
        self.suffix = np.array([common_suffix(prompts[h].ids, prompts[a].ids) for h, a in self.places])
        self.sides = [Side(engine, self.places, self.suffix, side) for side in (HUMAN, AI)]
        self._stores: dict[tuple[int, str], Tensor] = {}

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
        values = self.values(layer, side, self.exchanged(layer, side, part, name, offset=offset, scale=scale))
        score = base.probe.score_values(values, base.positive)
        return base.score_human - score if side == AI else score - base.score_ai

    def forget(self) -> None:
        """Drop what was computed of the residuals so far: many features are asked for one after another."""
        self._stores.clear()

    def values(
        self, layer: int, side: int, resid: Float[Tensor, "n_nodes d_model"]
    ) -> Float[np.ndarray, "n_pairs n_words"]:
        """Word scores of one side's prompts whose residuals at `layer` are these; what is unchanged is not run again."""
        mine, known = self.sides[side], self.engine.engine.reader
        reader = PlanReader(mine.plan)
        reader.z[:] = known.z[mine.sequences]
        if reader.norm is not None and known.norm is not None:
            reader.norm[:] = known.norm[mine.sequences]
        changed = (resid != self.own(layer, side)).any(-1).cpu().numpy()
        mine.reads.resume(layer, resid, reader.take, among=mine.through(changed))
        return reader.reading().values

    def own(self, layer: int, side: int) -> Float[Tensor, "n_nodes d_model"]:
        """One side's unedited residuals."""
        return self.engine.engine.runner.reads.keep(layer)[self.sides[side].own]

    def exchanged(
        self, layer: int, side: int, part: Part | None, name: str, *, offset: int | None = None, scale: Scale | None = None
    ) -> Float[Tensor, "n_nodes d_model"]:  # fmt: skip
        """The same with the other side's part in the positions that the two prompts share."""
        mine, store, own = self.sides[side], self._store(layer, part, name), self.own(layer, side)
        nodes = mine.takes(offset)
        x = own[nodes].float()
        size = None if scale is None or not len(nodes) else scale(x)
        size = 1.0 if size is None else size[:, None]
        own[nodes] = (x + store[mine.donor[nodes]] * size - store[mine.own[nodes]] * size).to(own.dtype)
        return own

    def _store(self, layer: int, part: Part | None, name: str) -> Float[Tensor, "n_nodes d_model"]:
        """`part` of every kept residual."""
        if (layer, name) not in self._stores:
            x = self.engine.engine.runner.reads.keep(layer).float()
            self._stores[layer, name] = x if part is None else part(x)
        return self._stores[layer, name]


def common_suffix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two prompts share from the end."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n
