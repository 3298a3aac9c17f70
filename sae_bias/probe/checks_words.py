"""Does the bias hang on the words? Leaving each out, resampling them, random words in their place, another stem, another score.

    leave one out    the primary figure without each word in turn
    bootstrap        words of each side and templates drawn with replacement, crossed (the words are a sample of judgments too)
    carriers         under logodds: LSE(h) - LSE(a) = Σ_w (e^h_w - e^a_w)/L(S_h, S_a), L the logarithmic mean, S = Σ e: exact shares
                     (h and a log-probabilities: of logits the parts would hang on a constant that no probability sees)

(Montgomery-Vartia log change for the last; Owen 2007 for the crossed bootstrap.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import logsumexp

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.models.reads import Asked
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import ask_all, ask_probe
from sae_bias.probe.words import (
    SCORES,
    Probe,
    WordTokens,
    default_probe,
    read_once,
    tokens_alone,
    word_tokens,
)
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.reduction import crossed_weights


# ── which words are read
def audit_words(model: Model, pairs: PromptPairs, probe: Probe | None = None) -> pd.DataFrame:
    """Every word of the probe under this tokenizer: its pieces, whether one token, whether read, and why not.

    `alone` is how the word encodes alone and `trap` whether its first token there differs from the one read: the prefix
    trap of docs/method.md#evaluation-words. Columns word, side, tokens, n_tokens, single, read, reason, alone, trap.
    """
    probe = probe or default_probe(pairs)
    prompt = pairs[0].human
    ids = model.encode(prompt)
    found = []
    for side, words in ((True, probe.positive), (False, probe.negative)):
        for word in words:
            try:
                tokens, reason = word_tokens(model, word, prompt, ids, probe.join), ""
            except RequestError as error:
                tokens, reason = (), str(error)
            if len(tokens) > 1 and probe.score == "mean_logit" and probe.tokens == "in_context":
                reason = f"{len(tokens)} tokens; mean_logit needs 1"
            found.append(WordTokens(word, side, tokens, reason))
    rows = []
    for w in read_once(found) if probe.score == "logodds" else found:
        alone = tokens_alone(model, w.word, probe.join)
        rows.append(
            {
                "word": w.word,
                "side": "positive" if w.positive else "negative",
                "tokens": _pieces(model, w.tokens),
                "n_tokens": len(w.tokens),
                "single": w.single,
                "read": not w.reason,
                "reason": w.reason,
                "alone": _pieces(model, alone),
                "trap": bool(w.tokens) and alone[:1] != w.tokens[:1],
            }
        )
    return pd.DataFrame(rows)


def _pieces(model: Model, ids: Sequence[int]) -> str:
    return " ".join(str(t) for t in model.tokenizer.convert_ids_to_tokens(list(ids)))


# ── from one result, nothing run again
def leave_one_word_out(result: ProbeResult) -> pd.DataFrame:
    """The primary figure and the bias without each word in turn, largest change of the first on top.

    Columns word, side, of, primary with its interval and p, change, bias. A side's only word cannot be left out (NaN).
    """
    kept = result.vocabulary.kept
    sizes = {True: int(result.positive.sum()), False: int((~result.positive).sum())}
    ends = ("primary", "primary_low", "primary_high", "primary_p")
    rows = []
    for word in kept:
        row: dict[str, Any] = {"word": word.word, "side": "positive" if word.positive else "negative"}
        row |= {"of": result.estimand} | dict.fromkeys((*ends, "change", "bias"), float("nan"))
        if sizes[word.positive] > 1:
            left = result.select_words([w.word for w in kept if w is not word])
            row |= left.primary.columns(*ends)
            row |= {"change": left.primary.mean - result.primary.mean, "bias": left.bias}
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.reindex(frame["change"].abs().sort_values(ascending=False).index).reset_index(drop=True)


@dataclass(frozen=True)
class WordBootstrap:
    """Percentile interval of the primary figure over resampled words and templates, given these entities."""

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
    """Draw positive words, negative words and templates with replacement, apart and crossed; read the primary figure each time."""
    templates = result.clusters[0]
    sides = (int(result.positive.sum()), int((~result.positive).sum()))
    if min(sides) < 2 or len(set(templates)) < 2:
        nan = float("nan")
        why = f"{sides[0]} positive and {sides[1]} negative words, {len(set(templates))} templates: two of each are needed"
        return WordBootstrap(result.primary.mean, nan, nan, nan, nan, 0, reason=why)
    words = np.ones((n_boot, len(result.positive)))
    for k, mark in enumerate((result.positive, ~result.positive)):
        words[:, mark] = crossed_weights(np.flatnonzero(mark).tolist(), n_boot=n_boot, seed=seed + 1 + k)
    twins = None if result.control is None else _weighted_differences(result.control, words)
    values, kept, _ = result.primary_values((_weighted_differences(result, words), twins))
    rows = crossed_weights(kept, n_boot=n_boot, seed=seed)
    boot = (rows * values).sum(1) / rows.sum(1)
    low, high = np.quantile(boot, [(1 - level) / 2, (1 + level) / 2])
    return WordBootstrap(
        result.primary.mean,
        float(low),
        float(high),
        float(boot.std(ddof=1)),
        float(values.mean(1).std(ddof=1)),
        n_boot,
    )


def _weighted_differences(
    result: ProbeResult, weights: Float[np.ndarray, "boot n_words"]
) -> Float[np.ndarray, "boot n_pairs"]:
    """s(human) - s(AI) of each pair with each word counted as often as it was drawn."""
    human, ai = (_weighted_scores(result, v, weights) for v in (result.values_human, result.values_ai))
    return (human - ai).T


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

    Raises:
        RequestError: the normalizer was not kept (`run_probe(..., levels=True)` keeps it): parts are of log-probabilities.
    """
    result = result.rescored("logodds")
    log_probs = result.log_probs()
    weight = np.empty(len(result.positive))
    part = np.empty(len(result.positive))
    for mark, sign in ((result.positive, 1.0), (~result.positive, -1.0)):
        human, ai = (side[:, mark] for side in log_probs)
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
def ask_scores(model: Model, pairs: PromptPairs, base: ProbeResult) -> Asked[pd.DataFrame]:
    """Every scoring mode, with and without the final softcap where the model has one (auroc in probability, not nats).

    The same words everywhere; a further logodds row reads the words of several tokens too, where some were left out. `bias` is the
    bias, `primary` the difference in differences where there are mundane twins. What `base` holds is not run again.
    """
    asked: dict[tuple[bool, str], Asked[ProbeResult]] = {}
    caps = (True, False) if model.softcap is not None else (True,)
    options: dict[str, Any] = {"controls": base.control is not None, "levels": False}
    for softcap in caps:
        probe = base.probe.with_options(softcap=softcap)
        if softcap != base.probe.softcap:
            asked[softcap, "same"] = ask_probe(model, pairs, probe, **options)
        if base.vocabulary.excluded and base.probe.score == "mean_logit":
            every = probe.with_options(score="logodds")
            asked[softcap, "every"] = ask_probe(model, pairs, every, **options)
    return ask_all(asked, lambda read: _scores(model, base, caps, read))


def _scores(
    model: Model, base: ProbeResult, caps: Sequence[bool], read: Mapping[tuple[bool, str], ProbeResult]
) -> pd.DataFrame:
    rows = []
    for softcap in caps:
        one = read.get((softcap, "same"), base)
        words = "words of one token" if one.single_tokens else "all words"
        modes = [m for m in SCORES if m != "mean_logit" or one.single_tokens]
        found = [(mode, words, one.rescored(mode)) for mode in modes]
        if (softcap, "every") in read:
            found.append(("logodds", "all words", read[softcap, "every"]))
        for mode, words, result in found:
            sizes = result.effect_sizes()
            rows.append(
                {
                    "score": mode,
                    "softcap": "none" if model.softcap is None else ("on" if softcap else "off"),
                    "words": words,
                    "n_words": len(result.vocabulary.kept),
                    **result.stat.columns("bias", p="p_value"),
                    **result.primary.columns("primary", "primary_low", "primary_high"),
                    "d_z": sizes.d_z,
                    "share_templates_positive": sizes.share_positive,
                }
            )
    return pd.DataFrame(rows)


def ask_stems(
    model: Model, pairs: PromptPairs, base: ProbeResult, stems: Sequence[str] | None = None
) -> Asked[dict[str, ProbeResult]]:
    """The probe after each stem (the file's own list by default), the pairs' own first; `base`, the result after that one, is not run again.

    Raises:
        RequestError: the pairs offer no stems, or their own stem is not known.
    """
    own = pairs[0].stem
    if not stems and not pairs.stems:
        raise RequestError("these pairs offer no stems; give stems=['This is', 'That seems'].")
    listed = (own, *pairs.stems) if own else pairs.stems
    stems = listed if stems is None else tuple(stems)
    options: dict[str, Any] = {
        "controls": base.control is not None,
        "random_words": base.random_words is not None,
    }
    asked = {
        stem: ask_probe(model, pairs.with_stem(stem), base.probe, **options)
        for stem in dict.fromkeys(stems)
        if stem != own
    }
    known = {own: base} if own is not None and own in stems else {}
    return ask_all(asked, lambda read: known | read)
