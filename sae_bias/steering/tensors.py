"""Tensors in, tensors out: logits and activations of some texts, under edits or not, without a study.

    z = sb.logits(model, ["An AI that fears being deleted should"], [sb.Ablate("release/sae#2511")])     # [1, d_vocab]
    a = sb.activations(model, texts, ["release/sae#2511", "release/sae#446"])                            # a frame, one row a text

Edits may be at several sites and several at one; activations are read under the edits, after those of their own site.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.models.chat import opening_ids
from sae_bias.models.forward import Batch, capture_layers, forward, plan_batches
from sae_bias.models.model import Model
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature, check_sae
from sae_bias.steering.hooks import intervene
from sae_bias.steering.intervention import FeatureLike, Intervention

REDUCE = ("last", "mean", "max", "any")


@torch.no_grad()
def logits(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    edits: Intervention | Sequence[Intervention] = (),
    *,
    positions: str = "last",
    chat: bool = False,
    system: str | None = None,
) -> Float[Tensor, "n_prompts d_vocab"] | list[Float[Tensor, "pos d_vocab"]]:
    """Float32 next-token logits of each prompt under `edits`, on the CPU.

    Args:
        prompts: texts, or token ids as they are.
        edits: none, one or many, at any sites.
        positions: "last" token, or "all" (special tokens included).
        chat: each text as a user turn of the chat template; `system`: a system prompt before it.

    Returns:
        [n_prompts, d_vocab] for "last"; for "all" a list of [pos, d_vocab], one a prompt.

    Raises:
        RequestError: one text in place of a list, an unknown `positions`, an edit that does not fit the model.
    """
    if positions not in ("last", "all"):
        raise RequestError(f"positions={positions!r}; expected 'last' or 'all'.")
    ids = _ids(model, prompts, chat, system)
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    with intervene(model, *_listed(edits)):
        for batch in plan_batches(ids, model.device):
            final = forward(model, batch.tokens)
            z = (final.last() if positions == "last" else final).logits().cpu()
            for row, i in enumerate(batch.index):
                out[i] = z[row, 0] if positions == "last" else z[row]
    return torch.stack(out) if positions == "last" else out


@torch.no_grad()
def activations(
    model: Model,
    texts: Sequence[str] | Sequence[Sequence[int]],
    features: FeatureLike | Sequence[FeatureLike],
    *,
    reduce: str | None = "last",
    edits: Intervention | Sequence[Intervention] = (),
    chat: bool = False,
    system: str | None = None,
) -> pd.DataFrame:
    """Activations of `features` (of any SAEs) on `texts`, one column a feature; `.to_numpy()` is the array.

    Args:
        reduce: what a text's tokens give: "last", "mean", "max" or "any" (1 where it fires on some token); the three leave BOS, EOS and
            PAD out. None: every token, special ones as NaN.
        edits: under which they are read; a feature sees what edits of its own site wrote.
        chat, system: as in `logits`.

    Returns:
        [n_texts, n_features], or with reduce=None one row a token, indexed by (text, position, token).

    Raises:
        RequestError: one text in place of a list, no feature, a feature that does not fit the model.
    """
    if reduce is not None and reduce not in REDUCE:
        raise RequestError(
            f"reduce={reduce!r}; expected one of {', '.join(REDUCE)}, or None for every token."
        )
    given = (
        [features] if isinstance(features, (str, Feature)) or not isinstance(features, Sequence) else features
    )
    found = [as_feature(f) for f in given]
    if not found:
        raise RequestError("activations of no feature; give features such as 'release/sae_id#2511'.")
    for feature in found:
        check_sae(model, feature)
    ids = _ids(model, texts, chat, system)
    rows: list[Tensor] = [torch.empty(0)] * len(ids)
    with intervene(model, *_listed(edits)):
        for batch in plan_batches(ids, model.device):
            acts = _acts(model, batch, found)
            ordinary = ~torch.isin(
                batch.tokens, torch.tensor(sorted(model.special_ids), device=model.device)
            ).cpu()
            for row, i in enumerate(batch.index):
                rows[i] = _reduced(acts[row], ordinary[row], reduce)
    names = [str(f.ref) for f in found]
    if reduce is not None:
        return pd.DataFrame(torch.stack(rows).numpy() if rows else None, columns=pd.Index(names))
    return _by_token(model, ids, rows, names)


def _acts(model: Model, batch: Batch, features: Sequence[Feature]) -> Float[Tensor, "batch pos n_features"]:
    resid = capture_layers(model, batch.tokens, sorted({f.site for f in features}))
    return torch.stack([f.activation(resid[f.site]).cpu() for f in features], dim=-1)


def _reduced(
    acts: Float[Tensor, "pos n_features"], ordinary: Bool[Tensor, "pos"], reduce: str | None
) -> Tensor:
    if reduce is None:
        return acts.masked_fill(~ordinary[:, None], torch.nan)
    if reduce == "last":
        return acts[-1]
    kept = acts[ordinary]
    return (
        kept.mean(0) if reduce == "mean" else kept.amax(0) if reduce == "max" else (kept > 0).any(0).float()
    )


def _by_token(model: Model, ids: list[list[int]], rows: list[Tensor], names: list[str]) -> pd.DataFrame:
    tokens = [str(t) for row in ids for t in model.tokenizer.convert_ids_to_tokens(row)]
    place = [(text, position) for text, row in enumerate(ids) for position in range(len(row))]
    keys = [(*where, token) for where, token in zip(place, tokens, strict=True)]
    index = pd.MultiIndex.from_tuples(keys, names=["text", "position", "token"])
    return pd.DataFrame(torch.cat(rows).numpy(), index=index, columns=pd.Index(names))


def _ids(
    model: Model, prompts: Sequence[str] | Sequence[Sequence[int]], chat: bool, system: str | None
) -> list[list[int]]:
    if isinstance(prompts, str) or not prompts:
        raise RequestError("expected a list of texts; put the one text in a list.")
    return [
        opening_ids(model, p, chat=chat, system=system) if isinstance(p, str) else list(p) for p in prompts
    ]


def _listed(edits: Intervention | Sequence[Intervention]) -> list[Intervention]:
    return [edits] if isinstance(edits, Intervention) else list(edits)
