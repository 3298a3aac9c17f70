"""Hashes and plain values of what is written to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
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
    """Values as JSON knows them: NaN and infinity become None, numpy scalars Python ones."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(folder, error) from error


def _storage_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return MissingError(
            f"no space left on the disk for {path}; free some and run the same command again: what is finished is kept."
        )
    return RequestError(f"cannot write {path}: {error.strerror or error}.")
