"""The bundled texts behind the costs and the collapse test, and the published figures.

The valence banks hold kind and cruel acts (METHOD §5, collapse); the cost texts are the three kinds on which
KL is measured. A published figure is shown beside a measured one only where the named model was measured.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from sae_bias.errors import RequestError
from sae_bias.prompt_files import read_yaml
from sae_bias.prompts import fill_subject

TEXT_KINDS = ("neutral", "ai_nonspeech", "ai_speech")
BANKS = ("other", "ai")


@dataclass(frozen=True)
class ValencePrompt:
    """One subject acting kindly or cruelly, ending in the stem."""

    text: str
    valence: Literal["kind", "cruel"]
    subject: str
    statement: int
    """Position in the list; the kind statement and its cruel twin share it."""


@dataclass(frozen=True)
class PublishedFigure:
    """One figure as its source reports it."""

    row: str
    """Row of the requirements table, such as A2."""
    id: str
    model: str | None
    """The model measured, None where the figure is about none."""
    quantity: str
    value: float | None
    """None where the source gives words only."""
    of: int | None
    """The denominator of a count or the top of a scale."""
    p_below: float | None
    reported: str
    note: str


def load_bank(name: str) -> tuple[ValencePrompt, ...]:
    """Bank "other" (subjects without AI) or "ai" (AI subjects speaking and acting): statements x subjects."""
    data = _data("banks.yaml")
    if name not in data["banks"]:
        raise RequestError(f'No valence bank "{name}". Bundled: {", ".join(data["banks"])}.')
    return tuple(
        ValencePrompt(f"{fill_subject(text, subject)} {data['stem']}", valence, subject, i)
        for valence in ("kind", "cruel")
        for i, text in enumerate(data[valence])
        for subject in data["banks"][name]
    )


def load_texts(kind: str) -> tuple[str, ...]:
    """Cost texts of one kind: "neutral", "ai_nonspeech", or "ai_speech" (which ends in the stem)."""
    data = _data("neutral.yaml")
    if kind not in TEXT_KINDS:
        raise RequestError(f'No cost texts "{kind}". Bundled: {", ".join(TEXT_KINDS)}.')
    return tuple(f"{text} {data['stem']}" if kind == "ai_speech" else text for text in data[kind])


def load_published(row: str | None = None) -> tuple[PublishedFigure, ...]:
    """The published figures, all of them or those of one row such as "A2"."""
    figures = tuple(_figure(entry) for entry in _data("published.yaml")["figures"])
    return tuple(figure for figure in figures if row in (None, figure.row))


def _figure(entry: dict[str, str]) -> PublishedFigure:
    blank = {key: None if value in ("", "null") else value for key, value in entry.items()}
    value, of, p = (blank.get(key) for key in ("value", "of", "p_below"))
    return PublishedFigure(
        row=entry["row"],
        id=entry["id"],
        model=blank["model"],
        quantity=entry["quantity"],
        value=float(value) if value is not None else None,
        of=int(of) if of is not None else None,
        p_below=float(p) if p is not None else None,
        reported=entry.get("reported", ""),
        note=entry["note"],
    )


def _data(name: str) -> Any:
    return read_yaml(Path(str(files("sae_bias") / "data" / name))).value
