"""`sae-bias merge`: the shards of one run into one."""

import json as json_module
import re
from pathlib import Path
from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.options import Json, Out, Quiet, example
from sae_bias.core.errors import RequestError

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder that the shards share.", show_default=False)
]


def register(app: typer.Typer) -> None:
    app.command("merge", epilog=example("sae-bias merge runs/first"))(merge)


def merge(run: Run, json: Json = False, out: Out = None, quiet: Quiet = False) -> None:
    """Join the cells that `--shard I/N` runs left in one folder.

    Cells are moved, not measured again; where that completes the sweep, its table is written. The command of the shards, run once more
    without --shard, finds every cell done and adds the summary. With --out, the result of the merge is written there as merge.json.
    """
    with Console(json, quiet) as console:
        from sae_bias.runs.folder import RunFolder
        from sae_bias.workflows.sweep import merge_run

        if not run.is_dir():
            raise RequestError(f"there is no run folder {run}; give the --out that the shards were run with.")
        folder = run / "sweep" if (run / "sweep" / "shards").is_dir() else run
        again = _command(folder)
        cells, whole = merge_run(folder)
        found = {"run": str(run), "cells": cells, "complete": whole is not None, "next": again}
        if out is not None:
            RunFolder(out).write_json("merge", found)
        console.say(f"{found['cells']} new cells in {folder}")
        if again:
            console.say(f"now run: {again}")
        console.finish(found)


def _command(folder: Path) -> str | None:
    """The shards' own command without --shard."""
    for manifest in sorted(folder.glob("shards/*/manifest.json")):
        try:
            command = str(json_module.loads(manifest.read_text(encoding="utf-8"))["command"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return re.sub(r"\s--shard[ =]\S+", "", command)
    return None
