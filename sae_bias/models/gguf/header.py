"""The header of a GGUF file, checked: typed key-values, then name, shape, type and offset of each tensor.

Format: the GGUF specification of github.com/ggml-org/ggml. Every count, length, offset and type is checked against the file before anything else
reads it, and nothing is allocated on a number's word alone.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_bias.core.errors import RequestError

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
            raise RequestError(
                f"{self.path}: {what} of {length:,} bytes (at most {most:,}); the header is damaged."
            )
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{self.path}: {what} is not UTF-8 text ({error.reason}); the header is damaged."
            ) from error

    def value(self, name: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text(f"the value of {name!r}", 1 << 22)
        if kind != _ARRAY:
            raise RequestError(f"{self.path}: {name!r} has the unknown value type {kind}; expected 0 to 12.")
        of, n = self.take("I"), self.take("Q")
        if n > _MAX_ARRAY:
            raise RequestError(
                f"{self.path}: {name!r} is a list of {n:,} (at most {_MAX_ARRAY:,}); the header is damaged."
            )
        if of in _SCALARS:
            self.need(n * struct.calcsize(f"<{_SCALARS[of]}"))
            return list(
                struct.unpack_from(
                    f"<{n}{_SCALARS[of]}", self.data, self._skip(n * struct.calcsize(f"<{_SCALARS[of]}"))
                )
            )
        if of != _STRING:
            raise RequestError(
                f"{self.path}: {name!r} is a list of the type {of}; expected numbers or texts."
            )
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
        raise RequestError(
            f"{path} begins with {bytes(magic)!r}, a GGUF file with b'GGUF'; it is another kind of file."
        )
    cursor.at = 4
    version = cursor.take("I")
    if version not in (2, 3):
        hint = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise RequestError(
            f"{path} is {hint}; expected GGUF version 2 or 3, little-endian. Convert it again with a current llama.cpp."
        )
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
        raise RequestError(f"{path} names no general.architecture; it is damaged, or no language model.")
    return GgufHeader(path, fields, tensors)


def _tensors(path: Path, cursor: _Cursor, n: int, alignment: Any) -> dict[str, GgufTensor]:
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise RequestError(
            f"{path}: general.alignment is {str(alignment)[:40]!r}; expected a power of two up to 1,048,576."
        )
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
            raise RequestError(
                f"{path}: tensor {slot.name[:80]!r} overlaps the one before; the header is damaged."
            )
        end = slot.offset + slot.n_bytes
    return {slot.name: slot for slot in slots}


def _slot(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
    start: int,
    alignment: int,
    size: int,
) -> GgufTensor:
    where = f"{path}: tensor {name[:80]!r}"
    if kind not in _BLOCKS:
        known = ", ".join(block[0] for block in _BLOCKS.values())
        raise RequestError(f"{where} has the ggml type {kind}; expected one of {known}.")
    block, n_block, n_bytes = _BLOCKS[kind]
    if any(not 0 < n < 1 << 40 for n in shape) or math.prod(shape) >= 1 << 48:
        raise RequestError(
            f"{where} has the shape {list(shape)}; no model has such a tensor, the header is damaged."
        )
    if shape[-1] % n_block:
        raise RequestError(f"{where} has rows of {shape[-1]:,}; {block} stores blocks of {n_block}.")
    length = math.prod(shape) // n_block * n_bytes
    if offset % alignment:
        raise RequestError(
            f"{where} begins at byte {offset:,}, not at a multiple of {alignment}; the header is damaged."
        )
    if start + offset + length > size:
        raise RequestError(
            f"{where} ends at byte {start + offset + length:,}, the file has {size:,}; it is cut short or damaged, copy or download it again."
        )
    return GgufTensor(name, shape, block, start + offset, length)
