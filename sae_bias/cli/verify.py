"""`sae-bias verify`: a run measured again from its folder alone."""

from pathlib import Path
from typing import Annotated

from sae_bias.cli.context import Run, command, picked
from sae_bias.core.errors import GateError

COLUMNS = {
    "what": "what",
    "status": "",
    "difference": "largest difference",
    "tolerance": "allowed",
    "detail": "",
}


@command(
    "verify",
    "sae-bias verify runs/demo",
    "sae-bias verify runs/demo --all --json",
    takes=(),
)
def verify(
    run: Run,
    folder: Path,
    cells: Annotated[int, {"min": 0}] = 8,
    all: bool = False,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Measure a run again from its folder, and say what agrees and what differs.

    The folder's own copies of prompts, words and edits are used. Compared are the files' hashes, each table with the cells it was made
    of, and the scores of every prompt with those measured now, within the rounding of the precision (a difference of 1e-4 in float32).
    Exit code 4 says that something differs. With --out, the result is written there as verify.json.

    Args:
        RUN: Run folder.
        --cells: Cells of a sweep to measure again.
        --all: Measure every cell again.
        --model MODEL: Where the model is now, if it has moved.
        --device: auto, cpu, cuda …; the run's own by default.
    """
    from sae_bias.workflows.verify import verify_run

    wanted = None if all else cells
    found = verify_run(folder, cells=wanted, model=model, device=device, progress=run.progress)
    figures = {"run": str(folder), **picked(found, "agrees of_cells"), "cells": found.n_cells}
    result = figures | {"checks": [vars(c) for c in found.checks]}
    run.write_json("verify", result)
    run.table(f"{folder}", found.to_frame(), COLUMNS)
    counts = f"{len(found.checks) - len(found.differing)} of {len(found.checks)} checks without a difference"
    again = f"; {found.n_cells} of {found.of_cells} cells measured again" if found.of_cells else ""
    run.say(f"{'agrees' if found.agrees else 'differs'}: {counts}{again}")
    run.finish(result)
    if not found.agrees:
        first = found.differing[0]
        n = len(found.differing)
        raise GateError(f"{folder} differs in {n} checks; the first: {first.what}: {first.detail}")
