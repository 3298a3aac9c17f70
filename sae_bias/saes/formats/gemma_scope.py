"""Gemma Scope 1 and 2 SAEs, read in slices from their files and with no network.

Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147) keeps one `params.npz` a folder, such as
`layer_20/width_16k/average_l0_71`; Gemma Scope 2 one `params.safetensors` and mostly a `config.json`, such as
`resid_post/layer_31_width_65k_l0_medium`. In both

    h = x · W_enc + b_enc        a = h · 1[h > threshold]        x̂ = a · W_dec + b_dec

the encoder does not subtract b_dec. Residual SAEs read the residual after a layer, MLP SAEs the MLP's output after the norm that
follows it, attention SAEs the heads' outputs before the output projection (section 3.1 of the report; the configs of Gemma Scope 2
say the same: `post_feedforward_layernorm.output`, `self_attn.o_proj.input`). What the folder name, the config and the file say of layer, width and
hook point must agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.saes.formats import register_format
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Columns, Sae, SaeInfo
from sae_bias.saes.tensors import TensorFile, open_tensor_file, read_json

PARAMS_FILES = ("params.safetensors", "params.npz")
"""File names of Gemma Scope 2 and Gemma Scope 1 weights."""
_UNITS = {"": (1, 1), "k": (1000, 1024), "m": (1_000_000, 1 << 20)}
_KINDS = re.compile(
    r"(?P<two>resid_post|attn_out|mlp_out|transcoder|crosscoder|clt)(?:_.*)?"
    r"|(?:models--google--)?gemma-scope-\w+-(?:pt|it)-(?P<one>res|att|mlp|transcoders)"
)
_SITES = {
    "resid_post": "resid_post",
    "res": "resid_post",
    "mlp": "mlp_out",
    "mlp_out": "mlp_out",
    "att": "z",
    "attn_out": "z",
}
"""Kind in a folder's name → kind of site."""
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Label:
    """What a folder's own name says; None where it is silent."""

    layer: int | None = None
    width: str | None = None
    """As written, `65k` for 65,536."""
    l0: float | None = None
    kind: str | None = None


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """The five tensors of an SAE file in slices: h = x · s W_enc + b_enc, or (x − b_dec) · W_enc + b_enc; s is 1 but in Llama Scope."""

    file: TensorFile
    names: dict[str, str]
    """The file's own name of w_enc, w_dec, b_enc, b_dec and, for JumpReLU, threshold."""
    subtract_b_dec: bool = False
    scale: float = 1.0
    """What the input is multiplied by, and the output divided by."""
    threshold: float | None = None
    """The one of all features, where the file has none."""

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.file.slots[self.names["w_enc"]].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.file.slots[self.names["w_enc"]].shape[1]

    def columns(self, start: int, stop: int) -> Columns:
        """Encoder columns start:stop with their biases and thresholds."""
        w_enc = self.file.columns(self.names["w_enc"], start, stop)
        w_enc = w_enc if self.scale == 1 else w_enc * self.scale
        b_enc = self.file.vector(self.names["b_enc"], start, stop)
        if self.subtract_b_dec:
            b_enc = b_enc - self.b_dec() @ w_enc
        own = self.names.get("threshold")
        if own is None:
            return Columns(w_enc, b_enc, torch.full_like(b_enc, self.threshold or 0.0))
        threshold = self.file.vector(own, start, stop)
        return Columns(w_enc, b_enc, threshold.exp() if own.startswith("log_") else threshold)

    def decoder_rows(self, indices: Sequence[int]) -> Float[Tensor, "n d_model"]:
        """Decoder rows of the given features."""
        return self.file.rows(self.names["w_dec"], indices) / self.scale

    def b_dec(self) -> Float[Tensor, "d_model"]:
        """The decoder's bias."""
        return self.file.vector(self.names["b_dec"]) / self.scale


def find_params(folder: Path) -> Path | None:
    """The Gemma Scope weights file of a folder, if it has one."""
    return next((folder / name for name in PARAMS_FILES if (folder / name).is_file()), None)


@register_format("gemma_scope")
class GemmaScope:
    """`params.safetensors` or `params.npz`; config.json or the folder's name says layer and hook point."""

    weights = PARAMS_FILES

    @staticmethod
    def matches(folder: Path) -> bool:
        return find_params(folder) is not None

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        params, config = find_params(folder), folder / "config.json"
        assert params is not None
        found = config if config.is_file() else None
        label = folder.absolute().as_posix()
        return open_files(sae_id, params, found, label, read_info(label, found))


def open_files(sae_id: SaeId, params: Path, config: Path | None, label_path: str, info: SaeInfo) -> Sae:
    """The SAE of a weights file, checked against what folder name and config promise."""
    encoder = read_encoder_file(params)
    check_width(encoder, label_path, config)
    return Sae(sae_id, encoder, info, params)


def read_encoder_file(
    path: Path, *, needs_threshold: bool = True, subtract_b_dec: bool = False
) -> EncoderFile:
    """Open an SAE's weights file and check that its tensors fit one another; reads headers only."""
    return encoder_of(
        open_tensor_file(path), path, needs_threshold=needs_threshold, subtract_b_dec=subtract_b_dec
    )


def encoder_of(
    file: TensorFile, path: Path, *, needs_threshold: bool = True, subtract_b_dec: bool = False
) -> EncoderFile:
    """The encoder of a weights file that is open, here or on the hub."""
    names = {name.lower(): name for name in file.slots}
    if "affine_skip_connection" in names or "w_skip" in names:
        raise _not_an_sae(str(path), "a transcoder with an affine skip connection")
    wanted = ["w_enc", "w_dec", "b_enc", "b_dec", *(["threshold"] if needs_threshold else [])]
    if missing := [name for name in wanted if name not in names]:
        raise RequestError(
            f"{path} has no {', '.join(missing)}; it holds {', '.join(sorted(names))[:120] or 'nothing'}"
        )
    _check_scaling(file, names, path)
    encoder = EncoderFile(file, {name: names[name] for name in wanted}, subtract_b_dec)
    _check_shapes(encoder, path)
    return encoder


def read_label(name: str) -> Label:
    """Layer, width, L0 and kind as a Gemma Scope path spells them."""
    parts = [part for part in name.split("/") if part][-7:]
    kind = next(
        (match["two"] or match["one"] for part in reversed(parts) if (match := _KINDS.fullmatch(part))), None
    )
    tail = "/".join(parts[-3:])
    layer = re.search(r"(?:^|[/_])layer_(\d{1,4})(?=[/_]|$)", tail)
    width = re.search(r"(?:^|[/_])width_(\d{1,9})([km]?)(?=[/_]|$)", tail)
    l0 = re.search(r"(?:^|[/_])(?:average_)?l0_(\d{1,6})(?=[/_]|$)", tail)
    return Label(
        layer=int(layer[1]) if layer else None,
        width=width[1] + width[2] if width else None,
        l0=float(l0[1]) if l0 else None,
        kind="embedding" if "embedding" in parts[-3:] else kind,
    )


def read_info(label_path: str, config: Path | None, *, model_name: str | None = None) -> SaeInfo:
    """What folder name and config.json say; refuses a transcoder, and contradictions.

    label_path: repository and folder, as `google/gemma-scope-2-12b-it/resid_post/layer_31_width_65k_l0_big`.
    """
    label = read_label(label_path)
    if label.kind is not None and label.kind not in _SITES:
        raise _not_an_sae(label_path, f"of kind {label.kind!r}")
    entries = _read_config(config) if config is not None else {}
    where = str(config) if config is not None else label_path
    if "hf_hook_point_in" in entries:
        site, notes = _config_site(entries, where), ()
        if label.layer is not None and label.layer != site.layer:
            raise RequestError(
                f"{where} says layer {site.layer}, the folder name says layer {label.layer}; one is wrong"
            )
        if label.kind is not None and _SITES[label.kind] != site.kind:
            raise RequestError(f"{where} says {site}, the folder name says {label.kind}; one is wrong")
    elif label.layer is not None:
        site, notes = (
            Site(label.layer, _SITES.get(label.kind or "", "resid_post")),
            ("layer and hook point taken from the folder name",),
        )
    else:
        raise RequestError(
            f"{label_path}: which layer? Expected a config.json with hf_hook_point_in, or a folder name like "
            "layer_31_width_65k_l0_medium"
        )
    l0 = _number(entries, "l0", where)
    return SaeInfo(
        site,
        _hub_model_name(_text(entries, "model_name", where)) or model_name or _model_of_release(label_path),
        label_l0=l0 if l0 is not None else label.l0,
        notes=notes,
    )


def check_width(encoder: EncoderFile, label_path: str, config: Path | None) -> None:
    """Refuse a file whose width is not the one its folder name or config promises."""
    label, wrong = read_label(label_path).width, None
    if label is not None and not _fits(label, encoder.d_sae):
        wrong = f"the folder name {label_path.split('/')[-1]!r} says {label}"
    width = None if config is None else _number(_read_config(config), "width", str(config))
    if width is not None and width != encoder.d_sae:
        wrong = f"{config} says {width:,.0f}"
    if wrong is not None:
        raise RequestError(f"{encoder.file.path} has {encoder.d_sae:,} features, {wrong}; one is wrong")


def _fits(label: str, d_sae: int) -> bool:
    """Whether a width such as `65k` can mean d_sae = 65,536: thousands of either kind, rounded down."""
    digits, unit = re.fullmatch(r"(\d+)([km]?)", label).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(digits) in {d_sae // size for size in _UNITS[unit]}


def _check_shapes(encoder: EncoderFile, path: Path) -> None:
    shapes = {name: encoder.file.slots[own].shape for name, own in encoder.names.items()}
    if len(shapes["w_enc"]) != 2 or 0 in shapes["w_enc"]:
        raise RequestError(f"{path}: w_enc has shape {list(shapes['w_enc'])}; expected [d_in, d_sae]")
    d_in, d_sae = shapes["w_enc"]
    if d_in != d_sae and shapes["b_enc"] == (d_in,) and shapes["b_dec"] == (d_sae,):
        raise RequestError(
            f"{path}: w_enc is transposed, [d_sae, d_in] = {list(shapes['w_enc'])}; save it as w_enc.T.contiguous() "
            "(expected w_enc [d_in, d_sae] and w_dec [d_sae, d_in])"
        )
    d_in, d_sae = shapes["w_enc"]
    if shapes["w_dec"] == (d_in, d_sae) and d_in != d_sae:
        raise RequestError(
            f"{path}: w_dec is transposed, [d_in, d_sae] = {list(shapes['w_dec'])}; save it as w_dec.T.contiguous()"
        )
    if len(shapes["w_dec"]) == 2 and shapes["w_dec"][0] == d_sae and shapes["w_dec"][1] != d_in:
        raise _not_an_sae(str(path), f"a transcoder (reads {d_in} dimensions, writes {shapes['w_dec'][1]})")
    expected = {"w_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,)}
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            raise RequestError(
                f"{path}: {name} has shape {list(shapes[name])}; w_enc is {[d_in, d_sae]}, "
                f"so {list(shape)} was expected"
            )
    for name, own in encoder.names.items():
        if encoder.file.slots[own].torch_dtype is None:
            raise RequestError(
                f"{path}: {name} has dtype {encoder.file.slots[own].dtype}; expected F32, BF16 or F16"
            )


def _check_scaling(file: TensorFile, names: dict[str, str], path: Path) -> None:
    """Some files carry a scaling_factor of ones; any other would change the encoder."""
    own = names.get("scaling_factor")
    if own is None:
        return
    slot = file.slots[own]
    if len(slot.shape) != 1 or slot.torch_dtype is None or not bool((file.vector(own) == 1).all()):
        raise RequestError(
            f"{path} has a scaling_factor that is not 1 everywhere; fold it into the weights first"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_CONFIG:
        raise RequestError(f"{path}: larger than {_MAX_CONFIG:,} bytes; not an SAE's config")
    return read_json(data, str(path))


def _config_site(entries: dict[str, Any], where: str) -> Site:
    """The site of a Gemma Scope 2 config, once it is known to be an SAE and no transcoder."""
    hook, hook_out = _text(entries, "hf_hook_point_in", where), _text(entries, "hf_hook_point_out", where)
    kind, architecture = _text(entries, "type", where), _text(entries, "architecture", where)
    if entries.get("affine_connection"):
        raise _not_an_sae(where, "a transcoder (affine_connection)")
    if kind is not None and re.search("transcoder|crosscoder|clt", kind):
        raise _not_an_sae(where, f"of type {kind!r}")
    if hook_out is not None and hook_out != hook:
        raise _not_an_sae(where, f"a transcoder (reads {hook!r}, writes {hook_out!r})")
    if architecture not in (None, "jump_relu", "jumprelu"):
        raise RequestError(f'{where}: architecture {architecture[:40]!r}; Gemma Scope SAEs are "jump_relu"')
    try:
        return Site.parse(hook or "")
    except RequestError:
        raise _not_an_sae(where, f"at {str(hook)[:80]!r}") from None


def _not_an_sae(where: str, what: str) -> RequestError:
    return RequestError(
        f"{where} is {what}; only SAEs, which write to the place they read (the residual after a layer, what the MLP adds to it, or "
        "the attention heads before o_proj), can be edited here"
    )


def _text(entries: dict[str, Any], key: str, where: str) -> str | None:
    value = entries.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{where}: {key} is {str(value)[:40]!r}; expected text")
    return value


def _number(entries: dict[str, Any], key: str, where: str) -> float | None:
    value = entries.get(key)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < 1e15
        or math.isnan(value)
    ):
        raise RequestError(f"{where}: {key} is {str(value)[:40]!r}; expected a number")
    return float(value)


def _hub_model_name(name: str | None) -> str | None:
    """Gemma Scope 2 writes `gemma-v3-12b-it`, the hub `google/gemma-3-12b-it` (and no `-pt` for the 270m)."""
    if name is None or not re.match(r"(google/)?gemma-", name):
        return name
    name = name.replace("-v3", "-3")
    name = name.replace("-pt", "") if "270m" in name else name
    return name if name.startswith("google/") else f"google/{name}"


def _model_of_release(label_path: str) -> str | None:
    """The model that a Gemma Scope repository in the path was trained on."""
    if match := re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)(?=/|-|$)", label_path):
        return _hub_model_name(f"gemma-3-{match[1]}-{match[2]}")
    if match := re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-", label_path):
        return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}"
    return None
