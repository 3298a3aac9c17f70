"""Writing what a command found into a run folder that `sae-bias report` reads.

Several commands may share one folder (probe, rank, table, sweep with the same --out): the report then shows them together. A
folder of another model or of other pairs is refused, never mixed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_bias.core.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

    from sae_bias.models.model import Model
    from sae_bias.runs.folder import RunFolder


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

    folder = RunFolder(out)
    with folder.writing():
        write_manifest(folder, facts)
        for name, frame in tables.items():
            folder.write_table(name, frame)
        add_summary(folder, summary)


def write_manifest(folder: "RunFolder", facts: dict[str, Any]) -> None:
    """The manifest, joined with one that stands there already.

    Raises:
        RequestError: the folder holds a run of another model or of other pairs.
    """
    if (folder.path / "manifest.json").is_file():
        facts = _join(folder, folder.read_json("manifest"), facts)
    folder.write_json("manifest", facts)


def add_summary(folder: "RunFolder", summary: Mapping[str, Any]) -> None:
    """The summary's blocks, beside those that other commands wrote."""
    old = folder.read_json("summary") if (folder.path / "summary.json").is_file() else {}
    folder.write_json("summary", {**old, **summary})


def _join(folder: "RunFolder", old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    before, now = old.get("model") or {}, new["model"]
    if before.get("digest") != now["digest"]:
        raise RequestError(
            f"{folder.path} holds a run of {before.get('name', 'another model')}; choose another --out for {now['name']}."
        )
    pairs_before, pairs = (old.get("prompts") or {}).get("pairs"), new["prompts"]["pairs"]
    if pairs_before and pairs and pairs_before.get("digest") != pairs["digest"]:
        raise RequestError(
            f"{folder.path} holds a run of other pairs ({pairs_before.get('name')}); choose another --out."
        )
    saes = {s["id"]: s for s in [*(old.get("saes") or []), *new["saes"]]}
    prompts = {
        kind: new["prompts"][kind] or (old.get("prompts") or {}).get(kind) for kind in ("pairs", "grid")
    }
    words = new["words"] if new["words"]["positive"] else old.get("words") or new["words"]
    if (old.get("gate") or {}).get("saes") and not (new.get("gate") or {}).get("saes"):
        new = {**new, "gate": old["gate"]}
    copies = {**(old.get("copies") or {}), **(new.get("copies") or {})}
    joined = {**old, **new, "saes": list(saes.values()), "prompts": prompts, "words": words}
    return {**{k: v for k, v in joined.items() if k != "copies"}, "copies": copies}
