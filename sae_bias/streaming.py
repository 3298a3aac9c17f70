"""Feature activations of many residuals, a block of the SAE's columns at a time: never tokens × d_sae."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.sae import Sae

BLOCK_BYTES = 64 * 2**20  # of encoder columns held at once


def block_width(d_in: int) -> int:
    """Columns of a float32 encoder that fit in a block."""
    return max(256, BLOCK_BYTES // (4 * d_in))


@torch.no_grad()
def acts_blocks(
    sae: Sae, x: Float[Tensor, "n d_in"], *, decoder: bool = False
) -> Iterator[tuple[int, Float[Tensor, "n block"], Float[Tensor, "block d_in"] | None]]:
    """(first column, activations, decoder rows or None) of each block, on x's device.

    An SAE whose encoder does not reduce to single columns (TopK, gated, normalised input) is encoded whole, a chunk of x at
    a time, and cut into blocks afterwards.
    """
    x = x.float()
    width = block_width(sae.d_in)
    full = (
        None
        if sae.reduces_to_one_row
        else torch.cat([sae.encode(part).to(x.device) for part in x.split(1024)])
    )
    for start in range(0, sae.d_sae, width):
        stop = min(start + width, sae.d_sae)
        if full is not None:
            acts = full[:, start:stop]
        else:
            w_enc, b_enc, threshold = (t.to(x.device) for t in sae.columns(start, stop))
            h = torch.addmm(b_enc, x, w_enc)
            acts = h * (h > threshold)
        rows = sae.W_dec_rows(range(start, stop)).to(x.device) if decoder else None
        yield start, acts, rows
