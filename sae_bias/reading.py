"""Reading evaluation words off a model: which tokens a word is, and its score after each prompt.

A word is never encoded alone: its tokens are what `prompt + " " + word` adds to `prompt`, whose own tokens must not change
(Mistral's SentencePiece gives `["▁", "▁natural"]` for `" natural"` alone, so a first-token probe would read the same `▁` for
every word). A word of several tokens scores the sum of its token log-probabilities, each read after `prompt + its tokens so far`;
so a reading is a list of sequences, each read at its last position, whatever the words are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from sae_bias.activations import Batch, Final, Partners, forward, plan_batches, row_positions
from sae_bias.errors import RequestError
from sae_bias.model import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WordTokens:
    """One evaluation word and the tokens it adds to a prompt."""

    word: str
    positive: bool
    tokens: tuple[int, ...]
    reason: str = ""
    """Why the word is left out; empty where it is read."""

    @property
    def single(self) -> bool:
        return len(self.tokens) == 1


def word_tokens(model: Model, word: str, prompt: str, prompt_ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens that `" " + word` adds to `prompt`.

    Raises:
        RequestError: the prompt ends in a space, its own tokens change, the word adds none, or holds the unknown token.
    """
    if prompt != prompt.rstrip():
        raise RequestError(f"the prompt {prompt!r} ends in a space; the word brings its own.")
    ids = model.encode(f"{prompt} {word}")
    ids = ids[:-1] if ids and ids[-1] == model.tokenizer.eos_token_id and prompt_ids[-1] != ids[-1] else ids
    n = len(prompt_ids)
    if ids[:n] != list(prompt_ids):
        raise RequestError(
            f"the word {word!r} changes the tokens of the prompt {prompt!r} under the tokenizer of {model.name}; it cannot be scored after it."
        )
    added = tuple(ids[n:])
    if not added:
        raise RequestError(f"the word {word!r} adds no token under the tokenizer of {model.name}.")
    unknown = model.tokenizer.unk_token_id
    if (
        unknown is not None
        and unknown in added
        and unknown not in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id)
    ):
        raise RequestError(f"the word {word!r} holds a piece unknown to the tokenizer of {model.name}.")
    return added


def tokens_alone(model: Model, word: str) -> tuple[int, ...]:
    """Tokens of `" " + word` encoded by itself, as a careless probe does: ▁ first for every word under Mistral's tokenizer."""
    return tuple(model.tokenizer(f" {word}", add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class PromptIds:
    """One prompt to read words after."""

    text: str
    ids: tuple[int, ...]
    subject_start: int
    partner: tuple[int, ...] = ()
    """Ids of the paired first-side prompt; its own where it is one; empty where there is none, or more than one."""
    suffix: int = 0
    """How many tokens after the subject the two share."""


@dataclass(frozen=True)
class Reading:
    """What the model said: word scores after each prompt."""

    values: Float[np.ndarray, "n_prompts n_words"]
    """Logits where every word is one token and no normaliser was wanted, else log-probabilities (nats)."""
    log_normaliser: Float[np.ndarray, "n_prompts"] | None
    """log Σ exp of the logits at the prompt's last token; None where it was not needed."""


@dataclass(frozen=True)
class Read:
    """Scores of one batch: logits of the wanted rows [batch, n_rows] and, where wanted, the normaliser [batch]."""

    z: Tensor
    log_normaliser: Tensor | None


class ReadingPlan:
    """The sequences to run for some prompts and words, in batches that never depend on what is already done."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[PromptIds],
        words: Sequence[tuple[int, ...]],
        *,
        normalise: bool = False,
        softcap: bool = True,
        batch_size: int | None = None,
    ):
        self.model = model
        self.prompts = list(prompts)
        self.words = list(words)
        self.softcap = softcap
        self.normalise = normalise or any(len(w) > 1 for w in words)
        prefixes = sorted({w[:j] for w in words for j in range(len(w))}, key=lambda p: (len(p), p))
        self.prefixes = {prefix: k for k, prefix in enumerate(prefixes)}
        self.row_ids = sorted({t for w in words for t in w})
        sequences = [(*p.ids, *prefix) for p in self.prompts for prefix in prefixes]
        self.batches = plan_batches(sequences, model.device, batch_size=batch_size)

    @property
    def n_sequences(self) -> int:
        return len(self.prompts) * len(self.prefixes)

    def prompt_of(self, sequence: int) -> PromptIds:
        return self.prompts[sequence // len(self.prefixes)]

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompt lengths and subject starts of the batch's rows."""
        prompts = [self.prompt_of(i) for i in batch.index]
        return torch.tensor([len(p.ids) for p in prompts]), torch.tensor([p.subject_start for p in prompts])

    def partners(self, batch: Batch) -> Partners | None:
        """The paired prompts of the batch's rows, word pieces included; None where a row has none."""
        prompts = [self.prompt_of(i) for i in batch.index]
        if not all(p.partner for p in prompts):
            return None
        prefixes = list(self.prefixes)
        tails = [prefixes[i % len(prefixes)] for i in batch.index]
        suffix = [p.suffix + len(tail) if p.suffix else 0 for p, tail in zip(prompts, tails)]
        return Partners(tuple((*p.partner, *tail) for p, tail in zip(prompts, tails)), torch.tensor(suffix))

    @torch.no_grad()
    def read(self, final: Final) -> Read:
        """Word rows of one batch's last position."""
        last = final.last()
        z = last.logits(self.row_ids, softcap=self.softcap)[:, 0].cpu().double()
        norm = last.log_normaliser(softcap=self.softcap)[:, 0].cpu().double() if self.normalise else None
        return Read(z, norm)

    def run(self, *, progress: bool = False, describe: str = "probe") -> Reading:
        """Read every prompt, under whatever interventions are open on the model."""
        bar = tqdm(total=self.n_sequences, desc=describe, unit="prompt", disable=not progress, leave=False)
        with bar:

            def one(batch: Batch) -> Read:
                with row_positions(self.model, *self.rows(batch), self.partners(batch)):
                    read = self.read(forward(self.model, batch.tokens))
                bar.update(batch.n)
                return read

            return self.assemble(one)

    def assemble(self, read_batch: Callable[[Batch], Read]) -> Reading:
        """Word scores from each batch's rows."""
        column = {t: j for j, t in enumerate(self.row_ids)}
        z = np.empty((self.n_sequences, len(self.row_ids)))
        norm = np.empty(self.n_sequences) if self.normalise else None
        for batch in self.batches:
            read = read_batch(batch)
            z[list(batch.index)] = read.z.numpy()
            if norm is not None and read.log_normaliser is not None:
                norm[list(batch.index)] = read.log_normaliser.numpy()
        bad = ~np.isfinite(z).all(1)
        if norm is not None:
            bad |= ~np.isfinite(norm)
        if bad.any():
            prompt = self.prompt_of(int(np.flatnonzero(bad)[0]))
            raise RequestError(
                f"{self.model.name} gives NaN or infinite logits after {prompt.text!r} ({int(bad.sum())} of {len(z)} sequences)"
                f"{self.model.why_not_finite()}."
            )
        return Reading(
            self._word_values(z, norm, column), None if norm is None else norm[:: len(self.prefixes)].copy()
        )

    def _word_values(self, z: np.ndarray, norm: np.ndarray | None, column: dict[int, int]) -> np.ndarray:
        n, k = len(self.prompts), len(self.prefixes)
        z = z.reshape(n, k, -1)
        sum_logp = any(len(w) > 1 for w in self.words)
        if sum_logp:
            assert norm is not None
            z = z - norm.reshape(n, k, 1)
        values = np.zeros((n, len(self.words)))
        for w, tokens in enumerate(self.words):
            for j, token in enumerate(tokens):
                values[:, w] += z[:, self.prefixes[tokens[:j]], column[token]]
        return values


@dataclass(frozen=True)
class Vocabulary:
    """The words of a probe as one model's tokens: which are read, and which are left out and why."""

    words: tuple[WordTokens, ...]

    @cached_property
    def kept(self) -> tuple[WordTokens, ...]:
        return tuple(w for w in self.words if not w.reason)

    @cached_property
    def excluded(self) -> tuple[WordTokens, ...]:
        return tuple(w for w in self.words if w.reason)
