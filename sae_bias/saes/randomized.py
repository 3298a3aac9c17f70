"""A randomized SAE: what a search finds in one is the yield of the search itself (docs/method.md#controls).

    h = x · W_enc[π] + b',    a' as in the SAE,    decoder rows drawn at random, as long as the SAE's own

π shuffles the rows of W_enc over the residual's dimensions, and each b' makes its feature fire as often on given residuals as before: as
sparse, as loud to write with, and of no meaning. It is kept in memory under the name `randomized-SEED/NAME`, for this process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.saes.ids import local_id
from sae_bias.saes.sae import Columns, Encoder, Sae

MADE: dict[str, Sae] = {}
"""Those of this process, by name: `load_sae` finds them here."""


@dataclass(frozen=True, eq=False)
class _Shuffled:
    """The numbers of a randomized SAE, made from the SAE's own when they are asked for."""

    own: Encoder
    order: Tensor
    bias: Float[Tensor, "d_sae"]
    seed: int

    @property
    def d_in(self) -> int:
        return self.own.d_in

    @property
    def d_sae(self) -> int:
        return self.own.d_sae

    def columns(self, start: int, stop: int) -> Columns:
        own = self.own.columns(start, stop)
        return Columns(own.w_enc[self.order].contiguous(), self.bias[start:stop], own.threshold)

    def decoder_rows(self, indices: Sequence[int]) -> Float[Tensor, "n d_model"]:
        drawn = [np.random.default_rng((self.seed, 1, int(i))).standard_normal(self.d_in) for i in indices]
        rows = torch.from_numpy(np.array(drawn).reshape(-1, self.d_in)).float()
        length = self.own.decoder_rows(indices).norm(dim=1, keepdim=True)
        return rows / rows.norm(dim=1, keepdim=True) * length

    def b_dec(self) -> Float[Tensor, "d_model"]:
        return self.own.b_dec()


@torch.no_grad()
def randomized_sae(sae: Sae, resid: Float[Tensor, "n d_model"], seed: int = 0) -> Sae:
    """`sae` with shuffled encoder rows and a random decoder, each feature as often active on `resid` as before.

    Raises:
        RequestError: an SAE whose activation is not one encoder column's (TopK, gated, normalized input).
    """
    if not sae.reduces_to_one_row:
        raise RequestError(
            f"{sae.id} ({sae.architecture}) encodes all features at once; only (Jump)ReLU SAEs can be randomized."
        )
    order = torch.from_numpy(np.random.default_rng((seed, 0)).permutation(sae.d_in))
    x, parts = resid.float().cpu(), []
    for start, stop in sae.blocks(1 << 22):
        own = sae.columns(start, stop)
        live = (x @ own.w_enc + own.b_enc > own.threshold).sum(0).clamp(max=len(x) - 1)
        shuffled = (x @ own.w_enc[order]).sort(0, descending=True).values
        shuffled = torch.cat([shuffled[:1] + 1, shuffled])  # so that a feature may stay silent
        between = (shuffled.gather(0, live[None]) + shuffled.gather(0, live[None] + 1))[0] / 2
        parts.append(own.threshold - between)
    name = f"randomized-{seed}/{sae.id}"
    encoder = _Shuffled(sae.encoder, order, torch.cat(parts), seed)
    info = replace(sae.info, notes=(f"randomized control of {sae.id}",))
    MADE[name] = Sae(local_id(name), encoder, info)
    return MADE[name]
