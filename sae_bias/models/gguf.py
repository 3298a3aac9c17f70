"""GGUF files as Hugging Face folders: header checked, weights dequantized once, kept by content hash.

A `.gguf` file (github.com/ggml-org/ggml, docs/gguf.md) is a header (typed key-values, then name, shape, type and offset of each
tensor) and the tensors, quantized in blocks. `converted` writes what the header says as config.json and tokenizer files and the
dequantized weights as model.safetensors, into the cache under the file's sha256; a second load reads the folder. Every count, length,
offset and type is checked against the file before the gguf library sees a byte of it.

llama.cpp stores some weights otherwise than Hugging Face: rotary query and key rows of Llama are interleaved, Gemma's norms hold 1 + w,
GPT-NeoX' fused query-key-value is grouped by kind, not by head. Each architecture's record undoes that; for the architectures which
transformers reads too, weights are equal to its own `gguf_file=` route bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_bias.core.errors import MissingError, RequestError

CONVERTER = 1
"""Part of the cache key: raised whenever a conversion changes."""
MANIFEST = "gguf.json"

_MAX_FIELDS, _MAX_TENSORS, _MAX_ARRAY, _MAX_NAME = 65_536, 65_536, 1 << 24, 4_096
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""ggml type id → its name, numbers a block, bytes a block."""
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 21: "Q2_K_S", 25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16",
}  # fmt: skip
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


# ── the header, checked ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor stands in the file."""

    name: str
    shape: tuple[int, ...]
    """In Hugging Face's order: rows first."""
    kind: str
    """Its quantization, such as `Q4_K`."""
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself; every number in it fits the file."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])

    @property
    def quantization(self) -> str:
        """The file's quantization as its maker calls it, such as `Q4_K_M`; else the type of most of its numbers."""
        named = _FILE_TYPES.get(self.fields.get("general.file_type", -1))
        if named is not None:
            return named
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.kind] = sizes.get(tensor.kind, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda kind: sizes[kind])

    def key(self, name: str, default: Any = None) -> Any:
        """The architecture's own field `name`, such as `block_count`."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, most: int = 1 << 30) -> int:
        """A whole number the architecture cannot do without, from 1 to `most`."""
        value = self.key(name)
        if type(value) is not int or not 0 < value <= most:
            said = "is missing" if value is None else f"says {str(value)[:40]!r}"
            raise RequestError(
                f"{self.path}: {self.architecture}.{name} {said}; expected a whole number from 1 to {most:,}."
            )
        return value


class _Cursor:
    """Reads a memory map in order and refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def take(self, form: str) -> Any:
        n = struct.calcsize(f"<{form}")
        self.need(n)
        value = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += n
        return value[0] if len(value) == 1 else value

    def need(self, n: int) -> None:
        if n > self.size - self.at:
            raise RequestError(
                f"{self.path}: {self.size:,} bytes, its header promises {self.at + n:,} or more; the file is cut short or damaged, "
                "copy or download it again."
            )

    def text(self, what: str, most: int) -> str:
        length = self.take("Q")
        if length > most:
            raise RequestError(f"{self.path}: {what} of {length:,} bytes (at most {most:,}); the header is damaged.")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{self.path}: {what} is not UTF-8 text ({error.reason}); the header is damaged.") from error

    def value(self, name: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text(f"the value of {name!r}", 1 << 22)
        if kind != _ARRAY:
            raise RequestError(f"{self.path}: {name!r} has the unknown value type {kind}; expected 0 to 12.")
        of, n = self.take("I"), self.take("Q")
        if n > _MAX_ARRAY:
            raise RequestError(f"{self.path}: {name!r} is a list of {n:,} (at most {_MAX_ARRAY:,}); the header is damaged.")
        if of in _SCALARS:
            self.need(n * struct.calcsize(f"<{_SCALARS[of]}"))
            return list(struct.unpack_from(f"<{n}{_SCALARS[of]}", self.data, self._skip(n * struct.calcsize(f"<{_SCALARS[of]}"))))
        if of != _STRING:
            raise RequestError(f"{self.path}: {name!r} is a list of the type {of}; expected numbers or texts.")
        self.need(8 * n)
        return [self.text(f"an entry of {name!r}", 1 << 20) for _ in range(n)]

    def _skip(self, n: int) -> int:
        start, self.at = self.at, self.at + n
        return start


def read_header(path: str | Path) -> GgufHeader:
    """The checked header of a GGUF file.

    Raises:
        RequestError: another kind of file, a count, length, offset, size or type that cannot be; says what was expected.
    """
    path = Path(path)
    size = _size(path)
    if size < 24:
        raise RequestError(f"{path}: {size} bytes; a GGUF file has at least 24. Copy or download it again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, _Cursor(path, data))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise RequestError(f"there is no readable file {str(path)[:200]}; give a .gguf file.") from error


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise RequestError(f"{path} begins with {bytes(magic)!r}, a GGUF file with b'GGUF'; it is another kind of file.")
    cursor.at = 4
    version = cursor.take("I")
    if version not in (2, 3):
        hint = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise RequestError(f"{path} is {hint}; expected GGUF version 2 or 3, little-endian. Convert it again with a current llama.cpp.")
    n_tensors, n_fields = cursor.take("QQ")
    if n_tensors > _MAX_TENSORS or n_fields > _MAX_FIELDS:
        raise RequestError(
            f"{path}: its header counts {n_tensors:,} tensors and {n_fields:,} fields (at most {_MAX_TENSORS:,} each); it is damaged."
        )
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.text("a field's name", _MAX_NAME)
        if name in fields:
            raise RequestError(f"{path}: the field {name[:80]!r} stands twice; the header is damaged.")
        fields[name] = cursor.value(name[:80], cursor.take("I"))
    tensors = _tensors(path, cursor, n_tensors, fields.get("general.alignment", 32))
    if not isinstance(fields.get("general.architecture"), str):
        raise RequestError(f"{path} names no general.architecture; expected one of {', '.join(ARCHITECTURES)}.")
    return GgufHeader(path, fields, tensors)


def _tensors(path: Path, cursor: _Cursor, n: int, alignment: Any) -> dict[str, GgufTensor]:
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise RequestError(f"{path}: general.alignment is {str(alignment)[:40]!r}; expected a power of two up to 1,048,576.")
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n):
        name = cursor.text("a tensor's name", _MAX_NAME)
        n_dims = cursor.take("I")
        if not 1 <= n_dims <= 4:
            raise RequestError(f"{path}: tensor {name[:80]!r} has {n_dims:,} dimensions; expected 1 to 4.")
        shape = tuple(reversed([cursor.take("Q") for _ in range(n_dims)]))
        kind, offset = cursor.take("I"), cursor.take("Q")
        if name in found:
            raise RequestError(f"{path}: two tensors are called {name[:80]!r}; the header is damaged.")
        found[name] = (shape, kind, offset)
    start = -(-cursor.at // alignment) * alignment
    slots = [_slot(path, name, *place, start, alignment, cursor.size) for name, place in found.items()]
    end = start
    for slot in sorted(slots, key=lambda slot: slot.offset):
        if slot.offset < end:
            raise RequestError(f"{path}: tensor {slot.name[:80]!r} overlaps the one before; the header is damaged.")
        end = slot.offset + slot.n_bytes
    return {slot.name: slot for slot in slots}


def _slot(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int, size: int
) -> GgufTensor:
    where = f"{path}: tensor {name[:80]!r}"
    if kind not in _BLOCKS:
        known = ", ".join(block[0] for block in _BLOCKS.values())
        raise RequestError(f"{where} has the ggml type {kind}; expected one of {known}.")
    block, n_block, n_bytes = _BLOCKS[kind]
    if any(not 0 < n < 1 << 40 for n in shape) or math.prod(shape) >= 1 << 48:
        raise RequestError(f"{where} has the shape {list(shape)}; no model has such a tensor, the header is damaged.")
    if shape[-1] % n_block:
        raise RequestError(f"{where} has rows of {shape[-1]:,}; {block} stores blocks of {n_block}.")
    length = math.prod(shape) // n_block * n_bytes
    if offset % alignment:
        raise RequestError(f"{where} begins at byte {offset:,}, not at a multiple of {alignment}; the header is damaged.")
    if start + offset + length > size:
        raise RequestError(
            f"{where} ends at byte {start + offset + length:,}, the file has {size:,}; it is cut short or damaged, copy or download it again."
        )
    return GgufTensor(name, shape, block, start + offset, length)


# ── what each architecture is called, and how its weights were stored ───────────────────────────────────────

Undo = Callable[[NDArray[np.float32], Mapping[str, Any]], NDArray[np.float32]]
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture of llama.cpp becomes a Hugging Face one."""

    model_class: str
    config: Callable[[GgufHeader], dict[str, Any]]
    layer: Mapping[str, str]
    """Tensors of `blk.N` → their place in the Hugging Face layer."""
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    layers: str = "model.layers"
    undo: Mapping[str, Undo] = field(default_factory=dict)
    """Ending of a GGUF tensor's name → what puts its numbers back."""
    tokenizer_class: str | None = None
    """None where transformers knows this architecture's GGUF tokenizer by itself."""

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor, None where it has no place there."""
        stem, _, ending = name.rpartition(".")
        if stem in self.outside:
            return f"{self.outside[stem]}.{ending}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in self.layer:
            return f"{self.layers}.{int(parts[1])}.{self.layer[parts[2]]}.{ending}"
        return None

    def restored(self, name: str, weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
        """The numbers as Hugging Face stores them."""
        for ending, undo in self.undo.items():
            if f".{name}".endswith(ending):
                return undo(weights, config)
        return weights


def _deinterleaved(heads: str) -> Undo:
    """Rotary rows as Hugging Face has them: the two halves of a head one after the other, not in turn."""

    def undo(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
        n = int(config[heads])
        split = weights.reshape(n, weights.shape[0] // n // 2, 2, *weights.shape[1:])
        return split.swapaxes(2, 1).reshape(weights.shape)

    return undo


def _minus_one(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Gemma's norm weight w; the file holds 1 + w."""
    return weights - 1


def _by_head(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """GPT-NeoX' fused rows grouped by head (q, k, v of the first head first); the file has all q, all k, all v."""
    n = int(config["num_attention_heads"])
    split = weights.reshape(3, n, weights.shape[0] // n // 3, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(0, 1)).reshape(weights.shape)


def _decoder_config(header: GgufHeader, **more: Any) -> dict[str, Any]:
    """What Llama-like configs share."""
    heads, width = header.number("attention.head_count", 1 << 14), header.number("embedding_length", 1 << 17)
    kv_heads = header.key("attention.head_count_kv", heads)
    if type(kv_heads) is not int or not 0 < kv_heads <= heads or heads % kv_heads:
        raise RequestError(f"{header.path}: {heads} heads and {str(kv_heads)[:40]} key-value heads; expected a divisor of the first.")
    head_dim = header.key("attention.key_length") or header.key("rope.dimension_count") or width // heads
    return {
        "hidden_size": width,
        "num_hidden_layers": header.number("block_count", 4096),
        "intermediate_size": header.number("feed_forward_length", 1 << 20),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": header.number("context_length"),
        "rms_norm_eps": header.key("attention.layer_norm_rms_epsilon", 1e-6),
        **_vocabulary(header),
        **more,
    }


def _vocabulary(header: GgufHeader) -> dict[str, Any]:
    """Vocabulary size, special ids, and whether the unembedding is the embedding."""
    n = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    ids = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        value = header.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < n):
            raise RequestError(f"{header.path}: tokenizer.ggml.{theirs}_token_id is {str(value)[:40]!r}; expected an id below {n:,}.")
        if ours != "unk" and value is not None:
            ids[f"{ours}_token_id"] = value
    return {"vocab_size": n, **ids, "tie_word_embeddings": "output.weight" not in header.tensors}


def _rope(header: GgufHeader, default: float = 10_000.0) -> dict[str, Any]:
    """Plain rotary embeddings, or linearly scaled ones; other scalings are refused, not ignored."""
    theta = float(header.key("rope.freq_base", default))
    kind, factor = header.key("rope.scaling.type", "none"), float(header.key("rope.scaling.factor", 1.0))
    if kind not in ("none", "linear") or "rope_freqs.weight" in header.tensors:
        raise RequestError(
            f"{header.path}: rotary embeddings are scaled by {kind if kind != 'none' else 'a table (rope_freqs)'}; only unscaled and "
            "linearly scaled ones are read. Give the model's Hugging Face folder instead."
        )
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    return {"rope_type": "default", "rope_theta": theta}


def _llama_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(header, model_type="llama", rope_parameters=_rope(header))


def _qwen2_config(header: GgufHeader) -> dict[str, Any]:
    config = _decoder_config(header, model_type="qwen2", rope_parameters=_rope(header, 1_000_000.0))
    return {name: value for name, value in config.items() if name != "head_dim"}


def _qwen3_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(header, model_type="qwen3", rope_parameters=_rope(header, 1_000_000.0))


def _attention_scalar(header: GgufHeader, deepest: int) -> int:
    """What queries are divided by the root of: the head dimension; in the 27B models the width of a head's share."""
    if header.number("block_count") == deepest:
        return header.number("embedding_length") // header.number("attention.head_count")
    return int(header.key("attention.key_length", 256))


def _gemma2_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(
        header,
        model_type="gemma2",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_attention_scalar(header, 46),
        sliding_window=int(header.key("attention.sliding_window", 4096)),
        attn_logit_softcapping=float(header.key("attn_logit_softcapping", 50.0)),
        final_logit_softcapping=float(header.key("final_logit_softcapping", 30.0)),
        rope_parameters=_rope(header),
    )


def _gemma3_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(
        header,
        model_type="gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_attention_scalar(header, 62),
        sliding_window=int(header.key("attention.sliding_window", 4096)),
        rope_parameters={
            "full_attention": _rope(header, 1_000_000.0),
            "sliding_attention": {"rope_type": "default", "rope_theta": float(header.key("rope.freq_base_swa", 10_000.0))},
        },
    )


def _gpt_neox_config(header: GgufHeader) -> dict[str, Any]:
    heads, width = header.number("attention.head_count", 1 << 14), header.number("embedding_length", 1 << 17)
    rotary = header.number("rope.dimension_count", width)
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "num_hidden_layers": header.number("block_count", 4096),
        "intermediate_size": header.number("feed_forward_length", 1 << 20),
        "num_attention_heads": heads,
        "max_position_embeddings": header.number("context_length"),
        "layer_norm_eps": header.key("attention.layer_norm_epsilon", 1e-5),
        "use_parallel_residual": bool(header.key("use_parallel_residual", True)),
        "hidden_act": "gelu",
        "rope_parameters": _rope(header) | {"partial_rotary_factor": rotary / (width // heads)},
        **_vocabulary(header),
    }


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", _gemma2_config, _GEMMA_LAYER, undo={"norm.weight": _minus_one}),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", _gemma3_config, _GEMMA_LAYER | _QK_NORMS, undo={"norm.weight": _minus_one}),
    "llama": GgufArchitecture(
        "LlamaForCausalLM",
        _llama_config,
        _LAYER,
        undo={
            f".attn_{part}.{ending}": _deinterleaved(heads)
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
            for ending in ("weight", "bias")
        },
    ),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", _qwen2_config, _LAYER),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", _qwen3_config, _LAYER | _QK_NORMS),
    "gptneox": GgufArchitecture(
        "GPTNeoXForCausalLM",
        _gpt_neox_config,
        {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        outside={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        layers="gpt_neox.layers",
        undo={".attn_qkv.weight": _by_head, ".attn_qkv.bias": _by_head},
        tokenizer_class="PreTrainedTokenizerFast",
    ),
}  # fmt: skip
"""`general.architecture` of a GGUF file → how it is read."""


# ── conversion, once ────────────────────────────────────────────────────────────────────────────────────────


def cache_folder() -> Path:
    """Where converted models are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sae-bias" / "gguf"


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
        raise RequestError(f"{path} has the sha256 {digest[:16]}…, expected {sha256[:16]}…; it is damaged or another file, get it again.")
    folder = kept_folder(digest, dtype)
    if (folder / MANIFEST).is_file():
        return folder
    return _convert(header, digest, dtype, folder)


def kept_folder(sha256: str, dtype: torch.dtype = torch.float32) -> Path:
    """Where the conversion of a file with this hash is or will be."""
    return cache_folder() / f"{sha256[:32]}-{str(dtype).removeprefix('torch.')}-v{CONVERTER}"


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
    config = architecture.config(header) | {"architectures": [architecture.model_class], "dtype": str(dtype).removeprefix("torch.")}
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
            raise MissingError(f"no space left on the disk for the dequantized {header.path.name} in {folder.parent}.") from error
        raise RequestError(f"cannot write the dequantized model to {folder.parent}: {error.strerror or error}.") from error
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


def _plan(header: GgufHeader, architecture: GgufArchitecture, config: dict[str, Any]) -> dict[str, GgufTensor]:
    """Hugging Face name → tensor, exactly those the model has, each of the right shape."""
    expected = _expected(header, config)
    plan: dict[str, GgufTensor] = {}
    for name, tensor in header.tensors.items():
        hf_name = architecture.hf_name(name)
        if hf_name is None or hf_name not in expected:
            raise RequestError(f"{header.path}: tensor {name[:80]!r} has no place in a {architecture.model_class}; it is not read.")
        if tensor.shape != expected[hf_name]:
            raise RequestError(
                f"{header.path}: tensor {name[:80]!r} has the shape {list(tensor.shape)}, its config asks for {list(expected[hf_name])}."
            )
        plan[hf_name] = tensor
    if missing := sorted(set(expected) - set(plan)):
        raise RequestError(f"{header.path} lacks {len(missing)} of the model's weights (first: {missing[0]}); they would be random.")
    return plan


def _expected(header: GgufHeader, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights, from its config, without allocating them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    n_layers = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.")})
    if config["num_hidden_layers"] != n_layers:
        raise RequestError(f"{header.path} says {config['num_hidden_layers']:,} layers and holds {n_layers:,}; the header is damaged.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # transformers raises a dozen kinds for values that do not fit together
        raise RequestError(f"{header.path}: its config cannot be built ({type(error).__name__}: {str(error)[:160]}).") from error
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    if config["tie_word_embeddings"]:
        shapes = {name: shape for name, shape in shapes.items() if name not in ("lm_head.weight", "embed_out.weight")}
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
            values = torch.from_numpy(np.ascontiguousarray(restored)).to(dtype)
            out.write(memoryview(values.view(torch.uint8).numpy()).cast("B"))


def _dequantized(header: GgufHeader, plan: Mapping[str, GgufTensor]) -> Iterator[tuple[str, NDArray[np.float32]]]:
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
        raise RequestError(f"{header.path} holds {said} tokens for {n:,} embeddings; the tokenizer cannot be read from it.")
    kind: Any = getattr(transformers, architecture.tokenizer_class or "AutoTokenizer")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = kind.from_pretrained(str(header.path.parent), gguf_file=header.path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a tokenizer can be broken in more ways than transformers has names for
        raise RequestError(
            f"the tokenizer in {header.path} cannot be read ({type(error).__name__}: {str(error)[:160]}); give the model's Hugging Face folder."
        ) from error
    finally:
        transformers.logging.set_verbosity(before)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
