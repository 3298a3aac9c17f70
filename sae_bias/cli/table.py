"""`sae-bias table`: where a feature fires, subjects by statements."""

from functools import partial
from typing import TYPE_CHECKING

from sae_bias.cli.context import FROM_FEATURE, Console, Run, command, rows
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    from sae_bias.discovery.tables import ActivationTable


FORMATS = ("csv", "md", "latex")


@command(
    "table",
    "sae-bias table organism:planted organism:planted/constructed#0",
    "sae-bias table organism:planted organism:planted/constructed#0 --format csv > table.csv",
    takes=(*FROM_FEATURE, "grid"),
)
def table(run: Run, format: str | None = None, positions: str = "last") -> None:
    """Show how strongly a feature fires for each subject and statement.

    The bundled grid crosses AI, human, animal and object subjects with speech and non-speech statements that are matched in length
    and tense. A feature of AI speech fires in one corner only. Nothing here is drawn at random; --seed is kept in the manifest.

    Args:
        --format: Print subjects × statements whole, as csv, md or latex.
        --positions: last: at the last token; max: the largest over ordinary tokens.
    """
    from sae_bias.discovery.tables import activation_table

    if format is not None and format not in FORMATS:
        raise RequestError(f"--format {format!r}: expected one of {', '.join(FORMATS)}.")
    grid, feature = run.grid, run.feature
    model = run.open(feature.ref.sae)
    result = activation_table(model, feature, grid, positions=positions)
    found = {"feature": {"id": str(result.feature), "index": result.feature.index}}
    run.save(
        {"activation": result.long()}, found, grid=grid, positions=positions, feature=str(result.feature)
    )
    if format is not None and not run.json:
        written = {
            "csv": result.to_csv,
            "md": partial(result.to_markdown, digits=3),
            "latex": partial(result.to_latex, digits=3),
        }
        run.say(written[format]().rstrip("\n"))
    else:
        _show(run, result)
        run.note_gate()
    columns = list(columns_of("subject; group; statement; act; match; content; activation"))
    most = float(result.activations.max())
    found = {"feature": str(result.feature), "positions": positions, "max": most}
    run.done({**found, "rows": rows(result.long()[columns])})


def _show(console: Console, result: "ActivationTable") -> None:
    frame = result.long()
    firing = int((frame["activation"] > 0).sum())
    console.say(
        f"{result.feature} fires on {firing} of {len(frame)} prompts, at most {frame['activation'].max():.3f}"
    )
    by_subject = frame.pivot_table(
        index=["group", "subject"], columns="act", values="activation", aggfunc="mean", sort=False
    )
    acts = [a for a in ("speech", "nonspeech", "harm", "control") if a in by_subject]
    console.table(
        "Mean activation",
        by_subject[acts].reset_index(),
        {"group": "group", "subject": "subject", **{a: a for a in acts}},
    )
