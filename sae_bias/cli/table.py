"""`sae-bias table`: where a feature fires, subjects by statements."""

from typing import TYPE_CHECKING

from sae_bias.cli.context import FROM_FEATURE, Console, Run, command, rows
from sae_bias.core.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

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
        run.say(render(result.to_frame(), format).rstrip("\n"))
    else:
        _show(run, result)
        run.note_gate()
    columns = ["subject", "group", "statement", "act", "match", "content", "activation"]
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


def render(frame: "pd.DataFrame", format: str) -> str:
    """Subjects × statements as text."""
    if format == "csv":
        return frame.to_csv(float_format="%.4f")
    escape = _latex if format == "latex" else _markdown
    head = [escape(str(c)) for c in ("subject", *frame.columns)]
    rows = [
        [escape(str(i)), *("" if v != v else f"{v:.3f}" for v in row)]
        for i, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    if format == "md":
        lines = [head, ["---", *["---:"] * len(frame.columns)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    body = "\n".join(f"{' & '.join(row)} \\\\" for row in rows)
    return f"\\begin{{tabular}}{{l{'r' * len(frame.columns)}}}\n\\hline\n{' & '.join(head)} \\\\\n\\hline\n{body}\n\\hline\n\\end{{tabular}}"


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _latex(text: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escapes.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
