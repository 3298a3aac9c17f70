"""Text collections as streams: a file of any size, a list or an iterator, cut into windows a model can read.

.txt     a text a line          .jsonl   a text a line, under `text`, or the line itself where it is a string
.json    a list of texts, or of objects with `text` (read whole)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_bias.bundled import TEXT_KINDS, load_texts
from sae_bias.errors import RequestError
from sae_bias.model import Model

Texts = str | Path | Iterable[str] | None
_MOST_LINE = 64 << 20


def text_stream(source: Texts) -> tuple[str, Iterator[str]]:
    """(what the collection is called, its texts one by one); None is the small bundled collection.

    Raises:
        RequestError: no such file, another kind of file, a line that is no text (when it is reached).
    """
    if source is None:
        return "bundled sentences", iter([text for kind in TEXT_KINDS for text in load_texts(kind)])
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not path.is_file():
            raise RequestError(
                f"there is no text file {source}; give a .txt, .jsonl or .json file, or a list of texts."
            )
        readers = {".txt": _lines, ".jsonl": _jsonl, ".json": _json}
        if path.suffix not in readers:
            raise RequestError(f"{source} is no .txt, .jsonl or .json file.")
        return path.name, readers[path.suffix](path)
    if not isinstance(source, Iterable):
        raise RequestError(f"texts must be a file or an iterable of texts, not a {type(source).__name__}.")
    return "given texts", _checked(source)


def token_windows(model: Model, texts: Iterable[str], length: int) -> Iterator[tuple[int, list[int]]]:
    """(place of the text, token ids of one window); every window begins with a BOS where the tokenizer puts one."""
    bos: Any = model.tokenizer.bos_token_id
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(length, longest) if longest else length
    for place, text in enumerate(texts):
        ids: list[int] = list(model.tokenizer(text, verbose=False).input_ids)  # type: ignore[arg-type]
        head = [bos] if ids and bos is not None and ids[0] == bos else []
        body = ids[len(head) :]
        step = length - len(head)
        for start in range(0, len(body), step):
            window = body[start : start + step]
            if any(i not in model.special_ids for i in window):
                yield place, head + window


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        try:
            while line := file.readline(_MOST_LINE):
                if line.strip():
                    yield line.strip()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}, line {number}: not JSON ({error}).") from error
        yield _text(value, f"{path}, line {number}")


def _json(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: not JSON ({error}).") from error
    if not isinstance(values, list):
        raise RequestError(f"{path} holds no list; expected a list of texts, or of objects with `text`.")
    for place, value in enumerate(values):
        yield _text(value, f"{path}, entry {place}")


def _checked(texts: Iterable[Any]) -> Iterator[str]:
    for place, value in enumerate(texts):
        yield _text(value, f"text {place}")


def _text(value: Any, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise RequestError(f"{where} is no text; expected a string, or an object with `text`.")
    return text


def _opened(path: Path):
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error


def batches(
    windows: Iterable[tuple[int, list[int]]], n: int = 256
) -> Iterator[Sequence[tuple[int, list[int]]]]:
    """Windows in groups of n, so that texts of one length can run together."""
    group: list[tuple[int, list[int]]] = []
    for window in windows:
        group.append(window)
        if len(group) == n:
            yield group
            group = []
    if group:
        yield group
