"""Numbers as a reader wants them: one format for terminal, report and tables."""

import math
from numbers import Real
from typing import Any, Protocol, TypeGuard

import pandas as pd

UNDEFINED, NOT_MEASURED = "undefined", "not measured"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TEXT_KINDS = {
    "neutral": "neutral text",
    "ai_nonspeech": "AI text without speech",
    "ai_speech": "AI-speech text",
}
COST_KINDS = TEXT_KINDS | {
    "valence": "human deeds (at the evaluation)",
    "off": "last token (without the evaluation words)",
}


def number(value: Any, *, missing: str = UNDEFINED) -> str:
    """A scalar as a reader wants it: three significant figures, a true minus, thousands set apart."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if pd.isna(value):
        return missing
    if math.isinf(value):
        return "unbounded"
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e4:
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    else:
        digits, power = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.2g}", "")
        text = f"{digits} × 10{str(int(power)).translate(_RAISED)}" if power else digits
    return text.replace("-", "−")


def percent(value: Any, *, missing: str = UNDEFINED) -> str:
    """A share as a percentage with at most one decimal."""
    if not is_number(value):
        return number(value, missing=missing)
    return f"{value * 100:.1f}".removesuffix(".0").replace("-", "−") + "%"


def signed(value: Any, *, missing: str = UNDEFINED) -> str:
    """A number with its sign, plus or minus."""
    text = number(value, missing=missing)
    return f"+{text}" if is_number(value) and value > 0 else text


def bracket(low: Any, high: Any, *, share: bool = False) -> str:
    """`[low, high]`."""
    show = percent if share else number
    return f"[{show(low)}, {show(high)}]"


def p_text(value: Any) -> str:
    """`p = 0.012`, `p < 0.0001`, or that it is missing."""
    if not is_number(value):
        return f"p {number(value)}"
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite scalar."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


class Estimated(Protocol):
    """Anything with a 95% interval."""

    @property
    def ci_low(self) -> float | None: ...
    @property
    def ci_high(self) -> float | None: ...


def interval(part: Estimated, *, share: bool = False) -> str:
    """The 95% interval in words; an unbounded or missing one says so."""
    if getattr(part, "bounded", None) is False:
        return "95% interval undefined (unbounded)"
    low, high = part.ci_low, part.ci_high
    if not (is_number(low) and is_number(high)):
        return f"95% interval {NOT_MEASURED if low is None else UNDEFINED}"
    show = percent if share else number
    return f"95% interval {show(low)} to {show(high)}"


def excludes_zero(part: Estimated) -> bool | None:
    """Whether the interval lies wholly on one side of 0; None where there is no interval."""
    low, high = part.ci_low, part.ci_high
    return bool(low > 0 or high < 0) if is_number(low) and is_number(high) else None
