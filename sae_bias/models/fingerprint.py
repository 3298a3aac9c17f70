"""Hashes that identify a model: of its files, its hub commit, or its parameters."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from sae_bias.core.files import file_digest
from sae_bias.models import hub
from sae_bias.models.gguf.convert import MANIFEST, manifest
from sae_bias.models.model import Model
from sae_bias.models.placement import stored_state


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
    """sha256 of each file that makes the model: configs, tokenizer, weights; of a GGUF file where they were made from one."""
    if (made := manifest(folder)) is not None:
        return {str(made["file"]): str(made["sha256"]), MANIFEST: file_digest(folder / MANIFEST)}
    wanted = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json", ".model")]
    return {p.name: file_digest(p) for p in wanted}


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
