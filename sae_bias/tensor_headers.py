"""Where each tensor's bytes stand in a weights file: the headers of `.safetensors` and `.npz`, checked.

A `.safetensors` file is 8 bytes of header length, a JSON header (dtype, shape and byte range of each tensor),
and the raw tensors (github.com/huggingface/safetensors). A `.npz` file is a zip of `.npy` files: a short text
header and the raw array each. Every tensor must lie inside the file, none may overlap another, and sizes must
fit shapes. Nothing is unpickled or evaluated: an object array is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch

from sae_bias.errors import MissingError, RequestError

_MAX_HEADER = 1 << 20
_MAX_TENSORS = 4096

_SAFETENSORS_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
_NPY_DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}
_NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'(?P<descr>[<>|=]?[A-Za-z]\d{0,6})',\s*'fortran_order':\s*(?P<fortran>True|False),"
    r"\s*'shape':\s*\((?P<shape>[\d,\s]{0,200})\),?\s*\}\s*"
)


@runtime_checkable
class _Reader(Protocol):
    """Anything read in order, such as a member of a zip."""

    def read(self, size: int = ..., /) -> bytes: ...


@dataclass(frozen=True)
class Slot:
    """Where one tensor's numbers stand in a file."""

    name: str
    dtype: str
    """As the file writes it: `F32`, `BF16`, `<f4`."""
    shape: tuple[int, ...]
    offset: int
    """Byte position of the first number; in a compressed zip member, position inside the unpacked member."""
    column_major: bool = False
    member: str | None = None
    """Name of the compressed zip member that holds it, if any."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype, or None where it is not a real floating-point type we read."""
        return _SAFETENSORS_DTYPES.get(self.dtype) or _NPY_DTYPES.get(self.dtype)


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────────────────


def safetensors_slots(path: Path, file: BufferedIOBase, start: bytes, size: int) -> dict[str, Slot]:
    """Slots of an open safetensors file of which the first eight bytes (`start`) have been read."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length < 2:
        raise RequestError(f"{path}: {size} bytes and no safetensors header; the file is empty or cut short")
    if length > _MAX_HEADER:
        raise RequestError(
            f"{path}: header of {length:,} bytes (at most {_MAX_HEADER:,}); not a safetensors file"
        )
    if 8 + length > size:
        raise RequestError(
            f"{path}: the header needs {8 + length:,} bytes, the file has {size:,}; download it again"
        )
    header = read_json(file.read(length), f"{path}: the safetensors header")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > _MAX_TENSORS:
        raise RequestError(f"{path}: {len(entries):,} tensors; an SAE file has fewer than {_MAX_TENSORS:,}")
    slots = [_safetensors_slot(path, name, entry, 8 + length) for name, entry in entries.items()]
    _refuse_overlap(path, slots, 8 + length, size)
    return {slot.name: slot for slot in slots}


def _safetensors_slot(path: Path, name: str, entry: Any, data_start: int) -> Slot:
    where = f"{path}: header of {name[:60]!r}"
    if not isinstance(entry, dict):
        raise RequestError(f"{where} is {str(entry)[:40]!r}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SAFETENSORS_BYTES:
        raise RequestError(f"{where}: unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise RequestError(
            f"{where}: shape {str(shape)[:60]} at bytes {str(offsets)[:60]}; expected whole numbers from 0"
        )
    n_bytes = math.prod(shape) * _SAFETENSORS_BYTES[dtype]
    if offsets[1] - offsets[0] != n_bytes:
        raise RequestError(
            f"{where}: {dtype} of shape {shape} takes {n_bytes:,} bytes, not {offsets[1] - offsets[0]:,}"
        )
    return Slot(name, dtype, tuple(shape), data_start + offsets[0])


def _refuse_overlap(path: Path, slots: Sequence[Slot], data_start: int, size: int) -> None:
    """The format lays tensors end to end, from the header to the end of the file."""
    at = data_start
    for slot in sorted(slots, key=lambda slot: (slot.offset, math.prod(slot.shape))):
        if slot.offset != at:
            fault = "overlaps the one before" if slot.offset < at else "leaves a gap after the one before"
            raise RequestError(f"{path}: tensor {slot.name[:60]!r} {fault}; the header is wrong")
        at += math.prod(slot.shape) * _SAFETENSORS_BYTES[slot.dtype]
    if at != size:
        short = "is cut short, copy or download it again" if at > size else "is longer than its header says"
        raise RequestError(f"{path}: {size:,} bytes, its header promises {at:,}; the file {short}")


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers that could be sizes or byte positions."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
    )


# ── npz ─────────────────────────────────────────────────────────────────────────────────────────────────────


def npz_slots(path: Path, file: BufferedIOBase, size: int) -> dict[str, Slot]:
    """Slots of an open npz file."""
    slots = {}
    with unzipping(path), zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if len(members) > _MAX_TENSORS:
            raise RequestError(
                f"{path}: {len(members):,} arrays; an SAE file has fewer than {_MAX_TENSORS:,}"
            )
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in slots:
                raise RequestError(f"{path}: two arrays are called {name[:60]!r}")
            slots[name] = _npz_slot(path, file, archive, member, name, size)
    return slots


def _npz_slot(
    path: Path, file: BufferedIOBase, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, size: int
) -> Slot:
    with archive.open(member) as stream:
        descr, fortran, shape, header = _npy_header(path, name, stream)
    if "O" in descr or "V" in descr:
        raise RequestError(
            f"{path}: array {name[:60]!r} holds Python objects ({descr}), a pickle, which is never loaded"
        )
    item = int(descr[2:] or 1)
    n_bytes = math.prod(shape) * item
    if header + n_bytes != member.file_size:
        raise RequestError(
            f"{path}: array {name[:60]!r} of shape {list(shape)} takes {n_bytes:,} bytes, "
            f"the archive holds {member.file_size - header:,}; the file is damaged"
        )
    if member.compress_type != zipfile.ZIP_STORED:
        return Slot(name, descr, shape, header, fortran and len(shape) == 2, member.filename)
    start = _stored_start(path, file, member)
    if start + header + n_bytes > size:
        raise RequestError(f"{path}: array {name[:60]!r} ends beyond the file; download it again")
    return Slot(name, descr, shape, start + header, fortran and len(shape) == 2)


def _stored_start(path: Path, file: BufferedIOBase, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header (name lengths at bytes 26 to 30)."""
    file.seek(member.header_offset)
    local = file.read(30)
    if len(local) != 30 or local[:4] != b"PK\x03\x04":
        raise RequestError(f"{path}: no entry where the archive's directory puts {member.filename[:60]!r}")
    return (
        member.header_offset
        + 30
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )


def _npy_header(path: Path, name: str, stream: _Reader) -> tuple[str, bool, tuple[int, ...], int]:
    """dtype, Fortran order, shape and header length of a `.npy` array, by pattern: nothing is evaluated."""
    magic = stream.read(8)
    if len(magic) != 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise RequestError(f"{path}: member {name[:60]!r} is not a .npy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > 10_000:
        raise RequestError(f"{path}: array {name[:60]!r} has a header of {length:,} bytes; not a .npy array")
    text = stream.read(length).decode("latin-1")
    match = _NPY_HEADER.fullmatch(text)
    sizes = [size.strip() for size in match["shape"].split(",") if size.strip()] if match else []
    if match is None or not all(size.isdigit() and len(size) < 15 for size in sizes):
        raise RequestError(
            f"{path}: array {name[:60]!r} has the header {text[:80]!r}; expected one plain numeric array"
        )
    return match["descr"], match["fortran"] == "True", tuple(map(int, sizes)), 8 + width + length


@contextlib.contextmanager
def unzipping(path: Path) -> Iterator[None]:
    """Every way a zip can be malformed becomes one RequestError."""
    try:
        yield
    except (RequestError, MissingError):
        raise
    # zipfile raises a dozen kinds for malformed archives: BadZipFile, struct.error, zlib.error, …
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (28, 122):
            raise
        raise RequestError(
            f"{path}: not a readable .npz archive ({error}); copy or download it again"
        ) from error


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes; duplicate keys, NaN and anything that is no object are refused."""

    def no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key stands twice")
        return dict(items)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where} is not a JSON object")
    return value
