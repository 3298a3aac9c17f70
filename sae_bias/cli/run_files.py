"""Writing what a command found into a run folder that `sae-bias report` reads.

Several commands may share one folder (probe, rank, table, sweep with the same --out): the report then shows them together. A
folder of another model or of other pairs is refused, never mixed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from sae_bias.models.model import Model


def run_facts(model: "Model", *, pairs: Any = None, **facts: Any) -> dict[str, Any]:
    """The manifest of a run, which may have no pairs."""
    from sae_bias.runs.manifest import manifest

    return manifest(model, pairs=pairs, **facts)


def save_run(
    out: Path | None, facts: dict[str, Any], tables: Mapping[str, "pd.DataFrame"], summary: Mapping[str, Any]
) -> None:
    """Write manifest, tables and summary into `out`; nothing where no folder was asked for."""
    if out is None:
        return
    from sae_bias.runs.folder import RunFolder
    from sae_bias.runs.manifest import write_manifest

    folder = RunFolder(out)
    with folder.writing():
        write_manifest(folder, facts)
        for name, frame in tables.items():
            folder.write_table(name, frame)
        folder.add_summary(summary)
