"""Files from the Hugging Face hub: the cache first and with no network, then a checked download.

A file that is cached is never asked for again. A downloaded one is hashed against the name the hub gave its
content (sha256 for large files, git's sha1 for small ones) and thrown away when they differ, so a broken
transfer cannot stay in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_bias.core.errors import MissingError, RequestError, SaeBiasError


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_file(repo_id: str, filename: str, revision: str | None = None) -> Path | None:
    """The file in the hub cache, or None; no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, filename, revision=revision)
    except (HFValidationError, ValueError) as error:
        raise RequestError(
            f"{repo_id!r} is not the id of a hub repository, expected e.g. google/gemma-2-9b"
        ) from error
    return Path(found) if isinstance(found, str) else None


def hub_file(repo_id: str, filename: str, *, revision: str | None = None) -> Path:
    """The file from the cache or, if need be, downloaded and checked.

    Raises:
        MissingError: offline and not cached, gated, no such file, or the transfer failed; says what gets it.
    """
    refuse_traversal(filename)
    if (found := cached_file(repo_id, filename, revision)) is not None:
        return found
    if is_offline():
        raise MissingError(
            f"{repo_id}/{filename} is not in the hub cache and HF_HUB_OFFLINE is set; "
            f"run `hf download {repo_id} --include '{filename.rpartition('/')[0] or '.'}/*'` where there is a network"
        )
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{repo_id}/{filename}", repo_id):
        path = Path(hf_hub_download(repo_id, filename, revision=revision))
    _check_download(path, f"{repo_id}/{filename}")
    _forget_absence(path, filename)
    return path


def optional_hub_file(repo_id: str, filename: str, *, revision: str | None = None) -> Path | None:
    """As `hub_file`, None where the repository has no such file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hub_file(repo_id, filename, revision=revision)
    except MissingError as error:
        absent, local = EntryNotFoundError, LocalEntryNotFoundError
        if isinstance(error.__cause__, absent) and not isinstance(error.__cause__, local):
            return None
        raise


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
MODEL_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a causal model beside its config and weights, where it has them."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def fetch_model(repo_id: str) -> None:
    """Have every file of a causal language model in the cache, each fresh one checked; weights as safetensors only.

    What is whole in the cache is not asked for again. The config comes last, so that a fetch that broke off is taken up again.

    Raises:
        MissingError: gated, no such repository, or a transfer failed; says what gets it.
        RequestError: the repository holds no safetensors weights, or an index that names none.
    """
    if is_whole(repo_id):
        return
    from huggingface_hub import HfApi

    with hub_errors(repo_id, repo_id):
        there = set(HfApi().list_repo_files(repo_id))
    if not there & {_WEIGHTS, _INDEX}:
        raise RequestError(
            f"{repo_id} has no {_WEIGHTS}; pickled weights are never loaded, convert them to safetensors."
        )
    for name in MODEL_FILES:
        if name in there:
            hub_file(repo_id, name)
    shards = _shards(hub_file(repo_id, _INDEX), repo_id) if _INDEX in there else [_WEIGHTS]
    for name in (*shards, "config.json"):
        hub_file(repo_id, name)


def is_whole(repo_id: str) -> bool:
    """Whether a model's config, weights and tokenizer are in the cache: then no network is asked."""
    if cached_file(repo_id, "config.json") is None:
        return False
    index = cached_file(repo_id, _INDEX)
    weights = [_WEIGHTS] if index is None else _shards(index, repo_id)
    tokenizer = any(cached_file(repo_id, name) for name in TOKENIZERS)
    return tokenizer and all(cached_file(repo_id, name) for name in weights)


def _shards(index: Path, repo_id: str) -> list[str]:
    """Names of the weights files that an index lists."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{repo_id}: its model.safetensors.index.json lists no weights files.") from error
    if not names or not all(isinstance(n, str) and n.endswith(".safetensors") for n in names):
        raise RequestError(
            f"{repo_id}: its model.safetensors.index.json names a file that is no .safetensors."
        )
    return names


def refuse_traversal(name: str) -> None:
    """Refuse a hub file or SAE name that could leave its folder."""
    parts = name.split("/")
    wrong = any(part in ("..", ".", "") or len(part.encode("utf-8", "replace")) > 200 for part in parts)
    if wrong or "\\" in name or "\0" in name or len(name) > 1000:
        raise RequestError(
            f"{name[:80]!r}: a name inside a repository has no '..', no empty or very long part and no leading slash"
        )


@contextlib.contextmanager
def hub_errors(what: str, repo_id: str) -> Iterator[None]:
    """Turn whatever the hub client raises while getting `what` into one plain line."""
    from huggingface_hub import errors

    try:
        yield
    except SaeBiasError:
        raise
    except errors.GatedRepoError as error:
        raise MissingError(_gated(what, repo_id)) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingError(
            f"{what}: the hub has no repository {repo_id}, or it is private or gated; check the name, "
            f"accept the license at https://huggingface.co/{repo_id} and run `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise RequestError(
            f"{repo_id!r} is not the id of a hub repository, expected e.g. google/gemma-2-9b"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise MissingError(_unreachable(what, repo_id, error)) from error
    except errors.RevisionNotFoundError as error:
        raise MissingError(f"{what}: the repository {repo_id} has no such revision") from error
    except errors.EntryNotFoundError as error:
        raise MissingError(f"{what}: the repository {repo_id} has no such file") from error
    except Exception as error:
        if _status(error) in (401, 403):
            raise MissingError(_gated(what, repo_id)) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MissingError(
                f"{what}: the disk of the hub cache is full; free some space or point HF_HOME elsewhere"
            ) from error
        if isinstance(error, (OSError, RuntimeError)) or type(error).__module__.startswith(
            ("httpx", "huggingface_hub")
        ):
            raise MissingError(_unreachable(what, repo_id, error)) from error
        raise


def _gated(what: str, repo_id: str) -> str:
    return (
        f"{what} is gated: accept the license at https://huggingface.co/{repo_id} and run `hf auth login` "
        "once (or set HF_TOKEN)"
    )


def _unreachable(what: str, repo_id: str, error: BaseException) -> str:
    cause = error.__cause__ or error
    code = _status(error) or _status(cause)
    if code in (401, 403):
        return _gated(what, repo_id)
    if code == 429:
        reason = "the hub asks to slow down (429); wait a few minutes, or log in with `hf auth login`"
    elif is_offline():
        reason = f"it is not in the hub cache and HF_HUB_OFFLINE is set; run `hf download {repo_id}` where there is a network"
    elif code is not None and code >= 500:
        reason = f"the hub answered {code}; try again later"
    else:
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        reason = f"the download did not finish ({line[:160]}); check the network and try again; partial downloads are kept"
    return f"{what}: {reason}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _forget_absence(path: Path, filename: str) -> None:
    """Take away the cache's note that the file does not exist: it came, so an earlier 404 was wrong."""
    snapshot = path.parents[filename.count("/")]
    note = snapshot.parents[1] / ".no_exist" / snapshot.name / filename
    with contextlib.suppress(OSError):
        note.unlink()


def _check_download(path: Path, what: str) -> None:
    """Hash a fresh download against its blob name, which the hub derives from the content."""
    blob = path.resolve()
    expected = blob.name
    if len(expected) not in (40, 64) or any(digit not in "0123456789abcdef" for digit in expected):
        return
    digest = (
        hashlib.sha256() if len(expected) == 64 else hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
    )
    with blob.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() == expected:
        return
    for leftover in (path, blob, Path(f"{blob}.incomplete")):
        with contextlib.suppress(OSError):
            os.unlink(leftover)
    raise MissingError(f"{what}: the download's checksum is wrong, so it was thrown away; try again")


def _loading_error(source: Path | str, error: Exception, what: str = "model") -> Exception:
    """The library's error as one line that says what to do: missing (exit 3) or wrong (exit 2)."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {type(e).__name__ for e in chain}
    first = " ".join(str(error).split())[:300]
    if "custom code which must be executed" in str(error) or "trust_remote_code" in str(error):
        return RequestError(
            f"{source} needs Python code of its own, which sae-bias never runs; transformers has no class for it."
        )
    if isinstance(source, Path):
        if any(isinstance(e, OSError) and e.errno == 28 for e in chain):
            return MissingError(f"no space left on the disk while loading {source}.")
        return RequestError(f"the {what} in {source} cannot be read ({type(error).__name__}: {first}).")
    if "GatedRepoError" in names or "401" in first or "403" in first or "gated repo" in first:
        return MissingError(
            f"{source} is gated: accept its license at its page on the hub, then log in once with `hf auth login` (or set HF_TOKEN)."
        )
    if {"RepositoryNotFoundError", "RemoteEntryNotFoundError"} & names:
        return MissingError(
            f"the hub has no model {source} that you may read; check the name, or log in with `hf auth login`."
        )
    if "SafetensorError" in names:
        return RequestError(
            f"the cached weights of {source} are damaged ({first}); run `hf download {source} --force-download`."
        )
    return MissingError(
        f"{source} is not in the local cache and could not be fetched ({type(error).__name__}); "
        f"on a machine with network run `hf download {source}`, or give a local folder."
    )


class _quiet:
    """Silences the loading report of transformers, which would bury our one line."""

    def __init__(self, transformers: Any):
        self.logging = transformers.logging

    def __enter__(self) -> None:
        self.before = self.logging.get_verbosity()
        self.bars = self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.before)
        if self.bars:
            self.logging.enable_progress_bar()


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)
