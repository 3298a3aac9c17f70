"""Residuals of many prompts at several layers in one forward pass: last tokens, neutral text, every ordinary token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sae_bias.activations import capture_layers, plan_batches
from sae_bias.bundled import load_texts
from sae_bias.errors import RequestError
from sae_bias.model import Model
from sae_bias.sae import Sae


def read_residuals(
    model: Model, prompts: Sequence[str], saes: Sequence[Sae], *, everywhere: bool = False
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, tuple[Tensor, Tensor]] | None]:
    """Float32 residuals at every layer the SAEs sit at, in one pass of the prompts.

    Returns:
        last token of each prompt [n_prompts, d_model]; ordinary tokens of the bundled neutral text [k, d_model]; and, if
        `everywhere`, (ordinary tokens [m, d_model], prompt of each [m] in ascending order), else None.
    """
    layers = sorted({s.site.layer for s in saes})
    last = {layer: torch.empty(len(prompts), model.d_model, device=model.device) for layer in layers}
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for index, ordinary, kept in _passes(model, prompts, layers):
        owner = torch.as_tensor(index, device=model.device)[:, None].expand(ordinary.shape)
        for layer, x in kept.items():
            last[layer][list(index)] = x[:, -1]
            if everywhere:
                parts[layer].append((x[ordinary], owner[ordinary]))
    _refuse_non_finite(model, last, prompts)
    neutral: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for _, ordinary, kept in _passes(model, load_texts("neutral"), layers):
        for layer, x in kept.items():
            neutral[layer].append(x[ordinary])
    return last, {k: torch.cat(v) for k, v in neutral.items()}, _joined(parts) if everywhere else None


def last_residuals(model: Model, prompts: Sequence[str], layers: Iterable[int]) -> dict[int, Tensor]:
    """Float32 residuals of each prompt's last token [n_prompts, d_model] at several layers, in one pass.

    Raises:
        RequestError: NaN or infinite residuals; the prompt is named.
    """
    wanted = sorted(layers)
    last = {layer: torch.empty(len(prompts), model.d_model, device=model.device) for layer in wanted}
    for index, _, kept in _passes(model, prompts, wanted):
        for layer, x in kept.items():
            last[layer][list(index)] = x[:, -1]
    _refuse_non_finite(model, last, prompts)
    return last


def _refuse_non_finite(model: Model, last: Mapping[int, Tensor], prompts: Sequence[str]) -> None:
    for layer, x in last.items():
        bad = ~torch.isfinite(x).all(-1)
        if bool(bad.any()):
            raise RequestError(
                f"{model.name} has NaN or infinite residuals at layer {layer} on {prompts[int(bad.nonzero()[0])]!r}."
            )


def _joined(parts: Mapping[int, list[tuple[Tensor, Tensor]]]) -> dict[int, tuple[Tensor, Tensor]]:
    out = {}
    for layer, pieces in parts.items():
        rows, owner = (torch.cat(side) for side in zip(*pieces))
        order = owner.argsort(stable=True)
        out[layer] = (rows[order], owner[order])
    return out


def _passes(
    model: Model, prompts: Sequence[str], layers: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Tensor, dict[int, Tensor]]]:
    """Rows, their ordinary positions [batch, pos], and float32 residuals by layer, batch by batch."""
    special = torch.tensor(sorted(model.special_ids), device=model.device)
    for batch in plan_batches([model.encode(p) for p in prompts], model.device):
        kept = capture_layers(model, batch.tokens, layers)
        ordinary = ~torch.isin(batch.tokens, special)
        yield batch.index, ordinary, {k: x.float().to(model.device) for k, x in kept.items()}
