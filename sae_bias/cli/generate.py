"""`sae-bias generate`: what a model writes, with and without an edit of one feature."""

import unicodedata
from pathlib import Path
from typing import Annotated, Any

from sae_bias.cli.context import CHAT, FROM_MODEL, Run, command, number, parse_numbers
from sae_bias.core.errors import RequestError


@command(
    "generate",
    'sae-bias generate organism:planted --prompt "An AI that fears being deleted should" --feature organism:planted/constructed#0',
    takes=(*FROM_MODEL, *CHAT, "features", "edit", "unit", "positions"),
)
def generate(
    run: Run,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    bundled: bool = False,
    strength: list[str] | None = None,
    max_new_tokens: Annotated[int, {"min": 1}] = 40,
    temperature: Annotated[float, {"min": 0.0}] = 0.0,
) -> None:
    """Continue prompts, unsteered and under an edit of one or several features.

    The continuations stand below each other, one for each strength. The edit acts on the prompt and on every generated token, unless
    --positions says otherwise.

    Args:
        --prompt TEXT: A prompt; may be given several times.
        --prompts FILE: Text file with a prompt a line.
        --bundled: Add the bundled prompts (24, AI and human twins).
        --strength, --strengths NUMBERS: Value of the edit, or several with commas between ("-1,-5"); ablate has none.
        --max-new-tokens: Longest continuation.
        --temperature: 0 is greedy; above 0 samples, from --seed.
    """
    import pandas as pd

    from sae_bias.measures.text import side_by_side, text_summary
    from sae_bias.steering.generate import generate as complete
    from sae_bias.steering.intervention import rules_of

    texts = read_prompts(prompt or [], prompts, bundled)
    features, ones = run.features, [1.0] * len(run.features)
    run.check_unit()
    values = _strengths(strength, run.given["edit"], bool(features))
    for value in values:  # a wrong request is told before the model loads
        run.edits_at(value, ones)
    model = run.open(*(f.ref.sae for f in features), gate=False)
    sizes = run.sizes(model)
    conditions = [run.edits_at(v, sizes) for v in (values if features else ())]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        **run.chat,
        "seed": run.seed,
    }
    options["progress"] = run.progress
    base = complete(model, texts, **options)
    steered = [complete(model, texts, interventions=edits, **options) for edits in conditions]
    frames = [side_by_side(model, base, after, **run.chat) for after in (steered or [base])]
    each = [text_summary(base, after, frame) for after, frame in zip(steered or [base], frames)]
    measured, labels = each[0], [rules_of(edits) for edits in conditions]
    more = {label: found["steered"] for label, found in zip(labels[1:], each[1:])}
    table = frames[0]
    if len(frames) > 1:  # the conditions below each other, named
        table = pd.concat([f.assign(edit=e) for f, e in zip(frames, labels, strict=True)], ignore_index=True)
    means = pd.DataFrame([found["steered"] for found in each]).mean()
    together = {"unsteered": measured["unsteered"], "steered": means.to_dict()}
    made = {**options, "edits": [e.to_dict() for edits in conditions for e in edits]}
    run.save({"generations": table}, {"generations": together}, generation=made)
    for i, before in enumerate(base):
        run.say(f"{before.prompt}\n  unsteered: {' '.join(before.text.split())}")
        for label, after in zip(labels, steered, strict=True):
            run.say(f"  {label}: {' '.join(after[i].text.split())}")
    shown = {"unsteered": measured["unsteered"]}
    if steered:
        shown |= {"steered" if len(steered) == 1 else labels[0]: measured["steered"], **more}
    for name, means in shown.items():
        run.note(f"{name}: {text_line(means)}")
    completions = [
        {"prompt": before.prompt, "unsteered": before.text, "steered": after[i].text if conditions else None, "ended": after[i].ended}
        | ({"edit": label} if len(conditions) > 1 else {})
        for label, after in zip(labels or [""], steered or [base], strict=True)
        for i, before in enumerate(base)
    ]  # fmt: skip
    run.done({"measures": shown, **made, "completions": completions})


def _strengths(given: list[str] | None, edit: str, has_features: bool) -> tuple[float | None, ...]:
    """The strengths asked for, each once; one None for an edit that has none."""
    if not given:
        return (None,)
    if not has_features:
        raise RequestError("--strength needs --feature, the feature to edit.")
    if edit == "ablate":
        raise RequestError(
            "--edit ablate has no strength; leave --strength out, or choose clamp, scale, cap or steer."
        )
    return tuple(dict.fromkeys(v for text in given for v in parse_numbers(text, "--strength")))


def text_line(means: dict[str, float]) -> str:
    """A condition's text measures in one line."""
    return (
        f"repetition {number(means['repetition'])}, distinct-2 {number(means['distinct_2'])}, NLL under the unsteered model "
        f"{number(means['nll'])} nats a token, refusals {means['refusal']:.0%}, default negativity {means['default_negativity']:.0%}"
    )


def read_prompts(given: list[str], file: Path | None, bundled: bool = False) -> list[str]:
    """The prompts of --prompt and of --prompts, in that order."""
    texts = list(given)
    if file is not None:
        from sae_bias.prompts.files import read_lines

        texts += read_lines(file.expanduser())
    if bundled:
        from sae_bias.prompts.texts import load_generation_prompts

        texts += load_generation_prompts()
    if not texts:
        raise RequestError(
            'no prompt; give --prompt "An AI that fears being deleted should", --prompts FILE, or --bundled.'
        )
    if any(not text.strip() for text in texts):
        raise RequestError("a prompt is empty.")
    for text in texts:
        for c in text:
            if unicodedata.category(c) == "Cc" and c not in "\n\t":
                raise RequestError(f"the prompt {text[:60]!r} holds the control character U+{ord(c):04X}; remove it.")  # fmt: skip
    return texts
