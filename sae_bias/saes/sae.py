"""A sparse autoencoder and its features, wherever the weights lie."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.files import file_digest
from sae_bias.core.site import Site
from sae_bias.models.forward import check_fits
from sae_bias.models.model import Model
from sae_bias.saes.ids import FeatureRef, SaeId


def sae_facts(sae: Sae) -> dict[str, Any]:
    """An SAE's id, site, file hash and, from the hub, commit."""
    files = {sae.path.name: file_digest(sae.path)} if sae.path is not None and sae.path.is_file() else {}
    commit = None if sae.path is None else re.search(r"/snapshots/([0-9a-f]{40})/", sae.path.as_posix())
    return {
        "id": str(sae.id),
        "layer": sae.site.layer,
        "width": sae.d_sae,
        "l0": sae.label_l0,
        "files": files,
        "commit": commit and commit[1],
    }


_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature's vectors, float32."""

    ref: FeatureRef
    w_enc: Float[Tensor, "d_model"]
    w_dec: Float[Tensor, "d_model"]
    b_enc: Float[Tensor, ""]
    threshold: Float[Tensor, ""]
    site: Site
    whole: Sae | None = None
    """The whole SAE, where one encoder column does not give the activation."""

    @property
    def index(self) -> int:
        """Its index in its SAE."""
        return self.ref.index

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.w_dec.shape[0]

    @cached_property
    def digest(self) -> str:
        """Hash of its weights."""
        sha = hashlib.sha256()
        for tensor in self._weights:
            sha.update(tensor.detach().cpu().numpy().tobytes())
        if self.whole is not None:
            sha.update(repr(sae_facts(self.whole)["files"]).encode())
        return sha.hexdigest()[:16]

    def activation(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """a = h · 1[h > threshold] of residuals x, in float32."""
        if self.whole is not None:
            return self.whole.encode(x)[..., self.index]
        feature = self.to(x.device)
        h = x.float() @ feature.w_enc + feature.b_enc
        return torch.where(h > feature.threshold, h, torch.zeros_like(h))

    def write(
        self, x: Float[Tensor, "*batch d_model"], acts: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What the decoder adds to residuals x where the activation is `acts`: acts · scale(x) · W_dec[f].

        The same for a change of the activation: decode(a + acts) − decode(a), whatever the other features do.
        """
        scale = self.decoder_scale(x)
        return (acts if scale is None else acts * scale)[..., None] * self.w_dec.to(x.device)

    def decoder_scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"] | None:
        """`Sae.decoder_scale` of its SAE; None where it is 1 everywhere."""
        return None if self.whole is None else self.whole.decoder_scale(x)

    def to(self, device: str | torch.device) -> Feature:
        """The same feature on a device."""
        if self.w_dec.device == torch.device(device):
            return self
        names = ("w_enc", "w_dec", "b_enc", "threshold")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def __eq__(self, other: object) -> bool:
        """The same feature with the same weights, however often it was loaded."""
        if not isinstance(other, Feature) or self.ref != other.ref:
            return False
        return self is other or all(
            torch.equal(a.cpu(), b.cpu()) for a, b in zip(self._weights, other._weights)
        )

    def __hash__(self) -> int:
        return hash(self.ref)

    @property
    def _weights(self) -> tuple[Tensor, ...]:
        return self.w_enc, self.w_dec, self.b_enc, self.threshold

    def __str__(self) -> str:
        return str(self.ref)

    def __repr__(self) -> str:
        return f"Feature({str(self.ref)!r}, site={str(self.site)!r}, d_model={self.d_model})"


@runtime_checkable
class Encoder(Protocol):
    """Where an SAE's numbers come from: a file read in slices, or tensors in memory."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    def columns(self, start: int, stop: int) -> Columns: ...
    def decoder_rows(self, indices: Sequence[int]) -> Float[Tensor, "n d_model"]: ...
    def b_dec(self) -> Float[Tensor, "d_model"]: ...


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder of one hook point; weights are read when asked for."""

    id: SaeId
    encoder: Encoder
    info: SaeInfo
    path: Path | None = None
    """Its weights file, where it has one."""
    reduces_to_one_row: bool = True
    """Whether a feature's own encoder column gives its activation: (Jump)ReLU, input not normalized."""
    lens: Any = None
    """The SAELens object, where the whole SAE is in memory."""
    _features: dict[int, Feature] = field(default_factory=dict, repr=False)

    @property
    def d_in(self) -> int:
        """Width of what it reads: d_model, or n_heads · d_head."""
        return self.encoder.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.encoder.d_sae

    @property
    def site(self) -> Site:
        """Hook point it was trained on."""
        return self.info.site

    @property
    def architecture(self) -> str:
        """`jumprelu`, `standard`, `topk` …"""
        return self.info.architecture

    @property
    def label_l0(self) -> float | None:
        """Mean number of active features its release states."""
        return self.info.label_l0

    @property
    def model_name(self) -> str | None:
        """Model it was trained on, as its release states."""
        return self.info.model_name

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be inferred while loading."""
        return self.info.notes

    @cached_property
    def b_dec(self) -> Float[Tensor, "d_model"]:
        """The decoder's bias."""
        return self.encoder.b_dec()

    def feature(self, index: int) -> Feature:
        """One feature: an encoder column, a decoder row and two numbers are all that is read, once."""
        ref = FeatureRef(self.id, index)
        if ref.index not in self._features:
            self._features[ref.index] = self._read_feature(ref)
        return self._features[ref.index]

    def _read_feature(self, ref: FeatureRef) -> Feature:
        self._check_index(ref.index)
        column = self.encoder.columns(ref.index, ref.index + 1)
        (w_dec,) = self.encoder.decoder_rows([ref.index])
        whole = None if self.reduces_to_one_row else self
        w_enc = column.w_enc[:, 0].contiguous()
        return Feature(ref, w_enc, w_dec, column.b_enc[0], column.threshold[0], self.site, whole)

    def columns(self, start: int, stop: int) -> Columns:
        """Encoder columns start:stop (w_enc [d_in, n], b_enc [n], threshold [n]); h = x · w_enc + b_enc."""
        if not 0 <= start <= stop <= self.d_sae:
            raise RequestError(f"columns {start}:{stop} of {self.id}: it has {self.d_sae:,} features")
        return self.encoder.columns(start, stop)

    def W_dec_rows(self, indices: Sequence[int] | Tensor) -> Float[Tensor, "n d_model"]:
        """Decoder rows of the given features."""
        rows = [
            operator.index(index) for index in (indices.tolist() if isinstance(indices, Tensor) else indices)
        ]
        for row in rows:
            self._check_index(row)
        return self.encoder.decoder_rows(rows)

    def blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) column blocks that cover the SAE, each about `max_bytes` of float32 weights."""
        step = max(64, (max_bytes or _BLOCK_BYTES) // (4 * self.d_in) // 64 * 64)
        for start in range(0, self.d_sae, step):
            yield start, min(start + step, self.d_sae)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of every feature in float32, the encoder streamed in column blocks."""
        self._check_width(x, self.d_in, "residuals")
        if not self.reduces_to_one_row:
            return self._lens_call("encode", x)
        flat = x.reshape(-1, self.d_in).float()
        acts = flat.new_empty(flat.shape[0], self.d_sae)
        for start, stop in self.blocks():
            acts[:, start:stop] = self.encoder.columns(start, stop).to(x.device).acts(flat)
        return acts.reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def decode(
        self, a: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_model"] | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """x̂ = a · W_dec + b_dec in float32; only decoder rows of features active somewhere are read.

        x: the residuals encoded; an SAE that normalises its input scales its output back by their size.
        """
        self._check_width(a, self.d_sae, "activations")
        if not self.reduces_to_one_row:
            self._remember_size(x)
            return self._lens_call("decode", a)
        flat = a.reshape(-1, self.d_sae).float()
        out = self.b_dec.to(a.device).expand(flat.shape[0], -1).clone()
        active = (flat != 0).any(0).nonzero()[:, 0]
        for part in active.split(max(1, _BLOCK_BYTES // (4 * self.d_in))):
            out += flat[:, part] @ self.W_dec_rows(part).to(a.device)
        return out.reshape(*a.shape[:-1], self.d_in)

    def decoder_scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"] | None:
        """What decode multiplies the sum of decoder rows by, at residuals x; None where it is 1 everywhere.

        constant_norm_rescale encodes x·√d/‖x‖, so its output is multiplied by ‖x‖/√d; layer_norm encodes (x − mean)/std, so its
        output is multiplied by the standard deviation of x over its d dimensions.
        """
        x = x.float()
        if self.info.normalization == "constant_norm_rescale":
            return x.norm(dim=-1) / self.d_in**0.5
        return x.std(dim=-1) if self.info.normalization == "layer_norm" else None

    def _remember_size(self, x: Tensor | None) -> None:
        """Hand SAELens the residuals' size, which its encode keeps for the decode that follows."""
        if self.info.normalization == "none":
            return
        if x is None:
            raise RequestError(
                f"{self.id} scales what it decodes by the size of its input: give decode(acts, x) the residuals x too."
            )
        self.lens.run_time_activation_norm_fn_in(x.float().to(self.lens.W_dec.device))

    def _lens_call(self, method: str, x: Tensor) -> Tensor:
        device, by_head = self.lens.W_dec.device, getattr(self.lens, "hook_z_reshaping_mode", False)
        if by_head:  # its heads are concatenated here already
            self.lens.turn_off_forward_pass_hook_z_reshaping()
        try:
            return getattr(self.lens, method)(x.float().to(device)).float().to(x.device)
        finally:
            if by_head:
                self.lens.turn_on_forward_pass_hook_z_reshaping()

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.d_sae:
            raise RequestError(
                f"feature {index} of {self.id}: it has {self.d_sae:,} features, 0 to {self.d_sae - 1}"
            )

    def _check_width(self, x: Tensor, width: int, what: str) -> None:
        if x.ndim == 0 or x.shape[-1] != width:
            raise RequestError(
                f"{what} of shape {list(x.shape)} for {self.id}; the last axis must be {width:,}"
            )

    def __str__(self) -> str:
        return str(self.id)

    def __repr__(self) -> str:
        return f"Sae({str(self.id)!r}, site={str(self.site)!r}, d_in={self.d_in}, d_sae={self.d_sae})"


class Columns(NamedTuple):
    """A block of n encoder columns, float32: pre-activations are x · w_enc + b_enc."""

    w_enc: Float[Tensor, "d_model n"]
    b_enc: Float[Tensor, "n"]
    threshold: Float[Tensor, "n"]

    def to(self, device: torch.device) -> Columns:
        """The same columns on a device."""
        return Columns(*(part.to(device) for part in self))

    def acts(self, x: Float[Tensor, "m d_model"]) -> Float[Tensor, "m n"]:
        """a = h · 1[h > threshold] of residuals x."""
        h = torch.addmm(self.b_enc, x, self.w_enc)
        return torch.where(h > self.threshold, h, 0.0)  # not h · 0, which is -0 for a negative h


@dataclass(frozen=True)
class SaeInfo:
    """What is known of an SAE without its weights."""

    site: Site
    model_name: str | None = None
    architecture: str = "jumprelu"
    label_l0: float | None = None
    notes: tuple[str, ...] = ()
    """What had to be inferred."""
    normalization: str = "none"
    """How the input is scaled at run time, and the output scaled back: none, constant_norm_rescale or layer_norm."""


def check_sae(model: Model, found: Sae | Feature) -> None:
    """Refuse an SAE or a feature of another width or a site the model lacks."""
    check_fits(model, str(found), found.site, found.d_model if isinstance(found, Feature) else found.d_in)
