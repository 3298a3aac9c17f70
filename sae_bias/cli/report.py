"""`sae-bias report`: run folders into one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.options import Json, Out, Quiet, example

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Run folders; several stand side by side.", show_default=False),
]
Format = Annotated[str, typer.Option("--format", help="html, or md for a paper's appendix.")]


def register(app: typer.Typer) -> None:
    app.command("report", epilog=example("sae-bias report runs/demo"))(report)


def report(
    runs: Runs, format: Format = "html", json: Json = False, out: Out = None, quiet: Quiet = False
) -> None:
    """Write one report over run folders; nothing is measured again.

    The HTML is one file that opens without a network. Without --out it stands in the run's own folder.
    """
    with Console(json, quiet) as console:
        from sae_bias.report.page import write_report

        if out is not None and not out.suffix:
            out.mkdir(parents=True, exist_ok=True)
        path = write_report(*runs, out=out, format=format)
        console.say(f"report: {path}")
        console.finish({"report": str(path), "runs": [str(r) for r in runs], "format": format})
