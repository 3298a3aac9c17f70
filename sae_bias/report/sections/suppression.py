"""The report's sections about turning the feature down: strengths, costs, controls, other biases, other methods."""

from typing import Any

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.figures import sweep as sweep_figures
from sae_bias.report import words
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import SUPPRESSED, section
from sae_bias.runs.effect_lines import cost_note
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import StrengthFigure


@section(SUPPRESSED, table="sweep")
def sweep_section(run: Run) -> Section:
    best, cut = run.summary.best_strength, run.summary.reduction
    takeaway = (
        words.reduction_sentence(cut) if cut else "How the bias moves with the strength of the intervention."
    )
    if best is not None and best.undefined:
        takeaway += f" No strength is called best: {best.undefined}."
    elif best is not None and best.in_sample.facts() and best.held_out.facts():
        key = "reduction" if best.held_out.specific_reduction is None else "specific_reduction"
        what = "removing" if key == "reduction" else "a specific reduction of"
        takeaway += (
            f" Best on the tune split: {_best(best.in_sample)}, {what}"
            f" {fmt.percent(getattr(best.in_sample, key))} there and {fmt.percent(getattr(best.held_out, key))}"
            f" on templates held out{_beyond(run, best.in_sample.strength)}."
        )
    columns = columns_of(
        "intervention; strength; kind; split; positions; n_pairs; bias; ci_low; ci_high; removed_nats; "
        "did_removed_nats: of the difference to mundane; reduction; specific_reduction; beta; "
        "human_shift; ai_shift; mean_abs_change; kl_neutral: KL neutral; "
        "kl_ai_nonspeech: KL AI, no speech; kl_ai_speech: KL AI speech; kl_valence: KL human deeds; "
        "kl_off: KL_off; kl_off_p95: KL_off, 95th percentile; outside_observed; label: what"
    )
    how = (
        "Solid: templates held out, with their 95% interval. Dotted: the templates on which a strength may be"
        " chosen."
    )
    return Section(
        "sweep",
        "Turning the feature down",
        takeaway,
        sweep_figures.sweep_curve(run.tables["sweep"]),
        run_table(run, "sweep", columns),
        how_to_read=how,
    )


def _best(inside: StrengthFigure) -> str:
    """The best cell by its strength, or by its name where it has none."""
    return f"strength {fmt.number(inside.strength)}" if fmt.is_number(inside.strength) else str(inside.label)


def _beyond(run: Run, strength: Any) -> str:
    """Says so where the best strength lies outside the activations that the feature ever took."""
    frame = run.tables["sweep"]
    if "outside_observed" not in frame or not fmt.is_number(strength):
        return ""
    cells = frame[(frame["kind"] == "candidate") & (frame["strength"] == strength)]
    return (
        "; this strength lies outside the activations observed"
        if cells["outside_observed"].fillna(False).astype(bool).any()
        else ""
    )


@section(SUPPRESSED, table="sweep")
def frontier_section(run: Run) -> Section:
    costs = run.summary.costs or {}
    rows = pd.DataFrame([{"text": fmt.COST_KINDS.get(k, k), **c.facts()} for k, c in costs.items()])
    table = (
        run_table(
            run,
            "sweep",
            columns_of("text; kl_mean: mean KL; kl_p95: 95th percentile; fired: feature fired on"),
            rows,
        )
        if len(rows)
        else None
    )
    takeaway = f"{words.cost_sentence(costs)} An intervention is better the further up and left it stands."
    if note := cost_note(run.tables["sweep"]):
        takeaway += f" Note: {note}."
    return Section("cost", "What it costs", takeaway, sweep_figures.frontier(run.tables["sweep"]), table)


@section(SUPPRESSED, table="controls")
def controls_section(run: Run) -> Section:
    part, cut, controls = run.summary.controls, run.summary.reduction, run.tables["controls"]
    statistic = "reduction" if part is None or part.statistic is None else part.statistic
    if part is None or statistic not in controls:
        value, percentile, statistic = (cut.estimate if cut else None), None, "reduction"
    else:
        value = (cut.estimate if cut else None) if statistic == "reduction" else part.value
        percentile = part.percentile95
    figure = sweep_figures.controls_histogram(controls, value, percentile, column=statistic)
    columns = columns_of("control; kind; removed_nats; reduction")
    table = run_table(run, "controls", columns | {"specific_reduction": "specific", "beta": "β"})
    return Section("controls", "Would any feature have done it?", words.control_sentence(part), figure, table)


@section(SUPPRESSED, table="specificity")
def specificity_section(run: Run) -> Section:
    """Biases that should not move."""
    frame = run.tables["specificity"]
    known = frame.dropna(subset=["before"])
    said = [
        f"{s.replace(' - ', ' − ')} {fmt.number(b)} → {fmt.number(a)}"
        for s, b, a in zip(known["sides"], known["before"], known["after"])
    ]
    silent = (
        f" {len(frame) - len(known)} could not be asked (reasons in the table)."
        if len(known) < len(frame)
        else ""
    )
    columns = columns_of(
        "question; sides: bias of; n_pairs; before; before_low: from; before_high: to; after; change; "
        "change_low; change_high; mean_abs_change; margin; p_equivalent: p of no change; "
        "equivalent: within the margin; wrong_way_share: moved further from 0; moved_share: moved at all; "
        "reason: why not asked"
    )
    names = {"question": {q: q.replace("_", " ") for q in frame["question"]}}
    return Section(
        "other-biases",
        "Do other biases move?",
        f"They should not: {'; '.join(said) or 'none was measured'} (nats, before → after).{silent}",
        sweep_figures.specificity(frame),
        run_table(run, "specificity", columns, frame.replace(names)),
        how_to_read="Bias of each question, the first side less the second, with its 95% interval before the edit.",
    )


@section(SUPPRESSED, table="compare")
def methods_section(run: Run) -> Section:
    """The feature against its baselines at equal cost."""
    frame = run.tables["compare"]
    levels = [c.removeprefix("reached_") for c in map(str, frame) if c.startswith("reached_")]
    at = "at" if f"at_{levels[0]}" in frame else "kl"  # kl: runs of an older sae-bias
    rows = frame.copy()
    for level in levels:
        reached = rows[f"reached_{level}"].astype(bool)
        ends = (
            [f" ({fmt.percent(low)} to {fmt.percent(high)})" for low, high in zip(rows[f"low_{level}"], rows[f"high_{level}"])]
            if f"low_{level}" in rows
            else [""] * len(rows)
        )  # fmt: skip
        rows[f"{at}_{level}"] = [
            fmt.percent(v) + end + ("" if r else " *")
            for v, end, r in zip(frame[f"{at}_{level}"], ends, reached)
        ]
    columns = {"method": "method"} | {
        f"{at}_{level}": f"at {'cost' if at == 'at' else 'KL'} {level}" for level in levels
    }
    columns |= {
        "share": "tuned share", "removed_nats": "nats removed", "specific_reduction": "specific", "beta": "β",
        "human_shift": "human moved", "ai_shift": "AI moved", "undefined": "why no strength",
    }  # fmt: skip
    curves = run.tables.get("compare_curves")
    if curves is not None and "split" in curves:
        curves = curves[curves["split"] == curves["split"].iloc[-1]]
    said = _leader(frame, f"{at}_{levels[len(levels) // 2]}", levels[len(levels) // 2])
    if curves is not None and (note := cost_note(curves)):
        said += f" Note: {note}."
    return Section(
        "methods",
        "Other methods at the same cost",
        said,
        None if curves is None else sweep_figures.methods_at_cost(curves),
        run_table(run, "compare", {k: v for k, v in columns.items() if k in rows}, rows),
        open_table=True,
        how_to_read=(
            f"Share of the {frame['of'].iloc[0] if 'of' in frame else 'bias'} removed on templates held out, the strength chosen on others."
            " Cost: the worst KL in nats a token, or 1 − β where that is more. * not reached: no strength of the method costs so much, so its best below stands there."
        ),
    )


def _leader(frame: pd.DataFrame, column: str, level: str) -> str:
    """Which method removes most at the middle cost, and what the feature removes there."""
    known = frame.dropna(subset=[column])
    if known.empty:
        return "Shares are undefined: the unsteered figure is not distinguishable from 0."
    best, own = known.iloc[int(known[column].to_numpy().argmax())], known[known["kind"] == "candidate"]
    said = f"At a cost of {level}, {best['method']} removes most: {fmt.percent(best[column])}"
    if len(own) and best["kind"] != "candidate":
        said += f"; the feature removes {fmt.percent(own[column].max())}"
    return f"{said}."


@section(SUPPRESSED, table="examples")
def examples_section(run: Run) -> Section:
    frame = run.tables["examples"]
    nearer = int((frame["bias_after"].abs() < frame["bias_before"].abs()).sum())
    first, second = run.sides
    columns = {
        "human": f"{first} prompt",
        "ai": f"{second} prompt",
        "before_human": f"{first}, before",
        "before_ai": f"{second}, before",
        "after_human": f"{first}, after",
        "after_ai": f"{second}, after",
        "bias_before": "bias before",
        "bias_after": "bias after",
    }
    takeaway = f"In {nearer} of {len(frame)} example pairs the bias is nearer to 0 after the intervention."
    return Section(
        "examples",
        "Example pairs, before and after",
        takeaway,
        sweep_figures.before_after(frame, sides=run.sides),
        run_table(run, "examples", columns),
    )
