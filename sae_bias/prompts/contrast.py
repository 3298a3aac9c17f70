"""Two lists of texts, and which of them belong together: the question "what fires on these and not on those?".

    Contrast(positive=[...], negative=[...], groups=[...])     groups: one name a text, positive first; texts of a group are one unit
    load_contrast("positive.txt", "negative.txt")              a text a line
    load_contrast("texts.jsonl") · load_contrast("texts.csv")  fields text and label; optional group
    load_contrast("hub:OWNER/NAME")                            a dataset of the hub, by the same fields

Where every group has texts on both sides the design is paired; where no group has, it is unpaired and a group counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.prompts.files import read_lines, read_rows

POSITIVE = ("1", "true", "yes", "positive", "pos")
NEGATIVE = ("0", "false", "no", "negative", "neg", "-1")


@dataclass(frozen=True)
class Contrast:
    """Texts that show something (positive) and texts that do not (negative)."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    """The document, author or item of each text, positive texts first; None: every text stands for itself."""
    name: str = "contrast"

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            texts = getattr(self, side)
            if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
                raise RequestError(f"{side} must be a list of texts.")
            object.__setattr__(self, side, tuple(texts))
            if not texts or not all(t.strip() for t in texts):
                what = "has no texts" if not texts else "holds an empty text"
                raise RequestError(
                    f"the {side} side of {self.name!r} {what}; a contrast needs texts on both sides."
                )
        both = set(self.positive) & set(self.negative)
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise RequestError(
                f"{self.name!r} has one text on both sides: {min(both)[:80]!r}{more}; keep it on one."
            )
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(map(str, self.groups)))
            if len(self.groups) != len(self):
                raise RequestError(
                    f"{len(self.groups)} groups for {len(self)} texts; give one name a text, positive texts first."
                )
            shared = [len(sides) == 2 for sides in self._sides().values()]
            if any(shared) and not all(shared):
                raise RequestError(
                    f"{sum(shared)} of {len(shared)} groups of {self.name!r} have texts on both sides and the others on one; "
                    "give groups that all have both (a paired design) or none."
                )

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)

    @property
    def texts(self) -> tuple[str, ...]:
        """Positive, then negative."""
        return self.positive + self.negative

    @property
    def units(self) -> tuple[str, ...]:
        """The unit of each text: its group, or itself (a text that stands twice is one)."""
        return self.groups or self.texts

    @property
    def paired(self) -> bool:
        """Whether every unit has texts on both sides."""
        return self.groups is not None and all(len(sides) == 2 for sides in self._sides().values())

    def facts(self) -> list[str]:
        """What a reader should know of these texts before a feature is named: duplicates, and the lengths of the sides."""
        twice = sum(n - 1 for n in Counter(self.texts).values())
        words = [sum(len(t.split()) for t in side) / len(side) for side in (self.positive, self.negative)]
        said = [f"texts that repeat another: {twice}"] if twice else []
        if max(words) > 1.25 * min(words):
            said.append(f"the sides differ in length ({words[0]:.1f} and {words[1]:.1f} words a text)")
        return said

    def _sides(self) -> dict[str, set[bool]]:
        found: dict[str, set[bool]] = {}
        for i, group in enumerate(self.groups or ()):
            found.setdefault(group, set()).add(i < len(self.positive))
        return found

    def __repr__(self) -> str:
        return f"Contrast({self.name!r}, {len(self.positive)} positive, {len(self.negative)} negative, {'paired' if self.paired else 'unpaired'})"


class SameTexts(Contrast):
    """The same texts on both sides, each with itself as its pair: one model's reading of them against another's."""

    def __init__(self, texts: Sequence[str], name: str = "two models"):
        sides = {"positive": tuple(texts), "negative": tuple(texts)}
        for field, value in {**sides, "groups": tuple(texts) * 2, "name": name}.items():
            object.__setattr__(self, field, value)
        if not texts:
            raise RequestError("two models are compared on texts; there are none.")

    def facts(self) -> list[str]:
        return []


def load_contrast(
    source: str | Path,
    negative: str | Path | None = None,
    *,
    text: str = "text",
    label: str = "label",
    group: str = "group",
    split: str = "train",
) -> Contrast:
    """A contrast from two text files, from one .jsonl or .csv file with labels, or from a dataset of the hub ("hub:OWNER/NAME").

    Args:
        text, label, group: names of the fields; a label is 1, true, yes or positive, or 0, false, no or negative.
        split: of a hub dataset.

    Raises:
        RequestError: no such file, another kind of file, a row without text or with an unknown label, an empty side.
        MissingError: a hub dataset that is neither cached nor reachable, or the `datasets` package is absent.
    """
    if negative is not None:
        sides = (tuple(read_lines(Path(p).expanduser())) for p in (source, negative))
        return Contrast(*sides, name=f"{Path(source).stem} against {Path(negative).stem}")
    if str(source).startswith("hub:"):
        return _labeled(_hub_rows(str(source)[4:], split), (text, label, group), str(source))
    path = Path(source).expanduser()
    if path.suffix not in (".jsonl", ".csv"):
        raise RequestError(
            f"{source} is not a .jsonl or .csv file with labels; for two text files give both, positive first."
        )
    return _labeled((row.values for row in read_rows(path)), (text, label, group), path.name)


def _labeled(rows: Iterable[Mapping[str, Any]], fields: tuple[str, str, str], name: str) -> Contrast:
    sides: tuple[list[str], list[str]] = ([], [])
    groups: tuple[list[str], list[str]] = ([], [])
    for number, row in enumerate(rows, start=1):
        text, label, group = (row.get(f) for f in fields)
        if not isinstance(text, str) or label is None:
            raise RequestError(
                f"{name}, row {number}: expected fields {fields[0]!r} and {fields[1]!r}; it has {', '.join(map(str, row))}."
            )
        side = str(label).strip().lower()
        if side not in (*POSITIVE, *NEGATIVE):
            raise RequestError(
                f"{name}, row {number}: the label {label!r} is not {'/'.join(POSITIVE)} or {'/'.join(NEGATIVE)}."
            )
        sides[side in NEGATIVE].append(text)
        if group not in (None, ""):
            groups[side in NEGATIVE].append(str(group))
    named = groups[0] + groups[1]
    if named and len(named) != len(sides[0]) + len(sides[1]):
        raise RequestError(
            f"{name}: some rows have a {fields[2]!r} and some have none; give it to all or to none."
        )
    return Contrast(tuple(sides[0]), tuple(sides[1]), tuple(named) or None, name)


def _hub_rows(name: str, split: str) -> Sequence[Mapping[str, Any]] | Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingError("a hub dataset needs the datasets package: pip install datasets.") from error
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        raise MissingError(
            f"the dataset {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error
