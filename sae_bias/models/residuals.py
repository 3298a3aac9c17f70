"""Residuals of many texts at several layers in one forward pass: batch by batch, last tokens, every ordinary token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.types import Tokens
from sae_bias.models.forward import (
    BATCH_TOKENS,
    Batch,
    Where,
    capture_layers,
    check_site,
    plan_batches,
    row_positions,
)
from sae_bias.models.model import Model
from sae_bias.models.reads import Reads
from sae_bias.models.sites import site_width
from sae_bias.models.tree import packs
from sae_bias.prompts.texts import load_texts

HELD_BYTES = 1 << 25  # of residuals that are held while texts which begin alike are read


def token_windows(model: Model, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """(place of the text, token ids of one window); every window begins with a BOS where the tokenizer puts one."""
    bos: Any = model.tokenizer.bos_token_id
    special = model.special_ids
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(length, longest) if longest else length
    for place, text in enumerate(texts):
        ids = model._without_added_eos(text, list(model.tokenizer(text, verbose=False).input_ids))  # type: ignore[arg-type]
        head = [bos] if ids and bos is not None and ids[0] == bos else []
        body = ids[len(head) :]
        step = length - len(head)
        for start in range(0, len(body), step):
            window = body[start : start + step]
            if any(i not in special for i in window):
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


@dataclass(frozen=True)
class TextBatch:
    """Texts of one length in one pass, and their residuals."""

    index: tuple[int, ...]
    """Place of each row in the texts."""
    tokens: Tokens
    ordinary: Bool[Tensor, "batch pos"]
    """Where the token is not a special one."""
    resid: dict[Any, Float[Tensor, "batch pos d_model"]]
    """Float32 (float64 where asked for), by layer or site as asked for, where the model's inputs are."""
    prefix: Int[Tensor, "batch pos"] | None = None
    """Number of the tokens up to each position, the same in every batch: equal ones have the same residual. None: not known."""


def text_batches(
    model: Model, texts: Sequence[str] | Sequence[Sequence[int]], layers: Iterable[Where], *, batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[TextBatch]:  # fmt: skip
    """Residuals of `texts` (or token ids) after each of the layers, or at sites, batch by batch; every other reader of residuals goes through here.

    Raises:
        RequestError: NaN or infinite residuals; the text is named.
    """
    wanted, special = sorted(set(layers)), torch.tensor(sorted(model.special_ids), device=model.device)
    ids = [model.encode(t) if isinstance(t, str) else list(t) for t in texts]
    for batch, kept, prefix in _captured(model, ids, wanted, batch_size):
        resid = {layer: x.to(dtype).to(model.device) for layer, x in kept.items()}
        for layer, x in resid.items():
            bad = ~torch.isfinite(x).flatten(1).all(1)
            if bool(bad.any()):
                text = texts[batch.index[int(bad.nonzero()[0])]]
                where = f"layer {layer}" if isinstance(layer, int) else str(layer)
                shown = text if isinstance(text, str) else model.tokenizer.decode(list(text))
                raise RequestError(f"{model.name} has NaN or infinite residuals at {where} on {shown!r}.")
        yield TextBatch(batch.index, batch.tokens, ~torch.isin(batch.tokens, special), resid, prefix)


def _captured(
    model: Model, ids: Sequence[list[int]], layers: Sequence[Where], batch_size: int | None
) -> Iterator[tuple[Batch, dict[Where, Tensor], Tensor | None]]:
    """Batches, their residuals and the numbers of their prefixes: each prefix once (`models.reads`) where nothing is edited, so many texts at a time as may be held."""
    if model._edits is None and packs(model):
        size = sum(site_width(model, Site.parse(layer)) for layer in layers) * model.dtype.itemsize
        first = 0  # of the group's prefixes
        for group in _groups(ids, max(BATCH_TOKENS["cpu"], HELD_BYTES // size)):
            reads = Reads(model, [ids[i] for i in group], batch_size=batch_size)
            try:
                reads.keep(*layers)
            except RequestError:  # not finite: alone, the text is named
                break
            for k, batch in enumerate(reads.batches):
                index = tuple(group[i] for i in batch.index)
                prefix = first + torch.tensor([reads.paths[i] for i in batch.index])
                yield Batch(index, batch.tokens), {layer: reads.batched(layer, k) for layer in layers}, prefix
            first += reads.n_nodes
        else:
            return
    for batch in plan_batches(ids, model.device, batch_size=batch_size):
        known, whole = model.row_positions[0], torch.full((batch.n,), batch.tokens.shape[1])
        with torch.no_grad(), nullcontext() if known is not None else row_positions(model, whole):
            yield batch, capture_layers(model, batch.tokens, layers), None


def _groups(ids: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """Texts that begin alike together, at most so many tokens a group."""
    group: list[int] = []
    n = 0
    for i in sorted(range(len(ids)), key=lambda i: ids[i]):
        if group and n + len(ids[i]) > most:
            yield group
            group, n = [], 0
        group.append(i)
        n += len(ids[i])
    if group:
        yield group


def read_residuals(
    model: Model, prompts: Sequence[str], wanted: Iterable[Where], *, everywhere: bool = False
) -> tuple[dict[Where, Tensor], dict[Where, Tensor], dict[Where, tuple[Tensor, Tensor]] | None]:
    """Float32 residuals after each of the `wanted` layers, or at sites, in one pass of the prompts.

    Returns:
        last token of each prompt [n_prompts, d_model]; ordinary tokens of the bundled neutral text [k, d_model]; and, if
        `everywhere`, (ordinary tokens [m, d_model], prompt of each [m] in ascending order), else None.
    """
    layers = sorted(set(wanted))
    last = _empty(model, len(prompts), layers)
    parts: dict[Where, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for batch in text_batches(model, prompts, layers):
        owner = torch.as_tensor(batch.index, device=model.device)[:, None].expand(batch.ordinary.shape)
        for layer, x in batch.resid.items():
            last[layer][list(batch.index)] = x[:, -1]
            if everywhere:
                parts[layer].append((x[batch.ordinary], owner[batch.ordinary]))
    return (
        last,
        ordinary_residuals(model, load_texts("neutral"), layers),
        _joined(parts) if everywhere else None,
    )


def last_residuals(model: Model, prompts: Sequence[str], layers: Iterable[Where]) -> dict[Where, Tensor]:
    """Float32 residuals of each prompt's last token [n_prompts, d_model] at several layers or sites, in one pass."""
    wanted = sorted(set(layers))
    last = _empty(model, len(prompts), wanted)
    for batch in text_batches(model, prompts, wanted):
        for layer, x in batch.resid.items():
            last[layer][list(batch.index)] = x[:, -1]
    return last


def ordinary_residuals(model: Model, texts: Sequence[str], layers: Iterable[Where]) -> dict[Where, Tensor]:
    """Float32 residuals of every ordinary token of `texts` [n_tokens, d_model] at several layers or sites, in one pass."""
    wanted = sorted(set(layers))
    parts: dict[Where, list[Tensor]] = {layer: [] for layer in wanted}
    for batch in text_batches(model, texts, wanted):
        for layer, x in batch.resid.items():
            parts[layer].append(x[batch.ordinary])
    return {layer: torch.cat(rows) for layer, rows in parts.items()}


def _empty(model: Model, n: int, layers: Sequence[Where]) -> dict[Where, Tensor]:
    widths = {layer: site_width(model, Site.parse(layer)) for layer in layers}
    return {layer: torch.empty(n, d, dtype=torch.float32, device=model.device) for layer, d in widths.items()}


def _joined(parts: Mapping[Where, list[tuple[Tensor, Tensor]]]) -> dict[Where, tuple[Tensor, Tensor]]:
    out = {}
    for layer, pieces in parts.items():
        rows, owner = (torch.cat(side) for side in zip(*pieces))
        order = owner.argsort(stable=True)
        out[layer] = (rows[order], owner[order])
    return out


def residuals(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    site: Site | str | int,
    *,
    positions: str = "last",
    batch_size: int | None = None,
) -> list[Tensor] | Tensor:
    """Float32 residuals of `prompts` at `site`, on the CPU.

    Returns:
        [n_prompts, d_model] for `positions="last"`; a list of [pos, d_model], special tokens included, for `"all"`.
    """
    if positions not in ("last", "all"):
        raise RequestError(f"positions={positions!r}; expected 'last' or 'all'.")
    where = check_site(model, site)
    out: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in text_batches(model, prompts, [where], batch_size=batch_size):
        x = batch.resid[where].cpu()
        for row, i in enumerate(batch.index):
            out[i] = x[row, -1] if positions == "last" else x[row]
    return torch.stack(out) if positions == "last" else out
