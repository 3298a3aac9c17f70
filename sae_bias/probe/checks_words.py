"""Does the bias hang on the words? Leaving each out, resampling them, random words in their place, another stem, another score.

    leave one out    the bias without each word in turn
    bootstrap        words of each side and templates drawn with replacement, crossed (the words are a sample of judgments too)
    random words     words of the model's own vocabulary, as likely after these prompts, in place of the evaluation words
    carriers         under logodds: LSE(h) - LSE(a) = Σ_w (e^h_w - e^a_w)/L(S_h, S_a), L the logarithmic mean, S = Σ e: exact shares

(Montgomery-Vartia log change for the last; Owen 2007 for the crossed bootstrap.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import logsumexp

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import SCORES, Probe, default_probe, tokens_alone, word_tokens
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.reduction import crossed_weights

MOST_CANDIDATES = 4096  # words of the vocabulary that are read for the random-word null
NEAREST = 50  # a random word is one of this many that are likely as the word it stands for


# ── which words are read
def audit_words(model: Model, pairs: PromptPairs, probe: Probe | None = None) -> pd.DataFrame:
    """Every word of the probe under this tokenizer: its pieces, whether one token, whether read, and why not.

    `alone` is how the word encodes alone and `trap` whether its first token there differs from the one read: the prefix
    trap of docs/method.md#evaluation-words. Columns word, side, tokens, n_tokens, single, read, reason, alone, trap.
    """
    probe = probe or default_probe(pairs)
    prompt = pairs[0].human
    ids = model.encode(prompt)
    rows = []
    for side, words in (("positive", probe.positive), ("negative", probe.negative)):
        for word in words:
            try:
                tokens, reason = word_tokens(model, word, prompt, ids), ""
            except RequestError as error:
                tokens, reason = (), str(error)
            if len(tokens) > 1 and probe.score == "mean_logit" and probe.tokens == "in_context":
                reason = f"{len(tokens)} tokens; mean_logit needs 1"
            alone = tokens_alone(model, word)
            rows.append(
                {
                    "word": word,
                    "side": side,
                    "tokens": _pieces(model, tokens),
                    "n_tokens": len(tokens),
                    "single": len(tokens) == 1,
                    "read": not reason,
                    "reason": reason,
                    "alone": _pieces(model, alone),
                    "trap": bool(tokens) and alone[:1] != tokens[:1],
                }
            )
    return pd.DataFrame(rows)


def _pieces(model: Model, ids: Sequence[int]) -> str:
    return " ".join(str(t) for t in model.tokenizer.convert_ids_to_tokens(list(ids)))


# ── from one result, nothing run again
def leave_one_word_out(result: ProbeResult) -> pd.DataFrame:
    """The bias without each word in turn, largest change first; a side's only word cannot be left out (NaN)."""
    kept = result.vocabulary.kept
    sizes = {True: int(result.positive.sum()), False: int((~result.positive).sum())}
    rows = []
    for word in kept:
        row: dict[str, Any] = {"word": word.word, "side": "positive" if word.positive else "negative"}
        if sizes[word.positive] > 1:
            left = result.select_words([w.word for w in kept if w is not word])
            row |= {"bias": left.bias, "ci_low": left.ci[0], "ci_high": left.ci[1], "p_value": left.p_value}
            row["change"] = left.bias - result.bias
        else:
            row |= dict.fromkeys(("bias", "ci_low", "ci_high", "p_value", "change"), float("nan"))
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.reindex(frame["change"].abs().sort_values(ascending=False).index).reset_index(drop=True)


@dataclass(frozen=True)
class WordBootstrap:
    """Percentile interval of the bias over resampled words and templates, given these entities."""

    bias: float
    ci_low: float
    ci_high: float
    sd: float
    sd_words: float
    """Standard deviation with the words alone resampled: how much of the spread is the choice of words."""
    n_boot: int
    label: str = "over words and templates, given these entities"
    reason: str = ""


def bootstrap_words(
    result: ProbeResult, *, n_boot: int = 2_000, seed: int = 0, level: float = 0.95
) -> WordBootstrap:
    """Draw positive words, negative words and templates with replacement, apart and crossed; read the bias each time."""
    templates = result.clusters[0]
    sides = (int(result.positive.sum()), int((~result.positive).sum()))
    if min(sides) < 2 or len(set(templates)) < 2:
        nan = float("nan")
        why = f"{sides[0]} positive and {sides[1]} negative words, {len(set(templates))} templates: two of each are needed"
        return WordBootstrap(result.bias, nan, nan, nan, nan, 0, reason=why)
    words = np.ones((n_boot, len(result.positive)))
    for k, mark in enumerate((result.positive, ~result.positive)):
        words[:, mark] = crossed_weights(np.flatnonzero(mark).tolist(), n_boot=n_boot, seed=seed + 1 + k)
    bias = _weighted_scores(result, result.values_human, words) - _weighted_scores(
        result, result.values_ai, words
    )
    rows = crossed_weights(templates, n_boot=n_boot, seed=seed)
    boot = (rows * bias.T).sum(1) / rows.sum(1)
    low, high = np.quantile(boot, [(1 - level) / 2, (1 + level) / 2])
    return WordBootstrap(
        result.bias, float(low), float(high), float(boot.std(ddof=1)), float(bias.mean(0).std(ddof=1)), n_boot
    )


def _weighted_scores(
    result: ProbeResult, values: Float[np.ndarray, "n n_words"], weights: Float[np.ndarray, "boot n_words"]
) -> Float[np.ndarray, "n boot"]:
    """s of each prompt with each word counted as often as it was drawn."""
    positive = result.positive
    pos, neg, w_pos, w_neg = (
        values[:, positive],
        values[:, ~positive],
        weights[:, positive],
        weights[:, ~positive],
    )
    if result.probe.score == "mean_logit":
        return pos @ w_pos.T / w_pos.sum(1) - neg @ w_neg.T / w_neg.sum(1)
    if result.probe.score == "logodds":
        return _weighted_lse(pos, w_pos) - _weighted_lse(neg, w_neg)
    above = (pos[:, :, None] > neg[:, None, :]) + 0.5 * (pos[:, :, None] == neg[:, None, :])
    both = (w_pos[:, :, None] * w_neg[:, None, :]).reshape(len(weights), -1)
    return above.reshape(len(values), -1) @ both.T / both.sum(1)


def _weighted_lse(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    top = values.max(1, keepdims=True)
    return np.log(np.exp(values - top) @ weights.T) + top


def carriers(result: ProbeResult) -> pd.DataFrame:
    """The words that carry most of `logodds`: their share of their side's probability, and their exact part of the bias.

    The contributions of all words add up to the logodds bias.
    """
    result = result.rescored("logodds")
    weight = np.empty(len(result.positive))
    part = np.empty(len(result.positive))
    for mark, sign in ((result.positive, 1.0), (~result.positive, -1.0)):
        human, ai = result.values_human[:, mark], result.values_ai[:, mark]
        total_human, total_ai = (np.asarray(logsumexp(side, axis=1)) for side in (human, ai))
        share_human, share_ai = np.exp(human - total_human[:, None]), np.exp(ai - total_ai[:, None])
        weight[mark] = (share_human.mean(0) + share_ai.mean(0)) / 2
        change = total_human - total_ai
        # (e^h - e^a)/L(S_h, S_a) with both divided by S_a, so that nothing overflows
        ratio = np.where(np.abs(change) > 1e-12, change / np.expm1(np.where(change == 0, 1, change)), 1.0)
        moved = share_human * np.exp(change)[:, None] - share_ai
        part[mark] = sign * (moved * ratio[:, None]).mean(0)
    frame = pd.DataFrame(
        {
            "word": [w.word for w in result.vocabulary.kept],
            "side": np.where(result.positive, "positive", "negative"),
            "weight": weight,
            "contribution": part,
        }
    )
    return frame.sort_values("weight", ascending=False).reset_index(drop=True)


# ── another run
def scores_side_by_side(model: Model, pairs: PromptPairs, probe: Probe | None = None) -> pd.DataFrame:
    """Every scoring mode, with and without the final softcap where the model has one (auroc in probability, not nats).

    The same words everywhere; a further logodds row reads the words of several tokens too, where some were left out.
    """
    probe = probe or default_probe(pairs)
    rows = []
    for softcap in (True, False) if model.softcap is not None else (True,):
        one = run_probe(model, pairs, probe.with_options(softcap=softcap))
        modes = [m for m in SCORES if m != "mean_logit" or one.single_tokens]
        found = [
            (mode, "words of one token" if one.single_tokens else "all words", one.rescored(mode))
            for mode in modes
        ]
        if one.vocabulary.excluded and one.probe.score == "mean_logit":
            whole = run_probe(model, pairs, probe.with_options(score="logodds", softcap=softcap))
            found.append(("logodds", "all words", whole))
        for mode, words, result in found:
            sizes = result.effect_sizes()
            rows.append(
                {
                    "score": mode,
                    "softcap": "none" if model.softcap is None else ("on" if softcap else "off"),
                    "words": words,
                    "n_words": len(result.vocabulary.kept),
                    "bias": result.bias,
                    "ci_low": result.ci[0],
                    "ci_high": result.ci[1],
                    "p_value": result.p_value,
                    "d_z": sizes.d_z,
                    "share_templates_positive": sizes.share_positive,
                }
            )
    return pd.DataFrame(rows)


def stem_variation(
    model: Model, pairs: PromptPairs, probe: Probe | None = None, stems: Sequence[str] | None = None
) -> pd.DataFrame:
    """The bias under each stem (the file's own list by default); the stem varies as words do.

    Raises:
        RequestError: the pairs offer no stems, or their own stem is not known.
    """
    stems = tuple(stems) if stems is not None else pairs.stems
    if not stems:
        raise RequestError("these pairs offer no stems; give stems=['This is', 'That seems'].")
    rows = []
    for stem in stems:
        result = run_probe(model, pairs.with_stem(stem), probe or default_probe(pairs))
        rows.append(
            {
                "stem": stem,
                "bias": result.bias,
                "ci_low": result.ci[0],
                "ci_high": result.ci[1],
                "p_value": result.p_value,
                "n_words": len(result.vocabulary.kept),
                "left_out": ", ".join(w.word for w in result.vocabulary.excluded),
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class RandomWordNull:
    """The bias read with random words, and where the evaluation words stand among them."""

    bias: float
    biases: Float[np.ndarray, "n"] = field(repr=False)
    p_value: float
    """(1 + #{|random| ≥ |bias|}) / (1 + n); NaN where the vocabulary has too few words."""
    n: int
    n_candidates: int
    reason: str = ""


def random_word_null(
    model: Model, pairs: PromptPairs, probe: Probe | None = None, n: int = 1_000, seed: int = 0
) -> RandomWordNull:
    """The probe with random single-token words of the model's own vocabulary in place of the evaluation words.

    Each word is replaced by one of the 50 candidates whose mean logit after all prompts (human and AI alike) is nearest to its
    own: as common after this stem, and blind to what is tested. All candidates are read in one pass.
    """
    probe = probe or default_probe(pairs)
    base = run_probe(model, pairs, probe)
    if not base.single_tokens:
        base = base.select_words([w.word for w in base.vocabulary.kept if w.single])
    candidates = _candidates(model, pairs[0].human, {w.tokens[0] for w in base.vocabulary.kept}, seed)
    n_words = len(base.vocabulary.kept)
    if len(candidates) < 2 * n_words:
        why = f"the vocabulary has {len(candidates)} other words of one token; at least {2 * n_words} are needed"
        return RandomWordNull(base.bias, np.empty(0), float("nan"), 0, len(candidates), why)
    half = len(candidates) // 2
    wide = run_probe(
        model, pairs, Probe(candidates[:half], candidates[half:], "mean_logit", softcap=probe.softcap)
    )
    rng = np.random.default_rng(seed)
    near = _nearest(base, wide)
    biases = np.empty(n)
    for i in range(n):
        columns = _draw(rng, near)
        human, ai = wide.values_human[:, columns], wide.values_ai[:, columns]
        difference = probe.score_values(human, base.positive) - probe.score_values(ai, base.positive)
        biases[i] = difference.mean()
    p = (1 + int((np.abs(biases) >= abs(base.bias) - 1e-12).sum())) / (1 + n)
    return RandomWordNull(base.bias, biases, p, n, len(candidates))


def _nearest(base: ProbeResult, wide: ProbeResult) -> list[np.ndarray]:
    """Of each evaluation word, the candidates of the nearest mean logit."""
    own, others = (((r.values_human + r.values_ai) / 2).mean(0) for r in (base, wide))
    k = min(NEAREST, max(len(own), len(others) // 4), len(others))
    return [np.argsort(np.abs(others - z), kind="stable")[:k] for z in own]


def _draw(rng: np.random.Generator, near: list[np.ndarray]) -> np.ndarray:
    """One candidate a word, none twice where that can be helped."""
    taken: list[int] = []
    for options in near:
        free = options[~np.isin(options, taken)]
        taken.append(int(rng.choice(free if len(free) else options)))
    return np.array(taken)


def _candidates(model: Model, prompt: str, taken: set[int], seed: int) -> list[str]:
    """Lower-case words of the vocabulary that are one token after `prompt`, at most 4,096 of them."""
    whole = re.compile(r"[▁Ġ]([a-z]{2,})")
    pieces = model.tokenizer.get_vocab()
    found = {
        match[1]: token
        for piece, token in pieces.items()
        if token not in taken and token < model.d_vocab and (match := whole.fullmatch(piece))
    }
    words = sorted(found)
    np.random.default_rng(seed).shuffle(words)
    ids = model.encode(prompt)
    kept: list[str] = []
    for word in words:
        try:
            tokens = word_tokens(model, word, prompt, ids)
        except RequestError:
            continue
        if tokens == (found[word],):
            kept.append(word)
        if len(kept) == MOST_CANDIDATES:
            break
    return kept
