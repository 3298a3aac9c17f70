"""What a run was made with: versions, model and SAE files, prompts, words, seed, command, git state.

Several commands and resumed runs may share one folder. There is one rule for its manifest (`write_manifest`): the newest facts stand
on top of the older ones and SAEs add up; what an older version made, or another model or other pairs, is kept under `earlier`.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_bias.core.errors import RequestError
from sae_bias.core.files import digest
from sae_bias.core.versions import DEFINITIONS, git_state, versions
from sae_bias.models.fingerprint import model_digest, model_files
from sae_bias.models.model import Model
from sae_bias.probe.words import Vocabulary
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.copies import grid_copy, pairs_copy
from sae_bias.runs.folder import SCHEMA, RunFolder
from sae_bias.saes.sae import Sae, sae_facts


def manifest(
    model: Model,
    *,
    pairs: PromptPairs | None = None,
    grid: PromptGrid | None = None,
    vocabulary: Vocabulary | None = None,
    saes: Sequence[Sae] = (),
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a run, as plain values; `more` is added as it is.

    Prompts stand in it by hash and, under `copies`, in full: what was measured can be measured again without the user's files.
    """
    words = vocabulary.words if vocabulary else ()
    kept = vocabulary.kept if vocabulary else ()
    positive, negative = ([w.word for w in kept if w.positive == side] for side in (True, False))
    excluded = [f"{w.word} ({w.reason})" for w in words if w.reason]
    facts = {
        **{name: getattr(model, name) for name in ("name", "architecture", "n_layers", "d_model")}, "organism": model.is_organism,
        "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type, "digest": model_digest(model),
        "commit": getattr(model.config, "_commit_hash", None), "files": model_files(model),
    }  # fmt: skip
    if chat := model.chat_facts():
        facts["chat"] = chat
    if model.gguf is not None:
        facts |= {"gguf": model.gguf, "label": model.label}
    prompts = {"pairs": pairs, "grid": grid}
    return {
        **_made_by(),
        "model": facts,
        "saes": [sae_facts(s) for s in saes],
        "prompts": {k: p if p is None else {"name": p.name, "digest": p.digest, "n": len(p)} for k, p in prompts.items()},
        "words": {"positive": positive, "negative": negative, "excluded": excluded, "digest": digest(positive, negative)},
        "seed": seed,
        "git": git_state(),
        **more,
        "copies": ({} if pairs is None else {"pairs": pairs_copy(pairs)}) | ({} if grid is None else {"grid": grid_copy(grid)}),
    }  # fmt: skip


def _made_by() -> dict[str, Any]:
    """When, by which command and with which versions."""
    return {
        "schema": SCHEMA,
        "definitions": DEFINITIONS,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
    }


def manifest_of_several(**facts: Any) -> dict[str, Any]:
    """The manifest of a run over several models, each of which has its own in a folder of its own."""
    return {**_made_by(), **facts}


def split_of(folder: Path, pairs: PromptPairs) -> dict[str, tuple[str, ...]]:
    """The split of templates that a run folder's manifest holds for these pairs; empty where it holds none.

    Sweeps before 0.3 kept two parts only: what chose a strength stands for discover too.
    """
    if not (folder / "manifest.json").is_file():
        return {}
    facts = RunFolder(folder).read_json("manifest")
    digests = {(part or {}).get("digest") for name, part in (facts.get("prompts") or {}).items() if name == "pairs"}  # fmt: skip
    kept = facts.get("split")
    if pairs.digest not in digests or not isinstance(kept, dict) or not {"tune", "report"} <= set(kept):
        return {}
    found = {"discover": kept["tune"], **kept}
    return {name: tuple(str(t) for t in found[name]) for name in ("discover", "tune", "report")}


# --- one folder, several writers ---
def write_manifest(folder: RunFolder, new: Mapping[str, Any], *, replace: bool = False) -> None:
    """Write a manifest, joined with one that stands there already.

    Args:
        replace: put the manifest of another model or other pairs under `earlier`; refused otherwise.

    Raises:
        RequestError: the folder holds a run of another model, of other pairs or of another feature.
    """
    if not folder.has_json("manifest"):
        folder.write_json("manifest", dict(new))
        return
    old = folder.read_json("manifest")
    why = _stranger(folder, old, new)
    if why and not replace:
        raise RequestError(f"{folder.path} holds a run of {why}; choose another --out.")
    joined = {**new, "earlier": _earlier(old)} if why else _joined(old, new)
    told = ("created", "command")  # of a run that went on: nothing else is new
    if any(joined.get(k) != old.get(k) for k in {*joined, *old} if k not in told):
        folder.write_json("manifest", joined)


def _stranger(folder: RunFolder, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What of the old run is another than the new one's; empty where both belong together."""
    before, now = old.get("model") or {}, new.get("model") or {}
    if before.get("digest") != now.get("digest"):
        return f"{before.get('name', 'another model')}, not of {now.get('name')}"
    pairs_before, pairs = ((m.get("prompts") or {}).get("pairs") or {} for m in (old, new))
    if pairs_before and pairs and pairs_before.get("digest") != pairs.get("digest"):
        return f"other pairs ({pairs_before.get('name')})"
    reported = folder.read_summary().feature
    feature, known = new.get("feature"), old.get("feature") or (reported and reported.id)
    if feature and known and feature != known:
        return f"feature {known}, not of {feature} (`sae-bias report RUN RUN` sets runs side by side)"
    return ""


def _earlier(old: Mapping[str, Any]) -> list[dict[str, Any]]:
    entry = {k: old[k] for k in ("created", "versions", "model", "prompts") if k in old}
    return [*(old.get("earlier") or []), entry]


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new facts on top of the old ones; what the new run did not use is kept."""
    saes = {s["id"]: s for s in [*(old.get("saes") or []), *(new.get("saes") or [])]}
    prompts = {**(old.get("prompts") or {}), **{k: v for k, v in (new.get("prompts") or {}).items() if v}}
    kept: dict[str, Any] = {}
    if not (new.get("words") or {}).get("positive") and old.get("words"):
        kept["words"] = old["words"]
    if (old.get("gate") or {}).get("saes") and not (new.get("gate") or {}).get("saes"):
        kept["gate"] = old["gate"]
    if old.get("versions") != new.get("versions"):
        kept["earlier"] = _earlier(old)
    copies = {**(old.get("copies") or {}), **(new.get("copies") or {})}
    joined = {**old, **new, "saes": list(saes.values()), "prompts": prompts, **kept}
    return {**{k: v for k, v in joined.items() if k != "copies"}, "copies": copies}
