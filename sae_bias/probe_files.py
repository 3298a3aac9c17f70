"""A probe's result as one file: numbers as numpy arrays, everything else as JSON text inside it; no pickle.

NAME/values_human, NAME/values_ai, NAME/log_normaliser    float64, bit for bit
facts                                                      UTF-8 JSON: pairs, probe, vocabulary, model (NAME: result, control)
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sae_bias.errors import RequestError
from sae_bias.probe import Probe, ProbeResult
from sae_bias.prompt_values import Lexicon, NeutralPrompt, PromptPair, PromptPairs
from sae_bias.reading import Vocabulary, WordTokens

FORMAT = "sae-bias probe result 1"
_MOST_BYTES = 1 << 30
_DAMAGE = (
    KeyError, ValueError, TypeError, OSError, EOFError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_ARRAYS = ("values_human", "values_ai", "log_normaliser")


def save_result(result: ProbeResult, path: str | Path) -> Path:
    """Write `result` and its control to `path`, whole or not at all."""
    path = Path(path)
    facts: dict[str, Any] = {"format": FORMAT}
    arrays: dict[str, np.ndarray] = {}
    for name, part in (("result", result), ("control", result.control)):
        if part is not None:
            facts[name] = _facts(part)
            arrays |= {f"{name}/{a}": v for a in _ARRAYS if (v := getattr(part, a)) is not None}
    text = json.dumps(facts, ensure_ascii=False).encode()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as f:
            np.savez_compressed(f, allow_pickle=False, facts=np.frombuffer(text, dtype=np.uint8), **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def load_result(path: str | Path) -> ProbeResult:
    """The result that `save_result` wrote.

    Raises:
        RequestError: the file does not exist, is damaged, or is none of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"there is no probe result {path}; give a file that ProbeResult.save wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes().decode())
            if facts["format"] != FORMAT:
                raise KeyError(facts["format"])
            return _result(facts, arrays, "result")
    except _DAMAGE as error:
        raise RequestError(
            f"{path} is not a probe result of this version ({type(error).__name__}: {str(error)[:120]})."
        ) from error


def _facts(result: ProbeResult) -> dict[str, Any]:
    pairs, probe = result.pairs, result.probe
    return {
        "model": result.model_name,
        "pairs": {
            "pairs": [asdict(p) for p in pairs],
            "neutral": [asdict(p) for p in pairs.neutral_prompts],
            "name": pairs.name,
            "stems": pairs.stems,
            "sides": pairs.sides,
            "note": pairs.note,
            "words": None if pairs.words is None else asdict(pairs.words),
        },
        "probe": {
            name: getattr(probe, name)
            for name in ("positive", "negative", "score", "softcap", "tokens", "bundled")
        },
        "vocabulary": [asdict(w) for w in result.vocabulary.words],
    }


def _result(facts: dict[str, Any], arrays: Any, name: str) -> ProbeResult:
    own = facts[name]
    pairs = _pairs(own["pairs"])
    words = Vocabulary(tuple(WordTokens(**w | {"tokens": tuple(w["tokens"])}) for w in own["vocabulary"]))
    n, k = len(pairs), len(words.kept)
    return ProbeResult(
        pairs,
        _probe(own["probe"]),
        words,
        _numbers(arrays, f"{name}/values_human", (n, k)),
        _numbers(arrays, f"{name}/values_ai", (n, k)),
        own["model"],
        _numbers(arrays, f"{name}/log_normaliser", (n, 2))
        if f"{name}/log_normaliser" in arrays.files
        else None,
        _result(facts, arrays, "control") if name == "result" and "control" in facts else None,
    )


def _numbers(arrays: Any, name: str, shape: tuple[int, int]) -> np.ndarray:
    """One array of the file, of the shape its pairs and words ask for, finite."""
    values = arrays[name]
    if values.dtype != np.float64 or values.shape != shape:
        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}; expected float64 {list(shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return values


def _pairs(own: dict[str, Any]) -> PromptPairs:
    words = own["words"]
    lexicon = words and Lexicon(tuple(words["positive"]), tuple(words["negative"]), words["name"])
    return PromptPairs(
        tuple(PromptPair(**p) for p in own["pairs"]),
        own["name"],
        tuple(NeutralPrompt(**p) for p in own["neutral"]),
        tuple(own["stems"]),
        lexicon,
        (own["sides"][0], own["sides"][1]),
        own["note"],
    )


def _probe(own: dict[str, Any]) -> Probe:
    bundled = own.pop("bundled")
    probe = Probe(**own)
    object.__setattr__(probe, "bundled", bundled)
    return probe
