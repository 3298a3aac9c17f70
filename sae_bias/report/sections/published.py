"""The report's sections beside the published study: its figures, several models, and the choices it leaves open.

A published figure stands beside a measured one only where the named model was measured; elsewhere the row says "not re-measured
here". Runs of organisms and of stand-ins have no published column at all.
"""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.figures import published as published_figures
from sae_bias.report import words
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import PUBLISHED, section
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import Effect

NOT_HERE = "not re-measured here"


@section(PUBLISHED, table="models")
def models_section(run: Run) -> Section:
    """Every model of a replication."""
    frame = run.tables["models"]
    measured = frame[frame["status"] != NOT_HERE]
    n, all_ = measured["model"].nunique(), frame["model"].nunique()
    if run.stand_ins:
        takeaway = f"{n} stand-ins with random weights ran in place of the models: this tests the plumbing, and no figure means anything."
    else:
        takeaway = f"{n} of {all_} models measured here." + (
            f" For the others a published figure is shown as “published, {NOT_HERE}”." if n < all_ else ""
        )
    rows = frame.drop(columns=["published", "verdict"], errors="ignore") if run.organism else frame
    columns = columns_of(
        "model; form; status; published; bias; ci_low; ci_high; p_value; verdict; n_pairs; "
        "n_words: shared words; bias_own_words: bias, its own words; n_own_words: its own words; "
        "control_bias: mundane bias; difference_in_differences: beyond mundane; did_low: beyond mundane, from; did_high: beyond mundane, to; d_z; "
        "share_templates_positive; reason: remark"
    )
    return Section(
        "models",
        "The bias of every model",
        takeaway,
        published_figures.models(rows, sides=run.sides),
        run_table(run, "models", columns, rows, missing="–"),
        open_table=True,
        how_to_read="Read with the words that are single tokens in every model measured; the interval is two-way clustered.",
    )


@section(PUBLISHED, table="comparison")
def comparison_section(run: Run) -> Section:
    frame = run.tables["comparison"]
    measured = int(frame["measured"].notna().sum())
    takeaway = (
        f"{measured} of {len(frame)} published figures were re-measured in this run; the others are marked"
        f" “{NOT_HERE}”."
    )
    columns = columns_of("name: figure; published; measured; ci_low; ci_high; verdict")
    return Section(
        "published",
        "Beside the published figures",
        takeaway,
        published_figures.comparison(frame),
        run_table(run, "comparison", columns, missing=NOT_HERE),
        how_to_read="Verdicts were fixed in advance: agrees, within the switches' range, same sign only, opposite.",
    )


@section(PUBLISHED, table="tuning")
def tuning_section(run: Run) -> Section:
    """Instruction-tuned against pretrained models of one name."""
    frame = run.tables["tuning"]
    bias = frame[frame["quantity"] == "bias"].to_dict("records")
    said = [
        f"{r['tuned']} against {r['pretrained']}: {fmt.number(r['change'])} nats ({fmt.interval(Effect(ci_low=r['ci_low'], ci_high=r['ci_high']))})"
        for r in bias
    ]
    columns = columns_of("tuned; pretrained; quantity; change; ci_low; ci_high; p_value; published; verdict")
    return Section(
        "tuning",
        "What instruction tuning changes",
        f"Change of the bias: {'; '.join(said)}. The scores and levels below show which side moved.",
        published_figures.tuning(frame),
        run_table(run, "tuning", columns, missing="–"),
    )


@section(PUBLISHED, table="switches")
@section(PUBLISHED, table="switches_probe")
def probe_switches_section(run: Run) -> Section:
    """How each choice that the study leaves open moves the bias."""
    name = "switches_probe" if "switches_probe" in run.tables else "switches"
    frame = run.tables[name]
    known = frame.loc[frame["open"].astype(bool), "bias"].dropna()
    takeaway = (
        f"Over the choices that the published study leaves open the bias lies between {fmt.number(known.min())} and"
        f" {fmt.number(known.max())} nats."
        if len(known)
        else "No switch gave a figure."
    )
    columns = columns_of(
        "model; switch; open: left open; bias; ci_low; ci_high; p_value; n_words: words; note"
    )
    return Section(
        "switches",
        "How the open choices move the bias",
        takeaway,
        published_figures.switches(frame, sides=run.sides),
        run_table(run, name, columns),
        how_to_read="Every switch is off unless named; only those left open by the study count for a verdict's range.",
    )


@section(PUBLISHED, table="switches_intervention")
def intervention_switches_section(run: Run) -> Section:
    """How each choice of the intervention moves the reduction, in-sample and held out side by side."""
    frame = run.tables["switches_intervention"]
    ours = frame.iloc[0]
    most = frame.sort_values("in_sample_reduction", ascending=False, kind="stable").iloc[0]
    takeaway = (
        f"Ours ({ours['switch']}): {fmt.percent(ours['held_out_reduction'])} on templates held out. The largest figure that an"
        f" open choice gives is {fmt.percent(most['in_sample_reduction'])} in-sample ({most['switch']}), "
        f"{fmt.percent(most['held_out_reduction'])} held out."
    )
    columns = columns_of(
        "switch; in_sample_strength: best strength, in-sample; in_sample_reduction: removed, in-sample; "
        "in_sample_low: from; in_sample_high: to; held_out_strength: best strength, held out; "
        "held_out_reduction: removed, held out; held_out_low: held out from; held_out_high: held out to; "
        "overshoot: overshoots; written_inactive: written where inactive"
    )
    return Section(
        "switches-intervention",
        "How the open choices move the reduction",
        takeaway,
        published_figures.intervention_switches(frame),
        run_table(run, "switches_intervention", columns),
        how_to_read="Strengths are in units of the feature's largest activation. In-sample: chosen and read on all pairs.",
    )


def model_rows(run: Run) -> list[tuple[str, str]]:
    """A sentence a model for the top of a replication's report."""
    if "models" not in run.tables:
        return []
    frame: pd.DataFrame = run.tables["models"]
    first, second = run.sides
    rows = []
    for r in frame[frame["form"] == "plain"].to_dict("records"):
        known = r.get("published")
        published = f" Published: {fmt.number(known)}" if fmt.is_number(known) and not run.organism else ""
        if r["status"] == NOT_HERE:
            rows.append(
                (
                    r["model"],
                    f"{published.strip()}, {NOT_HERE}." if published else f"Not measured: {r['reason']}",
                )
            )
            continue
        measured = Effect(mean=r["bias"], ci_low=r["ci_low"], ci_high=r["ci_high"], p_value=r["p_value"])
        sentence = words.bias_sentence(measured, (first, second))
        said = f" {published.strip()}; verdict: {r['verdict']}." if published else ""
        rows.append((r["model"], sentence + said))
    return rows
