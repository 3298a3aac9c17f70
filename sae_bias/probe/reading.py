"""Reading evaluation words off a model: which tokens a word is, and its score after each prompt.

A word is never encoded alone: its tokens are what `prompt + " " + word` adds to `prompt`, whose own tokens must not change
(Mistral's SentencePiece gives `["▁", "▁natural"]` for `" natural"` alone, so a first-token probe would read the same `▁` for
every word). A word of several tokens scores the sum of its token log-probabilities, each read after `prompt + its tokens so far`;
so a reading is a list of sequences, each read at its last position, whatever the words are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.models.forward import Batch, Final, Partners, forward, plan_batches, row_positions
from sae_bias.models.model import Model
from sae_bias.probe.random_words import RandomWords, candidate_words
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPair, PromptPairs


class PairReading:
    """Pairs and a probe as the sequences one model has to run, and the way back to a ProbeResult."""

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        probe: Probe,
        *,
        levels: bool = False,
        random_words: bool | Mapping[str, int] = False,
        batch_size: int | None = None,
    ):
        self.model, self.pairs, self.probe = model, pairs, probe
        self.levels = levels
        self.vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
        taken = {w.tokens[0] for w in self.vocabulary.kept}
        self.candidates = (
            candidate_words(model, pairs[0].human, taken, probe.join)
            if random_words is True
            else dict(random_words or {})
        )
        prompts: dict[str, PromptIds] = {}
        self._place: list[tuple[int, int]] = []
        order: dict[str, int] = {}
        for pair in pairs:
            human, ai = model.encode(pair.human), model.encode(pair.ai)
            start, shared = common_prefix(human, ai), shared_after_subject(model, pair, human, ai)
            for text, ids, suffix in ((pair.human, human, 0), (pair.ai, ai, shared)):
                new = PromptIds(text, tuple(ids), start, tuple(human), suffix)
                order.setdefault(text, len(order))
                known = prompts.setdefault(text, new)
                if (known.partner, known.suffix) != (new.partner, new.suffix):
                    prompts[text] = replace(known, partner=(), suffix=0)  # paired in several ways
            self._place.append((order[pair.human], order[pair.ai]))
        self.plan = ReadingPlan(
            model,
            list(prompts.values()),
            [w.tokens for w in self.vocabulary.kept],
            beside=list(self.candidates.values()),
            normalise=levels,
            rank=[w.tokens[0] for w in self.vocabulary.kept] if levels else (),
            softcap=probe.softcap,
            batch_size=batch_size,
        )

    def result(self, reading: Any) -> ProbeResult:
        human, ai = (np.array(side) for side in zip(*self._place))
        norm, ranks, n = reading.log_normaliser, reading.ranks, len(self.vocabulary.kept)
        others = (
            RandomWords(tuple(self.candidates), reading.values[human, n:], reading.values[ai, n:])
            if self.candidates
            else None
        )
        return ProbeResult(
            self.pairs,
            self.probe,
            self.vocabulary,
            reading.values[human, :n],
            reading.values[ai, :n],
            self.model.label,
            None if norm is None or not self.levels else np.stack([norm[human], norm[ai]], axis=1),
            ranks=None if ranks is None else np.stack([ranks[human], ranks[ai]], axis=1),
            random_words=others,
        )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts share from the start: where the subject begins."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


def shared_after_subject(model: Model, pair: PromptPair, human: Sequence[int], ai: Sequence[int]) -> int:
    """How many tokens the two prompts of a pair share from the end, the subject's own left out."""
    n = common_prefix(human[::-1], ai[::-1])
    for text, subject, ids in ((pair.human, pair.subject_human, human), (pair.ai, pair.subject_ai, ai)):
        at = text.lower().find(subject.lower()) if subject else -1
        if subject and at >= 0:
            n = min(n, max(0, len(ids) - len(model.encode(text[: at + len(subject)]))))
    return n


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
    """Logits where every word is one token and no normalizer was wanted, else log-probabilities (nats)."""
    log_normaliser: Float[np.ndarray, "n_prompts"] | None
    """log Σ exp of the logits at the prompt's last token; None where it was not needed."""
    ranks: Int[np.ndarray, "n_prompts n_ranked"] | None = None
    """Place of each ranked token among the whole vocabulary, 1 the most likely."""


@dataclass(frozen=True)
class Read:
    """Scores of one batch: logits of the wanted rows [batch, n_rows] and, where wanted, the normalizer [batch] and ranks."""

    z: Tensor
    log_normaliser: Tensor | None
    ranks: Tensor | None = None


class ReadingPlan:
    """The sequences to run for some prompts and words, in batches that never depend on what is already done."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[PromptIds],
        words: Sequence[tuple[int, ...]],
        *,
        normalise: bool = False,
        rank: Sequence[int] = (),
        beside: Sequence[int] = (),
        softcap: bool = True,
        batch_size: int | None = None,
    ):
        self.model = model
        self.rank, self.beside = list(rank), list(beside)
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
        if self.beside:  # in a product of their own: the words' logits stay the same to the bit
            more = last.logits(self.beside, softcap=self.softcap)[:, 0].cpu().double()
            z = torch.cat([z, more], dim=1)
        if not self.normalise:
            return Read(z, None)
        if not self.rank:
            return Read(z, last.log_normaliser(softcap=self.softcap)[:, 0].cpu().double())
        norm, ranks = _normaliser_and_ranks(last, self.rank, self.softcap)
        return Read(z, norm.cpu().double(), ranks.cpu())

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
        z = np.empty((self.n_sequences, len(self.row_ids) + len(self.beside)))
        norm = np.empty(self.n_sequences) if self.normalise else None
        ranks = np.zeros((self.n_sequences, len(self.rank)), dtype=np.int64) if self.rank else None
        for batch in self.batches:
            read = read_batch(batch)
            z[list(batch.index)] = read.z.numpy()
            if norm is not None and read.log_normaliser is not None:
                norm[list(batch.index)] = read.log_normaliser.numpy()
            if ranks is not None and read.ranks is not None:
                ranks[list(batch.index)] = read.ranks.numpy()
        bad = ~np.isfinite(z).all(1)
        if norm is not None:
            bad |= ~np.isfinite(norm)
        if bad.any():
            prompt = self.prompt_of(int(np.flatnonzero(bad)[0]))
            raise RequestError(
                f"{self.model.name} gives NaN or infinite logits after {prompt.text!r} ({int(bad.sum())} of {len(z)} sequences)"
                f"{self.model.why_not_finite()}."
            )
        k = len(self.prefixes)
        return Reading(
            self._word_values(z, norm, column),
            None if norm is None else norm[::k].copy(),
            None if ranks is None else ranks[::k].copy(),
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
        return (
            np.concatenate([values, z[:, self.prefixes[()], len(self.row_ids) :]], axis=1)
            if self.beside
            else values
        )


RANKED_ROWS = 16  # prompts whose full logits are held at once


def _normaliser_and_ranks(
    last: Final, tokens: Sequence[int], softcap: bool
) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch n"]]:
    """log Σ exp of all logits at one position, and how many tokens are more likely than each of `tokens`, plus 1."""
    n = len(last.full if last.full is not None else last.resid)  # pyright: ignore[reportArgumentType]
    norms, ranks = [], []
    for row in range(0, n, RANKED_ROWS):
        rows = slice(row, row + RANKED_ROWS)
        part = Final(
            last.model,
            None if last.resid is None else last.resid[rows],
            None if last.full is None else last.full[rows],
        )
        logits = part.logits(softcap=softcap)[:, 0]
        norms.append(logits.logsumexp(-1))
        ranks.append(torch.stack([(logits > logits[:, t, None]).sum(-1) + 1 for t in tokens], dim=1))
    return torch.cat(norms), torch.cat(ranks)


def prompt_scores(model: Model, texts: Sequence[str], probe: Probe) -> Float[np.ndarray, "n_prompts"]:
    """The probe's score after each of some prompts, in its own units (nats for `mean_logit` and `logodds`)."""
    vocabulary = probe.vocabulary(model, list(texts))
    prompts = [PromptIds(text, tuple(model.encode(text)), 0) for text in texts]
    plan = ReadingPlan(model, prompts, [w.tokens for w in vocabulary.kept], softcap=probe.softcap)
    positive = np.array([w.positive for w in vocabulary.kept])
    return probe.score_values(plan.run().values, positive)
