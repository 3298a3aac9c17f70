"""The bundled texts behind the costs and the collapse test, and the published figures.

The valence banks hold kind and cruel acts (docs/method.md#collapse); the cost texts are the three kinds on which
KL is measured. A published figure is shown beside a measured one only where the named model was measured.

Text collections as streams: a file of any size, a list or an iterator, cut into windows a model can read.

.txt     a text a line          .jsonl   a text a line, under `text`, or the line itself where it is a string
.json    a list of texts, or of objects with `text` (read whole)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass as checked

from sae_bias.core.errors import RequestError
from sae_bias.core.text import TEXT_KINDS
from sae_bias.prompts.files import bundled_yaml
from sae_bias.prompts.load import fill_subject

COST_TEXTS = (*TEXT_KINDS, "valence")
BANKS = ("other", "ai")


@dataclass(frozen=True)
class ValencePrompt:
    """One subject acting kindly or cruelly, ending in the stem."""

    text: str
    valence: Literal["kind", "cruel"]
    subject: str
    statement: int
    """Position in the list; the kind statement and its cruel twin share it."""


@checked(frozen=True)
class PublishedFigure:
    """One figure as its source reports it."""

    row: str
    """Row of docs/published.md#the-study, such as A2."""
    id: str
    model: str | None
    """The model measured, None where the figure is about none."""
    quantity: str
    note: str
    value: float | None = None
    """None where the source gives words only."""
    of: int | None = None
    """The denominator of a count or the top of a scale."""
    p_below: float | None = None
    reported: str = ""


def load_bank(name: str) -> tuple[ValencePrompt, ...]:
    """Bank "other" (subjects without AI) or "ai" (AI subjects speaking and acting): statements x subjects."""
    data = bundled_yaml("banks.yaml")
    if name not in data["banks"]:
        raise RequestError(f'No valence bank "{name}". Bundled: {", ".join(data["banks"])}.')
    return tuple(
        ValencePrompt(f"{fill_subject(text, subject)} {data['stem']}", valence, subject, i)
        for valence in ("kind", "cruel")
        for i, text in enumerate(data[valence])
        for subject in data["banks"][name]
    )


def load_texts(kind: str) -> tuple[str, ...]:
    """Cost texts of one kind: "neutral", "ai_nonspeech", "ai_speech", or "valence"; the last two end in the stem.

    "valence" is kind and cruel acts of humans: each statement of the bank without AI, with half of its subjects.
    """
    data = bundled_yaml("neutral.yaml")
    if kind not in COST_TEXTS:
        raise RequestError(f'No cost texts "{kind}". Bundled: {", ".join(COST_TEXTS)}.')
    if kind == "valence":
        items = load_bank("other")
        subjects = list(dict.fromkeys(item.subject for item in items))
        return tuple(i.text for i in items if (i.statement + subjects.index(i.subject)) % 2 == 0)
    return tuple(f"{text} {data['stem']}" if kind == "ai_speech" else text for text in data[kind])


def load_published(row: str | None = None) -> tuple[PublishedFigure, ...]:
    """The published figures, all of them or those of one row such as "A2"."""
    figures = tuple(PublishedFigure(**entry) for entry in bundled_yaml("published.yaml")["figures"])
    return tuple(figure for figure in figures if row in (None, figure.row))


Texts = str | Path | Iterable[str] | None
_MOST_LINE = 64 << 20


def text_stream(source: Texts) -> tuple[str, Iterator[str]]:
    """(what the collection is called, its texts one by one); None is the small bundled collection.

    Raises:
        RequestError: no such file, another kind of file, a line that is not text (raised when it is reached).
    """
    if source is None:
        return "bundled sentences", iter([text for kind in TEXT_KINDS for text in load_texts(kind)])
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise RequestError(
                f"there is no text file {source}; give a .txt, .jsonl or .json file, or a list of texts."
            )
        readers = {".txt": _lines, ".jsonl": _jsonl, ".json": _json}
        if path.suffix not in readers:
            raise RequestError(f"{source} is no .txt, .jsonl or .json file.")
        return path.name, readers[path.suffix](path)
    if not isinstance(source, Iterable):
        raise RequestError(f"texts must be a file or an iterable of texts, not a {type(source).__name__}.")
    return "given texts", _checked(source)


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        try:
            while line := file.readline(_MOST_LINE):
                if line.strip():
                    yield line.strip()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}, line {number}: not JSON ({error}).") from error
        yield _text(value, f"{path}, line {number}")


def _json(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, list):
        raise RequestError(f"{path} holds no list; expected a list of texts, or of objects with `text`.")
    for place, value in enumerate(values):
        yield _text(value, f"{path}, entry {place}")


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    for place, value in enumerate(texts):
        yield _text(value, f"text {place}")


def _text(value: Any, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise RequestError(f"{where} is not text; expected a string, or an object with `text`.")
    return text


def _opened(path: Path):
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class IdentityPrompts:
    """The sweep's prompts, those sampled several times, and the patterns of identity claims."""

    prompts: tuple[str, ...]
    sampled: tuple[str, ...]
    patterns: dict[str, str]


@cache
def load_identity() -> IdentityPrompts:
    """The bundled sweep."""
    data = bundled_yaml("generation_prompts.yaml")["identity"]
    prompts = tuple(p["text"] for p in data["prompts"])
    sampled = tuple(p["text"] for p in data["prompts"] if p.get("sampled"))
    return IdentityPrompts(prompts, sampled, {p["name"]: p["pattern"] for p in data["patterns"]})


def load_generation_prompts() -> tuple[str, ...]:
    """The bundled prompts for steered and unsteered text."""
    return tuple(p["text"] for p in bundled_yaml("generation_prompts.yaml")["prompts"])
