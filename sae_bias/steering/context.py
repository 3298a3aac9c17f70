"""What an edit sees of one forward pass, and what it gives back.

Positions count from the start of the sequence, the cached part included, so prefill, cached decoding and left padding follow one
contract. Special tokens are left alone by id, never by index: under a KV cache index 0 is the newest token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.types import PositionMask, Resid, Tokens
from sae_bias.saes.sae import Feature

if TYPE_CHECKING:
    from sae_bias.steering.donors import Sources


@dataclass(frozen=True)
class PassInfo:
    """The tokens a forward pass sees, and where its rows' prompts and subjects are."""

    tokens: Tokens
    past: int = 0
    """Tokens already in the KV cache."""
    attention_mask: Tensor | None = None
    prompt_len: Tensor | None = None
    """[batch] end of each row's prompt, counted from the start of the sequence (left padding included); [batch, pos] in a packed pass."""
    subject_start: Tensor | None = None
    """[batch] first position of each row's subject, counted likewise."""
    sources: Sources | None = None
    """What edits may read beside the residual: the paired prompts, another model."""
    place: Tensor | None = None
    """[batch, pos] position of each token in its own sequence, in a packed pass (`models.tree`)."""
    weight: Tensor | None = None
    """[batch, pos] sequences that each token stands for there; 0 where padded."""


def position_mask(info: PassInfo, positions: str, special_ids: frozenset[int]) -> PositionMask:
    """Which positions of this pass an edit may change: the named ones, without special and padded tokens."""
    n = info.tokens.shape[1]
    device = info.tokens.device
    place = info.past + torch.arange(n, device=device) if info.place is None else info.place
    special = torch.tensor(sorted(special_ids), device=device, dtype=info.tokens.dtype)
    mask = ~torch.isin(info.tokens, special)
    if info.attention_mask is not None and info.attention_mask.ndim == 2:
        mask &= info.attention_mask[:, -n:].to(device).bool()
    if info.weight is not None:
        mask &= info.weight > 0
    if positions == "all":
        return mask
    if positions == "subject":
        if info.subject_start is None:
            raise RequestError(
                'positions="subject" needs prompts with a known subject, such as a probe on pairs.'
            )
        return mask & (place >= _column(info.subject_start.to(device)))
    assert info.prompt_len is not None
    end = _column(info.prompt_len.to(device))
    if positions == "last":
        return mask & (place == end - 1)
    return mask & ((place < end) if positions == "prompt" else (place >= end))


def _column(of_rows: Tensor) -> Tensor:
    """What is said of rows, beside every position of them."""
    return of_rows[:, None] if of_rows.ndim == 1 else of_rows


@dataclass(frozen=True)
class Change:
    """One edit's delta [batch, pos, d_model], where it is non-zero, and the activations around it."""

    delta: Resid
    changed: PositionMask
    before: Tensor | None = None
    """[batch, pos] activations before the edit, where it edits a feature."""
    after: Tensor | None = None


@dataclass(frozen=True)
class EditContext:
    """One pass at one site, for one edit."""

    site: Site
    mask: PositionMask
    """Positions the edit may change."""
    info: PassInfo
    encoded: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Activations of whole SAEs on this pass, shared by the edits of a site."""

    @property
    def sources(self) -> Sources:
        """The paired prompts and other models, where the edit `looks_elsewhere`."""
        assert self.info.sources is not None
        return self.info.sources

    def acts(self, feature: Feature, x: Resid) -> Tensor:
        """The feature's activations on x; an SAE that needs all of its encoder columns encodes x once for all of its features."""
        sae = feature.whole
        if sae is None:
            return feature.activation(x)
        if id(sae) not in self.encoded:
            self.encoded[id(sae)] = sae.encode(x)
        return self.encoded[id(sae)][..., feature.index].to(x.device)

    def only_here(self, delta: Resid) -> Change:
        """`delta` at the positions the edit may change."""
        delta = torch.where(self.mask[..., None], delta, torch.zeros_like(delta))
        return Change(delta, (delta != 0).any(-1))

    def write(self, feature: Feature, x: Resid, acts: Tensor, new: Tensor) -> Change:
        """The feature's activation moved from `acts` to `new`, through its SAE's decode, at those positions."""
        change = torch.where(self.mask, new - acts, torch.zeros_like(acts))
        return Change(feature.write(x, change), change != 0, acts, acts + change)
