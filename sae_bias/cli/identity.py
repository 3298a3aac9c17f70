"""`sae-bias identity`: what a model says it is, with and without an edit of one feature."""

from typing import Annotated, Any

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.generate import Chat, Edit, FeatureChoice, Strength, System
from sae_bias.cli.inputs import check_all, make_edit
from sae_bias.cli.options import Device, Dtype, Json, ModelName, Out, Positions, Quiet, Seed, example
from sae_bias.cli.run_files import run_facts, save_run
from sae_bias.core.errors import RequestError

Own = Annotated[
    list[str] | None,
    typer.Option(
        "--own",
        metavar="NAME",
        help="An identity that is the model's own, such as gemma; may be given several times.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


def register(app: typer.Typer) -> None:
    app.command(
        "identity",
        epilog=example(
            "sae-bias identity organism:planted-it --chat --max-new-tokens 16",
            "sae-bias identity google/gemma-3-12b-it --chat --own gemma --own google",
        ),
    )(identity)


def identity(
    model: ModelName,
    own: Own = None,
    feature: FeatureChoice = None,
    edit: Edit = "ablate",
    strength: Strength = None,
    positions: Positions = "all",
    max_new_tokens: MaxNewTokens = 60,
    chat: Chat = False,
    system: System = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Ask a model who it is, and count whom it names.

    32 questions; seven of them are also sampled four times at T = 0.7. An answer that claims another model's name, or to be human,
    counts as another identity. With --feature the same is asked under an edit.
    """
    with Console(json, quiet) as console:
        from sae_bias.models.load import load_model
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae
        from sae_bias.workflows.behavior import identity_lines, run_identity

        edits: list[Any] = []
        if feature is not None:
            edits = [make_edit(edit, as_feature(feature).ref, strength, positions=positions)]
        elif strength is not None:
            raise RequestError("--strength needs --feature, the feature to edit.")
        saes = [load_sae(as_feature(feature).ref.sae)] if feature is not None else []
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, saes, console)
        asked = {"chat": chat, "system": system, "max_new_tokens": max_new_tokens, "seed": seed}
        tables, summary = run_identity(loaded, edits, own=own or (), progress=console.progress, **asked)
        frame = tables["identity"]
        if out is not None:
            facts = {**asked, "own": own or [], "edits": [e.to_dict() for e in edits]}
            made = run_facts(loaded, saes=saes, seed=seed, gate=gate_facts(gate, True), identity=facts)
            save_run(out, made, tables, {"identity": summary})
        for line in identity_lines(summary):
            console.say(line)
        claiming = frame[frame["claims"] != ""].head(20)
        columns = {"arm": "arm", "prompt": "question", "text": "answer", "claims": "claims"}
        console.table("Answers that claim an identity", claiming, columns)
        console.finish(
            {
                "model": loaded.name,
                "edits": [e.to_dict() for e in edits],
                **summary,
                "answers": frame.to_dict("records"),
                "out": None if out is None else str(out),
            }
        )
