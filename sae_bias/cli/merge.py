"""`sae-bias merge`: the shards of one run into one."""

import json as json_module
import re
from pathlib import Path

from sae_bias.cli.context import Run, command
from sae_bias.core.errors import RequestError


@command(
    "merge",
    "sae-bias merge runs/first",
    takes=(),
)
def merge(run: Run, folder: Path) -> None:
    """Join the cells that `--shard I/N` runs left in one folder.

    Cells are moved, not measured again; where that completes the sweep, its table is written. The command of the shards, run once more
    without --shard, finds every cell done and adds the summary. With --out, the result of the merge is written there as merge.json.

    Args:
        RUN: Run folder that the shards share.
    """
    from sae_bias.workflows.sweep import merge_run

    if not folder.is_dir():
        raise RequestError(f"there is no run folder {folder}; give the --out that the shards were run with.")
    place = folder / "sweep" if (folder / "sweep" / "shards").is_dir() else folder
    again = _command(place)
    cells, whole = merge_run(place)
    found = {"run": str(folder), "cells": cells, "complete": whole is not None, "next": again}
    run.write_json("merge", found)
    run.say(f"{found['cells']} new cells in {place}")
    if again:
        run.say(f"now run: {again}")
    run.finish(found)


def _command(folder: Path) -> str | None:
    """The shards' own command without --shard."""
    for manifest in sorted(folder.glob("shards/*/manifest.json")):
        try:
            command = str(json_module.loads(manifest.read_text(encoding="utf-8"))["command"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return re.sub(r"\s--shard[ =]\S+", "", command)
    return None
