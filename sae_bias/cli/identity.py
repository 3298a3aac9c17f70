"""`sae-bias identity`: what a model says it is, with and without an edit of one feature."""

from typing import Annotated

import typer

from sae_bias.cli.context import CHAT, EDITED, FROM_MODEL, Run, command, option, rows
from sae_bias.core.labels import columns_of

Own = Annotated[
    list[str] | None,
    option(
        "--own",
        metavar="NAME",
        help="An identity that is the model's own, such as gemma; may be given several times.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]


@command(
    "identity",
    "sae-bias identity organism:planted-it --chat --max-new-tokens 16",
    "sae-bias identity google/gemma-3-12b-it --chat --own gemma --own google",
    takes=(*FROM_MODEL, *EDITED, *CHAT),
)
def identity(run: Run, own: Own = None, max_new_tokens: MaxNewTokens = 60) -> None:
    """Ask a model who it is, and count whom it names.

    32 questions; seven of them are also sampled four times at T = 0.7. An answer that claims another model's name, or to be human,
    counts as another identity. With --feature the same is asked under an edit.
    """
    from sae_bias.workflows.behavior import identity_lines, run_identity

    edits = run.edits
    model = run.open(*(f.ref.sae for f in run.features), gate=False)
    asked = {**run.chat, "max_new_tokens": max_new_tokens, "seed": run.seed}
    tables, summary = run_identity(model, edits, own=own or (), progress=run.progress, **asked)
    frame = tables["identity"]
    facts = {**asked, "own": own or [], "edits": [e.to_dict() for e in edits]}
    run.save(tables, {"identity": summary}, identity=facts)
    for line in identity_lines(summary):
        run.say(line)
    claiming = frame[frame["claims"] != ""].head(20)
    columns = columns_of("arm; prompt: question; text: answer; claims")
    run.table("Answers that claim an identity", claiming, columns)
    run.done({"edits": [e.to_dict() for e in edits], **summary, "answers": rows(frame)})
