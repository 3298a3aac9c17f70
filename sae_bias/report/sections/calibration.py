"""The report's calibration sections: the pass marks, coverage, power, trained SAEs, attribution, and a user's own design."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.figures import calibration as figures
from sae_bias.report.sections import CALIBRATION, Drawn, drawn
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import CalibrationFigure

BAND, MATTERS = (0.93, 0.98), 0.005
EDIT_NAMES = {"scales": "learned scales", "gated": "gated counterfactual"}


def findings(part: CalibrationFigure | None) -> list[tuple[str, str]]:
    """The summary's sentences, from its block `calibration`; none for a run that is not a calibration."""
    if part is None:
        return []
    said = [("Marks", f"{part.n_marks - len(part.missed)} of {part.n_marks} pass marks are met.")]
    return said + ([("Missed", f"{'; '.join(part.missed)}.")] if part.missed else [])


@drawn(
    CALIBRATION, "marks", "marks", "The pass marks", "mark; organism; required; measured; verdict; n: over; note", opened=True
)  # fmt: skip
def marks(run: Run, frame: pd.DataFrame) -> Drawn:
    missed = frame[frame["verdict"] != "met"]
    said = "All are met." if missed.empty else f"Missed: {'; '.join(map(str, missed['mark']))}."
    return Drawn(f"{len(frame) - len(missed)} of {len(frame)} pass marks are met. {said}")


@drawn(
    CALIBRATION, "design", "design", "Your own design",
    "design; question; n_templates; n_entities; n_matched_pairs: matched pairs; power; coverage: intervals that hold the truth; "
    "templates_needed: templates for 80%; pairs_needed: pairs for 80%; smallest_bias: smallest effect, nats",
    opened=True,
)  # fmt: skip
def design(run: Run, frame: pd.DataFrame) -> Drawn:
    """What a user's own pairs and grid would find."""
    return Drawn(" ".join(run.summary.calibration.lines if run.summary.calibration else ()))


@drawn(
    CALIBRATION, "coverage", "coverage", "Do the intervals hold the truth?",
    "organism; question; truth: truth, nats; analytic: analytic, nats; coverage: intervals that hold it; "
    "ci_low; ci_high; n_studies: studies; n_templates; n_entities; mean_width: mean width, nats",
    how="The band is what the pass mark allows; each line is the share's own 95% interval.",
)  # fmt: skip
def coverage(run: Run, frame: pd.DataFrame) -> Drawn:
    """Coverage of the intervals of drawn studies."""
    low, high = (fmt.percent(v) for v in (frame["coverage"].min(), frame["coverage"].max()))
    said = f"Of the studies drawn from a whole grammar, {low} to {high} have a 95% interval that holds the grammar's mean."
    return Drawn(said, figures.coverage(frame, BAND))


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
        rows = rows[rows["n_entities"].isna() | (rows["n_entities"] == rows["n_entities"].max())]
        enough = None  # the smallest size from which every larger one has this power
        for size, share in sorted(zip(rows["n_units"], rows["share"]), reverse=True):
            if share < power:
                break
            enough = int(size)
        said += [] if enough is None else [words.format(enough)]
    if not said:
        return "Nothing was planted here: a design of any size should find nothing."
    return f"Of the sizes drawn, {fmt.percent(power)} of the designs find the planted effect from {', '.join(said)}."


@drawn(
    CALIBRATION, "power", "power", "How many templates does it take?",
    "organism; question; n_units: templates or pairs; n_entities; share: share of draws; "
    "coverage: intervals that hold the truth; n_draws: draws",
    how="Solid lines should be high and dotted ones low. A grid of fewer than 12 matched pairs can call nothing.",
)  # fmt: skip
def power(run: Run, frame: pd.DataFrame) -> Drawn:
    """Power against the number of templates and statement pairs."""
    return Drawn(power_sentence(frame), figures.power(frame))


@drawn(
    CALIBRATION, "learned", "learned", "Learned edits, and the same fit in randomized SAEs",
    "organism; sae; weights; kind: edit; n_features: features; specific: specific reduction; spec_low: from; spec_high: to; beta; "
    "human_moved: human moved, nats; kl_off: KL_off",
)  # fmt: skip
def learned(run: Run, frame: pd.DataFrame) -> Drawn:
    """Edits fitted in each bundled SAE, read on report templates and the half of the valence banks that the fit never saw."""
    medians = frame.groupby(["kind", "weights"])["specific"].median()
    said = "; ".join(
        f"{name}: {', '.join(f'{fmt.percent(medians[kind, w])} in {w} SAEs' for w in ('trained', 'randomized') if (kind, w) in medians)}"
        for kind, name in EDIT_NAMES.items()
        if kind in medians
    )
    return Drawn(
        f"Median specific reduction of the bias. {said}. A fit that is as specific in a randomized SAE says nothing about the features. The"
        " marks of learned edits are of 21 SAEs, so these few are not counted among the marks.",
        rows=frame.replace({"kind": EDIT_NAMES}),
    )


@drawn(
    CALIBRATION, "trained_saes", "trained", "SAEs trained from further seeds",
    "organism_seed: seed; sae; fvu: unexplained; l0: L0; bias: bias, nats; "
    "ceiling: upper bound, last token; live: features that fire; called: called AI-speech; "
    "first_exact: most causal removes; first_place: its place; joint_report: ten best remove; "
    "joint_low: from; joint_high: to; rho: ρ; slope; n_matter: features compared",
    opened=True,
)  # fmt: skip
def trained(run: Run, frame: pd.DataFrame) -> Drawn:
    """Trained SAEs: is the most causal feature found, and do the ten best remove the bias?"""
    top, removed = (frame["first_place"] <= 3).sum(), (frame["joint_report"] >= 0.6).sum()
    return Drawn(
        f"In {top} of {len(frame)} trained SAEs the most causal feature is among the first three by interaction; in "
        f"{removed} the ten best chosen on discover remove at least 60% of the bias on report."
    )


@drawn(
    CALIBRATION, "effects", "effects", "Attribution against ablation",
    "organism_seed: seed; sae; feature; attributed; exact; interaction; interaction_place: place by interaction",
    how="On the dotted line the prediction is exact.",
)  # fmt: skip
def effects(run: Run, frame: pd.DataFrame) -> Drawn:
    """Attribution against exact ablation over every trained SAE."""
    large = frame[frame[["attributed", "exact"]].abs().max(axis=1) > MATTERS]
    said = (
        f"{len(large)} features move more than {fmt.percent(MATTERS)} of the bias, predicted or measured; one backward pass "
        f"predicts their order with ρ = {large['attributed'].corr(large['exact'], method='spearman'):.2f}."
    )
    return Drawn(
        said, figures.attributed_and_exact(frame, MATTERS), large.sort_values("exact", ascending=False)
    )
