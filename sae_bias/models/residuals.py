"""Residuals of many prompts at several layers in one forward pass: last tokens, neutral text, every ordinary token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.models.forward import capture_layers, plan_batches
from sae_bias.models.model import Model
from sae_bias.prompts.texts import load_texts


def token_windows(model: Model, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """(place of the text, token ids of one window); every window begins with a BOS where the tokenizer puts one."""
    bos: Any = model.tokenizer.bos_token_id
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(length, longest) if longest else length
    for place, text in enumerate(texts):
        ids = model._without_added_eos(text, list(model.tokenizer(text, verbose=False).input_ids))  # type: ignore[arg-type]
        head = [bos] if ids and bos is not None and ids[0] == bos else []
        body = ids[len(head) :]
        step = length - len(head)
        for start in range(0, len(body), step):
            window = body[start : start + step]
            if any(i not in model.special_ids for i in window):
                yield place, head + window


def batches(
    windows: Iterable[tuple[int, list[int]]], n: int = 256
) -> Iterator[Sequence[tuple[int, list[int]]]]:
    """Windows in groups of n, so that texts of one length can run together."""
    group: list[tuple[int, list[int]]] = []
    for window in windows:
        group.append(window)
        if len(group) == n:
            yield group
            group = []
    if group:
        yield group


def read_residuals(
    model: Model, prompts: Sequence[str], wanted: Iterable[int], *, everywhere: bool = False
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, tuple[Tensor, Tensor]] | None]:
    """Float32 residuals after each of the `wanted` layers, in one pass of the prompts.

    Returns:
        last token of each prompt [n_prompts, d_model]; ordinary tokens of the bundled neutral text [k, d_model]; and, if
        `everywhere`, (ordinary tokens [m, d_model], prompt of each [m] in ascending order), else None.
    """
    layers = sorted(set(wanted))
    last = {
        layer: torch.empty(len(prompts), model.d_model, dtype=torch.float32, device=model.device)
        for layer in layers
    }
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
    last = {
        layer: torch.empty(len(prompts), model.d_model, dtype=torch.float32, device=model.device)
        for layer in wanted
    }
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
