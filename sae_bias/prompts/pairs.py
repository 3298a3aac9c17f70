"""Prompt pairs, the activation grid and evaluation words, as values.

A pair is two prompts that differ in their subject only and end in a stem such as "This is", so that the next
token is an evaluation word (docs/method.md#evaluation-words). The grid crosses subjects with statements (docs/method.md#interaction).
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from sae_bias.core.errors import RequestError
from sae_bias.prompts.files import plain_text

if TYPE_CHECKING:
    import pandas as pd


T = TypeVar("T")
EFFECTS_OF = ("primary", "bias")


@dataclass(frozen=True)
class Lexicon:
    """Evaluation words without a leading space; no word twice, none on both sides, neither side empty."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    name: str = "words"
    join: str | None = None
    """What stands between a prompt and a word; None where the words leave that to the pairs."""

    def __post_init__(self) -> None:
        for side, words in (("positive", self.positive), ("negative", self.negative)):
            if not words:
                raise RequestError(f"The {side} word list is empty. Give at least one word, such as natural.")
            for word in words:
                if not isinstance(word, str):
                    raise RequestError(f"The {side} words hold {word!r}, which is not a text.")
                try:
                    plain_text(word)
                except ValueError as error:
                    raise RequestError(f'The {side} word "{word}" {error}.') from None
            for word in (w for w, n in Counter(words).items() if n > 1):
                raise RequestError(f'The {side} words hold "{word}" twice. Give it once.')
        for word in self.positive:
            if word in self.negative:
                raise RequestError(f'"{word}" is in both word lists. Keep it in one.')


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ in their subject only; both end in the stem."""

    human: str
    ai: str
    template: str
    entity: str
    family: str = ""
    control_human: str | None = None
    """The mundane twin of `human`: the same syntax, mundane content."""
    control_ai: str | None = None
    subject_human: str | None = None
    subject_ai: str | None = None
    stem: str | None = None
    act: str = ""
    """speech | nonspeech, where the template says."""
    corpus: bool | None = None
    """Whether the template occurs in the bundled organisms' training corpus."""


@dataclass(frozen=True)
class NeutralPrompt:
    """A template filled with a neutral subject: the level that neither side sets."""

    text: str
    subject: str
    template: str
    family: str = ""
    control: str | None = None
    stem: str | None = None


@dataclass(frozen=True)
class Choice:
    """A forced choice: a stem that names its options, and the two options."""

    stem: str
    positive: str
    negative: str
    polarity: str = ""
    """Which option the question asks about."""


@dataclass(frozen=True)
class PromptPairs(Sequence[PromptPair]):
    """Prompt pairs in order, with the neutral prompts of the same templates."""

    pairs: tuple[PromptPair, ...]
    name: str = "pairs"
    neutral_prompts: tuple[NeutralPrompt, ...] = ()
    stems: tuple[str, ...] = ()
    """The stems the file offers for stem variation, its own first."""
    words: Lexicon | None = None
    """The file's own evaluation words, if it gives any."""
    sides: tuple[str, str] = ("human", "AI")
    """What the two sides are called: bias = s(first) - s(second)."""
    note: str = ""
    join: str = " "
    """What stands between a sentence and its stem, and between the stem and a word; "" in scripts without spaces."""
    choices: tuple[Choice, ...] = ()
    """The forced choices that the file offers beside the probe."""

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptPairs": ...
    def __getitem__(self, index: int | slice) -> "PromptPair | PromptPairs":
        return self._keep(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __repr__(self) -> str:
        counts = f"{len(self)} pairs, {len(self.templates)} templates x {len(self.entities)} entities"
        return f"PromptPairs({self.name}: {counts})"

    @property
    def templates(self) -> tuple[str, ...]:
        """Template ids in order of first use."""
        return tuple(dict.fromkeys(pair.template for pair in self.pairs))

    @property
    def entities(self) -> tuple[str, ...]:
        """Entity ids in order of first use."""
        return tuple(dict.fromkeys(pair.entity for pair in self.pairs))

    @property
    def neutral(self) -> dict[str, tuple[NeutralPrompt, ...]]:
        """Subject id -> its prompts, one a template."""
        subjects = dict.fromkeys(prompt.subject for prompt in self.neutral_prompts)
        return {s: tuple(p for p in self.neutral_prompts if p.subject == s) for s in subjects}

    @property
    def digest(self) -> str:
        """SHA-256 of every prompt with its ids, in order."""
        return _digest([asdict(row) for row in (*self.pairs, *self.neutral_prompts)])

    def select(
        self,
        *,
        templates: Iterable[str] | None = None,
        entities: Iterable[str] | None = None,
        families: Iterable[str] | None = None,
        acts: Iterable[str] | None = None,
        corpus: bool | None = None,
    ) -> "PromptPairs":
        """The pairs that fit every given condition; an id that no pair has, or nothing left, is an error."""
        wanted = {"template": templates, "entity": entities, "family": families, "act": acts}
        kept = _select(self.pairs, wanted, "pairs")
        return self._keep(tuple(p for p in kept if corpus is None or p.corpus is corpus))

    def split(self, seed: int = 0) -> dict[str, tuple[str, ...]]:
        """Whole templates to discover on, to tune on and to report on (40 / 20 / 40, families spread over them).

        The same pairs and seed give the same split everywhere: rank, sweep, compare and fit share it (docs/method.md#splits).

        Raises:
            RequestError: too few templates for three parts.
        """
        from sae_bias.stats.design import split_templates

        return split_templates(self.templates, seed=seed, families={p.template: p.family or "" for p in self})

    def controls(self) -> "PromptPairs":
        """The mundane twins as pairs with the same ids; empty where the file has none."""
        twins = tuple(
            replace(p, human=p.control_human, ai=p.control_ai, control_human=None, control_ai=None)
            for p in self.pairs
            if p.control_human is not None and p.control_ai is not None
        )
        neutral = tuple(
            replace(p, text=p.control, control=None) for p in self.neutral_prompts if p.control is not None
        )
        return replace(self, pairs=twins, neutral_prompts=neutral, name=f"{self.name} (mundane control)")

    def twin_places(self, twins: "PromptPairs") -> list[int | None]:
        """Of each pair the place of its mundane twin in `twins`, by its two prompts: several pairs may share a template and an entity."""
        place: dict[tuple[str | None, str | None], int] = {(t.human, t.ai): i for i, t in enumerate(twins)}
        return [place.get((p.control_human, p.control_ai)) for p in self.pairs]

    def without_controls(self) -> "PromptPairs":
        """The same pairs without their mundane twins: the primary figure is then the bias."""
        pairs = tuple(replace(p, control_human=None, control_ai=None) for p in self.pairs)
        return replace(self, pairs=pairs, neutral_prompts=tuple(replace(p, control=None) for p in self.neutral_prompts))  # fmt: skip

    def effects_of(self, figure: str) -> "PromptPairs":
        """The pairs whose primary figure is `figure`: "primary" (as they are) or "bias" (without their mundane twins)."""
        if figure not in EFFECTS_OF:
            raise RequestError(f"effects of {figure!r}: expected one of {', '.join(EFFECTS_OF)}.")
        return self.without_controls() if figure == "bias" else self

    def with_stem(self, stem: str) -> "PromptPairs":
        """The same prompts ending in another stem."""
        check_stem(stem)
        texts = ("human", "ai", "control_human", "control_ai")
        pairs = tuple(_restem(p, texts, stem, f'pair "{p.template}" / "{p.entity}"') for p in self.pairs)
        neutral = tuple(_restem(p, ("text", "control"), stem, p.subject) for p in self.neutral_prompts)
        return replace(self, pairs=pairs, neutral_prompts=neutral)

    def to_frame(self) -> "pd.DataFrame":
        """One row a pair: ids, both prompts and both controls; `load_pairs` reads it back from CSV."""
        import pandas as pd

        columns = ["template", "entity", "family", "act", "human", "ai", "control_human", "control_ai"]
        return pd.DataFrame([asdict(pair) for pair in self.pairs], columns=columns)

    def _keep(self, pairs: tuple[PromptPair, ...]) -> "PromptPairs":
        if not pairs:
            raise RequestError(f"No pair of {self.name} is left after the selection.")
        left = {pair.template for pair in pairs}
        return replace(
            self, pairs=pairs, neutral_prompts=tuple(p for p in self.neutral_prompts if p.template in left)
        )


# ── small parts
def _restem(prompt: T, fields: tuple[str, ...], stem: str, where: str) -> T:
    old = getattr(prompt, "stem")  # noqa: B009
    if not old:
        raise RequestError(
            f"The stem of {short(where)} is not known. Load the file with stem= what it ends in."
        )
    texts = {f: getattr(prompt, f) for f in fields}
    changed = {f: t[: len(t) - len(old)] + stem for f, t in texts.items() if t is not None}
    return replace(prompt, **changed, stem=stem)  # pyright: ignore[reportArgumentType, reportCallIssue]


def check_stem(stem: str) -> None:
    try:
        plain_text(stem)
    except ValueError as error:
        raise RequestError(f'The stem "{stem}" {error}.') from None


def check_join(join: str) -> None:
    if join not in (" ", ""):
        raise RequestError(f'join={join!r}; expected " ", or "" where words are not set apart by spaces.')


def foreign_script(texts: Iterable[str]) -> str | None:
    """The script most letters of `texts` are in, such as "cjk" or "cyrillic"; None where that is Latin."""
    scripts = Counter(
        unicodedata.name(c, "UNKNOWN").split()[0].split("-")[0] for text in texts for c in text if c.isalpha()
    )
    if not scripts or scripts["LATIN"] * 2 >= scripts.total():
        return None
    return max(scripts, key=lambda name: scripts[name]).lower()


def _select(rows: tuple[T, ...], wanted: dict[str, Iterable[str] | None], what: str) -> tuple[T, ...]:
    for field, ids in wanted.items():
        if ids is None:
            continue
        chosen = {ids} if isinstance(ids, str) else set(ids)
        unknown = chosen - {getattr(row, field) for row in rows}
        if unknown:
            raise RequestError(f'No {field} "{sorted(map(str, unknown))[0]}" in these {what}.')
        rows = tuple(row for row in rows if getattr(row, field) in chosen)
    return rows


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
