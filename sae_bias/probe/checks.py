"""Sensitivity analyses of a bias figure, in one call (docs/method.md#sensitivity-analyses).

`run_checks` gathers what `checks_words` (which words, which score, which stem), `checks_subjects` (which subject, which wording),
`random_words`, `multiverse` and `choices` measure one at a time; what they read off the model is read together (`models.tree`): a sentence that ten stems follow passes the model once.
A check that these pairs or this model cannot have is listed with the reason, never filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Framed
from sae_bias.models.model import Model
from sae_bias.models.reads import Asked, read_together
from sae_bias.probe.checks_subjects import Decomposition, Nuisances, ask_decomposition, ask_nuisances
from sae_bias.probe.checks_words import (
    ask_scores,
    ask_stems,
    audit_words,
    bootstrap_words,
    carriers,
    leave_one_word_out,
)
from sae_bias.probe.choices import ForcedChoice, ask_choices
from sae_bias.probe.multiverse import multiverse, sources_of_variance, stem_sentence, stem_table
from sae_bias.probe.random_words import RandomWordNull, random_word_null
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.clustered import Clustered, effect_sizes

_IN_A_RUN = {"subjects": "levels", "levels": "word_levels"}


@dataclass(frozen=True, eq=False)
class Checks(Framed):
    """The tables of `run_checks`, and one row a check."""

    frame_field: ClassVar[str] = "summary"
    result: ProbeResult
    summary: pd.DataFrame
    """check, value, ci_low, ci_high, p_value, says: the primary figure first."""
    tables: dict[str, pd.DataFrame] = field(repr=False)
    """audit, words_left_out, carriers, mass, scores, stems, multiverse, variance, choices, subjects, nuisances, levels: those that could be had."""
    skipped: dict[str, str]
    """Checks that these pairs or this model cannot have, and why."""
    warnings: tuple[str, ...] = ()
    """What belongs in the headline: the sign hangs on the stem, the forced choice disagrees."""
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    """Blocks of a run's summary: random_words, multiverse, forced_choice."""

    def run_tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the name they have in a run folder: `checks` (the summary), `levels`, `word_levels`, `check_…`."""
        return {"checks": self.summary} | {
            _IN_A_RUN.get(name, f"check_{name}"): table for name, table in self.tables.items()
        }

    def __repr__(self) -> str:
        text = self.summary.round(4).to_string(index=False)
        said = "".join(f"\n{line}" for line in self.warnings)
        skipped = "".join(f"\nnot checked: {name} ({why})" for name, why in self.skipped.items())
        return f"Checks of {self.result!r}{said}\n{text}{skipped}"


def run_checks(
    model: Model,
    pairs: PromptPairs,
    probe: Probe | None = None,
    *,
    base: ProbeResult | None = None,
    n_random: int = 1_000,
    n_boot: int = 2_000,
    seed: int = 0,
    progress: bool = False,
) -> Checks:
    """Every check of docs/method.md#sensitivity-analyses on one model and one set of pairs.

    `base` is this probe's result on these pairs with twins, levels and random words, where it was run already.
    """
    twins = len(pairs.controls()) > 0
    whole = base is not None and base.log_normaliser is not None and base.random_words is not None
    if base is None or not whole or twins != (base.control is not None):
        probe = probe or (base.probe if base is not None else default_probe(pairs))
        base = run_probe(model, pairs, probe, random_words=True, progress=progress)
    read, unread = _read_checks(model, check_asks(model, pairs, base), progress)
    run = _Checking(base, unread)
    run.primary()
    run.add("probability mass", lambda: _mass(run))
    run.add("words", lambda: _words(run, n_boot, seed))
    run.add("random words", lambda: _random(run, random_word_null(base, n_random, seed)))
    run.add("stems", lambda: _stems(run, read["stems"](), seed))
    run.add("scores", lambda: run.table("scores", read["scores"]()))
    run.add("forced choice", lambda: _choice(run, read["forced choice"]()))
    run.add("neutral subjects", lambda: _subjects(run, read["neutral subjects"]()))
    run.add("nuisances", lambda: _nuisances(run, read["nuisances"]()))
    run.table("audit", audit_words(model, pairs, base.probe))
    return Checks(base, pd.DataFrame(run.rows), run.tables, run.skipped, tuple(run.warnings), run.facts)


def check_asks(model: Model, pairs: PromptPairs, base: ProbeResult) -> dict[str, Callable[[], Asked[Any]]]:
    """What each check reads beside the probe's own result."""
    return {
        "stems": lambda: ask_stems(model, pairs, base),
        "scores": lambda: ask_scores(model, pairs, base),
        "forced choice": lambda: ask_choices(model, pairs),
        "neutral subjects": lambda: ask_decomposition(model, pairs, base),
        "nuisances": lambda: ask_nuisances(model, base),
    }


def _read_checks(
    model: Model, asks: Mapping[str, Callable[[], Asked[Any]]], progress: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, RequestError]]:
    """Everything the checks need from the model, read in one go, and why some cannot be had."""
    asked, unread = {}, {}
    for name, ask in asks.items():
        try:
            asked[name] = ask()
        except RequestError as error:
            unread[name] = error
    readers = [reader for a in asked.values() for reader in a.readers]
    read_together(model, readers, progress=progress, describe=f"checks ({', '.join(asked)})")
    return {name: a.finish for name, a in asked.items()}, unread


class _Checking:
    """Rows and tables as they come in."""

    def __init__(self, result: ProbeResult, unread: Mapping[str, RequestError]):
        self.result, self.unread = result, unread
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[str, pd.DataFrame] = {}
        self.skipped: dict[str, str] = {}
        self.warnings: list[str] = []
        self.facts: dict[str, Any] = {}

    def add(self, name: str, check: Callable[[], None]) -> None:
        try:
            if name in self.unread:
                raise self.unread[name]
            check()
        except RequestError as error:
            self.skipped[name] = str(error)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        self.tables[name] = frame

    def row(self, check: str, value: float, says: str = "", **more: float) -> None:
        row = dict.fromkeys(("ci_low", "ci_high", "p_value"), float("nan")) | more
        self.rows.append({"check": check, "value": value, **row, "says": says})

    def clustered(self, check: str, stat: Clustered, says: str = "") -> None:
        self.row(check, says=stat.reason or says, **stat.columns("value", p="p_value"))

    def primary(self) -> None:
        result, of = self.result, f"of the {self.result.estimand}"
        values, templates, _ = result.figure_by_pair()
        sizes = effect_sizes(values, templates)
        if result.control is None:
            self.skipped["mundane control"] = "these pairs have no mundane twins"
            self.clustered("bias", result.stat, "two-way clustered: the primary interval and p")
        else:
            says = "bias - mundane bias, two-way clustered: the primary interval and p"
            self.clustered("difference in differences", result.did.stat, says)
            self.clustered("bias", result.stat, "without the mundane control")
            self.clustered("mundane control", result.control.stat, "the same pairs with mundane content")
        for over, test in result.sign_flips(primary=True).items():
            says = f"{of}; {test.label}; floor {test.floor:.2g}"
            self.row(f"sign-flip over {over}", sizes.mean, says, p_value=test.p_value)
        self.row("d_z over templates", sizes.d_z, f"{of}: mean over SD of template means")
        self.row("share of templates above 0", sizes.share_positive, f"{of}; {sizes.n_templates} templates")
        self.table("levels", result.levels())


def _mass(run: _Checking) -> None:
    mass = run.result.mass
    run.row("probability mass", mass.total, str(mass))
    run.table("mass", mass.words)


def _words(run: _Checking, n_boot: int, seed: int) -> None:
    left = leave_one_word_out(run.result)
    run.table("words_left_out", left)
    run.table("carriers", carriers(run.result))
    low, high, of = left["primary"].min(), left["primary"].max(), run.result.estimand
    says = f"the {of} lies between {low:+.3f} and {high:+.3f}; most moved by {left['word'][0]!r}"
    run.row("one word left out", run.result.primary.mean, says)
    boot = bootstrap_words(run.result, n_boot=n_boot, seed=seed)
    run.row(
        "bootstrap of words", boot.bias, boot.reason or boot.label, ci_low=boot.ci_low, ci_high=boot.ci_high
    )


def _random(run: _Checking, null: RandomWordNull) -> None:
    if null.reason:
        raise RequestError(null.reason)
    says = f"{null.of}; {null.n} draws from {null.n_candidates} words; 95% of them within ±{null.within:.3f}"
    run.row("random words", null.estimate, says, p_value=null.p_value)
    run.facts["random_words"] = null_facts(null)


def null_facts(null: RandomWordNull) -> dict[str, Any]:
    """The block `random_words` of a run's summary."""
    return {
        "of": null.of,
        "p_value": null.p_value,
        "within": null.within,
        "n": null.n,
        "reason": null.reason or None,
    }


def _stems(run: _Checking, results: dict[str, ProbeResult], seed: int) -> None:
    stems = stem_table(results)
    run.table("stems", stems)
    for row in stems.itertuples():
        ends = {"ci_low": row.primary_low, "ci_high": row.primary_high, "p_value": row.primary_p}
        run.row(f"stem {row.stem!r}", row.primary, f"{row.of}; {row.n_words} words", **ends)  # type: ignore[arg-type]
    if said := stem_sentence(stems):
        run.warnings.append(said)
    run.add("table of variance", lambda: run.table("variance", sources_of_variance(results)))
    curve = multiverse(results, seed=seed)
    run.table("multiverse", curve.frame)
    run.row("multiverse", curve.median, str(curve))
    run.facts["multiverse"] = {
        "of": curve.of,
        "n": len(curve.frame),
        "median": curve.median,
        "same_sign": curve.same_sign,
        "outside_null": curve.outside_null,
    }


def _choice(run: _Checking, found: ForcedChoice) -> None:
    run.table("choices", found.frame)
    agrees = (found.stat.mean > 0) == (run.result.primary.mean > 0)
    says = f"{found.of}; {len(found.frame)} wordings; the options hold {100 * found.mass:.0f}% of the probability"
    run.clustered(
        "forced choice", found.stat, f"{says}; {'same' if agrees else 'opposite'} sign as the probe"
    )
    run.facts["forced_choice"] = {
        "of": found.of,
        **found.stat.columns(p="p_value"),
        "mass": found.mass,
        "agrees": agrees,
    }
    if not agrees:
        run.warnings.append(f"{found}: the opposite sign of the probe")


def _subjects(run: _Checking, found: Decomposition) -> None:
    run.table("subjects", found.frame)
    first, second = run.result.sides
    run.clustered(f"{first} bonus", found.human_bonus, f"{first} - neutral ({', '.join(found.neutral)})")
    run.clustered(f"{second} penalty", found.ai_penalty, f"neutral - {second}")


def _nuisances(run: _Checking, found: Nuisances) -> None:
    run.table("nuisances", found.table)
    named = ", ".join(found.table.loc[found.table["adjusted_for"], "nuisance"])
    run.clustered("adjusted for nuisances", found.adjusted, f"of the {found.of}, at equal {named}")
