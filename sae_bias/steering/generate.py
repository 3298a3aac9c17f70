"""Text from the model, steered or not: batched by equal length, KV-cached, greedy or sampled from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.models.chat import opening_ids
from sae_bias.models.forward import plan_batches, row_positions
from sae_bias.models.model import Model
from sae_bias.steering.hooks import intervene
from sae_bias.steering.intervention import Intervention

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Completion:
    """One prompt and what the model wrote after it."""

    prompt: str
    text: str
    """The new text only, special tokens left out."""
    tokens: tuple[int, ...]
    """Ids of the new tokens, up to and without the end-of-sequence token."""
    ended: bool
    """Whether the model ended the text itself, before `max_new_tokens`."""
    interventions: tuple[str, ...] = field(default=())
    """The edits it was written under, in words; empty for the unsteered model."""

    def __str__(self) -> str:
        return self.prompt + self.text


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    use_cache: bool = True,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Completion]:
    """Complete each prompt under `interventions`.

    Args:
        temperature: 0 is greedy; above 0 samples from the whole distribution, from `seed` alone.
        chat: put each prompt in a user turn of the model's chat template.
        system: system prompt; in the plain form, and where the template has no system role, it opens the text.
        use_cache: False recomputes every position at each step; the greedy tokens are the same.

    Returns:
        One Completion a prompt, in order.
    """
    if isinstance(prompts, str):
        raise RequestError("generate takes a list of prompts; put the one prompt in a list.")
    if max_new_tokens < 1 or temperature < 0:
        raise RequestError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least 1 and at least 0."
        )
    ids = [opening_ids(model, p, chat=chat, system=system) for p in prompts]
    check_room(model, max(map(len, ids), default=0), max_new_tokens)
    config, end = _generation_config(model, max_new_tokens, temperature, use_cache), model.end_ids
    notes = tuple(f"{e.describe()} on {e.target}" for e in interventions)
    out: list[Completion | None] = [None] * len(ids)
    bar = tqdm(total=len(ids), desc="generate", unit="prompt", disable=not progress, leave=False)
    with bar, intervene(model, *interventions):
        for batch in plan_batches(ids, model.device, batch_size=batch_size):
            new = _continue(model, batch.tokens, config, _batch_seed(seed, batch.index))
            for row, i in enumerate(batch.index):
                written = new[row].tolist()
                tokens = tuple(takewhile(lambda token: token not in end, written))
                out[i] = Completion(
                    prompts[i], model.decode(tokens), tokens, len(tokens) < len(written), notes
                )
            bar.update(batch.n)
    return [c for c in out if c is not None]


def check_room(model: Model, n_tokens: int, max_new_tokens: int) -> None:
    """Refuse a continuation past the last position the model knows: some architectures break there, others write nonsense."""
    if model.longest is not None and n_tokens + max_new_tokens > model.longest:
        raise RequestError(
            f"a prompt of {n_tokens} tokens and max_new_tokens={max_new_tokens} are more than {model.name} takes ({model.longest}); "
            f"try max_new_tokens={max(model.longest - n_tokens, 0)}."
        )


@torch.no_grad()
def _continue(model: Model, tokens: torch.Tensor, config: GenerationConfig, seed: int) -> torch.Tensor:
    """New token ids [batch, new]; the caller's random state is left as it was."""
    batch, n = tokens.shape
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        row_positions(model, torch.full((batch,), n)),
        _only(model.hf, config),
    ):
        torch.manual_seed(seed)
        known = {} if not config.use_cache else _opening(model, tokens)
        full: Any = model.hf.generate(  # type: ignore[operator]
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config, **known
        )
    return full[:, n:]


def _opening(model: Model, tokens: torch.Tensor) -> dict[str, Any]:
    """Keys and values of what all rows begin with (samples of one prompt, one system prompt), computed once where that is most of them."""
    batch, n = tokens.shape
    shared = int((tokens == tokens[0]).all(0).long().cumprod(0).sum())
    shared = min(shared, n - 1)
    whole = model._edits is not None and model._edits.looks_elsewhere
    if batch == 1 or 2 * shared < n or whole or model.foreign_hooks() or not model.arch.packs(model.config):
        return {}
    with row_positions(model, torch.full((1,), n)):
        cache = model.base(input_ids=tokens[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(batch)
    return {"past_key_values": cache}


def _generation_config(
    model: Model, max_new_tokens: int, temperature: float, use_cache: bool
) -> GenerationConfig:
    from transformers import GenerationConfig

    end = sorted(model.end_ids) or None
    pad = model.tokenizer.pad_token_id
    pad = pad if pad is not None or end is None else end[0]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad, use_cache=use_cache, **sampling
    )


@contextmanager
def _only(hf: Any, config: GenerationConfig) -> Iterator[None]:
    """`config` in place of the checkpoint's own, which would lend its repetition penalty and the like to a greedy search."""
    own, hf.generation_config = hf.generation_config, config
    try:
        yield
    finally:
        hf.generation_config = own


def _batch_seed(seed: int, index: tuple[int, ...]) -> int:
    """A seed of its own for each batch, from the run's seed and the prompts in it."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
