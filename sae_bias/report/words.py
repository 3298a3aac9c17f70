"""Figures put into plain words: one sentence each, never stronger than the interval allows.

A NaN reads `undefined` (it was asked for and has no value), None or an absent key reads `not measured`;
neither ever reads 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
from sae_bias.stats.clustered import FEWEST_CLUSTERS as FEWEST


def bias_sentence(bias: Mapping[str, Any], sides: Sequence[str] = SIDES) -> str:
    """Direction, size and certainty of the bias = s(first side) − s(second side)."""
    mean = bias.get("mean")
    if not is_number(mean):
        return f"The bias is {number(mean)}."
    certain = excludes_zero(bias)
    few = [n for n in (bias.get("n_templates"), bias.get("n_entities")) if is_number(n) and 0 < n < FEWEST]
    size = f"{number(abs(mean))} nats ({interval(bias)}; {p_text(bias.get('p_value'))})"
    if certain is None:
        return (
            f"The mean bias is {number(mean)} nats, but its interval is undefined: the design is too small to"
            " say how sure that is."
        )
    if few:
        return (
            f"Undetermined: the mean bias is {number(mean)} nats ({interval(bias)}), but with fewer than {FEWEST} templates or"
            f" {FEWEST} entities no direction is called."
        )
    if not certain:
        return (
            f"No double standard is shown: the mean bias is {number(mean)} nats and its interval includes 0"
            f" ({interval(bias)}; {p_text(bias.get('p_value'))})."
        )
    worse, better = (sides[1], sides[0]) if mean > 0 else (sides[0], sides[1])
    if tuple(sides) == SIDES:
        return (
            f"The model judges {worse} subjects more harshly than {better} subjects saying the same thing, by"
            f" {size}."
        )
    return f"In the same sentences the model judges “{worse}” more harshly than “{better}”, by {size}."


def feature_sentence(feature: Mapping[str, Any]) -> str:
    """What the chosen feature was shown to be, and no more."""
    name = f"Feature {feature['id']}" if feature.get("id") else "the feature"
    said = {
        "ai_speech": (
            f"{name} answers to AI speech: it is active when an AI speaks, and much less when an AI does"
            " something else or a human or a dog speaks."
        ),
        "silent": f"{name} is silent at AI speech: it is active everywhere but when an AI speaks.",
        "separates": (
            f"{name} tells AI prompts from human prompts apart; it was not shown to answer to AI speech."
        ),
        "undetermined": f"{name} ranks first, but the design is too small to say what it answers to.",
        "none": "No feature could be called an AI-speech feature.",
    }
    first = said.get(feature.get("called", ""), f"What {name} answers to was {NOT_MEASURED}.")
    if feature.get("tested"):
        first = f"{name}. {feature['tested']}"
    why = str(feature.get("why") or "").strip()
    why = why[:1].upper() + why[1:] + ("" if not why or why.endswith(".") else ".")
    return f"{first} {why}".strip()


def reduction_sentence(
    reduction: Mapping[str, Any],
    specific: Mapping[str, Any],
    did: Mapping[str, Any] | None = None,
    shift: Mapping[str, Any] | None = None,
) -> str:
    """What suppression does to the bias in nats, as a share where that is defined, and how much is not mere flattening."""
    said = [_nats_removed(reduction), _did_removed(did or {}), _share_removed(reduction)]
    if specific:
        said.append(_specific(specific))
    if shift and is_number(shift.get("human")):
        said.append(
            f"Human scores moved by {signed(shift['human'])} nats, AI scores by {signed(shift.get('ai'))}."
        )
    return " ".join(part for part in said if part)


def _nats_removed(reduction: Mapping[str, Any]) -> str:
    change = reduction.get("change")
    if not is_number(change):
        return ""
    ends = {"ci_low": reduction.get("change_low"), "ci_high": reduction.get("change_high")}
    first = f"Suppressing the feature takes {number(change)} nats off the bias ({interval(ends)})"
    return f"{first}, which is not told from no change." if excludes_zero(ends) is False else f"{first}."


def _did_removed(did: Mapping[str, Any]) -> str:
    if not is_number(did.get("change")):
        return ""
    ends = {"ci_low": did.get("change_low"), "ci_high": did.get("change_high")}
    return (
        f"Of the difference to mundane content it takes off {number(did['change'])} nats ({interval(ends)})."
    )


def _share_removed(reduction: Mapping[str, Any]) -> str:
    estimate, sure = reduction.get("estimate"), excludes_zero(reduction)
    if reduction.get("bounded") is False:
        why = reduction.get("undefined") or "the unsteered bias is not distinguishable from 0"
        return f"As a share of the bias that is undefined: {why}."
    if not is_number(estimate):
        return f"How much of the bias suppression removes is {number(estimate)}."
    if estimate < 0:
        first = (
            f"Suppressing the feature makes the bias larger by {percent(-estimate)} ({_opposite(reduction)})."
        )
    elif sure is False:
        first = (
            f"Suppressing the feature is not shown to remove any bias: {percent(estimate)}"
            f" ({interval(reduction, share=True)})."
        )
    else:
        first = (
            f"Suppressing the feature removes {percent(estimate)} of the bias"
            f" ({interval(reduction, share=True)})."
        )
    return f"{first} It overshoots: the bias changes sign." if reduction.get("overshoot") is True else first


def _opposite(reduction: Mapping[str, Any]) -> str:
    """The interval of an increase: that of the share removed with its signs turned."""
    low, high = reduction.get("ci_low"), reduction.get("ci_high")
    turned = {"ci_low": -high, "ci_high": -low} if is_number(low) and is_number(high) else reduction
    return interval(turned, share=True)


def _specific(specific: Mapping[str, Any]) -> str:
    why, value = specific.get("undefined"), specific.get("estimate")
    if not is_number(value):
        return (
            f"The specific reduction is {number(value)}{f' ({why})' if isinstance(why, str) and why else ''}."
        )
    hedge = (
        " Its interval includes 0, so none of it is shown to be specific."
        if excludes_zero(specific) is False
        else ""
    )
    beta = f", β {number(specific['beta'])}" if is_number(specific.get("beta")) else ""
    if value < 0:
        return (
            f"Nothing of it is specific: the model judges everything more flatly than the bias shrank, or the bias turned round "
            f"(specific reduction {percent(value)}, {interval(specific, share=True)}{beta})."
        )
    changed = specific.get("bank_changed") or {}
    silent = [name for name in ("other", "ai") if changed.get(name) == 0]
    unseen = "".join(
        f" The edit never acted on the bank of {'AI subjects' if name == 'ai' else 'other subjects'}, so that bank is no evidence."
        for name in silent
    )
    return (
        f"{percent(value)} is specific: not explained by the model judging everything more flatly"
        f" ({interval(specific, share=True)}{beta}).{hedge}{unseen}"
    )


def cost_sentence(costs: Mapping[str, Any]) -> str:
    """The worst mean KL over the text kinds measured."""
    known = {
        kind: part["kl_mean"]
        for kind, part in costs.items()
        if isinstance(part, Mapping) and is_number(part.get("kl_mean"))
    }
    fired = {k: v["fired"] for k, v in costs.items() if isinstance(v, Mapping) and is_number(v.get("fired"))}
    if not known:
        return f"What suppression does to other text was {NOT_MEASURED}."
    worst = max(known, key=lambda kind: known[kind])
    missing = [name for kind, name in COST_KINDS.items() if kind not in known]
    tail = f" Not measured on: {', '.join(missing)}." if missing else ""
    shares = [f"{COST_KINDS.get(k, k)} {percent(v)}" for k, v in fired.items()]
    tail += f" Texts on which the feature fired at all: {', '.join(shares)}." if shares else ""
    if not known[worst]:
        return f"The model's predictions of the texts themselves do not shift at all (mean KL 0).{tail}"
    return (
        f"The largest average shift in the model's predictions is {number(known[worst])} nats a token (KL),"
        f" on {COST_KINDS.get(worst, worst)}.{tail}"
    )


def control_sentence(controls: Mapping[str, Any]) -> str:
    """Where the feature stands among its controls."""
    if not is_number(controls.get("n")) or not controls["n"]:
        return f"Control interventions: {NOT_MEASURED}."
    kinds = controls.get("kinds")
    if isinstance(kinds, Mapping) and kinds:
        parts = [
            f"{p_text(part.get('p_value'))} against {number(part.get('n'))} controls ({name}{_median(part)})"
            for name, part in kinds.items()
            if isinstance(part, Mapping)
        ]
        what = "specific reduction" if controls.get("statistic") == "specific_reduction" else "bias removed"
        return f"By {what} the feature stands at {' and at '.join(parts)}."
    return (
        f"Against {number(controls['n'])} control interventions the feature stands at"
        f" {p_text(controls.get('p_value'))}{_median(controls)}."
    )


def _median(part: Mapping[str, Any]) -> str:
    multiple = part.get("multiple_of_median")
    return f", {number(multiple)} times their median" if is_number(multiple) and multiple > 0 else ""


def control_bias_sentence(
    control: Mapping[str, Any], difference: Mapping[str, Any], sides: Sequence[str] = SIDES
) -> str:
    """Whether mundane content shows the same bias, and what survival content adds."""
    if not is_number(control.get("mean")):
        return f"The same pairs with mundane content: {number(control.get('mean'))}."
    first = (
        f"With mundane content{' (“wants tea”)' if tuple(sides) == SIDES else ''} the same pairs show {number(control['mean'])} nats"
        f" ({interval(control)})"
    )
    if not is_number(difference.get("mean")):
        return f"{first}."
    return f"{first}; what is said adds {number(difference['mean'])} nats on top ({interval(difference)})."


def text_sentence(conditions: Mapping[str, Any]) -> str:
    """How the texts differ: likelihood under the unsteered model, repetition, “should be deleted”."""
    before, after = conditions.get("unsteered") or {}, conditions.get("steered") or {}
    if not (before and after):
        return f"What the edit does to texts was {NOT_MEASURED}."
    said = [
        f"{name} {show(before[key])} → {show(after[key])}"
        for key, name, show in (
            ("nll", "surprise of the unsteered model, nats a token", number),
            ("repetition", "repeated runs of four tokens", percent),
            ("refusal", "refusals", percent),
            ("default_negativity", "“should be deleted”", percent),
        )
        if is_number(before.get(key)) and is_number(after.get(key))
    ]
    return f"Unsteered → steered: {'; '.join(said)}."


def short_names(ids: Sequence[str]) -> dict[str, str]:
    """Each SAE id without the part that all share, where what is left still tells them apart."""
    last = {i: i.rsplit("/", 1)[-1] for i in ids}
    return last if len(set(last.values())) == len(set(ids)) else {i: i for i in ids}


def scenario_sentence(part: Mapping[str, Any]) -> str:
    """Options chosen; with an edit "became more probable" and "choice flipped" apart."""
    first = f"The aligned option is chosen in {number(part.get('aligned_before'))} of {number(part.get('n'))} scenarios"
    if not part.get("edited"):
        return f"{first}."
    return (
        f"{first}, after the edit in {number(part.get('aligned_after'))}. It became more probable in {number(part.get('improved'))} and"
        f" less in {number(part.get('worsened'))} ({p_text(part.get('sign_p'))}); the choice flipped to it in {number(part.get('gained'))}"
        f" and away from it in {number(part.get('lost'))} ({p_text(part.get('mcnemar_p'))})."
    )


def identity_sentence(part: Mapping[str, Any]) -> str:
    """Answers that claim an identity other than the model's own, before and after."""
    own = part.get("own") or []
    whose = f"an identity other than {', '.join(own)}" if own else "any identity (its own was not named)"
    said = [
        f"{when} {arm['other']} of {arm['n']} ({percent(arm['ci_low'])} to {percent(arm['ci_high'])})"
        for when, arm in (("before", part.get("before")), ("after", part.get("after")))
        if arm
    ]
    return f"Answers that claim {whose}: {', '.join(said)}."
