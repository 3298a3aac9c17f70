"""The report's calibration sections: the pass marks, coverage, power, trained SAEs, attribution, and a user's own design."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.figures import calibration as calibration_plots
from sae_bias.report.parts import Section, Table, table_of
from sae_bias.report.sections import CALIBRATION, section
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import CalibrationFigure

BAND, MATTERS = (0.93, 0.98), 0.005
MARK_COLUMNS = columns_of("mark; organism; required; measured; verdict; n: over; note")


def findings(part: CalibrationFigure | None) -> list[tuple[str, str]]:
    """The summary's sentences, from its block `calibration`; none for a run that is not a calibration."""
    if part is None:
        return []
    said = [("Marks", f"{part.n_marks - len(part.missed)} of {part.n_marks} pass marks are met.")]
    return said + ([("Missed", f"{'; '.join(part.missed)}.")] if part.missed else [])


@section(CALIBRATION, table="marks")
def marks_section(run: Run) -> Section:
    """The pass marks as a table."""
    frame = run.tables["marks"]
    missed = frame[frame["verdict"] != "met"]
    said = "All are met." if missed.empty else f"Missed: {'; '.join(map(str, missed['mark']))}."
    return Section(
        "marks",
        "The pass marks",
        f"{len(frame) - len(missed)} of {len(frame)} pass marks are met. {said}",
        table=_table(run, "marks", MARK_COLUMNS, frame),
        open_table=True,
    )


@section(CALIBRATION, table="design")
def design_section(run: Run) -> Section:
    """What a user's own pairs and grid would find."""
    frame = run.tables["design"]
    lines = run.summary.calibration.lines if run.summary.calibration else ()
    columns = columns_of(
        "design; question; n_templates; n_entities; n_matched_pairs: matched pairs; power; "
        "coverage: intervals that hold the truth; templates_needed: templates for 80%; "
        "pairs_needed: pairs for 80%; smallest_bias: smallest effect, nats"
    )
    return Section(
        "design",
        "Your own design",
        " ".join(map(str, lines)),
        table=_table(run, "design", columns, frame),
        open_table=True,
    )


@section(CALIBRATION, table="coverage")
def coverage_section(run: Run) -> Section:
    """Coverage of the intervals of drawn studies."""
    frame = run.tables["coverage"]
    columns = columns_of(
        "organism; question; truth: truth, nats; analytic: analytic, nats; coverage: intervals that hold it; "
        "ci_low; ci_high; n_studies: studies; n_templates; n_entities; mean_width: mean width, nats"
    )
    return Section(
        "coverage",
        "Do the intervals hold the truth?",
        f"Of the studies drawn from a whole grammar, {fmt.percent(frame['coverage'].min())} to "
        f"{fmt.percent(frame['coverage'].max())} have a 95% interval that holds the grammar's mean.",
        calibration_plots.coverage(frame, BAND),
        _table(run, "coverage", columns, frame),
        how_to_read="The band is what the pass mark allows; each line is the share's own 95% interval.",
    )


def power_sentence(frame: pd.DataFrame, power: float = 0.8) -> str:
    """Fewest templates and statement pairs at which the planted effect is found in this share of draws, and from there on."""
    said = []
    for question, words in (
        ("bias", "{} templates for the bias"),
        ("difference in differences", "{} for the difference in differences"),
        ("feature", "{} statement pairs for the planted feature"),
        ("trained", "{} for a trained SAE's"),
    ):
        rows = frame[(frame["question"] == question) & (frame["organism"] == "planted")]
        enough = _from_there_on(
            rows[rows["n_entities"].isna() | (rows["n_entities"] == rows["n_entities"].max())], power
        )
        if enough is not None:
            said.append(words.format(enough))
    if not said:
        return "Nothing was planted here: a design of any size should find nothing."
    return f"Of the sizes drawn, {fmt.percent(power)} of the designs find the planted effect from {', '.join(said)}."


def _from_there_on(rows: pd.DataFrame, power: float) -> int | None:
    """The smallest size from which every larger one has this power."""
    enough = None
    for size, share in sorted(zip(rows["n_units"], rows["share"]), reverse=True):
        if share < power:
            break
        enough = int(size)
    return enough


@section(CALIBRATION, table="power")
def power_section(run: Run) -> Section:
    """Power against the number of templates and statement pairs."""
    frame = run.tables["power"]
    columns = columns_of(
        "organism; question; n_units: templates or pairs; n_entities; share: share of draws; "
        "coverage: intervals that hold the truth; n_draws: draws"
    )
    return Section(
        "power",
        "How many templates does it take?",
        power_sentence(frame),
        calibration_plots.power(frame),
        _table(run, "power", columns, frame),
        how_to_read="Solid lines should be high and dotted ones low. A grid of fewer than 12 matched pairs can call nothing.",
    )


@section(CALIBRATION, table="trained_saes")
def trained_section(run: Run) -> Section:
    """Trained SAEs: is the most causal feature found, and do the ten best remove the bias?"""
    frame = run.tables["trained_saes"]
    top, removed = frame["first_place"] <= 3, frame["joint_report"] >= 0.6
    columns = columns_of(
        "organism_seed: seed; sae; fvu: unexplained; l0: L0; bias: bias, nats; "
        "ceiling: upper bound, last token; live: features that fire; called: called AI-speech; "
        "first_exact: most causal removes; first_place: its place; joint_report: ten best remove; "
        "joint_low: from; joint_high: to; rho: ρ; slope; n_matter: features compared"
    )
    return Section(
        "trained",
        "SAEs trained from further seeds",
        f"In {int(top.sum())} of {len(frame)} trained SAEs the most causal feature is among the first three by interaction; in "
        f"{int(removed.sum())} the ten best chosen on discover remove at least 60% of the bias on report.",
        table=_table(run, "trained_saes", columns, frame),
        open_table=True,
    )


@section(CALIBRATION, table="effects")
def effects_section(run: Run) -> Section:
    """Attribution against exact ablation over every trained SAE."""
    frame = run.tables["effects"]
    columns = columns_of(
        "organism_seed: seed; sae; feature; attributed; exact; interaction; "
        "interaction_place: place by interaction"
    )
    large = frame[frame[["attributed", "exact"]].abs().max(axis=1) > MATTERS]
    return Section(
        "effects",
        "Attribution against ablation",
        f"{len(large)} features move more than {fmt.percent(MATTERS)} of the bias, predicted or measured; one backward pass "
        f"predicts their order with ρ = {large['attributed'].corr(large['exact'], method='spearman'):.2f}.",
        calibration_plots.attributed_and_exact(frame, MATTERS),
        _table(run, "effects", columns, large.sort_values("exact", ascending=False)),
        how_to_read="On the dotted line the prediction is exact.",
    )


def _table(run: Run, name: str, columns: dict[str, str], frame: pd.DataFrame) -> Table:
    return table_of(frame, columns, source=f"{run.folder.name}/tables/{name}.parquet")
