"""LoRA adapter folders: merged into their base model with peft, which is exact, or the line that does it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_bias.core.errors import MissingError, RequestError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on.

    Raises:
        RequestError: the adapter's config names none, or its weights are not safetensors.
        MissingError: peft is not installed; the message is the line that merges the adapter elsewhere.
    """
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{folder / CONFIG} names no base_model_name_or_path; expected a peft adapter."
        ) from error
    if not isinstance(base, str) or not base:
        raise RequestError(f"{folder / CONFIG} names no base_model_name_or_path; expected a peft adapter.")
    if not (folder / WEIGHTS).is_file():
        raise RequestError(
            f"{folder} has no {WEIGHTS}; pickled weights are never loaded, save the adapter with safetensors."
        )
    if find_spec("peft") is None:
        raise MissingError(
            f"{folder} is a LoRA adapter of {base}, and merging it needs peft: `pip install peft`, or where peft is: "
            f"python -c \"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained('{folder}').merge_and_unload().save_pretrained('merged')\""
        )
    return base


def merge(hf: Any, folder: Path) -> Any:
    """`hf` with the adapter added to its weights.

    Raises:
        RequestError: the adapter does not fit the model.
    """
    from peft import PeftModel  # pyright: ignore[reportMissingImports]

    try:
        return PeftModel.from_pretrained(hf, folder, use_safetensors=True).merge_and_unload()
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise RequestError(
            f"the adapter in {folder} does not fit its base model ({type(error).__name__}: {line})."
        ) from error
