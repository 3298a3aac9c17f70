"""Features that point the same way: decoder-cosine families, and the counterpart in a twin SAE of another seed.

A trained SAE splits a concept over several features (docs/method.md#joint-ablation), so a list of the ten best may be one direction ten times. A
feature belongs to the family of the strongest feature above it whose decoder row has a cosine over 0.7 with its own. A
release's `_seed_1` SAE was trained on the same data from another seed: a feature found in both is less likely an accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.sae import Sae

COSINE = 0.7
MOST = 512  # features, from the top of a ranking, whose decoder rows are compared
_SEED = "_seed_1"


@dataclass(frozen=True)
class Neighbour:
    """One feature and how parallel its decoder row is."""

    ref: FeatureRef
    cosine: float


def decoder_directions(saes: Mapping[str, Sae], refs: Sequence[FeatureRef]) -> Float[Tensor, "n d_model"]:
    """Unit decoder rows of the given features (of `saes`, by their ids)."""
    rows = torch.empty(len(refs), next(iter(saes.values())).d_in, dtype=torch.float32)
    for name, sae in saes.items():
        mine = [i for i, ref in enumerate(refs) if str(ref.sae) == name]
        order = sorted(mine, key=lambda i: refs[i].index)  # neighbors in the file are one read
        if order:
            rows[order] = sae.W_dec_rows([refs[i].index for i in order]).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def decoder_families(directions: Float[Tensor, "n d_model"], cosine: float = COSINE) -> np.ndarray:
    """Place of each feature's family head, going down from the strongest; a head's own place is itself."""
    heads: list[int] = []
    place = np.empty(len(directions), dtype=np.int64)
    parallel = (directions @ directions.T).numpy()
    for i in range(len(directions)):
        head = next((h for h in heads if parallel[i, h] > cosine), i)
        if head == i:
            heads.append(i)
        place[i] = head
    return place


def nearest_rows(
    sae: Sae, direction: Float[Tensor, "d_model"], k: int, *, leave_out: int | None = None
) -> list[Neighbour]:
    """The k features of `sae` whose decoder rows are most parallel to `direction`; the decoder is streamed once."""
    unit = direction.float() / direction.float().norm().clamp(min=1e-12)
    best: list[tuple[float, int]] = []
    for start, stop in sae.blocks():
        rows = sae.W_dec_rows(range(start, stop)).float()
        cosines = (rows @ unit) / rows.norm(dim=1).clamp(min=1e-12)
        if leave_out is not None and start <= leave_out < start + len(cosines):
            cosines[leave_out - start] = -torch.inf
        top = cosines.topk(min(k, len(cosines)))
        best += [(float(c), start + int(i)) for c, i in zip(top.values, top.indices) if torch.isfinite(c)]
        best = sorted(best, reverse=True)[:k]
    return [Neighbour(FeatureRef(sae.id, index), value) for value, index in best]


def twin_id(sae: Sae) -> str:
    """The name of an SAE's seed twin: `…_seed_1` of a plain name, the plain name of a `…_seed_1`."""
    name = str(sae.id)
    return name.removesuffix(_SEED) if name.endswith(_SEED) else name + _SEED


def twins_among(saes: Sequence[Sae]) -> dict[str, Sae]:
    """SAE id → its seed twin, for those of which both are given."""
    by_name = {str(s.id): s for s in saes}
    return {name: by_name[twin_id(s)] for name, s in by_name.items() if twin_id(s) in by_name}
