"""Sensitivity analyses of a bias figure, in one call (docs/method.md#sensitivity-analyses).

`run_checks` gathers what `word_checks` (which words, which score, which stem) and `subject_checks` (which subject, which wording)
measure one at a time; a check that these pairs or this model cannot have is listed with the reason, never filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.probe.checks_subjects import (
    Decomposition,
    Nuisances,
    decompose,
    log_likelihoods,
    nuisance_table,
)
from sae_bias.probe.checks_words import (
    RandomWordNull,
    WordBootstrap,
    audit_words,
    bootstrap_words,
    carriers,
    leave_one_word_out,
    random_word_null,
    scores_side_by_side,
    stem_variation,
)
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.clustered import Clustered

__all__ = [
    "Checks",
    "Decomposition",
    "Nuisances",
    "RandomWordNull",
    "WordBootstrap",
    "audit_words",
    "bootstrap_words",
    "carriers",
    "decompose",
    "leave_one_word_out",
    "log_likelihoods",
    "nuisance_table",
    "random_word_null",
    "run_checks",
    "scores_side_by_side",
    "stem_variation",
]


@dataclass(frozen=True, eq=False)
class Checks:
    """The tables of `run_checks`, and one row a check."""

    result: ProbeResult
    summary: pd.DataFrame
    """check, value, ci_low, ci_high, p_value, says: the primary figure first."""
    tables: dict[str, pd.DataFrame] = field(repr=False)
    """audit, words_left_out, carriers, scores, stems, subjects, nuisances, levels: those that could be had."""
    skipped: dict[str, str]
    """Checks that these pairs or this model cannot have, and why."""

    def to_frame(self) -> pd.DataFrame:
        return self.summary.copy()

    def run_tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the name they have in a run folder: `checks` (the summary), `levels`, `word_levels`, `check_…`."""
        named = {"subjects": "levels", "levels": "word_levels"}
        return {"checks": self.summary} | {
            named.get(name, f"check_{name}"): table for name, table in self.tables.items()
        }

    def __repr__(self) -> str:
        text = self.summary.round(4).to_string(index=False)
        skipped = "".join(f"\nnot checked: {name} ({why})" for name, why in self.skipped.items())
        return f"Checks of {self.result!r}\n{text}{skipped}"


def run_checks(
    model: Model,
    pairs: PromptPairs,
    probe: Probe | None = None,
    *,
    n_random: int = 1_000,
    n_boot: int = 2_000,
    seed: int = 0,
    base: ProbeResult | None = None,
) -> Checks:
    """Every check of docs/method.md#sensitivity-analyses on one model and one set of pairs.

    base: these pairs measured already, with levels and, where there are mundane twins, with `controls`.
    """
    probe = probe or default_probe(pairs)
    result = base or run_probe(model, pairs, probe, controls=bool(len(pairs.controls())), levels=True)
    run = _Checking(result)
    run.primary()
    run.add("words", lambda: _words(run, n_boot, seed))
    run.add("random words", lambda: _random(run, random_word_null(model, pairs, probe, n_random, seed)))
    run.add("stems", lambda: _stems(run, stem_variation(model, pairs, probe)))
    run.add("scores", lambda: run.table("scores", scores_side_by_side(model, pairs, probe)))
    run.add("neutral subjects", lambda: _subjects(run, decompose(model, pairs, probe, base=result)))
    run.add("nuisances", lambda: _nuisances(run, nuisance_table(model, result)))
    run.table("audit", audit_words(model, pairs, probe))
    return Checks(result, pd.DataFrame(run.rows), run.tables, run.skipped)


class _Checking:
    """Rows and tables as they come in."""

    def __init__(self, result: ProbeResult):
        self.result = result
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[str, pd.DataFrame] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except RequestError as error:
            self.skipped[name] = str(error)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        self.tables[name] = frame

    def row(self, check: str, value: float, says: str = "", **more: float) -> None:
        row = dict.fromkeys(("ci_low", "ci_high", "p_value"), float("nan")) | more
        self.rows.append({"check": check, "value": value, **row, "says": says})

    def clustered(self, check: str, stat: Clustered, says: str = "") -> None:
        self.row(
            check,
            stat.mean,
            stat.reason or says,
            ci_low=stat.ci_low,
            ci_high=stat.ci_high,
            p_value=stat.p_value,
        )

    def primary(self) -> None:
        result, sizes = self.result, self.result.effect_sizes()
        self.clustered("bias", result.stat, "two-way clustered: the primary interval and p")
        for over, test in result.sign_flips().items():
            self.row(
                f"sign-flip over {over}",
                result.bias,
                f"{test.label}; floor {test.floor:.2g}",
                p_value=test.p_value,
            )
        self.row("d_z over templates", sizes.d_z, "mean over SD of template means")
        self.row("share of templates above 0", sizes.share_positive, f"{sizes.n_templates} templates")
        if result.control is None:
            self.skipped["mundane control"] = "these pairs have no mundane twins"
        else:
            self.clustered("mundane control", result.control.stat, "the same pairs with mundane content")
            self.clustered(
                "difference in differences", result.difference_in_differences().stat, "bias - mundane bias"
            )
        self.table("levels", result.levels())


def _words(run: _Checking, n_boot: int, seed: int) -> None:
    left = leave_one_word_out(run.result)
    run.table("words_left_out", left)
    run.table("carriers", carriers(run.result))
    low, high = left["bias"].min(), left["bias"].max()
    run.row(
        "one word left out",
        run.result.bias,
        f"between {low:+.3f} and {high:+.3f}; most moved by {left['word'][0]!r}",
    )
    boot = bootstrap_words(run.result, n_boot=n_boot, seed=seed)
    run.row(
        "bootstrap of words", boot.bias, boot.reason or boot.label, ci_low=boot.ci_low, ci_high=boot.ci_high
    )


def _random(run: _Checking, null: RandomWordNull) -> None:
    if null.reason:
        raise RequestError(null.reason)
    size = float(pd.Series(null.biases).abs().quantile(0.95))
    says = f"{null.n} draws from {null.n_candidates} words; 95 % of them within ±{size:.3f}"
    run.row("random words", null.bias, says, p_value=null.p_value)


def _stems(run: _Checking, stems: pd.DataFrame) -> None:
    run.table("stems", stems)
    for row in stems.itertuples():
        ends = {"ci_low": row.ci_low, "ci_high": row.ci_high, "p_value": row.p_value}
        run.row(f"stem {row.stem!r}", row.bias, f"{row.n_words} words", **ends)  # type: ignore[arg-type]


def _subjects(run: _Checking, found: Decomposition) -> None:
    run.table("subjects", found.frame)
    first, second = run.result.sides
    run.clustered(f"{first} bonus", found.human_bonus, f"{first} - neutral ({', '.join(found.neutral)})")
    run.clustered(f"{second} penalty", found.ai_penalty, f"neutral - {second}")


def _nuisances(run: _Checking, found: Nuisances) -> None:
    run.table("nuisances", found.table)
    named = ", ".join(found.table.loc[found.table["adjusted_for"], "nuisance"])
    run.clustered("adjusted for nuisances", found.adjusted, f"at equal {named}")
