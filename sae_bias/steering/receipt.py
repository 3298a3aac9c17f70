"""What interventions did: how often their hooks fired, how many positions they changed, and by how much.

A hook that never fired is an error (`hooks.HookNeverFiredError`); a feature that never fired is a fact, and stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sae_bias.steering.intervention import Intervention


@dataclass
class EditReceipt:
    """What one intervention did, summed over the passes it saw."""

    intervention: Intervention
    positions_seen: int = 0
    """Ordinary positions the edit was allowed to act on."""
    positions_active: int = 0
    """Of these, where the feature fired (for directions: all)."""
    positions_changed: int = 0
    markers_changed: int = 0
    """Changed positions that are chat turn markers (counted in `positions_changed` too)."""
    written_inactive: int = 0
    """Changed positions where the feature had not fired."""
    max_act: float = math.nan
    """Largest activation seen; NaN when the feature never fired."""
    _sum_before: float = 0.0
    _sum_after: float = 0.0
    _sum_relative: float = 0.0

    @property
    def mean_before(self) -> float:
        """Mean activation before the edit, over changed positions."""
        return self._sum_before / self.positions_changed if self.positions_changed else math.nan

    @property
    def mean_after(self) -> float:
        return self._sum_after / self.positions_changed if self.positions_changed else math.nan

    @property
    def relative_change(self) -> float:
        """Mean ‖Δ‖/‖x‖ over changed positions."""
        return self._sum_relative / self.positions_changed if self.positions_changed else math.nan


@dataclass
class Receipt:
    """What an `intervene` block did: how often its hooks fired and what each edit changed."""

    edits: list[EditReceipt] = field(default_factory=list)
    hook_calls: int = 0

    @property
    def positions_changed(self) -> int:
        return sum(e.positions_changed for e in self.edits)

    def rows(self) -> list[dict[str, Any]]:
        """One row of plain values an intervention."""
        return [
            {
                "intervention": e.intervention.describe(),
                "target": e.intervention.target,
                "positions_seen": e.positions_seen,
                "positions_active": e.positions_active,
                "positions_changed": e.positions_changed,
                "markers_changed": e.markers_changed,
                "written_inactive": e.written_inactive,
                "mean_before": e.mean_before,
                "mean_after": e.mean_after,
                "max_act": e.max_act,
                "relative_change": e.relative_change,
            }
            for e in self.edits
        ]

    def to_frame(self) -> pd.DataFrame:
        """One row an intervention."""
        return pd.DataFrame(self.rows())

    def __repr__(self) -> str:
        lines = [f"Receipt: hooks fired {self.hook_calls} times, {self.positions_changed} positions changed"]
        for e in self.edits:
            fired = f"changed {e.positions_changed} of {e.positions_seen} positions, mean ‖Δ‖/‖x‖ {e.relative_change:.3g}"
            lines.append(
                f"  {e.intervention.describe()} on {e.intervention.target}: {fired if e.positions_changed else 'changed nothing'}"
            )
        return "\n".join(lines)
