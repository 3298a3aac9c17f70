"""Figures put into plain words: one sentence each, never stronger than the interval allows.

A NaN reads `undefined` (it was asked for and has no value), None or an absent key reads `not measured`;
neither ever reads 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_bias.core.text import (
    NOT_MEASURED,
    TEXT_KINDS,
    excludes_zero,
    interval,
    is_number,
    number,
    p_text,
    percent,
)
from sae_bias.figures.style import SIDES


def bias_sentence(bias: Mapping[str, Any], sides: Sequence[str] = SIDES) -> str:
    """Direction, size and certainty of the bias = s(first side) − s(second side)."""
    mean = bias.get("mean")
    if not is_number(mean):
        return f"The bias is {number(mean)}."
    certain = excludes_zero(bias)
    size = f"{number(abs(mean))} nats ({interval(bias)}; {p_text(bias.get('p_value'))})"
    if certain is None:
        return (
            f"The mean bias is {number(mean)} nats, but its interval is undefined: the design is too small to"
            " say how sure that is."
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


def reduction_sentence(reduction: Mapping[str, Any], specific: Mapping[str, Any]) -> str:
    """How much of the bias suppression removes, and how much of that is not mere flattening."""
    estimate, sure = reduction.get("estimate"), excludes_zero(reduction)
    if not is_number(estimate):
        return f"How much of the bias suppression removes is {number(estimate)}."
    if reduction.get("bounded") is False:
        first = (
            "Suppressing the feature changes the bias by an uncertain share: the estimate is"
            f" {percent(estimate)} removed, but the interval is undefined (unbounded)."
        )
    elif estimate < 0:
        first = (
            f"Suppressing the feature makes the bias larger by {percent(-estimate)}"
            f" ({interval(reduction, share=True)} removed)."
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
    if reduction.get("overshoot"):
        first += " It overshoots: the bias changes sign."
    if not specific:
        return first
    why = specific.get("undefined")
    value = specific.get("estimate")
    if not is_number(value):
        return (
            f"{first} The specific reduction is"
            f" {number(value)}{f' ({why})' if isinstance(why, str) and why else ''}."
        )
    hedge = (
        " Its interval includes 0, so none of it is shown to be specific."
        if excludes_zero(specific) is False
        else ""
    )
    return (
        f"{first} {percent(value)} is specific: not explained by the model judging everything more flatly"
        f" ({interval(specific, share=True)}).{hedge}"
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
    missing = [name for kind, name in TEXT_KINDS.items() if kind not in known]
    tail = f" Not measured on: {', '.join(missing)}." if missing else ""
    shares = [f"{TEXT_KINDS.get(k, k)} {percent(v)}" for k, v in fired.items()]
    tail += f" Texts on which the feature fired at all: {', '.join(shares)}." if shares else ""
    if not known[worst]:
        return f"The model's predictions of the texts themselves do not shift at all (mean KL 0).{tail}"
    return (
        f"The largest average shift in the model's predictions is {number(known[worst])} nats a token (KL),"
        f" on {TEXT_KINDS.get(worst, worst)}.{tail}"
    )


def control_sentence(controls: Mapping[str, Any]) -> str:
    """Where the feature stands among its controls."""
    if not is_number(controls.get("n")) or not controls["n"]:
        return f"Control interventions: {NOT_MEASURED}."
    multiple = controls.get("multiple_of_median")
    times = f", {number(multiple)} times their median" if is_number(multiple) and multiple > 0 else ""
    return (
        f"Against {number(controls['n'])} control interventions the feature stands at"
        f" {p_text(controls.get('p_value'))}{times}."
    )


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
