"""The untouched Hugging Face tokenizer that token ids come from, and what is checked of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.models.hub import TOKENIZERS, _loading_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_OLDER = ("spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json")


def _load_tokenizer(source: Path | str, *, local: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if isinstance(source, Path) and not any((source / name).is_file() for name in (*TOKENIZERS, *_OLDER)):
        raise RequestError(
            f"{source} holds no tokenizer ({', '.join(TOKENIZERS)}); copy its files there, or give load_model(…, tokenizer=…)."
        )
    try:
        with _no_collection():
            return AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:
        raise _loading_error(source, error, what="tokenizer") from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: a vocabulary of 262k is parsed several times, and each collection walks all of it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _stored_tokenizer(hf: Any, bridge: Any) -> PreTrainedTokenizerBase:
    """The tokenizer found under the model object's own name; a bridge's is never used, because it was altered."""
    stored = getattr(getattr(bridge, "tokenizer", None), "name_or_path", "") if bridge is not None else ""
    for source in (getattr(hf.config, "_name_or_path", ""), stored):
        if source and Path(source).is_dir():
            return _load_tokenizer(Path(source))
        if source:
            try:
                return _load_tokenizer(source)
            except (RequestError, MissingError):
                continue
    raise RequestError("this model object has no stored tokenizer; pass load_model(model, tokenizer=...).")
