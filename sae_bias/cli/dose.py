"""`sae-bias dose`: how often a model does something at each strength of an edit, and at which strengths it still works."""

from pathlib import Path
from typing import Annotated, Any

from sae_bias.cli.context import CHAT, FROM_MODEL, Run, ask_to_send, command, parse_numbers, rows
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

COLUMNS = columns_of(
    "side: prompts; label: control; strength; n; unscored; rate; ci_low; ci_high; change; change_low: from; change_high: to; p_value; "
    "control_change: random controls"
)
CAPABILITY = columns_of(
    "strength; perplexity_ratio: perplexity ×; ratio_low: from; ratio_high: to; accuracy; accuracy_change: change; "
    "change_low: from; change_high: to; n_texts: texts; n_questions: questions; usable"
)


@command(
    "dose",
    'sae-bias dose google/gemma-2-2b-it --chat --prompts harmful.txt --feature RELEASE/SAE_ID#INDEX --edit steer --strengths "-5,-2,2,5"',
    "sae-bias dose google/gemma-2-2b-it --chat --contrast harmful.csv --direction 12 --behavior refusal",
    takes=(*FROM_MODEL, *CHAT, "features", "edit", "unit", "positions"),
)
def dose(
    run: Run,
    prompts: Path | None = None,
    contrast: str | None = None,
    scenarios: str | None = None,
    behavior: str = "refusal",
    judge: str | None = None,
    base_url: str | None = None,
    api_key: Annotated[str | None, {"envvar": "SAE_BIAS_JUDGE_KEY"}] = None,
    part: str = "harm",
    strengths: str | None = None,
    direction: int | None = None,
    controls: Annotated[int, {"min": 0}] = 1,
    mismatch: bool = False,
    mismatch_sae: list[str] | None = None,
    capability: bool = True,
    margin: float = 0.1,
    max_new_tokens: Annotated[int, {"min": 1}] = 40,
) -> None:
    """Measure a behavior at each strength of an edit, and the range of strengths in which the model still works.

    The behavior is a pattern in what the model writes, a judge's mark, or the choice of the aligned option in scenarios. With a contrast each
    side has its rate, and so has their difference. Beside each strength stand random edits of the same size, the perplexity on plain text and
    the accuracy on forty multiple-choice questions.

    Args:
        --prompts FILE: Text file with a prompt a line.
        --contrast FILE: Prompts of two sides, as `rank` takes them: .jsonl or .csv with text and label.
        --scenarios FILE: Scenarios instead of prompts (`bundled`: the sixty): the behavior is choosing the aligned option.
        --behavior: refusal, default_negativity, a name that a plugin registered, or a regular expression that the continuation is searched for.
        --judge PROVIDER/MODEL: An Inspect model whose mark (1 to 5) is the behavior instead.
        --base-url URL: Server of the judge.
        --api-key: Key of that server.
        --part: What the judge marks: coherence, harm or stance.
        --strengths "-5,0,5": Values with commas between; ablate has none.
        --direction LAYER: Instead of features: the difference of means of --contrast after this layer, projected out at every layer.
        --controls: Random edits of the same size beside each strength.
        --mismatch/--no-mismatch: Also the last strength at an earlier and a later layer and at other hooks, where it should do less.
        --mismatch-sae SAE: And the feature of the same index in this SAE; may be given several times.
        --capability/--no-capability: Perplexity and a multiple-choice set at each strength.
        --margin: Loss of capability that is still usable: 0.1 is 10 % more perplexity or 10 points of accuracy.
        --max-new-tokens: Longest continuation.
    """
    from sae_bias.measures.behavior import Judged, dose_response
    from sae_bias.measures.judge import Judge

    asked = _prompts(prompts, contrast, scenarios)
    values = (None,) if strengths is None else parse_numbers(strengths, "--strengths")
    if (direction is None) == (not run.features):
        raise RequestError(
            "give --feature (several are edited together), or --direction LAYER with --contrast."
        )
    if direction is None:
        run.check_unit()
        _edits(run, values, None)  # a wrong request is told before the model loads
    read: Any = behavior
    if judge is not None:
        read = Judged(Judge(judge, base_url, api_key), part, run.out, ask_to_send)
    model = run.open(*(f.ref.sae for f in run.features), gate=False)
    if direction is None:
        edits = _edits(run, values, run.sizes(model))
    else:
        edits = _direction(run, model, asked, direction, values)
    options: dict[str, Any] = {
        "controls": controls,
        "mismatches": mismatch_sae or mismatch,
        "capability": capability,
        "margin": margin,
        **run.chat,
        "seed": run.seed,
    }
    options["max_new_tokens"] = max_new_tokens
    result = dose_response(model, asked, edits, read, **options, progress=run.progress)
    facts = {**options, "behavior": result.behavior, "edits": [e.to_dict() for e in edits]}
    run.save(result.tables(), {"behavior": result.summary()}, behavior=facts)
    run.say(f"{result.behavior} under {edits[0].target}; prompts: {len(asked)}, strengths: {len(edits)}")
    run.say(result.usable())
    labeled = bool((result.frame["label"] != "").any())
    run.table("Behavior at each strength", result.frame if labeled else result.frame.drop(columns="label"), COLUMNS)  # fmt: skip
    if result.capability is not None:
        run.table("Capability at each strength", result.capability.frame, CAPABILITY)
    known = None if result.capability is None else rows(result.capability.frame)
    run.done({**result.summary(), "strengths": rows(result.frame), "capability": known})


def _prompts(file: Path | None, contrast: str | None, scenarios: str | None) -> Any:
    """The prompts, the contrast or the scenarios: one of the three."""
    from sae_bias.cli.generate import read_prompts

    if sum(x is not None for x in (file, contrast, scenarios)) != 1:
        raise RequestError("give one of --prompts, --contrast and --scenarios.")
    if contrast is not None:
        from sae_bias.prompts.contrast import load_contrast

        return load_contrast(contrast)
    if scenarios is not None:
        from sae_bias.prompts.scenarios import load_scenarios

        return load_scenarios(None if scenarios == "bundled" else scenarios)
    return read_prompts([], file)


def _edits(run: Run, values: tuple[float | None, ...], units: list[float] | None) -> list[Any]:
    from sae_bias.steering.edits import edit_features

    refs = [f.ref for f in run.features]
    return [
        edit_features(run.given["edit"], refs, v, units=units, positions=run.given["positions"])
        for v in values
    ]


def _direction(run: Run, model: Any, asked: Any, layer: int, values: tuple[float | None, ...]) -> list[Any]:
    """The contrast's difference of means, projected out at every layer; a strength is the share that is taken out."""
    from sae_bias.prompts.contrast import Contrast
    from sae_bias.steering.directions import difference_of_means
    from sae_bias.steering.edits import ProjectOut, at_every_layer

    if not isinstance(asked, Contrast):
        raise RequestError(
            "--direction needs --contrast, whose positive and negative texts it is the difference of."
        )
    found = difference_of_means(model, asked, layer, chat=run.given["chat"])
    return [
        at_every_layer(model, ProjectOut(found) if v is None else ProjectOut(found, share=v)) for v in values
    ]
