"""The report's sections about turning the feature down: strengths, costs, controls, other biases, other methods."""

import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.figures import sweep as figures
from sae_bias.report import words
from sae_bias.report.sections import SUPPRESSED, Drawn, drawn
from sae_bias.runs.effect_lines import cost_note
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import BestStrength


@drawn(
    SUPPRESSED, "sweep", "sweep", "Turning the feature down",
    "intervention; strength; kind; split; positions; n_pairs; bias; ci_low; ci_high; removed_nats; "
    "did_removed_nats: of the difference to mundane; reduction; specific_reduction; beta; "
    "human_shift; ai_shift; mean_abs_change; kl_neutral: KL neutral; "
    "kl_ai_nonspeech: KL AI, no speech; kl_ai_speech: KL AI speech; kl_valence: KL human deeds; "
    "kl_off: KL_off; kl_off_p95: KL_off, 95th percentile; outside_observed; label: what",
    how="Solid: templates held out, with their 95% interval. Dotted: the templates on which a strength may be chosen.",
)  # fmt: skip
def sweep(run: Run, frame: pd.DataFrame) -> Drawn:
    best, cut = run.summary.best_strength, run.summary.reduction
    said = (
        words.reduction_sentence(cut) if cut else "How the bias moves with the strength of the intervention."
    )
    return Drawn(said + (_best(best, frame) if best else ""), figures.sweep_curve(frame))


def _best(best: BestStrength, frame: pd.DataFrame) -> str:
    """The best cell by its strength, or by its name where it has none; and whether the feature was ever seen so strong."""
    if best.undefined:
        return f" No strength is called best: {best.undefined}."
    inside, held = best.in_sample, best.held_out
    if not (inside.facts() and held.facts()):
        return ""
    key = "reduction" if held.specific_reduction is None else "specific_reduction"
    what = "removing" if key == "reduction" else "a specific reduction of"
    there, here = (fmt.percent(getattr(part, key)) for part in (inside, held))
    named, beyond = str(inside.label), ""
    if fmt.is_number(inside.strength):
        named = f"strength {fmt.number(inside.strength)}"
        cells = frame[(frame["kind"] == "candidate") & (frame["strength"] == inside.strength)]
        if "outside_observed" in cells and cells["outside_observed"].fillna(False).astype(bool).any():
            beyond = "; this strength lies outside the activations observed"
    return f" Best on the tune split: {named}, {what} {there} there and {here} on templates held out{beyond}."


@drawn(
    SUPPRESSED, "sweep", "cost", "What it costs", "text; kl_mean: mean KL; kl_p95: 95th percentile; fired: feature fired on"
)  # fmt: skip
def frontier(run: Run, frame: pd.DataFrame) -> Drawn:
    costs = run.summary.costs or {}
    rows = pd.DataFrame([{"text": fmt.COST_KINDS.get(k, k), **c.facts()} for k, c in costs.items()])
    said = f"{words.cost_sentence(costs)} An intervention is better the further up and left it stands."
    return Drawn(said + _noted(frame), figures.frontier(frame), rows)


def _noted(cells: pd.DataFrame) -> str:
    note = cost_note(cells)
    return f" Note: {note}." if note else ""


@drawn(
    SUPPRESSED, "controls", "controls", "Would any feature have done it?",
    "control; kind; removed_nats; reduction; specific_reduction; beta",
)  # fmt: skip
def controls(run: Run, frame: pd.DataFrame) -> Drawn:
    part, cut = run.summary.controls, run.summary.reduction
    value, percentile, statistic = (cut.estimate if cut else None), None, "reduction"
    if part is not None and (part.statistic or "reduction") in frame:
        statistic, percentile = part.statistic or "reduction", part.percentile95
        value = value if statistic == "reduction" else part.value
    figure = figures.controls_histogram(frame, value, percentile, column=statistic)
    return Drawn(words.control_sentence(part), figure)


@drawn(
    SUPPRESSED, "specificity", "other-biases", "Do other biases move?",
    "question; sides: bias of; n_pairs; before; before_low: from; before_high: to; after; change; "
    "change_low; change_high; mean_abs_change; margin; p_equivalent: p of no change; "
    "equivalent: within the margin; wrong_way_share: moved further from 0; moved_share: moved at all; reason: why not asked",
    how="Bias of each question, the first side less the second, with its 95% interval before the edit.",
)  # fmt: skip
def specificity(run: Run, frame: pd.DataFrame) -> Drawn:
    """Biases that should not move."""
    known = frame.dropna(subset=["before"])
    moves = "; ".join(
        f"{str(r.sides).replace(' - ', ' − ')} {fmt.number(r.before)} → {fmt.number(r.after)}" for r in known.itertuples()
    )  # fmt: skip
    said = f"They should not: {moves or 'none was measured'} (nats, before → after)."
    if len(known) < len(frame):
        said += f" {len(frame) - len(known)} could not be asked (reasons in the table)."
    rows = frame.assign(question=frame["question"].str.replace("_", " "))
    return Drawn(said, figures.specificity(frame), rows)


@drawn(SUPPRESSED, "compare", "methods", "Other methods at the same cost", "method", opened=True)
def methods(run: Run, frame: pd.DataFrame) -> Drawn:
    """The feature against its baselines at equal cost."""
    levels = [c.removeprefix("reached_") for c in map(str, frame) if c.startswith("reached_")]
    at = "at" if f"at_{levels[0]}" in frame else "kl"  # kl: runs of an older sae-bias
    rows, columns = frame.copy(), {}
    for level in levels:
        columns[f"{at}_{level}"] = f"at {'cost' if at == 'at' else 'KL'} {level}"
        rows[f"{at}_{level}"] = [
            fmt.percent(r[f"{at}_{level}"])
            + (f" ({fmt.percent(r[f'low_{level}'])} to {fmt.percent(r[f'high_{level}'])})" if f"low_{level}" in r else "")
            + ("" if r[f"reached_{level}"] else " *")
            for r in frame.to_dict("records")
        ]  # fmt: skip
    columns |= {
        "share": "tuned share", "removed_nats": "nats removed", "specific_reduction": "specific", "beta": "β",
        "human_shift": "human moved", "ai_shift": "AI moved", "undefined": "why no strength",
    }  # fmt: skip
    curves = run.tables.get("compare_curves")
    if curves is not None and "split" in curves:
        curves = curves[curves["split"] == curves["split"].iloc[-1]]
    figure, middle = None if curves is None else figures.methods_at_cost(curves), levels[len(levels) // 2]
    how = (
        f"Share of the {frame['of'].iloc[0] if 'of' in frame else 'bias'} removed on templates held out, the strength chosen on others."
        " Cost: the worst KL in nats a token, or 1 − β where that is more. * not reached: no strength of the method costs so much, so its best below stands there."
    )
    said = _leader(frame, f"{at}_{middle}", middle) + ("" if curves is None else _noted(curves))
    return Drawn(said, figure, rows, columns, how)


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


@drawn(
    SUPPRESSED, "examples", "examples", "Example pairs, before and after",
    "human: {0} prompt; ai: {1} prompt; before_human: {0}, before; before_ai: {1}, before; after_human: {0}, after; "
    "after_ai: {1}, after; bias_before; bias_after",
)  # fmt: skip
def examples(run: Run, frame: pd.DataFrame) -> Drawn:
    nearer = int((frame["bias_after"].abs() < frame["bias_before"].abs()).sum())
    said = f"In {nearer} of {len(frame)} example pairs the bias is nearer to 0 after the intervention."
    return Drawn(said, figures.before_after(frame, sides=run.sides))
