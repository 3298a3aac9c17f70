"""What `verify` compares, and how: one check a thing, the largest difference against a tolerance.

Numbers are compared as |now - then| / max(1, |then|), so that a score of 12 nats and a divergence of 0.003 share one tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.versions import DEFINITIONS, changed_columns, changed_since

TABLE_TOLERANCE = 1e-9
"""Between a table and the cells it was made of: the same arithmetic on the same numbers."""
AGREES, DIFFERS, UNCHECKED, NOTE = "agrees", "differs", "not checked", "note"


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    status: str
    """agrees | differs | not checked | note (told, and no part of the answer)"""
    detail: str
    difference: float | None = None
    """The largest |now - then| over max(1, |then|), where numbers were compared."""
    tolerance: float | None = None


Part = tuple[np.ndarray, np.ndarray, Callable[[int], str]]
"""Numbers now, the same then, and what the entry of a place is called."""


def compare(what: str, parts: Iterable[Part], tolerance: float, over: str) -> Check:
    """The largest relative gap over some arrays, and where it is."""
    worst, where = 0.0, ""
    for now, then, name in parts:
        if len(now) != len(then):
            return Check(what, DIFFERS, f"{len(then)} pairs stored, {len(now)} measured")
        gap = relative_gap(now, then)
        row = int(gap.argmax())
        if not gap[row] <= worst:
            worst, where = float(gap[row]), name(row)
    return Check(
        what,
        AGREES if worst <= tolerance else DIFFERS,
        over if worst <= tolerance else where,
        worst,
        tolerance,
    )


def relative_gap(now: np.ndarray, then: np.ndarray) -> np.ndarray:
    """|now - then| / max(1, |then|); 0 where both are NaN (or the same infinity), infinite where one is."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(now - then) / np.maximum(1.0, np.abs(then))
    gap[(np.isnan(now) & np.isnan(then)) | (now == then)] = 0.0
    return np.where(np.isnan(gap), np.inf, gap)


def compare_tables(what: str, made: pd.DataFrame, stored: pd.DataFrame, definitions: int) -> Check:
    """A sweep's table as its cells give it against the one that is stored: the same rows, the same numbers.

    Columns whose meaning changed since the run's definitions, or which it did not have, are left out.
    """
    older, changed = definitions < DEFINITIONS, changed_columns(definitions)
    if not all(k in stored and list(made[k]) == list(stored[k]) for k in ("cell", "split")):
        return Check(what, DIFFERS, "its rows are not the sweep's cells")
    columns = [c for c in made.select_dtypes("number") if c not in changed and (c in stored or not older)]
    if lost := [c for c in columns if c not in stored]:
        return Check(what, DIFFERS, f"it has no column {lost[0]}")
    parts = [
        (made[c].to_numpy(float), numbers(stored[c]), lambda i, c=c: f"{c} of {made['rule'].iloc[i]} ({made['split'].iloc[i]})")
        for c in columns
    ]  # fmt: skip
    return compare(what, parts, TABLE_TOLERANCE, f"{len(made)} rows")


def definitions_note(version: int) -> list[Check]:
    """Which figures of an older run have changed their meaning since; nothing for a run of today's definitions."""
    said = "; ".join(f"{name}: {how}" for name, how in changed_since(version).items())
    what = f"definitions {version} → {DEFINITIONS}"
    return [Check(what, NOTE, f"these changed their meaning and are not compared: {said}")] if said else []


def compare_within(what: str, cells: Mapping[str, pd.DataFrame]) -> Check:
    """Each pair's bias against its own two scores, in every cell: needs no model."""
    parts = [
        ((f["score_human"] - f["score_ai"]).to_numpy(float), f["bias"].to_numpy(float), lambda i, n=n, f=f: f"{pair_name(f, i)} of cell {n}")
        for n, f in cells.items()
    ]  # fmt: skip
    n = sum(len(f) for f in cells.values())
    return compare(what, parts, TABLE_TOLERANCE, f"{n:,} pairs of {len(cells)} cells")


def kept_numbers(then: pd.DataFrame, now: pd.DataFrame) -> list[Part]:
    """Numbers kept with a cell: costs, and the scores on the valence banks."""
    found: list[Part] = []
    for key, old in then.attrs.items():
        new = now.attrs.get(str(key))
        if isinstance(old, float) and key != "strength":
            found.append(measured(numbers([old]), numbers([new]), lambda i, key=key: str(key)))
        if key == "bank" and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            found.append(measured(numbers(old), numbers(new), lambda i: f"valence bank, prompt {i + 1}"))
    return found


def measured(then: np.ndarray, now: np.ndarray, name: Callable[[int], str]) -> Part:
    """Stored numbers against those measured now; the difference is told with both."""
    return now, then, lambda i: f"{name(i)}: {then[i]:.6g} stored, {now[i]:.6g} measured"


def numbers(values: Any) -> np.ndarray:
    """Values as floats; what is no number is NaN."""
    return pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(float)


def sample(listed: Sequence[Mapping[str, Any]], wanted: int | None) -> list[Mapping[str, Any]]:
    """The base, the first candidate, and the rest spread evenly over the list."""
    if wanted is None or wanted >= len(listed):
        return list(listed)
    spread = np.linspace(0, len(listed) - 1, max(wanted - 1, 0)).round().astype(int).tolist()
    numbers = list(dict.fromkeys([0, 1, *spread]))[:wanted]
    return [listed[i] for i in sorted(numbers) if i < len(listed)]


def compare_files(what: str, then: Mapping[str, Any], now: Mapping[str, str]) -> Check:
    """Hashes of files, then and now."""
    changed = sorted(name for name in then if name in now and now[name] != then[name])
    gone = sorted(set(then) - set(now))
    if not changed and not gone:
        partial = sum(str(v).startswith("partial:") for v in then.values())
        more = f" ({partial} large ones by their ends)" if partial else ""
        count = "1 file has" if len(then) == 1 else f"{len(then)} files have"
        return Check(what, AGREES, f"{count} the recorded sha256{more}")
    words = [f"{n} has another sha256 than recorded" for n in changed] + [f"{n} is gone" for n in gone]
    return Check(what, DIFFERS, "; ".join(words[:4]))


def pair_name(frame: pd.DataFrame, row: int) -> str:
    parts = [str(frame[c].iloc[row]) for c in ("template", "entity") if c in frame]
    return " / ".join(parts) or f"row {row + 1}"


def cell_name(stored: Mapping[str, Any]) -> str:
    parts = [str(stored.get("rule") or "cell"), str(stored.get("feature") or "")]
    return "cell " + " of ".join(p for p in parts if p)


def as_mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{what} is a {type(value).__name__}; expected a mapping.")
    return value


def need_columns(frame: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    missing = [c for c in columns if c not in frame]
    if missing or not len(frame):
        raise RequestError(f"{where} has no {', '.join(missing) or 'rows'}.")
