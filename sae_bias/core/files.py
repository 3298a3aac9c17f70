"""What is written to disk: hashes, plain values, files that are whole or not there, the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_bias.core.errors import MissingError, RequestError


def digest(*parts: Any) -> str:
    """Sixteen hex digits that identify plain values."""
    text = json.dumps([plain(p) for p in parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path, *, whole_below: int = 2**30) -> str:
    """sha256 of a file; of its size, first and last MiB (marked "partial:") where it is large."""
    size = path.stat().st_size
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        if size < whole_below:
            for block in iter(lambda: f.read(2**22), b""):
                sha.update(block)
            return sha.hexdigest()
        sha.update(str(size).encode())
        sha.update(f.read(2**20))
        f.seek(-(2**20), os.SEEK_END)
        sha.update(f.read(2**20))
    return "partial:" + sha.hexdigest()


def plain(value: Any) -> Any:
    """Values as JSON knows them: NaN and infinity become None, numpy scalars Python ones, pydantic models the fields given."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` in one step when the block ends well, and is removed when it does not.

    Raises:
        MissingError: the disk is full.
        RequestError: the place cannot be written.
    """
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def cache_folder(name: str) -> Path:
    """`sae-bias/NAME` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sae-bias" / name


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error


def storage_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return MissingError(
            f"no space left on the disk for {path}; free some and run the same command again: what is finished is kept."
        )
    return RequestError(f"cannot write {path}: {error.strerror or error}.")
