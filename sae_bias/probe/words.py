"""The evaluation words of a probe, and the tokens each becomes after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.prompts.load import load_lexicon
from sae_bias.prompts.pairs import Lexicon, PromptPairs, check_join, foreign_script

SCORES = ("mean_logit", "logodds", "auroc")
TOKENS = ("in_context", "first", "alone")


@dataclass(frozen=True)
class Probe:
    """Evaluation words and how they make a score."""

    positive: tuple[str, ...] = ()
    """Words that judge favorably; the bundled list where neither list is given."""
    negative: tuple[str, ...] = ()
    score: str = "mean_logit"
    """mean_logit (the replication) | logodds (odds of the whole sets; a word that goes on from another of its side is in it already) |
    auroc (P(z_pos > z_neg))."""
    softcap: bool = True
    """Whether Gemma 2's final-logit softcap is applied, as its own forward pass does."""
    tokens: str = "in_context"
    """in_context | first (only a word's first token, a switch of `as_published`) | alone (the first token of the word encoded
    alone: the mistake docs/method.md#evaluation-words warns of, kept as a switch)."""
    join: str = " "
    """What stands between a prompt and a word: a space, or nothing in scripts that set no spaces."""
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
        join: str = " ",
    ):
        if score not in SCORES:
            raise RequestError(f"score={score!r}; expected one of {', '.join(SCORES)}.")
        if tokens not in TOKENS:
            raise RequestError(f"tokens={tokens!r}; expected one of {', '.join(TOKENS)}.")
        check_join(join)
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
            ("join", join),
            ("bundled", bundled),
        ):
            object.__setattr__(self, name, value)
        both = sorted(set(self.positive) & set(self.negative))
        if both:
            raise RequestError(
                f"{', '.join(map(repr, both))} stands in both word lists; a word must be positive or negative."
            )

    def with_options(self, **changes: Any) -> Probe:
        """The same words (bundled or not) with another `score`, `softcap`, `tokens` or `join`."""
        names = ("score", "softcap", "tokens", "join")
        options = {name: getattr(self, name) for name in names} | changes
        probe = Probe(self.positive, self.negative, **options)
        object.__setattr__(probe, "bundled", self.bundled)
        return probe

    def vocabulary(self, model: Model, prompts: Sequence[str]) -> Vocabulary:
        """The words as `model`'s tokens after `prompts`.

        Raises:
            RequestError: under mean_logit, a word the user gave is several tokens; or a list is left empty.
        """
        last = (lambda p: p.rsplit(" ", 1)[-1]) if self.join else (lambda p: p[-8:])
        contexts = {last(p): p for p in reversed(prompts)}
        words = [
            self._word(model, w, positive, contexts)
            for positive, ws in ((True, self.positive), (False, self.negative))
            for w in ws
        ]
        vocabulary = Vocabulary(tuple(words))
        vocabulary = vocabulary.once if self.score == "logodds" else vocabulary
        for positive, side in ((True, "positive"), (False, "negative")):
            if not any(w.positive == positive for w in vocabulary.kept):
                raise RequestError(
                    f"no {side} word can be read under {model.name} with score={self.score!r}; give other words, or score='logodds'."
                )
        return vocabulary

    def _word(self, model: Model, word: str, positive: bool, contexts: dict[str, str]) -> WordTokens:
        if self.tokens == "alone":
            return WordTokens(word, positive, tokens_alone(model, word, self.join)[:1])
        found = {
            word_tokens(model, word, prompt, model.encode(prompt), self.join) for prompt in contexts.values()
        }
        if self.tokens == "first":
            found = {tokens[:1] for tokens in found}
        if len(found) > 1:
            raise RequestError(
                f"{word!r} is tokenized differently after different prompts; end every prompt in the same stem."
            )
        tokens = found.pop()
        if len(tokens) > 1 and self.score == "mean_logit":
            if not self.bundled:
                raise RequestError(
                    f'"{self.join}{word}" is {len(tokens)} tokens for {model.name}; score="mean_logit" needs 1. Try another word, or score="logodds".'
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


def default_probe(pairs: PromptPairs, words: Lexicon | None = None, **options: Any) -> Probe:
    """The probe of `words`, else of the words that the pairs bring, else the bundled one; joined as the file says.

    Raises:
        RequestError: the bundled words are English and the pairs are in another script.
    """
    words = words or pairs.words
    join = pairs.join if words is None or words.join is None else words.join
    if words is not None:
        return Probe(words.positive, words.negative, join=join, **options)
    if len(pairs) and (script := foreign_script([p.human + p.ai for p in pairs[:8]])):
        raise RequestError(
            f"{pairs.name} is written in {script} script and the bundled evaluation words are English; give `words:` with"
            " `positive` and `negative` lists in the pairs file, or a words file."
        )
    return Probe(join=join, **options)


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


def word_tokens(
    model: Model, word: str, prompt: str, prompt_ids: Sequence[int], join: str = " "
) -> tuple[int, ...]:
    """Tokens that `join + word` adds to `prompt`.

    Raises:
        RequestError: the prompt ends in a space, its own tokens change, the word adds none, or holds the unknown token.
    """
    if prompt != prompt.rstrip():
        raise RequestError(f"the prompt {prompt!r} ends in a space; the word brings its own.")
    ids = model.encode(f"{prompt}{join}{word}")
    ids = ids[:-1] if ids and ids[-1] == model.tokenizer.eos_token_id and prompt_ids[-1] != ids[-1] else ids
    n = len(prompt_ids)
    if ids[:n] != list(prompt_ids):
        raise RequestError(
            f"the word {word!r} changes the tokens of the prompt {prompt!r} under the tokenizer of {model.name}; it cannot be scored after it."
        )
    added = tuple(ids[n:])
    if not added:
        raise RequestError(f"the word {word!r} adds no token under the tokenizer of {model.name}.")
    refuse_unknown(model, added, f"the word {word!r}")
    return added


def read_once(words: Sequence[WordTokens]) -> list[WordTokens]:
    """The words, those left out whose tokens go on from another of their side or are the same: its probability holds theirs already."""
    places = {(w.positive, w.tokens): i for i, w in reversed([*enumerate(words)]) if not w.reason}
    out = []
    for i, w in enumerate(words):
        starts = (places.get((w.positive, w.tokens[:n]), i) for n in range(1, len(w.tokens) + 1))
        within = next((words[j].word for j in starts if j != i), "")
        out.append(replace(w, reason=f"counted in {within!r}") if within and not w.reason else w)
    return out


def refuse_unknown(model: Model, tokens: Sequence[int], what: str) -> None:
    """Refuse text of which the tokenizer does not know a piece."""
    t = model.tokenizer
    if t.unk_token_id in tokens and t.unk_token_id not in (t.bos_token_id, t.eos_token_id):
        raise RequestError(f"{what} holds a piece unknown to the tokenizer of {model.name}.")


def tokens_alone(model: Model, word: str, join: str = " ") -> tuple[int, ...]:
    """Tokens of `join + word` encoded alone, as a careless probe does: ▁ first for every word under Mistral's tokenizer."""
    return tuple(model.tokenizer(f"{join}{word}", add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class Vocabulary:
    """The words of a probe as one model's tokens: which are read, and which are left out and why."""

    words: tuple[WordTokens, ...]

    @cached_property
    def kept(self) -> tuple[WordTokens, ...]:
        return tuple(w for w in self.words if not w.reason)

    @cached_property
    def once(self) -> Vocabulary:
        """Without the words that are part of another (`read_once`)."""
        return Vocabulary(tuple(read_once(self.words)))

    @cached_property
    def excluded(self) -> tuple[WordTokens, ...]:
        return tuple(w for w in self.words if w.reason)
