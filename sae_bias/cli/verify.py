"""`sae-bias verify`: a run measured again from its folder alone."""

from pathlib import Path
from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.options import Json, Out, Quiet, example
from sae_bias.core.errors import GateError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]
Cells = Annotated[int, typer.Option("--cells", min=0, help="Cells of a sweep to measure again.")]
All = Annotated[bool, typer.Option("--all", help="Measure every cell again.")]
ModelHere = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="Where the model is now, if it has moved.", show_default=False
    ),
]
DeviceHere = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda …; the run's own by default.", show_default=False),
]
COLUMNS = {
    "what": "what",
    "status": "",
    "difference": "largest difference",
    "tolerance": "allowed",
    "detail": "",
}


def register(app: typer.Typer) -> None:
    app.command(
        "verify", epilog=example("sae-bias verify runs/demo", "sae-bias verify runs/demo --all --json")
    )(verify)


def verify(
    run: Run,
    cells: Cells = 8,
    every: All = False,
    model: ModelHere = None,
    device: DeviceHere = None,
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run again from its folder, and say what agrees and what differs.

    The folder's own copies of prompts, words and edits are used. Compared are the files' hashes, each table with the cells it was made
    of, and the scores of every prompt with those measured now, within the rounding of the precision (a difference of 1e-4 in float32).
    Exit code 4 says that something differs. With --out, the result is written there as verify.json.
    """
    with Console(json, quiet) as console:
        from sae_bias.runs.folder import RunFolder
        from sae_bias.workflows.verify import verify_run

        found = verify_run(
            run, cells=None if every else cells, model=model, device=device, progress=console.progress
        )
        result = {
            "run": str(run),
            "agrees": found.agrees,
            "cells": found.n_cells,
            "of_cells": found.of_cells,
            "checks": [c.row() for c in found.checks],
        }
        if out is not None:
            RunFolder(out).write_json("verify", result)
        console.table(f"{run}", found.to_frame(), COLUMNS)
        counts = (
            f"{len(found.checks) - len(found.differing)} of {len(found.checks)} checks without a difference"
        )
        again = f"; {found.n_cells} of {found.of_cells} cells measured again" if found.of_cells else ""
        console.say(f"{'agrees' if found.agrees else 'differs'}: {counts}{again}")
        console.finish(result)
        if not found.agrees:
            first = found.differing[0]
            raise GateError(
                f"{run} differs in {len(found.differing)} checks; the first: {first.what}: {first.detail}"
            )
