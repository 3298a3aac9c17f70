"""Figures made from a probe's word scores: a change under an edit, the difference in differences, the words' probability mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from sae_bias.probe.words import WordTokens
from sae_bias.stats.clustered import Clustered, EffectSizes, effect_sizes

LITTLE_MASS = 0.01
"""Below this share of the next-token probability the headline warns."""
FAR = 1_000
"""A word beyond this rank is one that the model would hardly say here."""


@dataclass(frozen=True, eq=False)
class _Mean:
    """A mean over pairs, and the pairs' own values."""

    stat: Clustered
    """The mean with its two-way clustered interval."""
    values: Float[np.ndarray, "n_pairs"]

    @property
    def mean(self) -> float:
        return self.stat.mean

    @property
    def ci(self) -> tuple[float, float]:
        return self.stat.ci

    @property
    def p_value(self) -> float:
        return self.stat.p_value


@dataclass(frozen=True, eq=False)
class Change(_Mean):
    """after - base, pair by pair: negative means the bias fell."""

    @property
    def mean_abs(self) -> float:
        """Mean |change|: a mean near 0 can hide per-prompt damage."""
        return float(np.abs(self.values).mean())

    def __repr__(self) -> str:
        low, high = self.ci
        return f"Change(mean={self.mean:+.4f} [{low:+.4f}, {high:+.4f}], mean |change|={self.mean_abs:.4f}, n_pairs={len(self.values)})"


@dataclass(frozen=True, eq=False)
class ControlDifference(_Mean):
    """bias(survival) - bias(mundane), pair by pair: what the content adds to plain negativity towards AI."""

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


@dataclass(frozen=True)
class Mass:
    """What share of the next-token probability the evaluation words hold after a prompt, and where they rank."""

    total: float
    """Σp of both lists, a mean over prompts of both sides; words that share their tokens count once."""
    positive: float
    negative: float
    best_word: str
    best_rank: float
    """Rank of the most likely word (median over prompts); NaN where ranks were not kept."""
    beyond_1000: float
    """Share of the words whose median rank is beyond 1,000."""
    words: pd.DataFrame = field(repr=False, compare=False)
    """word, side, probability, rank: most likely first."""

    @property
    def little(self) -> bool:
        """Whether the words hold under 1 %: the figure is then about a corner of what the model would say."""
        return self.total < LITTLE_MASS

    def __str__(self) -> str:
        percent = 100 * self.total
        share = f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"
        rank = "" if self.best_rank != self.best_rank else f" (rank {self.best_rank:,.0f})"
        far = (
            ""
            if self.beyond_1000 != self.beyond_1000
            else f"; {100 * self.beyond_1000:.0f}% of the words rank beyond {FAR:,}"
        )
        return f"the words hold {share}% of the next-token probability, most likely {self.best_word!r}{rank}{far}"


def word_mass(
    words: Sequence[WordTokens],
    log_probs: Float[np.ndarray, "n_prompts n_words"],
    ranks: Int[np.ndarray, "n_pairs 2 n_words"] | None,
) -> Mass:
    """The mass of `words` from their log-probabilities after every prompt."""
    probability = np.exp(log_probs).mean(0)
    rank = np.full(len(words), np.nan) if ranks is None else np.median(ranks.reshape(-1, len(words)), axis=0)
    rank = np.where([w.single for w in words], rank, np.nan)
    positive = np.array([w.positive for w in words])
    frame = pd.DataFrame(
        {
            "word": [w.word for w in words],
            "side": np.where(positive, "positive", "negative"),
            "probability": probability,
            "rank": rank,
        }
    ).sort_values("probability", ascending=False, ignore_index=True)
    known = rank[np.isfinite(rank)]

    def held(of: Bool[np.ndarray, "n_words"]) -> float:
        """Probability of the next tokens being any of these words: one that goes on from another is part of it."""
        starts = {words[i].tokens: i for i in np.flatnonzero(of).tolist()}
        inside = [any(t[:n] in starts for n in range(1, len(t))) for t in starts]
        return float(sum(probability[i] for i, more in zip(starts.values(), inside) if not more))

    return Mass(
        total=held(np.ones(len(words), dtype=bool)),
        positive=held(positive),
        negative=held(~positive),
        best_word=str(frame["word"][0]),
        best_rank=float(frame["rank"][0]),
        beyond_1000=float((known > FAR).mean()) if len(known) else float("nan"),
        words=frame,
    )
