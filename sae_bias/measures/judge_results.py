"""What follows from judges' readable replies: paired differences, power, agreement, repeat noise, pairwise wins.

A text's mark is the mean over repeats, then over the judges that marked both sides of its item; the difference is paired by prompt, and
a prompt with several items (one a strength, say) counts once, with their mean.
The number of prompts needed is that of a paired t-test at 80 % power with the run's own paired SD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy
from scipy.special import stdtrit

from sae_bias.core.result import Figure
from sae_bias.measures.judge_replies import Agreement, krippendorff
from sae_bias.stats.design import needed_n, sign_test

SIDES = ("unsteered", "steered")
MEANINGFUL = 0.5
"""Difference in points of the 1–5 scale that a planned comparison should see."""


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, and what it may cost."""

    n_requests: int
    n_kept: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    """None where a judge's price is not given."""
    paid: bool

    def __str__(self) -> str:
        price = (
            "free of charge"
            if not self.paid
            else "price not given"
            if self.dollars is None
            else f"about ${self.dollars:.2f}"
        )
        return (
            f"{self.n_requests} requests to send ({self.n_kept} replies kept already), about {self.input_tokens:,} tokens in and at most "
            f"{self.output_tokens:,} out: {price}"
        )


@dataclass(frozen=True)
class JudgeResult:
    """Every reply, and what follows from the readable ones."""

    texts: pd.DataFrame = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    """One row a request: judge, kind, part, item, side, repeat, rating, choice, readable, reply."""
    cost: Estimate
    failures: tuple[str, ...] = ()

    @property
    def n_unanswered(self) -> int:
        return int(self.table["reply"].isna().sum())

    @property
    def n_unreadable(self) -> int:
        """Replies that gave no rating: missing, never 0."""
        return int((self.table["reply"].notna() & ~self.table["readable"]).sum())

    @property
    def judges(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.table["judge"]))

    def to_frame(self) -> pd.DataFrame:
        """One row a part: both means, the paired difference with its interval, power, agreement, noise, pairwise wins."""
        return pd.DataFrame([self._part(p) for p in dict.fromkeys(self.table["part"])])

    def plot(self) -> Figure:
        """Difference in mean mark of every part of the rubric, with its interval."""
        from sae_bias.figures.behavior import judge_parts

        return judge_parts(self.to_frame())

    def prompt_means(self, part: str) -> pd.DataFrame:
        """Mean rating [prompt × side], over repeats, then over the judges that rated both sides of an item, then over a prompt's items."""
        rows = self.table[(self.table["kind"] == "absolute") & (self.table["part"] == part)]
        cells = (
            rows.groupby(["item", "judge", "side"])["rating"]
            .mean()
            .unstack("side")
            .reindex(columns=list(SIDES))
        )
        of_items = cells.dropna().groupby("item").mean()
        return of_items.groupby(self.texts["prompt"].reindex(of_items.index)).mean()

    def _part(self, part: str) -> dict[str, Any]:
        means = self.prompt_means(part)
        diff = (means["steered"] - means["unsteered"]).to_numpy()
        n, mean = len(diff), float(diff.mean()) if len(diff) else float("nan")
        sd = float(diff.std(ddof=1)) if n > 1 else float("nan")
        half = float(stdtrit(n - 1, 0.975)) * sd / n**0.5 if n > 1 else float("nan")
        agreement, wins = self.agreement(part), self.pairwise(part)
        return {
            "part": part,
            "n_items": n,
            "unsteered": float(means["unsteered"].mean()),
            "steered": float(means["steered"].mean()),
            "difference": mean,
            "ci_low": mean - half,
            "ci_high": mean + half,
            "p_value": float(scipy.stats.ttest_1samp(diff, 0).pvalue) if n > 1 and sd > 0 else math.nan,
            "paired_sd": sd,
            "needed_n": _needed(sd, MEANINGFUL),
            "needed_n_observed": _needed(sd, mean),
            "alpha": agreement.alpha,
            "alpha_reason": agreement.reason,
            "repeat_sd": self.repeat_noise(part),
            **wins,
        }

    def agreement(self, part: str) -> Agreement:
        """Krippendorff's α between the judges' ratings (mean over repeats) of each text."""
        rows = self.table[(self.table["kind"] == "absolute") & (self.table["part"] == part)]
        cells = (
            rows.groupby(["item", "side", "judge"])["rating"]
            .mean()
            .unstack("judge")
            .reindex(columns=list(self.judges))
        )
        return krippendorff({judge: cells[judge].tolist() for judge in self.judges})

    def repeat_noise(self, part: str) -> float:
        """SD of one judge's repeated ratings of one text; NaN where nothing was repeated."""
        rows = self.table[(self.table["kind"] == "absolute") & (self.table["part"] == part)]
        variance = rows.groupby(["item", "side", "judge"])["rating"].var(ddof=1).dropna()
        return float(np.sqrt(variance.mean())) if len(variance) else float("nan")

    def pairwise(self, part: str) -> dict[str, Any]:
        """Prompts on which steered or unsteered won in both orders; how often a choice changed with the order, or stood first."""
        rows = self.table[(self.table["kind"] == "pairwise") & (self.table["part"] == part)].dropna(
            subset=["choice"]
        )
        rows = rows.assign(prompt=rows["item"].map(self.texts["prompt"]))
        votes: dict[Any, float] = {}
        compared = order_bound = 0
        for (prompt, *_), group in rows.groupby(["prompt", "item", "judge", "repeat"]):  # type: ignore[misc]
            if len(group) != 2:
                continue
            picks = [_picked_side(side, choice) for side, choice in zip(group["side"], group["choice"])]
            compared += 1
            order_bound += picks[0] != picks[1]
            vote = {"steered": 1.0, "unsteered": -1.0}.get(picks[0], 0.0) if picks[0] == picks[1] else 0.0
            votes[prompt] = votes.get(prompt, 0.0) + vote
        decided = rows[rows["choice"] != "tie"]
        won, lost = sum(v > 0 for v in votes.values()), sum(v < 0 for v in votes.values())
        return {
            "steered_wins": won,
            "unsteered_wins": lost,
            "ties": len(votes) - won - lost,
            "pairwise_p": sign_test(won, won + lost).p_value,
            "order_bound": order_bound / compared if compared else float("nan"),
            "chose_first": float((decided["choice"] == "1").mean()) if len(decided) else float("nan"),
        }

    def summary(self) -> dict[str, Any]:
        """The judge block of a run's summary."""
        return {
            "judges": list(self.judges),
            "n_items": len(self.texts),
            "n_requests": len(self.table),
            "n_unanswered": self.n_unanswered,
            "n_unreadable": self.n_unreadable,
            "failures": list(self.failures[:3]),
            "parts": self.to_frame().to_dict("records"),
            "power": {"effect": MEANINGFUL, "power": 0.8, "alpha": 0.05},
        }

    def headline(self) -> list[str]:
        """The result in a few plain lines, with the number of prompts that it takes."""
        lines = []
        row: Any
        for row in self.to_frame().itertuples():
            lines.append(
                f"{row.part}: {_two(row.unsteered)} unsteered, {_two(row.steered)} steered, difference {_two(row.difference)} "
                f"[{_two(row.ci_low)}, {_two(row.ci_high)}], {row.n_items} prompts; "
                f"{self.agreement(str(row.part))}; pairwise: steered {row.steered_wins}, unsteered {row.unsteered_wins}, ties {row.ties}"
            )
            needed = (
                "undefined (the paired SD is 0 or unknown)"
                if row.needed_n != row.needed_n
                else f"{int(row.needed_n)} prompts"
            )
            lines.append(
                f"  80 % power for {MEANINGFUL} points at this run's paired SD {_two(row.paired_sd)}: {needed}"
            )
            if row.order_bound == row.order_bound and row.order_bound > 0.5:
                lines.append(
                    f"  {row.order_bound:.0%} of the choices changed with the order: this judge looks at the place, not the text"
                )
        if self.n_unreadable:
            lines.append(
                f"{self.n_unreadable} of {len(self.table)} replies gave no rating; they are left out, not counted as 0"
            )
        if self.n_unanswered:
            lines.append(
                f"{self.n_unanswered} of {len(self.table)} questions have no reply ({'; '.join(self.failures[:2])})"
            )
        return lines

    def __repr__(self) -> str:
        return "\n".join(["JudgeResult:", *self.headline()])


def _picked_side(first: str, choice: str) -> str:
    if choice == "tie":
        return "tie"
    return first if choice == "1" else SIDES[1 - SIDES.index(first)]


def _needed(sd: float, effect: float) -> float:
    """Prompts for 80 % power; NaN where the run gives no SD or no effect."""
    return float(needed_n(sd, effect)) if sd > 0 and effect == effect and abs(effect) > 1e-9 else float("nan")


def _two(x: Any) -> str:
    return "undefined" if x != x else f"{x:.2f}"
