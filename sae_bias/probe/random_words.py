"""Random words in the place of the evaluation words: is the figure about evaluation, or about any words at all?

Each evaluation word gives way to one of the 50 words of the vocabulary whose mean logit after all prompts (first and second subject
alike) is nearest to its own: as common after this stem, and blind to what is tested. The candidates are read in the same pass as the
evaluation words. p = (1 + #{|random| ≥ |figure|}) / (1 + n).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.probe.words import word_tokens

if TYPE_CHECKING:
    from sae_bias.probe.result import ProbeResult

MOST_CANDIDATES = 4096  # words of the vocabulary that are read
NEAREST = 50  # a random word is one of this many that are as likely as the word it stands for
_AFTER_A_SPACE = re.compile(r"[▁Ġ]([a-z]{2,})")


@dataclass(frozen=True, eq=False)
class RandomWords:
    """Scores of words of the vocabulary after both prompts of every pair."""

    words: tuple[str, ...]
    human: Float[np.ndarray, "n_pairs n_words"]
    ai: Float[np.ndarray, "n_pairs n_words"]


@dataclass(frozen=True, eq=False)
class RandomWordNull:
    """The figure read with random words, and where the evaluation words stand among them."""

    estimate: float
    """The primary figure with the evaluation words that are one token."""
    draws: Float[np.ndarray, "n"] = field(repr=False)
    p_value: float
    """NaN where the vocabulary has too few words."""
    n: int
    n_candidates: int
    of: str
    """What is estimated: difference in differences | bias."""
    reason: str = ""

    @property
    def within(self) -> float:
        """95 % of the random lists give a figure of at most this size."""
        return float(np.quantile(np.abs(self.draws), 0.95)) if self.n else float("nan")


def candidate_words(model: Model, prompt: str, taken: set[int], join: str = " ") -> dict[str, int]:
    """Words of the vocabulary that are one token after `prompt`, at most 4,096 of them, each with its token."""
    found = _pieces(model) if join else _pieces_without_space(model)
    found = {w: t for w, t in found.items() if t not in taken and t < model.d_vocab}
    words = sorted(found)
    np.random.default_rng(0).shuffle(words)
    ids = model.encode(prompt)
    kept: dict[str, int] = {}
    for word in words:
        try:
            tokens = word_tokens(model, word, prompt, ids, join)
        except RequestError:
            continue
        if tokens == (found[word],):
            kept[word] = found[word]
        if len(kept) == MOST_CANDIDATES:
            break
    return kept


def _pieces(model: Model) -> dict[str, int]:
    """Lower-case English words that begin with a space."""
    vocabulary = model.tokenizer.get_vocab()
    return {m[1]: token for piece, token in vocabulary.items() if (m := _AFTER_A_SPACE.fullmatch(piece))}


def _pieces_without_space(model: Model) -> dict[str, int]:
    """Pieces of letters of a script without upper and lower case (Chinese, Japanese, Thai ...)."""
    tokens = sorted(model.tokenizer.get_vocab().values())
    texts = model.tokenizer.batch_decode([[t] for t in tokens])
    return {
        text: token
        for text, token in zip(texts, tokens)
        if text and all(unicodedata.category(c) == "Lo" for c in text)
    }


def random_word_null(result: ProbeResult, n: int = 1_000, seed: int = 0) -> RandomWordNull:
    """The primary figure of `result` with `n` lists of random words.

    Raises:
        RequestError: the candidates were not read; run_probe(..., random_words=True) reads them.
    """
    single = [w for w in result.vocabulary.kept if w.single]
    if len({w.positive for w in single}) < 2:
        why = "a list has no word of one token for random words to stand in for"
        return RandomWordNull(result.primary.mean, np.empty(0), float("nan"), 0, 0, result.estimand, why)
    if not result.single_tokens:
        result = result.select_words([w.word for w in single])
    of, others = result.estimand, _others(result)
    n_words = len(result.vocabulary.kept)
    if len(others.words) < 2 * n_words:
        why = f"the vocabulary has {len(others.words)} other words of one token; at least {2 * n_words} are needed"
        return RandomWordNull(result.primary.mean, np.empty(0), float("nan"), 0, len(others.words), of, why)
    values, *_ = result.primary_values(random_differences(result, n, seed))
    draws = values.mean(-1)
    estimate = result.primary.mean
    p = (1 + int((np.abs(draws) >= abs(estimate) - 1e-12).sum())) / (1 + n)
    return RandomWordNull(estimate, draws, p, n, len(others.words), of)


def random_differences(
    result: ProbeResult, n: int, seed: int
) -> tuple[Float[np.ndarray, "n n_pairs"], Float[np.ndarray, "n n_twins"] | None]:
    """s(human) - s(AI) of every pair, and of every twin, under `n` random word lists: the same lists for both."""
    others = _others(result)
    own = ((result.values_human + result.values_ai) / 2).mean(0)
    columns = _draw_lists(own, ((others.human + others.ai) / 2).mean(0), n, seed)
    twins = None if result.control is None else _differences(result.control, columns)
    return _differences(result, columns), twins


def _others(result: ProbeResult) -> RandomWords:
    if result.random_words is None:
        raise RequestError("no random words were read; run_probe(..., random_words=True) reads them.")
    return result.random_words


def _draw_lists(
    own: Float[np.ndarray, "n_words"], others: Float[np.ndarray, "n_other"], n: int, seed: int
) -> Int[np.ndarray, "n n_words"]:
    """Of each evaluation word one candidate of a near mean logit; none twice in a list where that can be helped."""
    rng = np.random.default_rng(seed)
    k = min(NEAREST, max(len(own), len(others) // 4), len(others))
    near = [np.argsort(np.abs(others - z), kind="stable")[:k] for z in own]
    lists = np.empty((n, len(own)), dtype=int)
    for row in lists:
        taken = np.zeros(len(others), dtype=bool)
        for j, options in enumerate(near):
            free = options[~taken[options]]
            pool = free if len(free) else options
            row[j] = pool[rng.integers(len(pool))]
            taken[row[j]] = True
    return lists


def _differences(
    result: ProbeResult, columns: Int[np.ndarray, "n n_words"]
) -> Float[np.ndarray, "n n_pairs"]:
    """s(human) - s(AI) of every pair with the candidates of `columns` as its words."""
    others, positive, score = _others(result), result.positive, result.probe.score_values
    if result.probe.score != "mean_logit":
        return np.stack(
            [score(others.human[:, c], positive) - score(others.ai[:, c], positive) for c in columns]
        )
    weights = np.zeros((len(columns), len(others.words)))
    share = np.where(positive, 1 / positive.sum(), -1 / (~positive).sum())
    np.add.at(weights, (np.arange(len(columns))[:, None], columns), share)
    return weights @ (others.human - others.ai).T
