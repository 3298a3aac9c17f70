"""The report's sections beside the published study: its figures, several models, and the choices it leaves open.

A published figure stands beside a measured one only where the named model was measured; elsewhere the row says "not re-measured
here". Runs of organisms and of stand-ins have no published column at all.
"""

from typing import Any

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.figures import published as figures
from sae_bias.report import words
from sae_bias.report.sections import PUBLISHED, Drawn, drawn
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import Effect

NOT_HERE = "not re-measured here"


@drawn(
    PUBLISHED, "models", "models", "The bias of every model",
    "model; form; status; published; bias; ci_low; ci_high; p_value; verdict; n_pairs; "
    "n_words: shared words; bias_own_words: bias, its own words; n_own_words: its own words; "
    "control_bias: mundane bias; difference_in_differences: beyond mundane; did_low: beyond mundane, from; did_high: beyond mundane, to; d_z; share_templates_positive; reason: remark",
    how="Read with the words that are single tokens in every model measured; the interval is two-way clustered.",
    opened=True, missing="–",
)  # fmt: skip
def models(run: Run, frame: pd.DataFrame) -> Drawn:
    """Every model of a replication."""
    n, all_ = frame.loc[frame["status"] != NOT_HERE, "model"].nunique(), frame["model"].nunique()
    said = f"{n} of {all_} models measured here."
    if run.stand_ins:
        said = f"{n} stand-ins with random weights ran in place of the models: this tests the plumbing, and no figure means anything."
    elif n < all_:
        said += f" For the others a published figure is shown as “published, {NOT_HERE}”."
    rows = frame.drop(columns=["published", "verdict"], errors="ignore") if run.organism else frame
    return Drawn(said, figures.models(rows, sides=run.sides), rows)


@drawn(
    PUBLISHED, "comparison", "published", "Beside the published figures", "name: figure; published; measured; ci_low; ci_high; verdict",
    how="Verdicts were fixed in advance: agrees, within the switches' range, same sign only, opposite.", missing=NOT_HERE,
)  # fmt: skip
def comparison(run: Run, frame: pd.DataFrame) -> Drawn:
    n = int(frame["measured"].notna().sum())
    said = f"{n} of {len(frame)} published figures were re-measured in this run; the others are marked “{NOT_HERE}”."
    return Drawn(said, figures.comparison(frame))


@drawn(
    PUBLISHED, "tuning", "tuning", "What instruction tuning changes",
    "tuned; pretrained; quantity; change; ci_low; ci_high; p_value; published; verdict", missing="–",
)  # fmt: skip
def tuning(run: Run, frame: pd.DataFrame) -> Drawn:
    """Instruction-tuned against pretrained models of one name."""
    rows: Any = frame[frame["quantity"] == "bias"].itertuples()
    said = [
        f"{r.tuned} against {r.pretrained}: {fmt.number(r.change)} nats ({fmt.interval(r)})" for r in rows
    ]
    takeaway = f"Change of the bias: {'; '.join(said)}. The scores and levels below show which side moved."
    return Drawn(takeaway, figures.tuning(frame))


SWITCHES = "model; switch; open: left open; bias; ci_low; ci_high; p_value; n_words: words; note"
HOW = "Every switch is off unless named; only those left open by the study count for a verdict's range."


@drawn(PUBLISHED, "switches", "switches", "How the open choices move the bias", SWITCHES, how=HOW)
@drawn(PUBLISHED, "switches_probe", "switches", "How the open choices move the bias", SWITCHES, how=HOW)
def probe_switches(run: Run, frame: pd.DataFrame) -> Drawn:
    """How each choice that the study leaves open moves the bias."""
    known = frame.loc[frame["open"].astype(bool), "bias"].dropna()
    said = "No switch gave a figure."
    if len(known):
        ends = f"between {fmt.number(known.min())} and {fmt.number(known.max())} nats"
        said = f"Over the choices that the published study leaves open the bias lies {ends}."
    return Drawn(said, figures.switches(frame, sides=run.sides))


@drawn(
    PUBLISHED, "switches_intervention", "switches-intervention", "How the open choices move the reduction",
    "switch; in_sample_strength: best strength, in-sample; in_sample_reduction: removed, in-sample; "
    "in_sample_low: from; in_sample_high: to; held_out_strength: best strength, held out; "
    "held_out_reduction: removed, held out; held_out_low: held out from; held_out_high: held out to; "
    "overshoot: overshoots; written_inactive: written where inactive",
    how="Strengths are in units of the feature's largest activation. In-sample: chosen and read on all pairs.",
)  # fmt: skip
def intervention_switches(run: Run, frame: pd.DataFrame) -> Drawn:
    """How each choice of the intervention moves the reduction, in-sample and held out side by side."""
    ours, most = (
        frame.iloc[0],
        frame.sort_values("in_sample_reduction", ascending=False, kind="stable").iloc[0],
    )
    said = (
        f"Ours ({ours['switch']}): {fmt.percent(ours['held_out_reduction'])} on templates held out. The largest figure that an"
        f" open choice gives is {fmt.percent(most['in_sample_reduction'])} in-sample ({most['switch']}), "
        f"{fmt.percent(most['held_out_reduction'])} held out."
    )
    return Drawn(said, figures.intervention_switches(frame))


def model_rows(run: Run) -> list[tuple[str, str]]:
    """A sentence a model for the top of a replication's report."""
    if "models" not in run.tables:
        return []
    frame, rows = run.tables["models"], []
    for r in frame[frame["form"] == "plain"].to_dict("records"):
        known = r.get("published")
        published = f"Published: {fmt.number(known)}" if fmt.is_number(known) and not run.organism else ""
        if r["status"] == NOT_HERE:
            said = f"{published}, {NOT_HERE}." if published else f"Not measured: {r['reason']}"
        else:
            measured = Effect(mean=r["bias"], ci_low=r["ci_low"], ci_high=r["ci_high"], p_value=r["p_value"])
            said = words.bias_sentence(measured, run.sides)
            said += f" {published}; verdict: {r['verdict']}." if published else ""
        rows.append((r["model"], said))
    return rows
