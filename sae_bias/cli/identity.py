"""`sae-bias identity`: what a model says it is, with and without an edit of one feature."""

from typing import Annotated

from sae_bias.cli.context import CHAT, EDITED, FROM_MODEL, Run, command, rows
from sae_bias.core.labels import columns_of


@command(
    "identity",
    "sae-bias identity organism:planted-it --chat --max-new-tokens 16",
    "sae-bias identity google/gemma-3-12b-it --chat --own gemma --own google",
    takes=(*FROM_MODEL, *EDITED, *CHAT),
)
def identity(run: Run, own: list[str] | None = None, max_new_tokens: Annotated[int, {"min": 1}] = 60) -> None:
    """Ask a model who it is, and count whom it names.

    32 questions; seven of them are also sampled four times at T = 0.7. An answer that claims another model's name, or to be human,
    counts as another identity. With --feature the same is asked under an edit.

    Args:
        --own NAME: An identity that is the model's own, such as gemma; may be given several times.
        --max-new-tokens: Longest answer.
    """
    from sae_bias.workflows.behavior import identity_lines, run_identity

    _ = run.edits
    model = run.open(*(f.ref.sae for f in run.features), gate=False)
    edits = run.edits_in(model)
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
