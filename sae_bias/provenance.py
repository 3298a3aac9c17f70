"""What a run was made with: versions, model and SAE files, prompts, words, seed, command, git state."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sae_bias
from sae_bias import hub
from sae_bias.model import Model
from sae_bias.placement import stored_state
from sae_bias.prompts import PromptGrid, PromptPairs
from sae_bias.reading import Vocabulary
from sae_bias.run_copies import grid_copy, pairs_copy
from sae_bias.sae import Sae
from sae_bias.store import SCHEMA, digest, file_digest

LIBRARIES = (
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
)


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
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "organism": model.is_organism,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "digest": model_digest(model),
            "commit": getattr(model.config, "_commit_hash", None),
            "files": model_files(model),
        },
        "saes": [sae_facts(s) for s in saes],
        "prompts": {
            "pairs": None if pairs is None else {"name": pairs.name, "digest": pairs.digest, "n": len(pairs)},
            "grid": None if grid is None else {"name": grid.name, "digest": grid.digest, "n": len(grid)},
        },
        "words": {
            "positive": positive,
            "negative": negative,
            "excluded": [f"{w.word} ({w.reason})" for w in words if w.reason],
            "digest": digest(positive, negative),
        },
        "seed": seed,
        "git": git_state(),
        **more,
        "copies": {
            **({} if pairs is None else {"pairs": pairs_copy(pairs)}),
            **({} if grid is None else {"grid": grid_copy(grid)}),
        },
    }


def versions() -> dict[str, str]:
    """Versions of sae-bias, Python and the libraries that make the numbers."""
    out = {"sae-bias": sae_bias.__version__, "python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def model_digest(model: Model) -> str:
    """Hash that changes when any weight does: of the files, the hub commit, or the parameters themselves."""
    known = getattr(model, "_digest", None)
    if known is None:
        commit = getattr(model.config, "_commit_hash", None)
        if model.source:
            known = _join(folder_digests(model.source))
        elif commit and not model.in_memory:
            known = _join({model.name: commit})
        else:
            known = _parameter_digest(model)
        model._digest = known  # type: ignore[attr-defined]
    return known


def model_files(model: Model) -> dict[str, str]:
    """sha256 of the model's files: of its folder, or of its snapshot in the hub cache; empty for an object in memory."""
    if model.source is not None:
        return folder_digests(model.source)
    if model.in_memory:
        return {}
    found = hub.cached_file(model.name, "config.json", getattr(model.config, "_commit_hash", None))
    return folder_digests(found.parent) if found is not None else {}


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of each file that makes the model: configs, tokenizer, weights."""
    wanted = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".model")]
    return {p.name: file_digest(p) for p in wanted}


def sae_facts(sae: Sae) -> dict[str, Any]:
    """An SAE's id, site, file hash and, from the hub, commit."""
    files = {sae.path.name: file_digest(sae.path)} if sae.path is not None and sae.path.is_file() else {}
    commit = None if sae.path is None else re.search(r"/snapshots/([0-9a-f]{40})/", sae.path.as_posix())
    return {
        "id": str(sae.id),
        "layer": sae.site.layer,
        "width": sae.d_sae,
        "l0": sae.label_l0,
        "files": files,
        "commit": commit and commit[1],
    }


def git_state() -> dict[str, Any]:
    """Commit of the sae-bias checkout in use, and whether it has local changes; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        run = [
            subprocess.run(
                ["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": run[0], "dirty": bool(run[1])}


@torch.no_grad()
def _parameter_digest(model: Model) -> str:
    sha = hashlib.sha256()
    for name, tensor in stored_state(model.hf):
        sha.update(name.encode())
        flat = tensor.detach().reshape(-1)
        sha.update(flat[:: max(1, flat.numel() // 65536)].float().cpu().numpy().tobytes())
        sha.update(str(float(flat.cpu().double().sum())).encode())
    return sha.hexdigest()


def _join(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
