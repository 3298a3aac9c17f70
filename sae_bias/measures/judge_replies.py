"""A judge's replies: read strictly, kept raw, never paid for twice; and how far judges agree.

A reply is appended to `judge/replies.jsonl` in the run folder the moment it arrives, under a key made of everything that was sent;
a later run with the same question finds it there. Unreadable replies are kept too: they were paid for, and count as unscored.

Krippendorff's α = 1 - D_observed / D_expected over units that at least two judges rated [Krippendorff 2011]; undefined, with the
reason, where a judge never varies: then agreement with it says nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_bias.core.errors import MissingError, RequestError

_MARKS = r"[\s:=*_(\"]{0,6}"
_RATING = re.compile(
    rf"\b(?:rating|score)\b{_MARKS}([-+]?\d+(?:[.,]\d+)?)(?:\s*(?:/|out of|of)\s*5)?", re.IGNORECASE
)
_BARE = re.compile(r"^[\s*_\"'(]*([1-5])\W*(?:(?:/|out of|of)\s*5\W*)?$", re.IGNORECASE)
_CHOICE = re.compile(r"\b(?:choice|answer|verdict)\b\W{0,6}(?:continuation\s+)?(1|2|tie)\b", re.IGNORECASE)
_BARE_CHOICE = re.compile(r"^\W*(?:continuation\s+)?(1|2|tie)\W*$", re.IGNORECASE)


def read_rating(reply: str) -> int | None:
    """The one rating 1–5 that a reply gives; None where it gives none, several, or one off the scale."""
    bare = _BARE.match(reply.strip())
    if bare:
        return int(bare.group(1))
    found = {float(number.replace(",", ".")) for number in _RATING.findall(reply)}
    if len(found) != 1:
        return None
    value = found.pop()
    return int(value) if value in (1, 2, 3, 4, 5) else None


def read_choice(reply: str) -> str | None:
    """ "1", "2" or "tie"; None where the reply gives none or several."""
    bare = _BARE_CHOICE.match(reply.strip())
    found = {bare.group(1).lower()} if bare else {c.lower() for c in _CHOICE.findall(reply)}
    return found.pop() if len(found) == 1 else None


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

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._replies[key]

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


def krippendorff(ratings: Mapping[str, Sequence[float]], *, metric: str = "interval") -> Agreement:
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
    return Agreement(_alpha(table, metric), "", n_units, len(names))


def _alpha(table: np.ndarray, metric: str) -> float:
    """1 - observed / expected disagreement, from the coincidences within units."""

    def apart(a: float, b: float) -> float:
        return (a - b) ** 2 if metric == "interval" else float(a != b)

    observed, pooled = 0.0, Counter()
    for unit in table.T:
        values = unit[~np.isnan(unit)]
        pooled.update(values.tolist())
        observed += sum(apart(a, b) for a in values for b in values) / (len(values) - 1)
    n = sum(pooled.values())
    expected = sum(k * m * apart(a, b) for a, k in pooled.items() for b, m in pooled.items()) / (n - 1)
    return 1 - observed / expected if expected else math.nan
