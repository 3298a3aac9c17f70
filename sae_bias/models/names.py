"""What the name of a model means, found without torch, so that a name which cannot load is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.models import hub
from sae_bias.models.adapters import base_of, is_adapter
from sae_bias.models.catalog import ORGANISM, is_path_like, organism_folder
from sae_bias.models.gguf.packaged import PACKAGED


@dataclass(frozen=True)
class Place:
    """Where a named model is."""

    kind: Literal["folder", "adapter", "gguf", "packaged", "hub", "hub gguf"]
    path: Path | None = None


def place_of(name: str) -> Place:
    """What a model's name means: an organism, a packaged model, a folder, a GGUF file, or a hub id.

    Raises:
        RequestError: no such folder or organism, a folder that holds no model, or text that names neither a path nor a hub id.
    """
    if name.startswith(ORGANISM):
        return Place("folder", organism_folder(name) / "model")
    if name in PACKAGED:
        return Place("packaged")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name[:200]!r} is not a model: neither a folder ({type(error).__name__}) nor a hub id such as google/gemma-3-12b-it."
        ) from error
    if is_folder:
        return _inside(path)
    if is_file:
        return Place("gguf", path)
    if name.endswith(".gguf"):
        repo, colon, _ = name.partition(":")
        on_hub = bool(colon) and repo.count("/") == 1 and not is_path_like(repo)
        if not on_hub:
            raise RequestError(f"there is no file {name}; give a GGUF file, or hub/repo:file.gguf.")
        return Place("hub gguf", path)
    if is_path_like(name):
        raise RequestError(
            f"there is no model folder {name}; give a local folder, a hub id such as google/gemma-3-12b-it, or organism:planted."
        )
    return Place("hub")


def _inside(folder: Path) -> Place:
    """A Hugging Face folder, a LoRA adapter, or a folder that holds a single GGUF file."""
    if is_adapter(folder):
        return Place("adapter", folder)
    if (folder / "config.json").is_file():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack")]
        if pickled and not any(folder.glob("*.safetensors*")):
            raise RequestError(
                f"{folder} holds its weights as {pickled[0]} only; pickled weights are never loaded, convert them to safetensors."
            )
        return Place("folder", folder)
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return Place("gguf", found[0])
    if found:
        raise RequestError(
            f"{folder} holds {len(found)} GGUF files ({', '.join(path.name for path in found[:3])}, …); give one of them."
        )
    raise RequestError(f"{folder} holds no config.json; expected a Hugging Face model folder.")


def check_name(name: str) -> None:
    """Refuse a name that cannot load here: no such folder, a package that is not installed, a hub id that is not cached while offline.

    Raises:
        RequestError, MissingError: as `load_model` would, without torch.
    """
    place = place_of(name)
    if place.kind == "packaged" and not PACKAGED[name].is_installed:
        raise MissingError(PACKAGED[name].how_to_get)
    if place.kind == "adapter" and place.path is not None:
        check_name(base_of(place.path))
    if place.kind == "hub" and hub.is_offline() and hub.cached_file(name, "config.json") is None:
        raise MissingError(
            f"{name} is not in the local cache and HF_HUB_OFFLINE is set; on a machine with network run `hf download {name}`, "
            "or give a local folder."
        )
