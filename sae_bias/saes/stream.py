"""Feature activations of many residuals, a block of the SAE's columns at a time: never tokens × d_sae."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_bias.saes.sae import Sae

TILE_ROWS, COLUMNS = 512, 512
"""Of a tile: with its columns and its product, about 2 MB."""
BLOCK_BYTES = 64 * 2**20  # of encoder columns held at once, and of the activations they give


def block_width(d_in: int, n_rows: int = 0) -> int:
    """Columns of a float32 encoder, and of n_rows activations, that fit in a block."""
    return max(256, BLOCK_BYTES // (4 * max(d_in, n_rows, 1)))


@torch.no_grad()
def acts_blocks(
    sae: Sae, x: Float[Tensor, "n d_in"], *, decoder: bool = False
) -> Iterator[tuple[int, Float[Tensor, "n block"], Float[Tensor, "block d_in"] | None]]:
    """(first column, activations, decoder rows or None) of each block, on x's device.

    An SAE whose encoder does not reduce to single columns (TopK, gated, normalized input) is encoded whole, a chunk of x at
    a time, and cut into blocks afterwards.
    """
    x = x.float()
    width = block_width(sae.d_in, len(x))
    full = None if sae.reduces_to_one_row else _encode_whole(sae, x)
    for start in range(0, sae.d_sae, width):
        stop = min(start + width, sae.d_sae)
        acts = sae.columns(start, stop).to(x.device).acts(x) if full is None else full[:, start:stop]
        rows = sae.W_dec_rows(range(start, stop)).to(x.device) if decoder else None
        yield start, acts, rows


class Entries(NamedTuple):
    """The activations of a block of columns that are not 0."""

    start: int
    """First column of the block."""
    row: Int[np.ndarray, "k"]
    column: Int[np.ndarray, "k"]
    """Within the block."""
    value: Float[np.ndarray, "k"]


@torch.no_grad()
def live_entries(sae: Sae, x: Float[Tensor, "n d_in"]) -> Iterator[Entries]:
    """The activations that are not 0, `COLUMNS` features at a time; in float64 where x is.

    On a CPU the product is made in tiles that stay in its cache: to write tokens × features to memory and read them again costs more
    than to compute them (measured at d_in 64: 2.3 times the product, against 0.6 in tiles).
    """
    x = x if x.dtype == torch.float64 else x.float()
    on_cpu = x.device.type == "cpu"
    full = None if sae.reduces_to_one_row else _encode_whole(sae, x)
    rows = TILE_ROWS if on_cpu else max(1, BLOCK_BYTES // (4 * COLUMNS))
    for start in range(0, sae.d_sae, COLUMNS):
        stop = min(start + COLUMNS, sae.d_sae)
        w_enc, b_enc, threshold = (t.contiguous().to(x.device, x.dtype) for t in sae.columns(start, stop))
        found: list[tuple[np.ndarray, np.ndarray]] = []
        fires, tile = np.empty((rows, stop - start), dtype=bool), x.new_empty(rows, stop - start)
        for at in range(0, len(x), rows):
            if full is None:
                part = x[at : at + rows]
                h, low = torch.addmm(b_enc, part, w_enc, out=tile[: len(part)]), threshold
            else:
                h, low = full[at : at + rows, start:stop], None
            place, value = _nonzero(h, low, fires) if on_cpu else _nonzero_on_device(h, low)
            found.append((place + at * (stop - start), value))
        place, value = (np.concatenate(part) for part in zip(*found))
        yield Entries(start, place // (stop - start), place % (stop - start), value)


def _nonzero(h: Tensor, threshold: Tensor | None, fires: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat places and values of what exceeds its threshold (is not 0, where none is given); numpy compares three times as fast as torch."""
    dense = h.numpy()
    fires = fires[: len(dense)]
    if threshold is None:
        np.not_equal(dense, 0, out=fires)
    else:
        np.greater(dense, threshold.numpy(), out=fires)
    place = np.flatnonzero(fires)
    return place, dense.ravel()[place]


def _nonzero_on_device(h: Tensor, threshold: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    fires = h != 0 if threshold is None else h > threshold
    place = fires.flatten().nonzero()[:, 0]
    return place.cpu().numpy(), h.flatten()[place].cpu().numpy()


@dataclass(frozen=True, eq=False)
class LiveBlock:
    """The features of one block that fire on some row; the silent ones are known by their absence."""

    index: Int[np.ndarray, "m"]
    """Their indices in the SAE."""
    acts: Float[np.ndarray, "n m"]
    """Float64 activations on the rows asked for."""
    density: Float[np.ndarray, "m"]
    """Share of the neutral rows on which each fires; NaN where none were given."""


@torch.no_grad()
def live_blocks(
    sae: Sae, x: Float[Tensor, "n d_in"], neutral: Float[Tensor, "k d_in"] | None = None
) -> Iterator[LiveBlock]:
    """Blocks of the features that fire somewhere on x.

    Most features of a wide SAE are silent on a few hundred prompts: only the live ones are copied, tested, and encoded on
    the neutral rows too, so that a scan costs little more than the matrix product x · W_enc.
    """
    x = x.float()
    if not sae.reduces_to_one_row:
        full, rest = _encode_whole(sae, x), None if neutral is None else _encode_whole(sae, neutral.float())
        live = (full > 0).any(0).nonzero()[:, 0]
        yield _live_block(live, full[:, live], None if rest is None else rest[:, live])
        return
    width = block_width(sae.d_in, len(x))
    for start in range(0, sae.d_sae, width):
        w_enc, b_enc, threshold = sae.columns(start, min(start + width, sae.d_sae)).to(x.device)
        h = torch.addmm(b_enc, x, w_enc)
        live = (h.amax(0) > threshold.clamp(min=0)).nonzero()[:, 0]
        acts = torch.where(h[:, live] > threshold[live], h[:, live], 0.0)
        rest = None
        if neutral is not None and len(live):
            rest = torch.addmm(b_enc[live], neutral.float(), w_enc[:, live]) > threshold[live]
        yield _live_block(start + live, acts, rest)


def _live_block(live: Tensor, acts: Tensor, on_neutral: Tensor | None) -> LiveBlock:
    density = (
        torch.full((len(live),), torch.nan, dtype=torch.float64)
        if on_neutral is None
        else (on_neutral > 0).cpu().double().mean(0)
    )
    return LiveBlock(live.cpu().numpy(), acts.cpu().double().numpy(), density.cpu().numpy())


def _encode_whole(sae: Sae, x: Tensor) -> Tensor:
    return torch.cat([sae.encode(part).to(x.device) for part in x.split(1024)])
