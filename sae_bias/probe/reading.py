"""Reading evaluation words off a model: which tokens a word is, and its score after each prompt.

A word is never encoded alone: its tokens are what `prompt + " " + word` adds to `prompt`, whose own tokens must not change
(Mistral's SentencePiece gives `["▁", "▁natural"]` for `" natural"` alone, so a first-token probe would read the same `▁` for
every word). A word of several tokens scores the sum of its token log-probabilities, each read after `prompt + its tokens so far`;
so a reading is a list of sequences, each read at its last position, whatever the words are; `models.tree` computes what they share once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.models.forward import Final, log_sum_exp
from sae_bias.models.model import Model
from sae_bias.models.reads import Partner, Reader, Spot, read_together
from sae_bias.models.tree import common_prefix
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

    def result(self, reading: Reading) -> ProbeResult:
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


def shared_after_subject(model: Model, pair: PromptPair, human: Sequence[int], ai: Sequence[int]) -> int:
    """How many tokens the two prompts of a pair share from the end, the subject's own left out."""
    n = common_prefix(human[::-1], ai[::-1])
    for text, subject, ids in ((pair.human, pair.subject_human, human), (pair.ai, pair.subject_ai, ai)):
        ends = _mentions(text, subject) if subject else []
        if ends:
            n = min(n, max(0, len(ids) - len(model.encode(text[: ends[-1]]))))
    return n


def _mentions(text: str, subject: str) -> list[int]:
    """Where each mention of the subject ends: whole words where there are any (an AI, not An airline)."""
    named = re.escape(subject)
    found = (
        re.finditer(rf"(?<!\w){named}(?!\w)", text, re.IGNORECASE),
        re.finditer(named, text, re.IGNORECASE),
    )
    whole, any_ = ([m.end() for m in ways] for ways in found)
    return whole or any_


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
        self.sequences = [(*p.ids, *prefix) for p in self.prompts for prefix in prefixes]
        self.batch_size = batch_size

    @property
    def n_sequences(self) -> int:
        return len(self.sequences)

    def prompt_of(self, sequence: int) -> PromptIds:
        return self.prompts[sequence // len(self.prefixes)]

    def partner(self, sequence: int) -> Partner | None:
        """The paired prompt of one sequence."""
        prompt, tail = self.prompt_of(sequence), list(self.prefixes)[sequence % len(self.prefixes)]
        if not prompt.partner:
            return None
        return (*prompt.partner, *tail), prompt.suffix + len(tail) if prompt.suffix else 0

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
        norms, ranks = [], []
        for _, logits in last.blocks(softcap=self.softcap):
            norms.append(log_sum_exp(logits))
            ranks += [_ranks(logits, self.rank)] if self.rank else []
        return Read(z, torch.cat(norms).cpu().double(), torch.cat(ranks).cpu() if ranks else None)

    def run(self, *, progress: bool = False, describe: str = "probe") -> Reading:
        """Read every prompt, under whatever interventions are open on the model."""
        reader = PlanReader(self)
        read_together(self.model, [reader], progress=progress, describe=describe, batch_size=self.batch_size)
        return reader.reading()

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


class PlanReader(Reader):
    """One reading of a plan, as its rows come in."""

    def __init__(self, plan: ReadingPlan):
        self.plan = plan
        self.sequences = plan.sequences
        self.positions = [[len(s) - 1] for s in plan.sequences]
        prompts = [plan.prompt_of(i) for i in range(plan.n_sequences)]
        self.ends, self.starts = [len(p.ids) for p in prompts], [p.subject_start for p in prompts]
        self.partners = [plan.partner(i) for i in range(plan.n_sequences)]
        self.z = np.full((plan.n_sequences, len(plan.row_ids) + len(plan.beside)), np.nan)
        self.norm = np.full(plan.n_sequences, np.nan) if plan.normalise else None
        self.ranks = np.zeros((plan.n_sequences, len(plan.rank)), dtype=np.int64) if plan.rank else None

    def copy(self) -> PlanReader:
        """The same scores, to be replaced where a cell changes them."""
        other = copy(self)
        other.z = self.z.copy()
        other.norm = None if self.norm is None else self.norm.copy()
        other.ranks = None if self.ranks is None else self.ranks.copy()
        return other

    def take(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        at, of = (
            [row for row, spots in enumerate(wanted) for _ in spots],
            [i for spots in wanted for i, _ in spots],
        )
        read = self.plan.read(final)
        self.z[of] = read.z.numpy()[at]
        if self.norm is not None and read.log_normaliser is not None:
            self.norm[of] = read.log_normaliser.numpy()[at]
        if self.ranks is not None and read.ranks is not None:
            self.ranks[of] = read.ranks.numpy()[at]

    def reading(self) -> Reading:
        """Word scores of every prompt.

        Raises:
            RequestError: NaN or infinite logits; the prompt is named.
        """
        plan, norm, k = self.plan, self.norm, len(self.plan.prefixes)
        bad = ~np.isfinite(self.z).all(1)
        if norm is not None:
            bad |= ~np.isfinite(norm)
        if bad.any():
            prompt = plan.prompt_of(int(np.flatnonzero(bad)[0]))
            raise RequestError(
                f"{plan.model.name} gives NaN or infinite logits after {prompt.text!r} ({int(bad.sum())} of {plan.n_sequences} sequences)"
                f"{plan.model.why_not_finite()}."
            )
        return Reading(
            plan._word_values(self.z, norm, {t: j for j, t in enumerate(plan.row_ids)}),
            None if norm is None else norm[::k].copy(),
            None if self.ranks is None else self.ranks[::k].copy(),
        )


def _ranks(z: Float[Tensor, "n d_vocab"], tokens: Sequence[int]) -> Int[Tensor, "n k"]:
    """How many tokens are more likely than each of `tokens`, plus 1."""
    if z.device.type != "cpu":
        return torch.stack([(z > z[:, t, None]).sum(-1) + 1 for t in tokens], dim=1)
    above = [
        [np.count_nonzero(row > row[t]) + 1 for t in tokens] for row in z.numpy()
    ]  # torch takes seven times as long
    return torch.tensor(above)


def prompt_scores(model: Model, texts: Sequence[str], probe: Probe) -> Float[np.ndarray, "n_prompts"]:
    """The probe's score after each of some prompts, in its own units (nats for `mean_logit` and `logodds`)."""
    vocabulary = probe.vocabulary(model, list(texts))
    prompts = [PromptIds(text, tuple(model.encode(text)), 0) for text in texts]
    plan = ReadingPlan(model, prompts, [w.tokens for w in vocabulary.kept], softcap=probe.softcap)
    positive = np.array([w.positive for w in vocabulary.kept])
    return probe.score_values(plan.run().values, positive)
