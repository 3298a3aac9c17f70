"""Parts of a Gemma Scope SAE straight from the hub, by HTTP ranges; the whole file is never stored.

A decoder row and pieces of the vectors are one small range each. An encoder column is spread over the whole w_enc tensor (one
number in every row), so it costs that tensor's bytes: the caller is asked first (`confirm`), the tensor is streamed once, and only
the wanted columns are kept, on disk too, so that they are not fetched twice.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_bias.core.errors import MissingError, RequestError, SaeBiasError
from sae_bias.core.files import cache_folder, writing_whole
from sae_bias.models import hub
from sae_bias.saes import releases
from sae_bias.saes.formats.gemma_scope import EncoderFile, check_width, encoder_of, read_info
from sae_bias.saes.ids import HUB_NAME, SaeId
from sae_bias.saes.sae import Sae
from sae_bias.saes.tensors import Slot, TensorFile, npz_slots, safetensors_slots

Confirm = Callable[[str, int], bool]
"""(what, bytes) → whether to fetch them."""
Span = tuple[int, int]


@dataclass(frozen=True)
class HubPlace:
    """Where one SAE's files are."""

    sae: SaeId
    repo_id: str
    folder: str
    model: str | None = None
    l0: float | None = None
    """As the release states it."""

    @property
    def label(self) -> str:
        return f"{self.repo_id}/{self.folder}"

    @property
    def file_name(self) -> str:
        return f"{self.folder}/params.{'safetensors' if '/gemma-scope-2-' in self.repo_id else 'npz'}"


def hub_place(name: str) -> HubPlace | None:
    """The hub repository and folder a name means; None for a local folder, an organism or another loader's release."""
    sae_id = SaeId.parse(name)
    if HUB_NAME.fullmatch(name):
        return HubPlace(sae_id, sae_id.release, sae_id.sae_id)
    if sae_id.release not in releases.release_names():
        return None
    release = releases.sae_release(sae_id.release)
    if not release.is_gemma_scope:
        return None
    folder, l0 = release.folder(sae_id.sae_id), release.l0.get(sae_id.sae_id)
    return HubPlace(sae_id, release.repo_id, folder, release.model, l0)


def is_cached(place: HubPlace) -> bool:
    """Whether the weights are in the hub cache: then nothing remote is needed."""
    return hub.cached_file(place.repo_id, place.file_name) is not None


def open_remote(place: HubPlace) -> Sae:
    """The SAE with its numbers still on the hub; only headers and the small config are fetched here.

    Raises:
        MissingError: offline, gated, not there; says what gets it.
    """
    hub.refuse_traversal(place.file_name)
    label = place.label
    if hub.is_offline():
        raise MissingError(f"{label} is not cached and HF_HUB_OFFLINE is set; run `hf download {place.repo_id} --include '{place.folder}/*'`")  # fmt: skip
    config = None
    if place.file_name.endswith("safetensors"):
        config = hub.optional_hub_file(place.repo_id, f"{place.folder}/config.json")
    info = read_info(label, config, model_name=place.model)
    file = RemoteTensorFile.open(place)
    encoder = encoder_of(file, Path(label))
    check_width(encoder, label, config)
    return Sae(place.sae, encoder, info)


@dataclass(frozen=True, eq=False)
class RemoteTensorFile(TensorFile):
    """A weights file on the hub; what is read is counted."""

    place: HubPlace | None = None
    source: RangeReader | None = None
    kept: dict[str, dict[Span, Tensor]] = field(default_factory=dict)

    @classmethod
    def open(cls, place: HubPlace) -> RemoteTensorFile:
        """Read and check the header."""
        source = RangeReader(place.repo_id, place.file_name)
        path = Path(f"{place.repo_id}/{place.file_name}")
        file = io.BufferedReader(source, 1 << 13)
        if path.suffix == ".npz":
            slots = npz_slots(path, file, source.size)
        else:
            slots = safetensors_slots(path, file, file.read(8), source.size)
        return cls(path, source.size, slots, place=place, source=source)

    @property
    def bytes_read(self) -> int:
        assert self.source is not None
        return self.source.bytes_read

    def fetch_columns(self, name: str, spans: Sequence[Span], confirm: Confirm) -> bool:
        """Get column spans of a matrix, after asking; False where the answer is no. Kept on disk for the next time."""
        slot = self._slot(name, 2)
        if slot.member is not None or slot.column_major:
            raise RequestError(f"{self.path}: its {name} is compressed; download the file to read columns.")
        stored = self._stored(name, spans)
        if stored is not None:
            self.kept[name] = stored
            return True
        n_bytes = _item(slot) * slot.shape[0] * slot.shape[1]
        if not confirm(f"{self.path} {name}", n_bytes):
            return False
        self.kept[name] = self._stream_columns(slot, spans)
        self._store(name)
        return True

    def _read_row_major(
        self, slot: Slot, dtype: torch.dtype, shape: Span, rows: Span, columns: Span
    ) -> Tensor:
        wanted = columns[1] - columns[0]
        for (start, stop), block in self.kept.get(slot.name, {}).items():
            if start <= columns[0] and columns[1] <= stop:
                return block[rows[0] : rows[1], columns[0] - start : columns[1] - start]
        if slot.member is not None:
            raise RequestError(
                f"{self.path}: {slot.name} is compressed; download the file to read parts of it."
            )
        if wanted != shape[1] and rows[1] - rows[0] != 1:
            raise MissingError(
                f"{self.path}: its {slot.name} is on the hub; a column needs the whole tensor, which was not fetched."
            )
        assert self.source is not None
        item = _item(slot)
        start = slot.offset + (rows[0] * shape[1] + columns[0]) * item
        data = self.source.read_at(start, (rows[1] - rows[0]) * wanted * item)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(rows[1] - rows[0], wanted)

    def _stream_columns(self, slot: Slot, spans: Sequence[Span]) -> dict[Span, Tensor]:
        assert self.source is not None
        assert slot.torch_dtype is not None
        n_rows, n_columns = slot.shape
        row_bytes = n_columns * _item(slot)
        out = {s: torch.empty(n_rows, s[1] - s[0], dtype=slot.torch_dtype) for s in spans}
        rest, row = b"", 0
        for chunk in self.source.stream(slot.offset, n_rows * row_bytes):
            rest += chunk
            whole = len(rest) // row_bytes
            if whole:
                block = torch.frombuffer(bytearray(rest[: whole * row_bytes]), dtype=slot.torch_dtype)
                for start, stop in spans:
                    out[start, stop][row : row + whole] = block.view(whole, n_columns)[:, start:stop]
                rest, row = rest[whole * row_bytes :], row + whole
        if row != n_rows:
            raise MissingError(f"{self.path}: the transfer of {slot.name} ended early; try again.")
        return out

    def _slice_file(self, name: str) -> Path:
        assert self.source is not None
        key = hashlib.sha256(f"{self.path}|{name}|{self.source.etag}".encode()).hexdigest()[:32]
        return cache_folder("slices") / f"{key}.safetensors"

    def _stored(self, name: str, spans: Sequence[Span]) -> dict[Span, Tensor] | None:
        try:
            found = load_file(self._slice_file(name))
        except Exception:  # absent or damaged: it is fetched again
            return None
        stored = {tuple(map(int, key.split("-"))): block for key, block in found.items()}
        return stored if set(spans) <= set(stored) else None  # type: ignore[return-value]

    def _store(self, name: str) -> None:
        blocks = {f"{a}-{b}": t.contiguous() for (a, b), t in self.kept[name].items()}
        # a cache that cannot be written is not a reason to fail
        with suppress(SaeBiasError), writing_whole(self._slice_file(name)) as partial:
            save_file(blocks, partial)


class RangeReader(io.RawIOBase):
    """A file on the hub as something seekable; every read is an HTTP range."""

    def __init__(self, repo_id: str, filename: str):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.repo_id, self.what = repo_id, f"{repo_id}/{filename}"
        url = hf_hub_url(repo_id, filename)
        with hub.hub_errors(self.what, repo_id):
            facts = get_hf_file_metadata(url)
        if not facts.size:
            raise MissingError(f"{self.what}: the hub does not say how large it is.")
        self.url, self.size, self.etag = facts.location or url, int(facts.size), facts.etag
        self.headers: dict[str, Any] = build_hf_headers() if self.url == url else {}
        self.at = self.bytes_read = 0

    def read_at(self, start: int, n: int) -> bytes:
        """n bytes from `start`."""
        data = b"".join(self.stream(start, n))
        if len(data) != n:
            raise MissingError(f"{self.what}: the transfer ended early; try again.")
        return data

    def stream(self, start: int, n: int):
        """n bytes from `start`, in pieces."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        if n <= 0:
            return
        headers = {**self.headers, "Range": f"bytes={start}-{start + n - 1}"}
        with (
            hub.hub_errors(self.what, self.repo_id),
            get_session().stream("GET", self.url, headers=headers, follow_redirects=True) as answer,
        ):
            hf_raise_for_status(answer)
            if answer.status_code != 206:
                raise MissingError(f"{self.what}: the server sends whole files only; download it.")
            for piece in answer.iter_raw(1 << 20):
                self.bytes_read += len(piece)
                yield piece

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence] + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        n = max(0, min(len(buffer), self.size - self.at))
        data = self.read_at(self.at, n) if n else b""
        buffer[:n] = data
        self.at += n
        return n


def _item(slot: Slot) -> int:
    assert slot.torch_dtype is not None
    return torch.empty(0, dtype=slot.torch_dtype).element_size()


def w_enc_file(sae: Sae) -> tuple[EncoderFile, str] | None:
    """The encoder file of an SAE read in slices and its own name of w_enc; None for one in memory."""
    encoder = sae.encoder
    return (encoder, encoder.names["w_enc"]) if isinstance(encoder, EncoderFile) else None
