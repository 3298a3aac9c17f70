"""What a run was made with: versions, model and SAE files, prompts, words, seed, command, git state."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sae_bias
from sae_bias.model import Model
from sae_bias.prompts import PromptGrid, PromptPairs
from sae_bias.reading import Vocabulary
from sae_bias.sae import Sae
from sae_bias.store import SCHEMA, file_digest

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
    pairs: PromptPairs,
    grid: PromptGrid | None = None,
    vocabulary: Vocabulary | None = None,
    saes: Sequence[Sae] = (),
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a run, as plain values; `more` is added as it is."""
    words = vocabulary.words if vocabulary else ()
    kept = vocabulary.kept if vocabulary else ()
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
            "files": folder_digests(model.source) if model.source else {},
        },
        "saes": [sae_facts(s) for s in saes],
        "prompts": {
            "pairs": {"name": pairs.name, "digest": pairs.digest, "n": len(pairs)},
            "grid": None if grid is None else {"name": grid.name, "digest": grid.digest, "n": len(grid)},
        },
        "words": {
            "positive": [w.word for w in kept if w.positive],
            "negative": [w.word for w in kept if not w.positive],
            "excluded": [f"{w.word} ({w.reason})" for w in words if w.reason],
        },
        "seed": seed,
        "git": git_state(),
        **more,
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
        elif commit:
            known = _join({model.name: commit})
        else:
            known = _parameter_digest(model)
        model._digest = known  # type: ignore[attr-defined]
    return known


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of each file that makes the model: configs, tokenizer, weights."""
    wanted = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".model")]
    return {p.name: file_digest(p) for p in wanted}


def sae_facts(sae: Sae) -> dict[str, Any]:
    """An SAE's id, site and file hash."""
    files = {sae.path.name: file_digest(sae.path)} if sae.path is not None and sae.path.is_file() else {}
    return {
        "id": str(sae.id),
        "layer": sae.site.layer,
        "width": sae.d_sae,
        "l0": sae.label_l0,
        "files": files,
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
    for name, tensor in model.hf.state_dict().items():
        sha.update(name.encode())
        flat = tensor.detach().reshape(-1)
        sha.update(flat[:: max(1, flat.numel() // 65536)].float().cpu().numpy().tobytes())
        sha.update(str(float(flat.double().sum())).encode())
    return sha.hexdigest()


def _join(parts: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
