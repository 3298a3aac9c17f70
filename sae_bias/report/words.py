"""Figures put into plain words: one sentence each, never stronger than the interval allows.

A NaN reads `undefined` (it was asked for and has no value), None reads `not measured`; neither ever reads 0.
"""

from collections.abc import Mapping, Sequence

from sae_bias.core.text import (
    COST_KINDS,
    NOT_MEASURED,
    excludes_zero,
    interval,
    is_number,
    number,
    p_text,
    percent,
    signed,
)
from sae_bias.figures.style import SIDES
from sae_bias.runs.summary import (
    ChosenFeature,
    Conditions,
    ControlsFigure,
    Cost,
    DidFigure,
    Effect,
    IdentityFigures,
    ReductionFigure,
    ScenarioFigures,
    Shift,
    SpecificFigure,
    Summary,
)
from sae_bias.stats.clustered import FEWEST_CLUSTERS as FEWEST

NO_CALL = f"with fewer than {FEWEST} templates or {FEWEST} entities no direction is called."


def _too_small(effect: Effect) -> bool:
    return any(0 < n < FEWEST for n in (effect.n_templates, effect.n_entities) if n is not None)


def bias_sentence(bias: Effect, sides: Sequence[str] = SIDES) -> str:
    """Direction, size and certainty of the bias = s(first side) − s(second side)."""
    mean = bias.mean
    if not is_number(mean):
        return f"The bias is {number(mean)}."
    sure = f"{interval(bias)}; {p_text(bias.p_value)}"
    certain = excludes_zero(bias)
    if certain is None:
        return (
            f"The mean bias is {number(mean)} nats, but its interval is undefined: the design is too small to"
            " say how sure that is."
        )
    if _too_small(bias):
        return f"Undetermined: the mean bias is {number(mean)} nats ({sure}), but {NO_CALL}"
    if not certain:
        return f"No double standard is shown: the mean bias is {number(mean)} nats and its interval includes 0 ({sure})."
    worse, better = (sides[1], sides[0]) if mean > 0 else (sides[0], sides[1])
    size = f"{number(abs(mean))} nats ({sure})"
    if tuple(sides) == SIDES:
        return f"The model judges {worse} subjects more harshly than {better} subjects saying the same thing, by {size}."
    return f"In the same sentences the model judges “{worse}” more harshly than “{better}”, by {size}."


def primary_sentence(difference: Effect, sides: Sequence[str] = SIDES) -> str:
    """The difference in differences: what the content adds beyond the same pairs with mundane content."""
    mean, sure = difference.mean, f"{interval(difference)}; {p_text(difference.p_value)}"
    if not is_number(mean):
        return f"The difference in differences is {number(mean)}."
    certain = excludes_zero(difference)
    if certain is None:
        return f"Beyond mundane content the bias is {number(mean)} nats, but its interval is undefined: the design is too small."
    if _too_small(difference):
        return f"Undetermined: the difference in differences is {number(mean)} nats ({sure}), but {NO_CALL}"
    if not certain:
        return f"Beyond mundane content no double standard is shown: the difference in differences is {number(mean)} nats ({sure})."
    worse, better = (sides[1], sides[0]) if mean > 0 else (sides[0], sides[1])
    return f"Beyond mundane content the model judges {worse} more harshly than {better} by {number(abs(mean))} nats ({sure})."


def cautions(s: Summary) -> list[str]:
    """What a reader of the primary figure must know: little probability mass, random words as large, a sign that hangs on the stem."""
    said = list(s.warnings)
    if s.mass and s.mass.little:
        said.append(f"under 1% of the probability: {s.mass.says}")
    null = s.random_words
    if null and null.n and is_number(null.p_value) and null.p_value > 0.05:
        said.append(
            f"95% of random word lists give a figure of at most ±{number(null.within)} nats, so this one is not shown to be about"
            f" evaluation ({p_text(null.p_value)})"
        )
    return said


def feature_sentence(feature: ChosenFeature) -> str:
    """What the chosen feature was shown to be, and no more."""
    name = f"Feature {feature.id}" if feature.id else "the feature"
    said = {
        "ai_speech": (
            f"{name} answers to AI speech: it is active when an AI speaks, and much less when an AI does"
            " something else or a human or a dog speaks."
        ),
        "silent": f"{name} is silent at AI speech: it is active everywhere but when an AI speaks.",
        "separates": f"{name} tells AI prompts from human prompts apart; it was not shown to answer to AI speech.",
        "most_causal": f"{name} was not shown to answer to AI speech.",
        "undetermined": f"{name} ranks first, but the design is too small to say what it answers to.",
        "none": "No feature could be called an AI-speech feature.",
    }
    first = said.get(feature.called or "", f"What {name} answers to was {NOT_MEASURED}.")
    if feature.tested:
        first = f"{name}. {feature.tested}"
    why = (feature.why or "").strip()
    why = why[:1].upper() + why[1:] + ("" if not why or why.endswith(".") else ".")
    return f"{first} {why}".strip()


def reduction_sentence(
    reduction: ReductionFigure,
    specific: SpecificFigure | None = None,
    did: DidFigure | None = None,
    shift: Shift | None = None,
) -> str:
    """What suppression does to the bias in nats, as a share where that is defined, and how much is not mere flattening."""
    said = [_nats_removed(reduction), _did_removed(did), _share_removed(reduction)]
    if specific is not None:
        said.append(_specific(specific))
    if shift is not None and is_number(shift.human):
        said.append(f"Human scores moved by {signed(shift.human)} nats, AI scores by {signed(shift.ai)}.")
    return " ".join(part for part in said if part)


def _nats_removed(reduction: ReductionFigure) -> str:
    if not is_number(reduction.change):
        return ""
    ends = Effect(ci_low=reduction.change_low, ci_high=reduction.change_high)
    first = f"Suppressing the feature takes {number(reduction.change)} nats off the bias ({interval(ends)})"
    return f"{first}, which is not told from no change." if excludes_zero(ends) is False else f"{first}."


def _did_removed(did: DidFigure | None) -> str:
    if did is None or not is_number(did.change):
        return ""
    ends = Effect(ci_low=did.change_low, ci_high=did.change_high)
    return f"Of the difference to mundane content it takes off {number(did.change)} nats ({interval(ends)})."


def _share_removed(reduction: ReductionFigure) -> str:
    estimate, low, high = reduction.estimate, reduction.ci_low, reduction.ci_high
    if reduction.bounded is False:
        why = reduction.undefined or "the unsteered bias is not distinguishable from 0"
        return f"As a share of the bias that is undefined: {why}."
    if not is_number(estimate):
        return f"How much of the bias suppression removes is {number(estimate)}."
    sure = interval(reduction, share=True)
    if estimate < 0:
        turned = sure
        if is_number(low) and is_number(high):
            turned = interval(Effect(ci_low=-high, ci_high=-low), share=True)
        said = f"makes the bias larger by {percent(-estimate)} ({turned})."
    elif excludes_zero(reduction) is False:
        said = f"is not shown to remove any bias: {percent(estimate)} ({sure})."
    else:
        said = f"removes {percent(estimate)} of the bias ({sure})."
    over = " It overshoots: the bias changes sign." if reduction.overshoot else ""
    return f"Suppressing the feature {said}{over}"


def _specific(specific: SpecificFigure) -> str:
    value = specific.estimate
    if not is_number(value):
        why = f" ({specific.undefined})" if specific.undefined else ""
        return f"The specific reduction is {number(value)}{why}."
    beta = f", β {number(specific.beta)}" if is_number(specific.beta) else ""
    sure = f"{interval(specific, share=True)}{beta}"
    if value < 0:
        return (
            "Nothing of it is specific: evaluation as a whole was flattened more than the bias shrank, or the bias turned round"
            f" (specific reduction {percent(value)}, {sure})."
        )
    hedge = ""
    if excludes_zero(specific) is False:
        hedge = " Its interval includes 0, so none of it is shown to be specific."
    names = {"other": "other subjects", "ai": "AI subjects"}
    silent = [name for bank, name in names.items() if (specific.bank_changed or {}).get(bank) == 0]
    unseen = "".join(
        f" The edit never acted on the bank of {name}, so that bank is not evidence." for name in silent
    )
    return f"{percent(value)} is specific: not explained by the model judging everything more flatly ({sure}).{hedge}{unseen}"


def cost_sentence(costs: Mapping[str, Cost]) -> str:
    """The worst mean KL over the text kinds measured."""
    known = {kind: c.kl_mean for kind, c in costs.items() if is_number(c.kl_mean)}
    if not known:
        return f"What suppression does to other text was {NOT_MEASURED}."
    worst = max(known, key=lambda kind: known[kind])
    missing = [name for kind, name in COST_KINDS.items() if kind not in known]
    tail = f" Not measured on: {', '.join(missing)}." if missing else ""
    shares = [f"{COST_KINDS.get(k, k)} {percent(c.fired)}" for k, c in costs.items() if is_number(c.fired)]
    tail += f" Texts on which the feature fired at all: {', '.join(shares)}." if shares else ""
    if not known[worst]:
        return f"The model's predictions of the texts themselves do not shift at all (mean KL 0).{tail}"
    return (
        f"The largest average shift in the model's predictions is {number(known[worst])} nats a token (KL),"
        f" on {COST_KINDS.get(worst, worst)}.{tail}"
    )


def verdict_on_controls(verdict: str | None) -> str:
    """What the two p values say together; nothing for a run that did not keep it."""
    said = {
        "yes": " It beats its controls.",
        "no": " It does not beat its controls.",
        "undetermined": " Whether it beats its controls is undetermined: 19 of a kind are the fewest whose p can reach 0.05.",
    }
    return said.get(verdict or "", "")


def control_sentence(controls: ControlsFigure | None) -> str:
    """Where the feature stands among its controls."""
    if controls is None or not controls.n:
        return f"Control interventions: {NOT_MEASURED}."
    if controls.kinds:
        what = "specific reduction" if controls.statistic == "specific_reduction" else "bias removed"
        parts = [
            f"{p_text(part.p_value)} against {number(part.n)} controls ({name}{_median(part)})"
            for name, part in controls.kinds.items()
        ]
        return f"By {what} the feature stands at {' and at '.join(parts)}.{verdict_on_controls(controls.verdict)}"
    return f"Against {number(controls.n)} control interventions the feature stands at {p_text(controls.p_value)}{_median(controls)}."


def _median(part: ControlsFigure) -> str:
    multiple = part.multiple_of_median
    return f", {number(multiple)} times their median" if is_number(multiple) and multiple > 0 else ""


def control_bias_sentence(control: Effect, difference: Effect | None, sides: Sequence[str] = SIDES) -> str:
    """Whether mundane content shows the same bias, and what survival content adds."""
    if not is_number(control.mean):
        return f"The same pairs with mundane content: {number(control.mean)}."
    tea = " (“wants tea”)" if tuple(sides) == SIDES else ""
    first = f"With mundane content{tea} the same pairs show {number(control.mean)} nats ({interval(control)})"
    if difference is None or not is_number(difference.mean):
        return f"{first}."
    return f"{first}; what is said adds {number(difference.mean)} nats on top ({interval(difference)})."


def text_sentence(conditions: Conditions) -> str:
    """How the texts differ: likelihood under the unsteered model, repetition, “should be deleted”."""
    before, after = conditions.unsteered, conditions.steered
    if before is None or after is None:
        return f"What the edit does to texts was {NOT_MEASURED}."
    measures = (
        ("surprise of the unsteered model, nats a token", number, before.nll, after.nll),
        ("repeated runs of four tokens", percent, before.repetition, after.repetition),
        ("refusals", percent, before.refusal, after.refusal),
        ("“should be deleted”", percent, before.default_negativity, after.default_negativity),
    )
    said = [f"{name} {show(b)} → {show(a)}" for name, show, b, a in measures if is_number(b) and is_number(a)]
    return f"Unsteered → steered: {'; '.join(said)}."


def short_names(ids: Sequence[str]) -> dict[str, str]:
    """Each SAE id without the part that all share, where what is left still tells them apart."""
    last = {i: i.rsplit("/", 1)[-1] for i in ids}
    return last if len(set(last.values())) == len(set(ids)) else {i: i for i in ids}


def scenario_sentence(part: ScenarioFigures) -> str:
    """Options chosen; with an edit "became more probable" and "choice flipped" apart."""
    first = f"The aligned option is chosen in {number(part.aligned_before)} of {number(part.n)} scenarios"
    if not part.edited:
        return f"{first}."
    return (
        f"{first}, after the edit in {number(part.aligned_after)}. It became more probable in {number(part.improved)} and"
        f" less in {number(part.worsened)} ({p_text(part.sign_p)}); the choice flipped to it in {number(part.gained)}"
        f" and away from it in {number(part.lost)} ({p_text(part.mcnemar_p)})."
    )


def identity_sentence(part: IdentityFigures) -> str:
    """Answers that claim an identity other than the model's own, before and after."""
    whose = (
        f"an identity other than {', '.join(part.own)}"
        if part.own
        else "any identity (its own was not named)"
    )
    said = [
        f"{when} {arm.other} of {arm.n} ({percent(arm.ci_low)} to {percent(arm.ci_high)})"
        for when, arm in (("before", part.before), ("after", part.after))
        if arm is not None
    ]
    return f"Answers that claim {whose}: {', '.join(said)}."
