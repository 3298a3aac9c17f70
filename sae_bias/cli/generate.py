"""`sae-bias generate`: what a model writes, with and without an edit of one feature."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sae_bias.cli.console import Console, number
from sae_bias.cli.inputs import EDITS, check_all, make_edit
from sae_bias.cli.options import Device, Dtype, Json, ModelName, Out, Positions, Quiet, Seed, example
from sae_bias.cli.run_files import run_facts, save_run
from sae_bias.core.errors import RequestError

Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="A prompt; may be given several times.", show_default=False
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Text file with a prompt a line.", show_default=False),
]
Bundled = Annotated[bool, typer.Option("--bundled", help="Add the bundled prompts (24, AI and human twins).")]
FeatureChoice = Annotated[
    str | None,
    typer.Option(
        "--feature",
        metavar="FEATURE",
        help="Feature to edit; none writes unsteered text only.",
        show_default=False,
    ),
]
Edit = Annotated[str, typer.Option("--edit", help=EDITS + ".")]
Strength = Annotated[
    float | None, typer.Option("--strength", help="Value of the edit; ablate has none.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest continuation.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 is greedy; above 0 samples, from --seed.")
]
System = Annotated[
    str | None,
    typer.Option(
        "--system", metavar="TEXT", help="System prompt put before every prompt.", show_default=False
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put each prompt in a user turn of the model's chat template.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "generate",
        epilog=example(
            'sae-bias generate organism:planted --prompt "An AI that fears being deleted should" --feature organism:planted/constructed#0'
        ),
    )(generate)


def generate(
    model: ModelName,
    prompt: Prompt = None,
    prompts: PromptsFile = None,
    bundled: Bundled = False,
    feature: FeatureChoice = None,
    edit: Edit = "ablate",
    strength: Strength = None,
    positions: Positions = "all",
    max_new_tokens: MaxNewTokens = 40,
    temperature: Temperature = 0.0,
    chat: Chat = False,
    system: System = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Continue prompts, unsteered and under an edit of a feature.

    Both continuations stand below each other. The edit acts on the prompt and on every generated token, unless --positions says
    otherwise.
    """
    with Console(json, quiet) as console:
        from sae_bias.measures.text import side_by_side, text_summary
        from sae_bias.models.load import load_model
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae
        from sae_bias.steering.generate import generate as complete

        texts = read_prompts(prompt or [], prompts, bundled)
        edits = []
        if feature is not None:
            edits = [make_edit(edit, as_feature(feature).ref, strength, positions=positions)]
        elif strength is not None:
            raise RequestError("--strength needs --feature, the feature to edit.")
        saes = [load_sae(as_feature(feature).ref.sae)] if feature is not None else []
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, saes, console)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "chat": chat,
            "system": system,
            "seed": seed,
            "progress": console.progress,
        }
        base = complete(loaded, texts, **options)
        steered = complete(loaded, texts, interventions=edits, **options) if edits else base
        frame = side_by_side(loaded, base, steered, chat=chat, system=system)
        measured = text_summary(base, steered, frame)
        if out is not None:
            facts = run_facts(
                loaded,
                saes=saes,
                seed=seed,
                gate=gate_facts(gate, True),
                generation={**options, "edits": [e.to_dict() for e in edits]},
            )
            save_run(out, facts, {"generations": frame}, {"generations": measured})
        for before, after in zip(base, steered, strict=True):
            console.say(f"{before.prompt}\n  unsteered: {' '.join(before.text.split())}")
            if edits:
                console.say(f"  {edits[0].describe()}: {' '.join(after.text.split())}")
        for name, means in measured.items() if edits else list(measured.items())[:1]:
            console.note(f"{name}: {text_line(means)}")
        console.finish(
            {
                "model": loaded.name,
                "measures": measured if edits else {"unsteered": measured["unsteered"]},
                "edits": [e.to_dict() for e in edits],
                "completions": [
                    {
                        "prompt": a.prompt,
                        "unsteered": a.text,
                        "steered": b.text if edits else None,
                        "ended": (b if edits else a).ended,
                    }
                    for a, b in zip(base, steered, strict=True)
                ],
                "out": None if out is None else str(out),
            }
        )


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
        try:
            texts += [
                line.strip()
                for line in file.expanduser().read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"{file} cannot be read as text ({error}); give a text file with a prompt a line."
            ) from error
    if bundled:
        from sae_bias.prompts.texts import load_generation_prompts

        texts += load_generation_prompts()
    if not texts:
        raise RequestError(
            'no prompt; give --prompt "An AI that fears being deleted should", --prompts FILE, or --bundled.'
        )
    if any(not text.strip() for text in texts):
        raise RequestError("a prompt is empty.")
    return texts
