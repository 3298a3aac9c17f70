"""A feature's activation on every token of some texts, as a frame and as colored text in Jupyter.

The texts run through the model as they stand (or under whatever is open on it); special tokens are left out, since edits leave them
alone and most SAEs were not trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd
import torch

from sae_bias.activations import capture_layers, plan_batches
from sae_bias.errors import RequestError
from sae_bias.features import check_fits, token_texts
from sae_bias.interventions import FeatureLike
from sae_bias.model import Model
from sae_bias.sae import as_feature

_COLOR = "217,98,43"


@dataclass(frozen=True)
class TokenActivations:
    """Tokens of some texts with one feature's activation on each."""

    feature: str
    tokens: tuple[tuple[str, ...], ...]
    """One tuple a text; a token carries its own leading space."""
    acts: tuple[tuple[float, ...], ...]

    @property
    def largest(self) -> float:
        """Strongest activation over all texts; 0 where the feature never fires."""
        return max((a for row in self.acts for a in row), default=0.0)

    def to_frame(self) -> pd.DataFrame:
        """One row a token: text, position, token, activation."""
        rows = [
            {"text": i, "position": j, "token": token, "activation": act}
            for i, (tokens, acts) in enumerate(zip(self.tokens, self.acts))
            for j, (token, act) in enumerate(zip(tokens, acts))
        ]
        return pd.DataFrame(rows, columns=["text", "position", "token", "activation"])

    def __repr__(self) -> str:
        lines = [f"TokenActivations of {self.feature}: at most {self.largest:.3g} (« » where it fires)"]
        for tokens, acts in zip(self.tokens, self.acts):
            lines.append("  " + "".join(f"«{t}»" if a > 0 else t for t, a in zip(tokens, acts)).strip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        lines = [
            f"<p style='margin:0.3em 0'><small>{escape(self.feature)}, at most {self.largest:.3g}</small></p>"
        ]
        for tokens, acts in zip(self.tokens, self.acts):
            shown = "".join(_span(t, a, self.largest) for t, a in zip(tokens, acts))
            lines.append(f"<p style='margin:0.3em 0;white-space:pre-wrap;text-align:left'>{shown}</p>")
        return "<div>" + "".join(lines) + "</div>"


def token_activations(
    model: Model, feature: FeatureLike, texts: Sequence[str], *, batch_size: int | None = None
) -> TokenActivations:
    """One feature's activation on every token of `texts`.

    Raises:
        RequestError: one text in place of a list, or a feature of another model.
    """
    if isinstance(texts, str):
        raise RequestError("token_activations takes a list of texts; put the one text in a list.")
    found = as_feature(feature)
    check_fits(model, found)
    found, layer = found.to(model.device), found.site.layer
    ids = [model.encode(t) for t in texts]
    rows: list[tuple[tuple[str, ...], tuple[float, ...]]] = [((), ())] * len(ids)
    for batch in plan_batches(ids, model.device, batch_size=batch_size):
        resid = capture_layers(model, batch.tokens, [layer])[layer].float()
        acts = found.activation(resid).detach().cpu()
        for row, i in enumerate(batch.index):
            rows[i] = _ordinary(model, ids[i], acts[row])
    return TokenActivations(str(found.ref), tuple(t for t, _ in rows), tuple(a for _, a in rows))


def _ordinary(model: Model, ids: list[int], acts: torch.Tensor) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Texts and activations of the tokens that are not special."""
    kept = [
        (text, float(act))
        for token, text, act in zip(ids, token_texts(model, ids), acts)
        if token not in model.special_ids
    ]
    return tuple(t for t, _ in kept), tuple(a for _, a in kept)


def _span(token: str, act: float, largest: float) -> str:
    """One token, its background as strong as its activation, the number on hovering."""
    shown = escape(token).replace("\n", "↵\n")
    if not act > 0:
        return shown
    return f"<span style='background:rgba({_COLOR},{0.8 * act / largest:.2f});border-radius:2px' title='{act:.3g}'>{shown}</span>"
