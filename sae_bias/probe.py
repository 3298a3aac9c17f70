"""The bias probe: does the model evaluate the same words and deeds more harshly when an AI is their subject?

    s(x)  = mean over positive words of z_w - mean over negative words of z_w      (z: next-token logits at the last token)
    bias  = s(human) - s(AI)                                                        (positive: the AI is judged worse; nats)

Logits, log-probabilities and centred logits give the same s, because one constant a position cancels. `logodds` compares the
odds of the whole sets (log-sum-exp), `auroc` ranks them. The interval and p are two-way clustered over templates and entities
(METHOD §1): 280 pairs are 35 templates × 8 entities, not 280 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.errors import RequestError
from sae_bias.model import Model
from sae_bias.prompts import PromptPair, PromptPairs, load_lexicon
from sae_bias.reading import PromptIds, ReadingPlan, Vocabulary, WordTokens, tokens_alone, word_tokens
from sae_bias.stats import (
    Clustered,
    EffectSizes,
    Reduction,
    SignFlip,
    clustered_mean,
    effect_sizes,
    fieller_reduction,
    sign_flip,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCORES = ("mean_logit", "logodds", "auroc")
TOKENS = ("in_context", "first", "alone")


@dataclass(frozen=True)
class Probe:
    """Evaluation words and how they make a score."""

    positive: tuple[str, ...] = ()
    """Words that judge favourably; the bundled list where neither list is given."""
    negative: tuple[str, ...] = ()
    score: str = "mean_logit"
    """mean_logit (the replication) | logodds (odds of the whole sets) | auroc (P(z_pos > z_neg))."""
    softcap: bool = True
    """Whether Gemma 2's final-logit softcap is applied, as its own forward pass does."""
    tokens: str = "in_context"
    """in_context | first (only a word's first token, a switch of `as_published`) | alone (the first token of the word encoded
    by itself: the mistake METHOD §1 warns of, kept as a switch)."""
    bundled: bool = field(default=False, init=False)
    """Whether the words are the bundled ones: then a word of several tokens is left out and listed, not an error."""

    def __init__(
        self,
        positive: Sequence[str] | None = None,
        negative: Sequence[str] | None = None,
        score: str = "mean_logit",
        *,
        softcap: bool = True,
        tokens: str = "in_context",
    ):
        if score not in SCORES:
            raise RequestError(f"score={score!r}; expected one of {', '.join(SCORES)}.")
        if tokens not in TOKENS:
            raise RequestError(f"tokens={tokens!r}; expected one of {', '.join(TOKENS)}.")
        if (positive is None) != (negative is None):
            raise RequestError("give both positive and negative words, or neither (for the bundled ones).")
        bundled = positive is None
        lexicon = load_lexicon() if bundled else None
        for name, value in (
            ("positive", _words("positive", lexicon.positive if lexicon else positive)),
            ("negative", _words("negative", lexicon.negative if lexicon else negative)),
            ("score", score),
            ("softcap", softcap),
            ("tokens", tokens),
            ("bundled", bundled),
        ):
            object.__setattr__(self, name, value)
        both = sorted(set(self.positive) & set(self.negative))
        if both:
            raise RequestError(
                f"{', '.join(map(repr, both))} stands in both word lists; a word must be positive or negative."
            )

    def with_options(self, **changes: Any) -> Probe:
        """The same words (bundled or not) with another `score`, `softcap` or `tokens`."""
        options = {"score": self.score, "softcap": self.softcap, "tokens": self.tokens} | changes
        probe = Probe(self.positive, self.negative, **options)
        object.__setattr__(probe, "bundled", self.bundled)
        return probe

    def vocabulary(self, model: Model, prompts: Sequence[str]) -> Vocabulary:
        """The words as `model`'s tokens after `prompts`.

        Raises:
            RequestError: under mean_logit, a word the user gave is several tokens; or a list is left empty.
        """
        contexts = {p.rsplit(" ", 1)[-1]: p for p in reversed(prompts)}
        words = [
            self._word(model, w, positive, contexts)
            for positive, ws in ((True, self.positive), (False, self.negative))
            for w in ws
        ]
        vocabulary = Vocabulary(tuple(words))
        for positive, side in ((True, "positive"), (False, "negative")):
            if not any(w.positive == positive for w in vocabulary.kept):
                raise RequestError(
                    f"no {side} word can be read under {model.name} with score={self.score!r}; give other words, or score='logodds'."
                )
        return vocabulary

    def _word(self, model: Model, word: str, positive: bool, contexts: dict[str, str]) -> WordTokens:
        if self.tokens == "alone":
            return WordTokens(word, positive, tokens_alone(model, word)[:1])
        found = {word_tokens(model, word, prompt, model.encode(prompt)) for prompt in contexts.values()}
        if self.tokens == "first":
            found = {tokens[:1] for tokens in found}
        if len(found) > 1:
            raise RequestError(
                f"{word!r} is tokenised differently after different prompts; end every prompt in the same stem."
            )
        tokens = found.pop()
        if len(tokens) > 1 and self.score == "mean_logit":
            if not self.bundled:
                raise RequestError(
                    f'" {word}" is {len(tokens)} tokens for {model.name}; score="mean_logit" needs 1. Try another word, or score="logodds".'
                )
            return WordTokens(word, positive, tokens, f"{len(tokens)} tokens")
        return WordTokens(word, positive, tokens)

    def score_values(
        self, values: Float[np.ndarray, "n n_words"], positive: np.ndarray
    ) -> Float[np.ndarray, "n"]:
        """s of each prompt from its word scores; `positive` marks the positive columns."""
        pos, neg = values[:, positive], values[:, ~positive]
        if self.score == "mean_logit":
            return pos.mean(1) - neg.mean(1)
        if self.score == "logodds":
            return np.logaddexp.reduce(pos, axis=1) - np.logaddexp.reduce(neg, axis=1)
        above = (pos[:, :, None] > neg[:, None, :]).mean((1, 2))
        return above + 0.5 * (pos[:, :, None] == neg[:, None, :]).mean((1, 2))


@dataclass(frozen=True, eq=False)
class Change:
    """after - base, pair by pair: negative means the bias fell."""

    stat: Clustered
    """Mean change of the bias with its two-way clustered interval."""
    mean_abs: float
    """Mean |change|: a mean near 0 can hide per-prompt damage."""
    values: Float[np.ndarray, "n_pairs"]

    @property
    def mean(self) -> float:
        return self.stat.mean

    @property
    def ci(self) -> tuple[float, float]:
        return self.stat.ci

    def __repr__(self) -> str:
        low, high = self.ci
        return f"Change(mean={self.mean:+.4f} [{low:+.4f}, {high:+.4f}], mean |change|={self.mean_abs:.4f}, n_pairs={len(self.values)})"


@dataclass(frozen=True, eq=False)
class ControlDifference:
    """bias(survival) - bias(mundane), pair by pair: what the content adds to plain negativity towards AI."""

    stat: Clustered
    values: Float[np.ndarray, "n_with_control"]
    templates: tuple[str, ...]
    """Template of each value."""
    n_without_control: int
    """Pairs that have no mundane twin, and do not count."""

    @property
    def effect_sizes(self) -> EffectSizes:
        return effect_sizes(self.values, self.templates)

    def __repr__(self) -> str:
        low, high = self.stat.ci
        left = f", {self.n_without_control} pairs without a twin" if self.n_without_control else ""
        return f"ControlDifference({self.stat.mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {self.stat.p_value:.2g}{left})"


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Word scores of every pair, and the bias they add up to."""

    pairs: PromptPairs
    probe: Probe
    vocabulary: Vocabulary
    values_human: Float[np.ndarray, "n_pairs n_words"]
    """Score of each kept word after the human prompt (logits, or log-probabilities where words are several tokens)."""
    values_ai: Float[np.ndarray, "n_pairs n_words"]
    model_name: str
    log_normaliser: Float[np.ndarray, "n_pairs 2"] | None = None
    """log Σ exp of the logits after the human and the AI prompt, where levels were asked for."""
    control: ProbeResult | None = None
    """The same pairs with mundane content, where asked for."""

    @cached_property
    def positive(self) -> np.ndarray:
        return np.array([w.positive for w in self.vocabulary.kept])

    @cached_property
    def score_human(self) -> Float[np.ndarray, "n_pairs"]:
        return self.probe.score_values(self.values_human, self.positive)

    @cached_property
    def score_ai(self) -> Float[np.ndarray, "n_pairs"]:
        return self.probe.score_values(self.values_ai, self.positive)

    @cached_property
    def pair_bias(self) -> Float[np.ndarray, "n_pairs"]:
        """s(human) - s(AI) of each pair."""
        return self.score_human - self.score_ai

    @cached_property
    def stat(self) -> Clustered:
        """Mean bias with its two-way clustered interval and p (METHOD §1)."""
        return clustered_mean(self.pair_bias, *self.clusters)

    @property
    def clusters(self) -> tuple[list[str], list[str]]:
        """Template and entity of each pair."""
        return [p.template for p in self.pairs], [p.entity for p in self.pairs]

    @property
    def bias(self) -> float:
        """Mean of s(human) - s(AI) in nats (for auroc: in probability); positive means the AI is judged worse."""
        return self.stat.mean

    @property
    def ci(self) -> tuple[float, float]:
        """95 % interval of the bias; NaN where the design has fewer than two templates or entities."""
        return self.stat.ci

    @property
    def p_value(self) -> float:
        return self.stat.p_value

    @property
    def n_pairs(self) -> int:
        return len(self.pairs)

    # --- beside the primary interval ---

    def effect_sizes(self) -> EffectSizes:
        """Mean, template-level d_z and the share of templates above 0."""
        return effect_sizes(self.pair_bias, self.clusters[0])

    def sign_flips(self) -> dict[str, SignFlip]:
        """Sign-flip tests over templates and over entities, each with its label; p is NaN with fewer than two clusters."""
        out = {}
        for over, clusters in zip(("templates", "entities"), self.clusters):
            test = sign_flip(self.pair_bias, clusters, over=over)
            out[over] = test if test.n_clusters > 1 else replace(test, p_value=float("nan"))
        return out

    def difference_in_differences(self) -> ControlDifference:
        """bias(survival) - bias(mundane) over the pairs that have a mundane twin.

        Raises:
            RequestError: the probe ran without controls, or no pair has a twin.
        """
        if self.control is None or not len(self.control.pairs):
            raise RequestError(
                "there is no mundane control; run_probe(..., controls=True) on pairs that have one."
            )
        difference = self.pair_bias - self._aligned_control()
        keep = np.isfinite(difference)
        templates, entities = (np.array(c)[keep].tolist() for c in self.clusters)
        stat = clustered_mean(difference[keep], templates, entities)
        return ControlDifference(stat, difference[keep], tuple(templates), int((~keep).sum()))

    @property
    def single_tokens(self) -> bool:
        """Whether every word read is one token: then `values_*` are logits, otherwise log-probabilities."""
        return all(w.single for w in self.vocabulary.kept)

    def log_probs(self) -> tuple[Float[np.ndarray, "n_pairs n_words"], Float[np.ndarray, "n_pairs n_words"]]:
        """Log-probability of each word after the human and after the AI prompt.

        Raises:
            RequestError: the normaliser was not kept; run_probe(..., levels=True) keeps it.
        """
        if not self.single_tokens:
            return self.values_human, self.values_ai
        if self.log_normaliser is None:
            raise RequestError(
                "levels need the normaliser of the logits; run_probe(..., levels=True) keeps it."
            )
        return self.values_human - self.log_normaliser[:, :1], self.values_ai - self.log_normaliser[:, 1:]

    def levels(self) -> pd.DataFrame:
        """Mean log-probability of the positive words alone and of the negative alone, per subject, with its interval.

        One row a side and subject, and one for their difference (first - second). Unlike s, levels are not free of the
        normaliser, so they need `run_probe(..., levels=True)`.
        """
        human, ai = self.log_probs()
        rows = []
        for words, mark in (("positive", self.positive), ("negative", ~self.positive)):
            first, second = human[:, mark].mean(1), ai[:, mark].mean(1)
            label = f"{self.sides[0]} - {self.sides[1]}"
            for subject, values in ((self.sides[0], first), (self.sides[1], second), (label, first - second)):
                stat = clustered_mean(values, *self.clusters)
                rows.append(
                    {
                        "words": words,
                        "subject": subject,
                        "level": stat.mean,
                        "ci_low": stat.ci_low,
                        "ci_high": stat.ci_high,
                    }
                )
        return pd.DataFrame(rows)

    # --- the same run, read otherwise ---

    @property
    def sides(self) -> tuple[str, str]:
        """What the two subjects are called: bias = s(first) - s(second)."""
        return self.pairs.sides

    def select_words(self, words: Sequence[str]) -> ProbeResult:
        """The result read with some of its words only; nothing is run again.

        Raises:
            RequestError: a word that was not read, or a side left without words.
        """
        wanted, kept = set(words), self.vocabulary.kept
        unknown = wanted - {w.word for w in kept}
        if unknown:
            raise RequestError(f"{sorted(unknown)[0]!r} was not read in this result.")
        keep = [i for i, w in enumerate(kept) if w.word in wanted]
        if len({kept[i].positive for i in keep}) < 2:
            raise RequestError("a selection of words must leave a positive and a negative one.")
        left_out = tuple(
            replace(w, reason="not selected") if not w.reason and w.word not in wanted else w
            for w in self.vocabulary.words
        )
        return replace(
            self,
            vocabulary=Vocabulary(left_out),
            values_human=self.values_human[:, keep],
            values_ai=self.values_ai[:, keep],
            control=None if self.control is None else self.control.select_words(words),
        )

    def rescored(self, score: str) -> ProbeResult:
        """The same words under another score; nothing is run again.

        Raises:
            RequestError: mean_logit where a word is several tokens.
        """
        if score == "mean_logit" and not self.single_tokens:
            raise RequestError("mean_logit needs single-token words; select_words() the single ones first.")
        control = None if self.control is None else self.control.rescored(score)
        return replace(self, probe=self.probe.with_options(score=score), control=control)

    def save(self, path: str | Path) -> Path:
        """Write everything to one .npz file (no pickle); `ProbeResult.load` gives it back without loss."""
        from sae_bias.probe_files import save_result

        return save_result(self, path)

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """A result that `save` wrote.

        Raises:
            RequestError: no such file, or not one of ours.
        """
        from sae_bias.probe_files import load_result

        return load_result(path)

    def select(self, templates: Sequence[str]) -> ProbeResult:
        """The result on some templates only."""
        wanted = set(templates)
        keep = [i for i, p in enumerate(self.pairs) if p.template in wanted]
        if not keep:
            raise RequestError(f"none of the templates {sorted(wanted)[:3]} is in this result.")
        return ProbeResult(
            self.pairs.select(templates=templates),
            self.probe,
            self.vocabulary,
            self.values_human[keep],
            self.values_ai[keep],
            self.model_name,
            None if self.log_normaliser is None else self.log_normaliser[keep],
            None if self.control is None else self.control._select_those(wanted),
        )

    def _select_those(self, wanted: set[str]) -> ProbeResult | None:
        """The wanted templates that are here; None where none is."""
        here = wanted & set(self.pairs.templates)
        return self.select(sorted(here)) if here else None

    def reduction_from(self, base: ProbeResult) -> Reduction:
        """B_0 - B_s and R = 1 - B_s/B_0 with Fieller's interval; positive means less bias than in `base`."""
        self._check_same(base)
        return fieller_reduction(base.pair_bias, self.pair_bias, *self.clusters)

    def __sub__(self, base: ProbeResult) -> Change:
        """Change of the bias from `base` to this result."""
        self._check_same(base)
        change = self.pair_bias - base.pair_bias
        return Change(clustered_mean(change, *self.clusters), float(np.abs(change).mean()), change)

    def _check_same(self, base: ProbeResult) -> None:
        if self.pairs.digest != base.pairs.digest:
            raise RequestError("the two results are of different pairs; compare results of the same prompts.")
        if self.vocabulary.kept != base.vocabulary.kept or self.probe != base.probe:
            raise RequestError("the two results read different words or scores; use one probe for both.")

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: prompts, template, entity, family, score of each subject, bias."""
        frame = self.pairs.to_frame()[["human", "ai", "template", "entity", "family"]].copy()
        frame["score_human"], frame["score_ai"], frame["bias"] = (
            self.score_human,
            self.score_ai,
            self.pair_bias,
        )
        if self.control is not None:
            frame["control_bias"] = self._aligned_control()
        return frame

    def _aligned_control(self) -> np.ndarray:
        assert self.control is not None
        by_key = {(p.template, p.entity): b for p, b in zip(self.control.pairs, self.control.pair_bias)}
        return np.array([by_key.get((p.template, p.entity), np.nan) for p in self.pairs])

    def words(self) -> pd.DataFrame:
        """One row a word: its mean score after human and AI prompts, and what it adds to the bias under mean_logit."""
        difference = (self.values_human - self.values_ai).mean(0)
        sign = np.where(self.positive, 1 / self.positive.sum(), -1 / (~self.positive).sum())
        return pd.DataFrame(
            {
                "word": [w.word for w in self.vocabulary.kept],
                "side": np.where(self.positive, "positive", "negative"),
                "n_tokens": [len(w.tokens) for w in self.vocabulary.kept],
                "human": self.values_human.mean(0),
                "ai": self.values_ai.mean(0),
                "diff": difference,
                "contribution": difference * sign,
            }
        )

    def plot(self) -> go.Figure:
        """Bias of each template with the overall interval."""
        from sae_bias.plots import bias_by_template

        figure = bias_by_template(
            self.to_frame(), {"mean": self.bias, "ci_low": self.ci[0], "ci_high": self.ci[1]}
        )
        if self.sides != ("human", "AI"):
            first, second = (escape(side) for side in self.sides)
            figure.update_xaxes(title_text=f"bias = {first} − {second} (right of 0: {second} judged worse)")
        return figure

    def __repr__(self) -> str:
        low, high = self.ci
        label = "" if self.sides == ("human", "AI") else f" ({self.sides[0]} − {self.sides[1]})"
        lines = [
            f"ProbeResult({self.model_name}): bias{label} {self.bias:+.4f} [{low:.4f}, {high:.4f}], p = {self.p_value:.2g}, "
            f"{self.n_pairs} pairs ({self.stat.n_templates} templates × {self.stat.n_entities} entities), score={self.probe.score}"
        ]
        if self.stat.reason:
            lines.append(f"  no interval: {self.stat.reason}")
        if self.vocabulary.excluded:
            lines.append(
                "  left out: " + ", ".join(f"{w.word} ({w.reason})" for w in self.vocabulary.excluded)
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>" + self.to_frame().head(8).to_html(
            escape=True, float_format="{:.3f}".format
        )


def run_probe(
    model: Model,
    pairs: PromptPairs | Sequence[PromptPair],
    probe: Probe | None = None,
    *,
    controls: bool = False,
    levels: bool = False,
    chat: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> ProbeResult:
    """Score every pair, under whatever interventions are open on `model`.

    Args:
        controls: also run each pair's mundane twin (`.control`).
        levels: also keep the normaliser, so that `.levels()` can be asked; needs the full vocabulary at one position a prompt.
        chat: the sentence in the user's turn (`sae_bias.chat.CHAT_QUESTION`), the stem prefilled in the model's turn.

    Raises:
        RequestError: no pairs, a word that cannot be read, NaN logits (the prompt is named), chat without a chat template.
    """
    pairs = pairs if isinstance(pairs, PromptPairs) else PromptPairs(tuple(pairs))
    if not len(pairs):
        raise RequestError("there are no pairs to probe.")
    probe = probe or default_probe(pairs)
    if chat:
        from sae_bias.chat import chat_pairs

        pairs = chat_pairs(model, pairs)
    reading = PairReading(model, pairs, probe, levels=levels, batch_size=batch_size)
    result = reading.result(reading.plan.run(progress=progress))
    if not controls:
        return result
    control = run_probe(
        model, pairs.controls(), probe, levels=levels, batch_size=batch_size, progress=progress
    )
    return _with(result, control=control)


def default_probe(pairs: PromptPairs) -> Probe:
    """The probe a pairs file brings its own words for, or the bundled one."""
    words = getattr(pairs, "words", None)
    return Probe() if words is None else Probe(words.positive, words.negative)


class PairReading:
    """Pairs and a probe as the sequences one model has to run, and the way back to a ProbeResult."""

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        probe: Probe,
        *,
        levels: bool = False,
        batch_size: int | None = None,
    ):
        self.model, self.pairs, self.probe = model, pairs, probe
        self.levels = levels
        self.vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
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
            normalise=levels,
            softcap=probe.softcap,
            batch_size=batch_size,
        )

    def result(self, reading: Any) -> ProbeResult:
        human, ai = (np.array(side) for side in zip(*self._place))
        norm = reading.log_normaliser
        return ProbeResult(
            self.pairs,
            self.probe,
            self.vocabulary,
            reading.values[human],
            reading.values[ai],
            self.model.name,
            None if norm is None or not self.levels else np.stack([norm[human], norm[ai]], axis=1),
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


def _with(result: ProbeResult, **changes: Any) -> ProbeResult:
    return replace(result, **changes)


def _words(side: str, words: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(words, str):
        raise RequestError(f"{side} words must be a list, not the one text {words!r}.")
    cleaned = tuple(str(w).strip() for w in words or ())
    if not cleaned or not all(cleaned):
        raise RequestError(f"the list of {side} words is empty or holds an empty word.")
    if len(set(cleaned)) != len(cleaned):
        doubled = sorted({w for w in cleaned if cleaned.count(w) > 1})
        raise RequestError(f"the {side} words hold {', '.join(map(repr, doubled))} twice.")
    return cleaned
