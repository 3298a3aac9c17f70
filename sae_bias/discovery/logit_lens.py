"""The words a direction of the residual stream promotes and demotes (the logit lens, nostalgebraist 2020).

    logit_w = W_U[w] · (g ⊙ δ) · scale

g is the final norm's own gain (Gemma's is 1 + weight; a LayerNorm also centres δ), scale the mean 1/rms of the residual the norm
sees, so that the numbers are logits a unit of activation, the norm held still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.models.model import Model
from sae_bias.models.residuals import last_residuals

_ROWS = 32_768


@dataclass(frozen=True)
class Word:
    """One token of the vocabulary and the logit written to it, relative to the mean over the vocabulary."""

    token: str
    logit: float


@torch.no_grad()
def logit_lens(
    model: Model, direction: Float[Tensor, "d_model"], scale: float = 1.0
) -> Float[Tensor, "d_vocab"]:
    """Logit of every token, less their mean (a constant changes no probability); on the CPU."""
    norm = model.arch.norm
    gain = norm.gain(model.final_norm, model.d_model)
    written = norm.center(direction.to(gain.device).float()) * gain * scale
    w = model.w_unembed
    parts = [(rows.float() @ written.to(w.device)).cpu() for rows in w.split(_ROWS)]
    logits = torch.cat(parts)
    return logits - logits.mean()


def promoted(
    model: Model, direction: Float[Tensor, "d_model"], k: int, scale: float = 1.0
) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """The k tokens most promoted and the k most demoted; special and unused tokens are left out."""
    logits = logit_lens(model, direction, scale)
    n_real = min(len(logits), len(model.tokenizer))
    hidden = [i for i in model.tokenizer.all_special_ids if i < len(logits)] + list(
        range(n_real, len(logits))
    )
    up, down = logits.clone(), logits.clone()
    up[hidden], down[hidden] = -torch.inf, torch.inf
    ends = (up.topk(min(k, n_real)).indices, (-down).topk(min(k, n_real)).indices)
    first, last = ([Word(token_name(model, int(i)), float(logits[i])) for i in end] for end in ends)
    return tuple(first), tuple(last)


def token_name(model: Model, token: int) -> str:
    """A token as a reader knows it: its text, the leading space kept."""
    piece = model.tokenizer.convert_ids_to_tokens(token)
    text = model.tokenizer.decode([token])
    starts_word = isinstance(piece, str) and piece[:1] in ("▁", "Ġ")
    text = str(piece) if "\ufffd" in str(text) or not str(text) else str(text)
    return " " + text.lstrip(" ") if starts_word and text.strip(" ▁") else text


@torch.no_grad()
def mean_inverse_rms(model: Model, texts: list[str]) -> float:
    """Mean 1/rms (for a LayerNorm 1/std) of the last token's residual before the final norm."""
    top = model.n_layers - 1
    return float(model.arch.norm.scale(model.final_norm, last_residuals(model, texts, [top])[top]).mean())
