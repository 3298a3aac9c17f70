"""The report's sections about turning the feature down: strengths, costs, controls, other biases, other methods."""

from typing import Any

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.figures import sweep as sweep_figures
from sae_bias.report import words
from sae_bias.report.parts import Section, run_table
from sae_bias.report.sections import SUPPRESSED, section
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import StrengthFigure


@section(SUPPRESSED, table="sweep")
def sweep_section(run: Run) -> Section:
    best, cut = run.summary.best_strength, run.summary.reduction
    takeaway = (
        words.reduction_sentence(cut) if cut else "How the bias moves with the strength of the intervention."
    )
    if best is not None and best.in_sample.facts() and best.held_out.facts():
        takeaway += (
            f" Best on the tune split: {_best(best.in_sample)}, removing"
            f" {fmt.percent(best.in_sample.reduction)} there and {fmt.percent(best.held_out.reduction)}"
            f" on templates held out{_beyond(run, best.in_sample.strength)}."
        )
    columns = {
        "intervention": "intervention",
        "strength": "strength",
        "kind": "kind",
        "split": "split",
        "positions": "positions",
        "n_pairs": "pairs",
        "bias": "bias",
        "ci_low": "from",
        "ci_high": "to",
        "reduction": "removed",
        "mean_abs_change": "mean |change|",
        "kl_neutral": "KL neutral",
        "kl_ai_nonspeech": "KL AI, no speech",
        "kl_ai_speech": "KL AI speech",
        "outside_observed": "outside observed",
        "label": "what",
    }
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
    rows = pd.DataFrame([{"text": fmt.TEXT_KINDS.get(k, k), **c.facts()} for k, c in costs.items()])
    table = (
        run_table(
            run,
            "sweep",
            {"text": "text", "kl_mean": "mean KL", "kl_p95": "95th percentile", "fired": "feature fired on"},
            rows,
        )
        if len(rows)
        else None
    )
    takeaway = f"{words.cost_sentence(costs)} An intervention is better the further up and left it stands."
    return Section("cost", "What it costs", takeaway, sweep_figures.frontier(run.tables["sweep"]), table)


@section(SUPPRESSED, table="controls")
def controls_section(run: Run) -> Section:
    part, cut = run.summary.controls, run.summary.reduction
    figure = sweep_figures.controls_histogram(
        run.tables["controls"], cut.estimate if cut else None, part.percentile95 if part else None
    )
    table = run_table(run, "controls", {"control": "control", "kind": "kind", "reduction": "removed"})
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
    columns = {
        "question": "question", "sides": "bias of", "n_pairs": "pairs", "before": "before", "before_low": "from", "before_high": "to",
        "after": "after", "change": "change", "change_low": "change from", "change_high": "change to", "mean_abs_change": "mean |change|",
        "wrong_way_share": "moved further from 0", "moved_share": "moved at all", "reason": "why not asked",
    }  # fmt: skip
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
    levels = [str(c) for c in frame if str(c).startswith("kl_")]
    rows = frame.copy()
    for level in levels:
        reached = rows["reached_" + level.removeprefix("kl_")].astype(bool)
        rows[level] = [fmt.percent(v) + ("" if r else " *") for v, r in zip(rows[level], reached)]
    middle = levels[len(levels) // 2]
    best = frame.sort_values(middle, ascending=False).iloc[0]
    own = frame.loc[frame["method"] == "feature", middle]
    lead = "the feature" if best["method"] == "feature" else best["method"]
    takeaway = (
        f"At {middle.removeprefix('kl_')} nats a token, {lead} removes most: {fmt.percent(best[middle])}"
    )
    if len(own) and best["method"] != "feature":
        takeaway += f"; the feature removes {fmt.percent(own.iloc[0])}"
    columns = {"method": "method"} | {level: f"at KL {level.removeprefix('kl_')}" for level in levels}
    curves = run.tables.get("compare_curves")
    return Section(
        "methods",
        "Other methods at the same cost",
        f"{takeaway}.",
        None if curves is None else sweep_figures.methods_at_cost(curves),
        run_table(run, "compare", columns, rows),
        open_table=True,
        how_to_read="Share of the bias removed; * the method never reached this KL, so its most stands there.",
    )


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
