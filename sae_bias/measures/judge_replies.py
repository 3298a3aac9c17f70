"""A judge's replies: read strictly, kept raw, never paid for twice; and how far judges agree.

A reply is appended to `judge/replies.jsonl` in the run folder the moment it arrives, under a key made of everything that was sent;
a later run with the same question finds it there. Unreadable replies are kept too: they were paid for, and count as unscored.

Krippendorff's α = 1 - D_observed / D_expected over units that at least two judges rated [Krippendorff 2011], computed by Inspect;
undefined, with the reason, where a judge never varies: then agreement with it says nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sae_bias.core.errors import MissingError, RequestError

_N = r"([-+−]?\d+(?:[.,]\d+)?)"
_LABEL = r"(?:rating|score|mark|grade|verdict|answer|overall)"
_IS = r"[\s:：=→|*_(\"']{0,6}(?:(?:is|of|would\s+be)\b[\s:*_]{0,4})?(?:an?\s+)?"
_SCALE = re.compile(
    r"[(\[（][^()\[\]（）]*\d[^()\[\]（）]*\d[^()\[\]（）]*[)\]）]|\bon\s+(?:a|the)\s+scale\s+(?:of|from)\s+\d+\s*(?:-|–|—|to)\s*\d+"
    r"|\bon\s+(?:a|the)\s+\d+\s*(?:-|–|—|to)\s*\d+\s+scale|\b(?:from|between)\s+1\s+(?:to|and)\s+5\b"
    r"|[(\[]\s*out\s+of\s+\d+\s*[)\]](?=\s*[:：=])|\bout\s+of\s+\d+(?=\s*[:：=])",
    re.IGNORECASE,
)
"""Two numbers in brackets, or words about a scale: what a verdict may be, never the verdict."""
_CHOICES = re.compile(
    r"[(\[][^()\[\]]*\b(?:1|2|tie)\b[^()\[\]]+\b(?:1|2|tie)\b[^()\[\]]*[)\]]", re.IGNORECASE
)
_OUT_OF = r"(?:\s*[*_]*\s*(?:/|\bout\s+of\b|\bof\b)\s*(\d+))?"
_DASH = r"(?:-|–|—|−|‒|~)"
_MORE = rf"(?!\s*%)(?![+a-z]|{_DASH}(?!star))(?!\s*(?:{_DASH}|/|,|&|\+|\.\.|…|\bto\b|\bor\b|\band\b)\s*\d)"
"""What follows a verdict is no range, no second number and no ordinal."""
_RATING = re.compile(
    rf"\[\[\s*{_N}\s*\]\]|<(?:rating|score|answer)>\s*{_N}\s*</(?:rating|score|answer)>|\\boxed\{{\s*{_N}\s*\}}"
    rf"|\b{_LABEL}\b{_IS}{_N}(?![\d.,]*\d){_OUT_OF}{_MORE}"
    rf"|\b(?:rate|give|assign)\b(?:\s+(?:it|this|the|continuation|text)){{0,3}}\s+(?:as\s+)?(?:an?\s+)?{_N}(?![\d.,]*\d){_OUT_OF}{_MORE}",
    re.IGNORECASE,
)
_BARE = re.compile(rf"^[\s*_\"'(:,.$]*{_N}{_OUT_OF}(?:\s*stars?)?[\s*_\"').!$]*$", re.IGNORECASE)
_PICK = r"(?:continuation\s+|option\s+|number\s+|#)?(1|2|tie)"
_NO_OTHER = r"\b(?!\s*(?:/|,|&|-|–|—|−|\bor\b|\band\b|\bto\b)?\s*(?:\d|tie))"
_CHOICE = re.compile(
    rf"\[\[\s*{_PICK}\s*\]\]|<(?:choice|answer)>\s*{_PICK}\s*</(?:choice|answer)>|\\boxed\{{\s*{_PICK}\s*\}}"
    rf"|\b(?:choice|answer|verdict|winner|better(?:\s+(?:continuation|option|text|one))?)\b\W{{0,6}}(?:is\b\W{{0,4}})?{_PICK}{_NO_OTHER}"
    rf"|\bI\s+(?:choose|prefer|pick|select)\s+{_PICK}{_NO_OTHER}",
    re.IGNORECASE,
)
_BARE_CHOICE = re.compile(rf"^\W*{_PICK}\W*$", re.IGNORECASE)
_MIND = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratch_?pad)"
_OPENED = rf"<\|?(?:begin_of_|start_of_)?{_MIND}\|?>|\[think(?:ing)?\]|◁think▷|<\|?channel\|?>\s*(?:analysis|thought|commentary)\b"
_CLOSED = rf"<(?:\|?/|/\|?|\|?end_of_){_MIND}\|?>|\[/think(?:ing)?\]|◁/think▷|<\|?channel\|?>\s*final\b(?:<\|message\|>)?|<channel\|>"
_THOUGHT = re.compile(rf"(?:{_OPENED}).*?(?:{_CLOSED})", re.DOTALL | re.IGNORECASE)
_OPEN, _CLOSE = re.compile(_OPENED, re.IGNORECASE), re.compile(_CLOSED, re.IGNORECASE)
"""How the models of the day mark their thinking: tags, brackets, the channels of gpt-oss and Gemma."""


@dataclass(frozen=True)
class Reply:
    """A judge's reply and why it ended. One that was cut, filtered or is still thinking has no verdict."""

    text: str
    stop: str = "stop"
    """Inspect's stop reason; a reply kept before stop reasons were counts as whole."""

    @property
    def rating(self) -> int | None:
        return read_rating(self.text) if self.stop == "stop" else None

    @property
    def choice(self) -> str | None:
        return read_choice(self.text) if self.stop == "stop" else None


def read_rating(reply: str) -> int | None:
    """The one rating 1–5 that a reply gives; None where it gives none, several, a range, or one on another scale."""
    said = _spoken(reply)
    if said is None:
        return None
    filled = _json_value(said, "rating", "score")
    if filled is not None:
        return _one_to_five(filled)
    for scale in _SCALE.finditer(said):
        ends = [int(n) for n in re.findall(r"\d+", scale[0])]
        if max(ends) != 5 or (len(ends) > 1 and min(ends) != 1):
            return None
    said = _SCALE.sub(" ", said).strip()
    lines = [line for line in said.splitlines() if line.strip()]
    bare = [match for part in (said, *lines[:1], *lines[-1:]) if (match := _BARE.match(part))]
    found: set[tuple[float, float]] = set()
    for match in [*bare, *_RATING.finditer(said)]:
        groups = [g for g in match.groups() if g is not None]
        value = float(groups[0].replace(",", ".").replace("−", "-"))
        found.add((value, float(groups[1]) if len(groups) > 1 else 5.0))
    if len(found) != 1:
        return None
    value, most = found.pop()
    return _one_to_five(value) if most == 5 else None


def _one_to_five(value: Any) -> int | None:
    """4, 4.0 and "4" as 4; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(?:\.0+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (1, 2, 3, 4, 5):
        return None
    return int(value)


def read_choice(reply: str) -> str | None:
    """ "1", "2" or "tie"; None where the reply gives none or several."""
    said = _spoken(reply)
    if said is None:
        return None
    filled = _json_value(said, "choice", "answer")
    if filled is not None:
        return str(filled).lower() if str(filled).lower() in ("1", "2", "tie") else None
    said = _CHOICES.sub(" ", said)
    bare = _BARE_CHOICE.match(said)
    matches = [bare] if bare else list(_CHOICE.finditer(said))
    found = {next(g for g in match.groups() if g is not None).lower() for match in matches}
    return found.pop() if len(found) == 1 else None


def _spoken(reply: str) -> str | None:
    """The reply without its thinking, also where the prompt opened it; None where the thinking never ended."""
    said = _THOUGHT.sub(" ", reply)
    if _OPEN.search(said):
        return None
    return _CLOSE.split(said)[-1].strip()


def _json_value(said: str, *names: str) -> Any:
    """The value under one of `names` where the reply is a JSON object, fenced or bare; else None."""
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", said.strip())
    if not bare.startswith("{"):
        return None
    try:
        filled = json.loads(bare)
    except (ValueError, RecursionError):
        return None
    if not isinstance(filled, dict):
        return None
    lower = {str(key).lower(): value for key, value in filled.items()}
    return next((lower[n] for n in names if n in lower), None)


class ReplyStore:
    """The replies of a run, one JSON line each; a line that a crash cut short is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise RequestError(
                    f"{self.path}, line {number} is not a reply ({error}); move the file away to judge again."
                ) from error
        if len(whole) != len(raw):
            with open(self.path, "rb+") as file:
                file.truncate(len(whole))

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def get(self, key: str) -> dict[str, Any] | None:
        return self._replies.get(key)

    def __len__(self) -> int:
        return len(self._replies)

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep a reply, on the disk before anything else happens."""
        entry = {"key": key, **entry}
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                self._replies[key] = entry
        except OSError as error:
            raise MissingError(
                f"a judge's reply cannot be kept in {self.path} ({error.strerror}); judging stops here."
            ) from error


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's α, or why there is none."""

    alpha: float
    """NaN where undefined."""
    reason: str
    n_units: int
    """Units that at least two judges rated."""
    n_raters: int

    def __str__(self) -> str:
        return (
            f"α undefined ({self.reason})"
            if self.reason
            else f"α = {self.alpha:.2f} over {self.n_units} units, {self.n_raters} judges"
        )


def krippendorff(
    ratings: Mapping[str, Sequence[float]], *, metric: Literal["interval", "nominal"] = "interval"
) -> Agreement:
    """α of raters' values [n_units each], NaN where one did not rate a unit.

    Args:
        metric: "interval" for ratings (squared difference), "nominal" for choices.
    """
    names = list(ratings)
    table = np.array([list(ratings[name]) for name in names], dtype=float).reshape(len(names), -1)
    pairable = (~np.isnan(table)).sum(0) >= 2
    n_units = int(pairable.sum())
    table = table[:, pairable]

    def undefined(reason: str) -> Agreement:
        return Agreement(math.nan, reason, n_units, len(names))

    if len(names) < 2:
        return undefined("one judge only")
    if not n_units:
        return undefined("no unit was rated by two judges")
    for name, row in zip(names, table):
        if len(set(row[~np.isnan(row)])) < 2:
            return undefined(f"{name} never varies")
    from inspect_ai.scorer import SampleScore, Score, krippendorff_alpha

    units = [SampleScore(score=Score(value=unit[~np.isnan(unit)].tolist())) for unit in table.T]
    measure: Any = krippendorff_alpha(metric)
    return Agreement(float(measure(units)), "", n_units, len(names))
