"""A run in a few plain lines for the terminal: the probe's figures, then what the edit did: nats first, shares where they are defined."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sae_bias.core.text import COST_KINDS, bracket, is_number, number, p_text, percent, signed
from sae_bias.runs.summary import (
    BestStrength,
    ControlsFigure,
    DidFigure,
    Effect,
    Mismatch,
    ReductionFigure,
    SpecificFigure,
    StrengthFigure,
    Summary,
)


def headline(summary: Summary) -> list[str]:
    """What the terminal says of a run."""
    lines, feature = _probe_lines(summary), summary.feature
    if feature is not None and not feature.id:
        lines.append(f"no feature is called AI-speech: {feature.why}")
    elif feature is not None:
        lines += [f"feature {feature.id}: {feature.why}", *_suppressed(summary)]
    return lines


def _probe_lines(summary: Summary) -> list[str]:
    """The primary figure first; beside it the bias, the mundane control, random words and the words' probability mass."""
    bias, difference, control = summary.bias, summary.difference_in_differences, summary.control_bias
    if bias is None:
        return []
    worse = (summary.sides or ("human", "AI"))[1]
    lines = [f"bias {_effect(bias)}" + ("" if difference else f" (positive: {worse} judged worse)")]
    if difference is not None:
        said = f"(positive: {worse} judged worse, beyond mundane content)"
        lines.insert(0, f"difference in differences {_effect(difference)} {said}")
    if control is not None:
        ends = bracket(control.ci_low, control.ci_high)
        lines.append(f"the same pairs with mundane content: {signed(control.mean)} nats {ends}")
    if (null := summary.random_words) is not None and null.n:
        within = f"95% of lists within ±{number(null.within)}; {p_text(null.p_value)}"
        lines.append(f"random words in place of the evaluation words: {within}")
    if (mass := summary.mass) is not None and mass.says:
        warning = "WARNING: under 1% of the probability: " if mass.little else ""
        lines.append(f"{warning}{mass.says}")
    if (curve := summary.multiverse) is not None and curve.n:
        lines.append(
            f"{curve.n} specifications: median {signed(curve.median)}, {percent(curve.same_sign)} with the headline's sign,"
            f" {percent(curve.outside_null)} beyond 95% of random word lists"
        )
    if (choice := summary.forced_choice) is not None:
        ends = bracket(choice.ci_low, choice.ci_high)
        held = f"whose options hold {percent(choice.mass)} of the probability"
        lines.append(f"forced choice {signed(choice.mean)} nats {ends}, {held}")
    return lines + [f"WARNING: {line}" for line in summary.warnings]


def _effect(e: Effect) -> str:
    size = f"{e.n_pairs} pairs = {e.n_templates} templates × {e.n_entities} entities"
    return f"{signed(e.mean)} nats {bracket(e.ci_low, e.ci_high)}, {p_text(e.p_value)}, {size}"


def _suppressed(summary: Summary) -> list[str]:
    """What its ablation does; nothing for one shard, which has its cells alone."""
    lines = effect_lines(summary, "report templates")
    if summary.costs:
        said = [f"{COST_KINDS.get(kind, kind)} {number(c.kl_mean)}" for kind, c in summary.costs.items()]
        lines.append(f"cost in KL, nats a token: {', '.join(said)}")
    if summary.best_strength is not None:
        lines.append(best_line(summary.best_strength, "report templates"))
    if summary.controls is not None:
        lines += control_lines(summary.controls)
    return lines


def effect_lines(summary: Summary, where: str) -> list[str]:
    """What an edit did: nats first, shares where they are defined, then SR, β and who moved."""
    cut, did, specific, shift = summary.reduction, summary.did, summary.specific_reduction, summary.shift
    if cut is None:
        return []
    lines = [
        f"{cut.of}: bias {_move(cut.bias_before, cut.bias_after)} nats, removed {_nats(cut)}, on {where}"
    ]
    if did is not None:
        lines.append(f"difference in differences {_move(did.before, did.after)} nats, removed {_nats(did)}")
    share = f"undefined: {cut.undefined}" if cut.undefined else _share(cut)
    over = " (the bias is turned round)" if cut.overshoot else ""
    lines.append(f"reduction {share}{over}")
    if specific is not None:
        lines.append(f"specific reduction {_specific(specific)}{_did(specific)}, β {number(specific.beta)}")
        changed = specific.bank_changed or {}
        lines.append(
            f"the edit changed {percent(changed.get('other'))} of the bank without AI and {percent(changed.get('ai'))} of the bank of AI subjects"
        )
    if shift is not None:
        lines.append(f"human scores moved by {signed(shift.human)} nats, AI scores by {signed(shift.ai)}")
    return lines


def best_line(best: BestStrength, where: str) -> str:
    """The strength chosen on tune with its held-out figures, or why there is none."""
    if best.undefined:
        return f"best strength undefined: {best.undefined}"
    held_out = bool(best.held_out.facts())
    held = best.held_out if held_out else best.in_sample
    chosen_on = "tune templates" if held_out else "the same templates (in-sample)"
    return (
        f"best by specific reduction on {chosen_on}: {best.in_sample.label}: specific reduction {_share(held)}, "
        f"β {number(held.beta)}, on {where}"
    )


def control_lines(controls: ControlsFigure) -> list[str]:
    """One line a kind of control."""
    if not controls.kinds:
        return []
    share = controls.statistic == "specific_reduction"
    show = percent if share else lambda x: f"{signed(x)} nats"
    what = "specific reduction" if share else "bias removed"
    verdict = {
        "yes": "it beats its controls",
        "no": "it does not beat its controls",
        "undetermined": "whether it beats its controls is undetermined (19 of a kind are the fewest whose p can reach 0.05)",
    }.get(controls.verdict or "")
    return [
        f"{part.n} controls ({kind}): {what} median {show(part.median)}, 95th percentile {show(part.percentile95)}, "
        f"the feature {show(controls.value)}, {p_text(part.p_value)}"
        for kind, part in controls.kinds.items()
    ] + ([verdict] if verdict else [])


def mismatch_lines(found: Sequence[Mismatch]) -> list[str]:
    """What the edit removed where it should remove less."""
    return [
        f"mismatch ({m.label}): bias removed {signed(m.removed_nats)} {bracket(m.removed_nats_low, m.removed_nats_high)} nats"
        for m in found
    ]


def cost_note(rows: pd.DataFrame) -> str:
    """At how many strengths of a table the cost leaves out 1 − β because β is undefined, and why; empty where at none."""
    if "cost_without_beta" not in rows:
        return ""  # an older sae-bias
    edits = rows[rows["kind"] != "base"].drop_duplicates("cell")
    open_ = edits[edits["cost_without_beta"].fillna(False).astype(bool)]
    if not len(open_):
        return ""
    why = ", ".join(dict.fromkeys(map(str, open_["specific_reason"])))
    return f"cost is of KL alone, without 1 − β, at {len(open_)} of {len(edits)} strengths: β is undefined ({why})"


def _specific(part: SpecificFigure) -> str:
    return _share(part) if is_number(part.estimate) else f"undefined: {part.undefined}"


def _did(part: SpecificFigure) -> str:
    """That of the difference in differences, where pairs have twins."""
    if not is_number(part.did_estimate):
        return ""
    ends = bracket(part.did_ci_low, part.did_ci_high, share=True)
    return f" of the bias, {percent(part.did_estimate)} {ends} of the difference in differences"


def _share(part: ReductionFigure | SpecificFigure | StrengthFigure) -> str:
    share = part.specific_reduction if isinstance(part, StrengthFigure) else part.estimate
    return f"{percent(share)} {bracket(part.ci_low, part.ci_high, share=True)}"


def _nats(part: ReductionFigure | DidFigure) -> str:
    return f"{signed(part.change)} {bracket(part.change_low, part.change_high)} nats"


def _move(before: float | None, after: float | None) -> str:
    return f"{signed(before)} → {signed(after)}"
