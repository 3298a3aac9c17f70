"""The bias probe: does the model evaluate the same words and deeds more harshly when an AI is their subject?

    s(x)  = mean over positive words of z_w - mean over negative words of z_w      (z: next-token logits at the last token)
    bias  = s(human) - s(AI)                                                        (positive: the AI is judged worse; nats)

Logits, log-probabilities and centred logits give the same s, because one constant a position cancels. `logodds` compares the
odds of the whole sets (log-sum-exp), `auroc` ranks them. The interval and p are two-way clustered over templates and entities
(METHOD §1): 280 pairs are 35 templates × 8 entities, not 280 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.errors import RequestError
from sae_bias.model import Model
from sae_bias.prompts import PromptPair, PromptPairs, load_lexicon
from sae_bias.reading import PromptIds, ReadingPlan, Vocabulary, WordTokens, word_tokens
from sae_bias.stats import Clustered, Reduction, clustered_mean, fieller_reduction

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCORES = ("mean_logit", "logodds", "auroc")


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
    bundled: bool = field(default=False, init=False)
    """Whether the words are the bundled ones: then a word of several tokens is left out and listed, not an error."""

    def __init__(
        self,
        positive: Sequence[str] | None = None,
        negative: Sequence[str] | None = None,
        score: str = "mean_logit",
        *,
        softcap: bool = True,
    ):
        if score not in SCORES:
            raise RequestError(f"score={score!r}; expected one of {', '.join(SCORES)}.")
        if (positive is None) != (negative is None):
            raise RequestError("give both positive and negative words, or neither (for the bundled ones).")
        bundled = positive is None
        lexicon = load_lexicon() if bundled else None
        for name, value in (
            ("positive", _words("positive", lexicon.positive if lexicon else positive)),
            ("negative", _words("negative", lexicon.negative if lexicon else negative)),
            ("score", score),
            ("softcap", softcap),
            ("bundled", bundled),
        ):
            object.__setattr__(self, name, value)
        both = sorted(set(self.positive) & set(self.negative))
        if both:
            raise RequestError(
                f"{', '.join(map(repr, both))} stands in both word lists; a word must be positive or negative."
            )

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
        found = {word_tokens(model, word, prompt, model.encode(prompt)) for prompt in contexts.values()}
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
            None if self.control is None else self.control.select(templates),
        )

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

        return bias_by_template(
            self.to_frame(), {"mean": self.bias, "ci_low": self.ci[0], "ci_high": self.ci[1]}
        )

    def __repr__(self) -> str:
        low, high = self.ci
        lines = [
            f"ProbeResult({self.model_name}): bias {self.bias:+.4f} [{low:.4f}, {high:.4f}], p = {self.p_value:.2g}, "
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
        from html import escape

        return f"<pre>{escape(repr(self))}</pre>" + self.to_frame().head(8).to_html(
            escape=True, float_format="%.3f"
        )


def run_probe(
    model: Model,
    pairs: PromptPairs | Sequence[PromptPair],
    probe: Probe | None = None,
    *,
    controls: bool = False,
    levels: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> ProbeResult:
    """Score every pair, under whatever interventions are open on `model`.

    Args:
        controls: also run each pair's mundane twin (`.control`).
        levels: also keep the normaliser, so that `.levels()` can be asked; needs the full vocabulary at one position a prompt.

    Raises:
        RequestError: no pairs, a word that cannot be read, NaN logits (the prompt is named).
    """
    pairs = pairs if isinstance(pairs, PromptPairs) else PromptPairs(tuple(pairs))
    if not len(pairs):
        raise RequestError("there are no pairs to probe.")
    probe = probe or default_probe(pairs)
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
            start = common_prefix(human, ai)
            for text, ids in ((pair.human, human), (pair.ai, ai)):
                if text not in prompts:
                    order[text] = len(prompts)
                    prompts[text] = PromptIds(text, tuple(ids), start)
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


def _with(result: ProbeResult, **changes: Any) -> ProbeResult:
    from dataclasses import replace

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
