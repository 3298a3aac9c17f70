"""Structural fuzzing from a seed: damage a good input as text, as bytes or as a JSON tree, many ways, the same ways each time."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_bias.core.errors import SaeBiasError

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**64), 0.5, 1e308, -1e-300, float("nan"), float("inf"), "", " ", "x", "\x00", "\ud800",
    "x" * 5000, "é☃\u202e", "../../etc/passwd", "/dev/zero", "~", "organism:planted", "organism:../x", "a/b/c#1", "#", "NaN", "1e999",
    "{subject}", "{", "<script>alert(1)</script>", "!!python/object:os.system", "*a", "&a b", [], {}, [[]], [None], {"": ""}, [0] * 300, {"a": {"b": []}},
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[", b"]" * 40, b"[" * 2000, b":", b"- ", b"\n", b"\r", b",", b'"', b"'",
    b"&a ", b"*a", b"!!python/name:os.x ", b"!tag ", b"<<: ", b"? ", b"|", b"%YAML 9", b"---\n", b"...\n", b"NaN", b"1e999", b"-0", b"9" * 60, b"null",
    b"\\u0000", b"\\ud800", b"../", b"#", b"\t", b"x" * 3000, b"{subject}", b"{0.__class__}", b"\x1b[31m",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Something that reads what a user, a file or a network gives, and good inputs for it."""

    name: str
    read: Callable[[Any], Any]
    """Takes the damaged input: bytes for `seeds`, a value for `trees`."""
    seeds: tuple[bytes, ...] = ()
    trees: tuple[Any, ...] = ()
    cost: float = 1.0
    """Share of inputs: less than 1 for a slow reader."""


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to five edits: overwritten, inserted, cut, doubled or swapped pieces; headers are hit more often."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        at = int(len(data) * rng.random() ** rng.choice((1, 1, 3)))
        piece = rng.choice(PIECES) if rng.random() < 0.6 else rng.randbytes(rng.randint(1, 8))
        how = rng.randrange(7)
        if how == 0:
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == 1:
            data = data[:at] + piece + data[at:]
        elif how == 2:
            data = data[:at] + data[at + rng.randint(1, 40) :]
        elif how == 3:
            data = data[:at]
        elif how == 4:
            data = data[:at] + data[at : at + rng.randint(1, 200)] * 2 + data[at:]
        elif how == 5 and data:
            data = (
                data[:at] + bytes([data[min(at, len(data) - 1)] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            )
        else:
            other = rng.randrange(len(data) + 1)
            data = data[: min(at, other)] + data[max(at, other) :]
    return data


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three nodes replaced, taken out, doubled, renamed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = list(_holders(tree))
        if not holders:
            return rng.choice(VALUES)
        holder, key = rng.choice(holders)
        how = rng.randrange(6)
        if how <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif how == 3:
            del holder[key]
        elif how == 4:
            other, at = rng.choice(holders)
            holder[key] = copy.deepcopy(other[at]) if _has(other, at) else None
        elif isinstance(holder, dict):
            holder[rng.choice(("", "x", key.upper(), f"{key} ", "id", "\x00"))] = holder.pop(key)
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    return tree


def _holders(tree: Any) -> Any:
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            stack.append(node[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def fuzz(reader: Reader, n: int, seed: int = 0) -> int:
    """Give a reader n damaged inputs; only errors of ours may leave it, each one line that says something.

    Returns how many of them were refused.
    """
    rng = random.Random(f"{reader.name} {seed}")
    refused = 0
    for i in range(n):
        if reader.trees and (not reader.seeds or rng.random() < 0.7):
            given: Any = damaged_tree(rng.choice(reader.trees), rng)
        else:
            given = damaged_bytes(rng.choice(reader.seeds), rng)
        try:
            reader.read(given)
        except SaeBiasError as error:
            refused += 1
            line = str(error)
            assert line.strip(), f"{reader.name}, input {i}: an empty message"
            assert len(line) < 5000 and len(line.splitlines()) == 1, (
                f"{reader.name}, input {i}: {line[:300]!r}"
            )
        except Exception as error:
            shown = repr(given)
            raise AssertionError(
                f"{reader.name}, input {i} (seed {seed}): {type(error).__name__}: {str(error)[:200]}\n{shown[:1500]}"
            ) from error
    return refused


def as_text(value: Any) -> bytes:
    """A tree as JSON (which is YAML too); what UTF-8 has no bytes for stays escaped."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


class Files:
    """Writes an input where a reader of files will look."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_text(content))
        return path
