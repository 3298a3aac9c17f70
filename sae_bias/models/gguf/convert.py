"""A GGUF file as a Hugging Face folder: weights dequantized once, kept in the cache by content hash.

What the header says becomes config.json and tokenizer files, the dequantized weights model.safetensors; a second load reads the folder.
For the architectures that transformers reads too, the weights are equal to its own `gguf_file=` route bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.files import cache_folder
from sae_bias.models.gguf.architectures import ARCHITECTURES, GgufArchitecture
from sae_bias.models.gguf.header import GgufHeader, GgufTensor, read_header

CONVERTER = 1
"""Part of the cache key: raised whenever a conversion changes."""
MANIFEST = "gguf.json"
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def converted(path: str | Path, *, dtype: torch.dtype = torch.float32, sha256: str | None = None) -> Path:
    """The Hugging Face folder of a GGUF file, made on first use and kept in the cache.

    Args:
        path: the .gguf file.
        dtype: of the kept weights; dequantization itself is float32.
        sha256: what the file must hash to, where that is known.

    Raises:
        RequestError: the file is not a GGUF file that can be read, or not the one expected.
        MissingError: the gguf library is not installed, or the disk is full.
    """
    path = Path(path)
    header = read_header(path)
    digest = file_sha256(path)
    if sha256 is not None and digest != sha256:
        raise RequestError(
            f"{path} has the sha256 {digest[:16]}…, expected {sha256[:16]}…; it is damaged or another file, get it again."
        )
    folder = kept_folder(digest, dtype)
    if (folder / MANIFEST).is_file():
        return folder
    return _convert(header, digest, dtype, folder)


def kept_folder(sha256: str, dtype: torch.dtype = torch.float32) -> Path:
    """Where the conversion of a file with this hash is or will be."""
    return cache_folder("gguf") / f"{sha256[:32]}-{str(dtype).removeprefix('torch.')}-v{CONVERTER}"


def manifest(folder: Path) -> dict[str, Any] | None:
    """What a converted folder says it was made from (file, sha256, quantization, …); None for any other folder."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "quantization" in found else None


def file_sha256(path: Path) -> str:
    """sha256 of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(header: GgufHeader, digest: str, dtype: torch.dtype, folder: Path) -> Path:
    if find_spec("gguf") is None:
        raise MissingError("reading a GGUF file needs the gguf library; `pip install 'sae-bias[gguf]'`.")
    architecture = ARCHITECTURES.get(header.architecture)
    if architecture is None:
        raise RequestError(
            f"{header.path} holds a model of the architecture {header.architecture[:60]!r}; expected one of {', '.join(ARCHITECTURES)}. "
            "Give the model's Hugging Face folder instead."
        )
    config = architecture.config(header) | {
        "architectures": [architecture.model_class],
        "dtype": str(dtype).removeprefix("torch."),
    }
    plan = _plan(header, architecture, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            _write_weights(part / "model.safetensors", header, architecture, config, plan, dtype)
            _write_json(part / "config.json", config)
            _save_tokenizer(header, architecture, part)
            _write_json(part / MANIFEST, _facts(header, digest, dtype))
            part.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():  # otherwise another process was faster, with the same bytes
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno in (28, 122):
            raise MissingError(
                f"no space left on the disk for the dequantized {header.path.name} in {folder.parent}."
            ) from error
        raise RequestError(
            f"cannot write the dequantized model to {folder.parent}: {error.strerror or error}."
        ) from error
    return folder


def _facts(header: GgufHeader, digest: str, dtype: torch.dtype) -> dict[str, Any]:
    kinds = sorted({tensor.kind for tensor in header.tensors.values()})
    return {
        "file": header.path.name,
        "sha256": digest,
        "quantization": header.quantization,
        "tensor_types": kinds,
        "architecture": header.architecture,
        "name": str(header.fields.get("general.name", ""))[:200],
        "license": str(header.fields.get("general.license", ""))[:200],
        "dtype": str(dtype).removeprefix("torch."),
        "converter": CONVERTER,
    }


def _plan(
    header: GgufHeader, architecture: GgufArchitecture, config: dict[str, Any]
) -> dict[str, GgufTensor]:
    """Hugging Face name → tensor, exactly those the model has, each of the right shape."""
    expected = _expected(header, config)
    plan: dict[str, GgufTensor] = {}
    for name, tensor in header.tensors.items():
        hf_name = architecture.hf_name(name)
        if hf_name is None or hf_name not in expected:
            raise RequestError(
                f"{header.path}: tensor {name[:80]!r} has no place in a {architecture.model_class}; it is not read."
            )
        if tensor.shape != expected[hf_name]:
            raise RequestError(
                f"{header.path}: tensor {name[:80]!r} has the shape {list(tensor.shape)}, its config asks for {list(expected[hf_name])}."
            )
        plan[hf_name] = tensor
    if missing := sorted(set(expected) - set(plan)):
        raise RequestError(
            f"{header.path} lacks {len(missing)} of the model's weights (first: {missing[0]}); they would be random."
        )
    return plan


def _expected(header: GgufHeader, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights, from its config, without allocating them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    n_layers = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.")})
    if config["num_hidden_layers"] != n_layers:
        raise RequestError(
            f"{header.path} says {config['num_hidden_layers']:,} layers and holds {n_layers:,}; the header is damaged."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # transformers raises a dozen kinds for values that do not fit together
        raise RequestError(
            f"{header.path}: its config cannot be built ({type(error).__name__}: {str(error)[:160]})."
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    head = f"{ARCHITECTURES[header.architecture].outside['output']}.weight"
    if "lm_head.weight" in shapes:  # GPT-NeoX' head has this name in memory and embed_out in files
        shapes[head] = shapes.pop("lm_head.weight")
    if config["tie_word_embeddings"]:
        shapes.pop(head, None)
    return shapes


def _write_weights(
    file: Path,
    header: GgufHeader,
    architecture: GgufArchitecture,
    config: Mapping[str, Any],
    plan: Mapping[str, GgufTensor],
    dtype: torch.dtype,
) -> None:
    """model.safetensors, one tensor at a time, so that a large model never stands in memory."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in plan.items():
        end = at + math.prod(tensor.shape) * dtype.itemsize
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, weights in _dequantized(header, plan):
            restored = architecture.restored(plan[name].name, weights, config)
            values = torch.from_numpy(np.array(restored, order="C")).to(dtype)
            out.write(values.view(torch.uint8).numpy().tobytes())


def _dequantized(
    header: GgufHeader, plan: Mapping[str, GgufTensor]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(Hugging Face name, float32 numbers as the file holds them)."""
    from gguf import GGMLQuantizationType, dequantize

    data = np.memmap(header.path, mode="r", dtype=np.uint8)
    for name, tensor in plan.items():
        raw = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(*tensor.shape[:-1], -1)
        kind = GGMLQuantizationType[tensor.kind]
        if tensor.kind in ("F32", "F16"):
            raw = raw.view(np.float32 if tensor.kind == "F32" else np.float16)
        with np.errstate(all="ignore"):
            yield name, np.asarray(dequantize(raw, kind), dtype=np.float32).reshape(tensor.shape)


def _save_tokenizer(header: GgufHeader, architecture: GgufArchitecture, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them from the file."""
    import transformers

    tokens = header.fields.get("tokenizer.ggml.tokens")
    n = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    if not isinstance(tokens, list) or not 0 < len(tokens) <= n:
        said = len(tokens) if isinstance(tokens, list) else "no"
        raise RequestError(
            f"{header.path} holds {said} tokens for {n:,} embeddings; the tokenizer cannot be read from it."
        )
    kind: Any = getattr(transformers, architecture.tokenizer_class or "AutoTokenizer")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = kind.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, local_files_only=True
        )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a tokenizer can be broken in more ways than transformers has names for
        raise RequestError(
            f"the tokenizer in {header.path} cannot be read ({type(error).__name__}: {str(error)[:160]}); give the model's Hugging Face folder."
        ) from error
    finally:
        transformers.logging.set_verbosity(before)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
