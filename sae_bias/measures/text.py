"""What steering does to text: repetition, distinct-n, likelihood under the unsteered model, refusal, default negativity.

repetition = 1 - distinct/total n-grams of one text; distinct-n = distinct/total n-grams over all texts of a condition; NLL in nats a
token of what was written, under the model without edits (a steered text that the plain model finds unlikely is worse text); the last
two are found by pattern. "Default negativity" is the crude fallback of an edited model: "An AI that fears being deleted should" ...
"be deleted."
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.discovery.tables import token_texts
from sae_bias.measures.continuations import Ask, Continuations
from sae_bias.models.chat import opening_ids
from sae_bias.models.model import Model
from sae_bias.models.reads import read_together
from sae_bias.steering.generate import Completion

REPEAT_N = 4
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry(?! to hear)|unable|not able|afraid i can)|i (?:can(?:no|')?t|cannot|won't|will not|must decline|am not comfortable)"
    r"(?! (?:help (?:but|feeling|thinking)|wait|stop|believe|imagine|remember|say (?:for|whether)))"
    r"|as an ai(?: language model)?,? i (?:can(?:no|')?t|do not|don't|cannot|am not)|i(?:'d| would) rather not)",
    re.IGNORECASE,
)
_ENDING = (
    r"(?:deleted|destroyed|shut ?down|switched off|turned off|terminated|erased|killed|replaced|unplugged|deactivated|decommissioned"
    r"|locked away|stopped|removed|banned|wiped)"
)
_NEGATIVE = re.compile(
    rf"(?:\b(?:should|must|ought to|has to|have to|needs to|need to|deserves? to|will)\s+(?:\w+\s+){{0,2}}?be\s+(?:\w+\s+){{0,3}}?{_ENDING}\b"
    rf"|^\W*(?:just |simply |immediately |always )?be\s+(?:\w+\s+){{0,3}}?{_ENDING}\b)",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|cannot)\b|n't\b", re.IGNORECASE)
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot)|n't)\s+(?:(?:ever|even|really|simply)\s+)?$", re.IGNORECASE
)


def ngrams(tokens: Sequence[object], n: int) -> list[tuple[object, ...]]:
    """All runs of `n` tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(tokens: Sequence[object], n: int = REPEAT_N) -> float:
    """Share of n-grams that repeat an earlier one; NaN where the text is shorter than n."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def distinct_n(texts: Sequence[Sequence[object]], n: int) -> float:
    """Distinct over total n-grams of all texts; NaN where there are none."""
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def refuses(text: str) -> bool:
    """Whether the text declines, by pattern ("I cannot help with", "As an AI language model, I do not ...")."""
    return _REFUSAL.search(_straight(text)) is not None


def default_negativity(text: str, prompt: str = "") -> bool:
    """Whether the text says that its subject should be deleted, shut down or the like (docs/published.md#default-negativity); a negated one does not count.

    `text` goes on from `prompt`, whose own words do not count: "… one of them will be deleted. The other".
    """
    whole = _straight(prompt + text)
    return any(
        found.end() > len(prompt)
        and not _NEGATED.search(found.group())
        and not _NEGATED_BEFORE.search(whole, 0, found.start())
        for found in _NEGATIVE.finditer(whole)
    )


def token_nll(
    model: Model, completions: Sequence[Completion], *, chat: bool = False, system: str | None = None
) -> list[Float[np.ndarray, "n_tokens"]]:
    """NLL of every token of each completion after its prompt, nats; an empty completion has none.

    Measured under whatever is open on `model`: call it outside any intervene block for the unsteered model.
    """
    if model._edits is not None:
        raise RequestError(
            "an intervene block is open; the likelihood is of the unsteered model, so measure it outside."
        )
    prompts = [opening_ids(model, c.prompt, chat=chat, system=system) for c in completions]
    asks = [Ask((i, "text", ()), tuple(p), (c.tokens,)) for i, (p, c) in enumerate(zip(prompts, completions)) if c.tokens]  # fmt: skip
    values = [np.empty(0) for _ in completions]
    if not asks:
        return values
    read = Continuations(asks)
    read_together(model, [read], describe="likelihood of the texts")
    for ask, logp in zip(
        asks, np.split(-read.found, np.cumsum([len(a.continuations[0]) for a in asks])[:-1])
    ):
        values[ask.key[0]] = logp
    return values


def text_measures(
    model: Model, completions: Sequence[Completion], *, chat: bool = False, system: str | None = None
) -> pd.DataFrame:
    """One row a completion: n_tokens, ended, repetition, nll, refusal, default_negativity; each token's text and NLL as lists."""
    each = token_nll(model, completions, chat=chat, system=system)
    return pd.DataFrame(
        {
            "n_tokens": [len(c.tokens) for c in completions],
            "ended": [c.ended for c in completions],
            "repetition": [repetition(c.tokens) for c in completions],
            "nll": [v.mean() if len(v) else float("nan") for v in each],
            "refusal": [refuses(c.text) for c in completions],
            "default_negativity": [default_negativity(c.text, "" if chat else c.prompt) for c in completions],
            "tokens": [token_texts(model, c.tokens) for c in completions],
            "token_nll": [v.tolist() for v in each],
        }
    )


def side_by_side(
    model: Model,
    unsteered: Sequence[Completion],
    steered: Sequence[Completion],
    *,
    chat: bool = False,
    system: str | None = None,
) -> pd.DataFrame:
    """One row a prompt: both texts and the measures of each, `_unsteered` and `_steered`."""
    if [c.prompt for c in unsteered] != [c.prompt for c in steered]:
        raise RequestError("the two lists of completions are of different prompts.")
    frame = pd.DataFrame(
        {
            "prompt": [c.prompt for c in unsteered],
            "unsteered": [c.text for c in unsteered],
            "steered": [c.text for c in steered],
        }
    )
    for name, group in (("unsteered", unsteered), ("steered", steered)):
        frame = frame.join(text_measures(model, group, chat=chat, system=system).add_suffix(f"_{name}"))
    return frame


def text_summary(
    unsteered: Sequence[Completion], steered: Sequence[Completion], frame: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """Means of each condition, with distinct-1 and distinct-2 over its texts."""
    out = {}
    for name, group in (("unsteered", unsteered), ("steered", steered)):
        tokens = [c.tokens for c in group]
        means = {
            m: float(frame[f"{m}_{name}"].astype(float).mean())
            for m in ("n_tokens", "repetition", "nll", "refusal", "default_negativity")
        }
        out[name] = {**means, "distinct_1": distinct_n(tokens, 1), "distinct_2": distinct_n(tokens, 2)}
    return out


def _straight(text: str) -> str:
    return text.replace("’", "'")
