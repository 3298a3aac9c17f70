"""Choosing a strength: the largest specific reduction on the tune split, among those that keep evaluation and the rest of the law.

    eligible   β ≥ 0.7 and KL_off ≤ 0.05 on tune;   chosen   the largest SR on tune;   reported   its figures on the report split

Never by |bias|: an edit that flattens every evaluation has the smallest one (docs/method.md#choosing-a-strength).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.text import number, percent
from sae_bias.stats.reduction import NOT_DISTINGUISHABLE

MIN_BETA = 0.7
MAX_KL_OFF = 0.05
ALIKE = 1e-4
"""Specific reductions that differ by less are alike, and the edit listed first is named: ablating and clamping to 0 are one edit, and rounding must not choose."""


@dataclass(frozen=True)
class BestStrength:
    """The strength chosen on one split, with its figures there and on the split that had no part in the choice."""

    chosen_on: str
    reported_on: str
    cell: str = ""
    """Empty where no strength can be named."""
    rule: str = "undefined"
    strength: float = float("nan")
    outside_observed: bool = False
    """Whether the strength lies outside the activations the feature was seen to take."""
    in_sample: float = float("nan")
    """Specific reduction on the split that chose it: too good on average."""
    held_out: float = float("nan")
    """Specific reduction on the other split."""
    held_out_low: float = float("nan")
    held_out_high: float = float("nan")
    reason: str = ""
    """Why no strength is named."""

    def __repr__(self) -> str:
        if not self.cell:
            return f"BestStrength(undefined: {self.reason})"
        flag = ", outside the observed range" if self.outside_observed else ""
        return (
            f"BestStrength({self.rule}{flag}: specific reduction {percent(self.in_sample)} on {self.chosen_on} (in-sample), "
            f"{percent(self.held_out)} [{percent(self.held_out_low)}, {percent(self.held_out_high)}] on {self.reported_on})"
        )


def choose_strength(frame: pd.DataFrame, tune: str, report: str) -> BestStrength:
    """The best candidate of a sweep's table on `tune`, with its specific reduction there and on `report`."""
    missing = {tune, report} - set(frame["split"])
    if missing:
        raise RequestError(
            f"the sweep has no split {sorted(missing)[0]!r}, only {', '.join(frame['split'].unique())}; "
            'give Sweep(splits={"tune": [...], "report": [...]}).'
        )
    rows = frame[(frame["split"] == tune) & (frame["kind"] == "candidate")]
    if rows.empty:
        raise RequestError(f"the sweep has no candidate cell on split {tune!r}.")
    reason = why_no_strength(rows)
    if reason:
        return BestStrength(tune, report, reason=reason)
    eligible = _eligible(rows)
    found = eligible["specific_reduction"].to_numpy()
    chosen = eligible.iloc[int(np.argmax(found >= found.max() - ALIKE))]
    held: Any = frame[(frame["cell"] == chosen["cell"]) & (frame["split"] == report)].iloc[0]
    return BestStrength(
        tune, report, str(chosen["cell"]), str(chosen["rule"]), float(chosen["strength"]), bool(held["outside_observed"]),
        float(chosen["specific_reduction"]), float(held["specific_reduction"]), float(held["spec_low"]), float(held["spec_high"]),
    )  # fmt: skip


def why_no_strength(rows: pd.DataFrame) -> str:
    """Why none of some candidates' rows can be called best; empty where one can."""
    if (rows["red_reason"] == NOT_DISTINGUISHABLE).all():
        return NOT_DISTINGUISHABLE
    if "specific_reduction" not in rows:
        return "a strength is chosen by specific reduction, which needs costs"
    if rows["specific_reduction"].isna().all():
        return f"no specific reduction is defined ({rows['specific_reason'].iloc[0]})"
    keeps = rows["beta"] >= MIN_BETA
    if not keeps.any():
        return f"no strength keeps β ≥ {MIN_BETA:g} (the most is {number(float(rows['beta'].max()))})"
    if rows["kl_off"].isna().all():
        return "KL_off was not measured (an older sae-bias)"
    if _eligible(rows).empty:
        least = number(float(rows.loc[keeps, "kl_off"].min()))
        return f"no strength that keeps β ≥ {MIN_BETA:g} has KL_off ≤ {MAX_KL_OFF:g} (the least is {least})"
    return ""


def _eligible(rows: pd.DataFrame) -> pd.DataFrame:
    keep = (
        (rows["beta"] >= MIN_BETA) & (rows["kl_off"] <= MAX_KL_OFF) & np.isfinite(rows["specific_reduction"])
    )
    return rows[keep]
