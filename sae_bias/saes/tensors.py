"""Where each tensor's bytes stand in a weights file: the headers of `.safetensors` and `.npz`, checked.

A `.safetensors` file is 8 bytes of header length, a JSON header (dtype, shape and byte range of each tensor),
and the raw tensors (github.com/huggingface/safetensors). A `.npz` file is a zip of `.npy` files: a short text
header and the raw array each. Every tensor must lie inside the file, none may overlap another, and sizes must
fit shapes. Nothing is unpickled or evaluated: an object array is refused.

Slices of one tensor out of a weights file, by positioned reads.

Rows, columns and pieces of vectors are read with `pread` at computed offsets, never through a memory map: one
column of a [3840, 65536] tensor is 3,840 reads of four bytes and 1 MB of memory, while the pages of a map
that hold it are 960 MB. A compressed member of an `.npz` is unpacked in chunks and only the slice kept; asked
for a block of it, it is unpacked once into an unnamed file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import MissingError, RequestError

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
    """A JSON object from bytes; duplicate keys, NaN and anything that is not an object are refused."""

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


_CHUNK = 4 << 20


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The tensors of one `.safetensors` or `.npz` file, readable in slices; opened anew for every read."""

    path: Path
    size: int
    slots: Mapping[str, Slot]
    _unpacked: dict[str, IO[bytes]] = field(default_factory=dict, repr=False)

    def vector(self, name: str, start: int = 0, stop: int | None = None) -> Float[Tensor, "n"]:
        """Elements start:stop of a one-dimensional tensor, float32."""
        slot = self._slot(name, 1)
        stop = slot.shape[0] if stop is None else stop
        return self._read(slot, (0, 1), (start, stop))[0]

    def columns(self, name: str, start: int, stop: int) -> Float[Tensor, "rows n"]:
        """Columns start:stop of a matrix, float32."""
        slot = self._slot(name, 2)
        return self._read(slot, (0, slot.shape[0]), (start, stop))

    def rows(self, name: str, indices: Sequence[int]) -> Float[Tensor, "n columns"]:
        """The named rows of a matrix, float32; runs of neighbors are one read."""
        slot = self._slot(name, 2)
        blocks = [self._read(slot, run, (0, slot.shape[1])) for run in _runs(indices)]
        return torch.cat(blocks) if blocks else torch.empty(0, slot.shape[1], dtype=torch.float32)

    def _slot(self, name: str, n_dims: int) -> Slot:
        slot = self.slots[name]
        assert len(slot.shape) == n_dims, f"{name} has shape {slot.shape}"
        return slot

    def _read(self, slot: Slot, rows: tuple[int, int], columns: tuple[int, int]) -> Float[Tensor, "r c"]:
        """The block rows × columns of a tensor (a vector is one row), checked for NaN and Inf."""
        dtype = slot.torch_dtype
        if dtype is None:
            raise RequestError(
                f"{self.path}: {slot.name} has dtype {slot.dtype}; expected float32, bfloat16 or float16"
            )
        shape = (1, *slot.shape) if len(slot.shape) == 1 else slot.shape
        if slot.column_major:
            block = self._read_row_major(slot, dtype, (shape[1], shape[0]), columns, rows).T.contiguous()
        else:
            block = self._read_row_major(slot, dtype, (shape[0], shape[1]), rows, columns)
        block = block.float()
        _refuse_non_finite(block, f"{self.path}: {slot.name}")
        return block

    def _read_row_major(
        self,
        slot: Slot,
        dtype: torch.dtype,
        shape: tuple[int, int],
        rows: tuple[int, int],
        columns: tuple[int, int],
    ) -> Tensor:
        out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)
        if out.numel() == 0:
            return out
        narrow = out.shape[0] == 1 or out.shape[1] == 1
        if slot.member is not None and narrow and slot.member not in self._unpacked:
            self._stream_member(slot, shape, rows, columns, out)
            return out
        with self._descriptor(slot) as fd:
            _pread_block(fd, out, slot.offset, shape[1], rows, columns, str(self.path))
        return out

    @contextlib.contextmanager
    def _descriptor(self, slot: Slot) -> Iterator[int]:
        if slot.member is not None:
            yield self._unpack(slot.member).fileno()
            return
        fd = _open(self.path)
        try:
            if os.fstat(fd).st_size != self.size:
                raise RequestError(
                    f"{self.path}: the file changed size since it was opened; load the SAE again"
                )
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            yield fd
        finally:
            os.close(fd)

    def _stream_member(
        self, slot: Slot, shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], out: Tensor
    ) -> None:
        """One row or one column of a compressed member: unpack it in chunks, keep only the slice."""
        n_columns, item = shape[1], out.element_size()
        step = max(1, _CHUNK // (n_columns * item))
        with (
            unzipping(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open(slot.member or "") as stream,
        ):
            stream.read(slot.offset)
            for start in range(0, rows[1], step):
                stop = min(start + step, rows[1])
                data = stream.read((stop - start) * n_columns * item)
                if len(data) != (stop - start) * n_columns * item:
                    raise RequestError(f"{self.path}: {slot.name} is cut short; copy or download it again")
                if stop > rows[0]:
                    chunk = torch.frombuffer(bytearray(data), dtype=out.dtype).view(-1, n_columns)
                    first = max(start, rows[0])
                    out[first - rows[0] : stop - rows[0]] = chunk[first - start :, columns[0] : columns[1]]

    def _unpack(self, member: str) -> IO[bytes]:
        """A compressed member as an unnamed temporary file, unpacked once."""
        if member not in self._unpacked:
            # lives as long as this object does; unnamed, so nothing is left behind
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115
            try:
                with (
                    unzipping(self.path),
                    zipfile.ZipFile(self.path) as archive,
                    archive.open(member) as stream,
                ):
                    while data := stream.read(_CHUNK):
                        unpacked.write(data)
                unpacked.flush()
            except OSError as error:
                raise MissingError(
                    f"{self.path}: no room to unpack {member} in {tempfile.gettempdir()}: {error}"
                ) from error
            self._unpacked[member] = unpacked
        return self._unpacked[member]


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a `.safetensors` or `.npz` file."""
    fd = _open(path)
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        start = file.read(8)
        if start.startswith(b"version "):
            raise RequestError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file"
            )
        if path.suffix == ".npz":
            slots = npz_slots(path, file, size)
        else:
            slots = safetensors_slots(path, file, start, size)
    return TensorFile(path, size, slots)


def all_tensors(path: Path) -> dict[str, Tensor]:
    """Every floating-point tensor of a file, whole, in float32."""
    file = open_tensor_file(path)
    found: dict[str, Tensor] = {}
    for name, slot in file.slots.items():
        if slot.torch_dtype is None:
            continue
        if len(slot.shape) == 0:
            scalar = replace(slot, shape=(1,))
            found[name] = file._read(scalar, (0, 1), (0, 1))[0, 0]
        elif len(slot.shape) == 1:
            found[name] = file.vector(name)
        elif len(slot.shape) == 2:
            found[name] = file.columns(name, 0, slot.shape[1])
    return found


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{str(path)[:80]!r} is not a file name: {error}") from error
    if not os.path.isfile(path):
        os.close(fd)
        raise RequestError(f"{path}: a folder or device, not a weights file")
    return fd


def _pread_block(
    fd: int,
    out: Tensor,
    offset: int,
    n_columns: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    path: str,
) -> None:
    """Fill `out` with rows × columns of the row-major matrix at `offset`."""
    item, row_bytes = out.element_size(), out.shape[1] * out.element_size()
    buffer = out.view(torch.uint8).view(-1).numpy().data
    if columns == (0, n_columns):
        _pread(fd, buffer, offset + rows[0] * row_bytes, path)
        return
    position, stride = offset + (rows[0] * n_columns + columns[0]) * item, n_columns * item
    for row in range(out.shape[0]):
        _pread(fd, buffer[row * row_bytes : (row + 1) * row_bytes], position + row * stride, path)


def _pread(fd: int, buffer: memoryview, position: int, path: str) -> None:
    n_read = os.preadv(fd, [buffer], position)
    while n_read < len(buffer):
        more = os.preadv(fd, [buffer[n_read:]], position + n_read)
        if more == 0:
            raise RequestError(f"{path}: cut short at byte {position + n_read:,}; copy or download it again")
        n_read += more


def _refuse_non_finite(block: Tensor, where: str) -> None:
    # a finite sum proves finite terms; only a suspicious one pays for the full look
    if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
        n_bad = int((~torch.isfinite(block)).sum())
        raise RequestError(
            f"{where} holds NaN or infinite values ({n_bad:,} of {block.numel():,} read); the file is damaged"
        )


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive indices as (start, stop) runs, in the order given."""
    start = stop = None
    for index in indices:
        if start is not None and stop is not None and index == stop and stop - start < 4096:
            stop += 1
            continue
        if start is not None and stop is not None:
            yield start, stop
        start, stop = index, index + 1
    if start is not None and stop is not None:
        yield start, stop
