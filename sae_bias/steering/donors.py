"""Residuals that an edit takes from elsewhere: from the paired prompt, or from another model on the same tokens.

    resample: a'_p = a(y)_q        patch: x'_p = z_p

y is the paired human prompt (p and q equally far from the end, within the words after the subject, which the two prompts share),
z the other model's residual. Both are unedited. Each is run once for a batch, before the edited pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.types import PositionMask, Resid, Tokens
from sae_bias.models.forward import Partners, capture_layers
from sae_bias.models.model import Model
from sae_bias.models.tree import Packed


class Sources:
    """What the edits of one batch may read beside its own residual; every residual is computed once and kept."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        partners: Partners | None = None,
        attention_mask: Tensor | None = None,
        packed: Packed | None = None,
    ):
        """`packed`: the tokens are a tree's (`models.tree`)."""
        self.model, self.tokens, self.partners, self.attention_mask = model, tokens, partners, attention_mask
        self.packed = packed
        self._paired: dict[int, tuple[Tensor, Tensor]] = {}
        self._other: dict[tuple[int, int], Tensor] = {}

    def paired(self, layer: int) -> tuple[Resid, PositionMask]:
        """Residual of each row's paired prompt, aligned with the row from the right, and where the two are matched."""
        if layer not in self._paired:
            if self.partners is None:
                raise RequestError(
                    "this edit needs the paired human prompt of every prompt, and what is run here has none (or several); "
                    "run a probe on pairs, in which each AI prompt has one human prompt."
                )
            self._paired[layer] = self._run_partners(self.partners, layer)
        return self._paired[layer]

    def other(self, source: Model, layer: int) -> Resid:
        """The residual of `source` at `layer` on this batch's tokens."""
        key = (id(source), layer)
        if key not in self._other:
            _check_twin(self.model, source)
            tokens = self.tokens.to(source.device)
            x = capture_layers(source, tokens, [layer], packed=self.packed, mask=self.attention_mask)[layer]
            self._other[key] = x.to(self.tokens.device)
        return self._other[key]

    def _run_partners(self, partners: Partners, layer: int) -> tuple[Tensor, Tensor]:
        batch, n = self.tokens.shape
        device = self.tokens.device
        matched = torch.arange(n) >= n - partners.suffix[:, None]
        resid: Tensor | None = None
        lengths = [len(s) for s in partners.sequences]
        for length in sorted(set(lengths)):
            rows = [i for i, k in enumerate(lengths) if k == length and bool(partners.suffix[i] > 0)]
            if not rows:
                continue
            tokens = torch.tensor([list(partners.sequences[i]) for i in rows], device=device)
            x = capture_layers(self.model, tokens, [layer])[layer]
            if resid is None:
                resid = x.new_zeros(batch, n, x.shape[-1])
            shared = min(n, length)
            resid[rows, n - shared :] = x[:, length - shared :]
        if resid is None:
            resid = torch.zeros(batch, n, self.model.d_model, dtype=torch.float32, device=device)
        return resid, matched.to(device)


def _check_twin(model: Model, source: Model) -> None:
    """Refuse to patch between models whose residuals cannot stand for each other."""
    facts = [(m.architecture, m.n_layers, m.d_model) for m in (model, source)]
    if facts[0] != facts[1]:
        shown = [f"{name} ({layers} layers, d_model {width})" for name, layers, width in facts]
        raise RequestError(
            f"cannot patch {source.name} into {model.name}: {shown[1]} into {shown[0]}; the two must be of one architecture and size."
        )
