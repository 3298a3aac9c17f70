"""Slices of one tensor out of a weights file, by positioned reads.

Rows, columns and pieces of vectors are read with `pread` at computed offsets, never through a memory map: one
column of a [3840, 65536] tensor is 3,840 reads of four bytes and 1 MB of memory, while the pages of a map
that hold it are 960 MB. A compressed member of an `.npz` is unpacked in chunks and only the slice kept; asked
for a block of it, it is unpacked once into an unnamed file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.errors import MissingError, RequestError
from sae_bias.tensor_headers import Slot, npz_slots, safetensors_slots, unzipping

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
        """The named rows of a matrix, float32; runs of neighbours are one read."""
        slot = self._slot(name, 2)
        blocks = [self._read(slot, run, (0, slot.shape[1])) for run in _runs(indices)]
        return torch.cat(blocks) if blocks else torch.empty(0, slot.shape[1])

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
