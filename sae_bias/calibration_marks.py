"""A pass mark of METHOD §6: what is required, what was measured, and whether that is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sae_bias import wording

UNITS = ("share", "nats", "count", "rho")


@dataclass(frozen=True)
class Mark:
    """One row of the table that `calibrate` prints."""

    mark: str
    """What is asked, in words."""
    organism: str
    value: float
    """NaN where it could not be measured; then the mark is missed."""
    low: float = -math.inf
    high: float = math.inf
    unit: str = "share"
    n: str = ""
    """Over how much it was measured, in words: "1,000 grids"."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.low <= self.value <= self.high)

    @property
    def verdict(self) -> str:
        return "met" if self.passed else "missed"

    @property
    def required(self) -> str:
        low, high = (_text(v, self.unit) for v in (self.low, self.high))
        if math.isfinite(self.low) and math.isfinite(self.high):
            return low if self.low == self.high else f"{low} to {high}"
        return f"at least {low}" if math.isfinite(self.low) else f"at most {high}"

    @property
    def measured(self) -> str:
        return _text(self.value, self.unit)


def _text(value: float, unit: str) -> str:
    if unit == "share":
        return wording.percent(value)
    number = wording.number(value)
    return f"{number} nats" if unit == "nats" else number


def marks_frame(marks: Sequence[Mark]) -> pd.DataFrame:
    """One row a mark, in order: words for a reader, numbers for a program."""
    columns = (
        "mark",
        "organism",
        "required",
        "measured",
        "verdict",
        "n",
        "note",
        "value",
        "low",
        "high",
        "unit",
    )
    return pd.DataFrame([{c: getattr(m, c) for c in columns} for m in marks], columns=columns)  # type: ignore[arg-type]
