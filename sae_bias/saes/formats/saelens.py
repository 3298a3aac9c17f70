"""SAEs in SAELens' own format: what its config says, and slices of one that is whole in memory.

SAELens (github.com/decoderesearch/SAELens) may subtract b_dec from the input, (x − b_dec) · W + b = x · W +
(b − b_dec · W): folded into the bias here. It applies a ReLU before the threshold of a JumpReLU, so a
negative threshold acts as zero.
"""

from __future__ import annotations

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
from sae_bias.saes.formats.gemma_scope import read_encoder_file
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Columns, Sae, SaeInfo
from sae_bias.saes.tensors import read_json

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


@dataclass(frozen=True, eq=False)
class LensEncoder:
    """Slices of a SAELens SAE that is whole in memory, on the CPU and in float32."""

    lens: Any

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return int(self.lens.cfg.d_in)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.lens.cfg.d_sae)

    def columns(self, start: int, stop: int) -> Columns:
        """Encoder columns; what SAELens subtracts from the input is folded into the bias."""
        w_enc = _plain(self.lens.W_enc[:, start:stop])
        bias = getattr(self.lens, "b_enc", None)
        b_enc = torch.zeros(stop - start, dtype=torch.float32) if bias is None else _plain(bias[start:stop])
        if getattr(self.lens.cfg, "apply_b_dec_to_input", False):
            b_enc = b_enc - self.b_dec() @ w_enc
        threshold = getattr(self.lens, "threshold", None)
        if threshold is None or threshold.ndim != 1:
            return Columns(w_enc, b_enc, torch.zeros_like(b_enc))
        # SAELens applies a ReLU first, so a negative threshold acts as zero
        return Columns(w_enc, b_enc, _plain(threshold[start:stop]).clamp(min=0))

    def decoder_rows(self, indices: Sequence[int]) -> Float[Tensor, "n d_model"]:
        """What one unit of each activation writes: rescaled activations are measured along decoder rows of length 1."""
        rows = _plain(self.lens.W_dec[list(indices)])
        return rows / rows.norm(dim=-1, keepdim=True) if _rescaled(self.lens.cfg) else rows

    def b_dec(self) -> Float[Tensor, "d_model"]:
        """The decoder's bias."""
        return _plain(self.lens.b_dec)


@register_format("saelens")
class SaeLens:
    """`cfg.json` and `sae_weights.safetensors`: in slices where the architecture allows it, whole otherwise."""

    weights = (WEIGHTS,)

    @staticmethod
    def matches(folder: Path) -> bool:
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        config_path, weights = folder / CONFIG, folder / WEIGHTS
        config = read_config(config_path)
        info = lens_info(config, str(config_path))
        if not is_plain(config):
            return lens_sae(sae_id, _lens_from_disk(folder), weights)
        needs_threshold = info.architecture == "jumprelu"
        subtract = bool(config.get("apply_b_dec_to_input", True))
        encoder = read_encoder_file(weights, needs_threshold=needs_threshold, subtract_b_dec=subtract)
        for key, actual in (("d_in", encoder.d_in), ("d_sae", encoder.d_sae)):
            if config.get(key) not in (None, actual):
                raise RequestError(
                    f"{config_path} says {key} {str(config[key])[:20]}, {weights.name} has {actual}; one is wrong"
                )
        return Sae(sae_id, encoder, info, weights)


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a JSON config file."""
    try:
        return read_json(path.read_bytes()[: 1 << 20], str(path))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error


def _lens_from_disk(folder: Path) -> Any:
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device="cpu", dtype="float32")
    # SAELens checks little itself: a wrong config or file surfaces as any exception
    except Exception as error:
        raise RequestError(f"{folder}: SAELens cannot load it: {str(error).strip()[:200]}") from error


def wrap_lens(lens: Any, sae_id: SaeId | None = None) -> Sae:
    """A SAELens SAE in memory."""
    info = lens_info(_config(lens), f"SAELens SAE {sae_id or ''}".strip())
    name = re.sub(r"[^\w.-]+", "_", f"{info.model_name or 'model'}_{info.site}_{lens.cfg.d_sae}")
    return lens_sae(sae_id or SaeId("object:sae_lens", name), lens)


def lens_sae(sae_id: SaeId, lens: Any, path: Path | None = None) -> Sae:
    """The SAE that a SAELens object is, whole in memory."""
    for weight, values in lens.state_dict().items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise RequestError(f"{sae_id}: {weight} holds NaN or infinite values")
    config = _config(lens)
    info = lens_info(config, str(path or sae_id))
    return Sae(sae_id, LensEncoder(lens), info, path, reduces_to_one_row=is_plain(config), lens=lens)


def _config(lens: Any) -> dict[str, Any]:
    return {**lens.cfg.to_dict(), "architecture": lens.cfg.architecture()}


def lens_info(config: dict[str, Any], where: str) -> SaeInfo:
    metadata = config.get("metadata")
    found = {**config, **(metadata if isinstance(metadata, dict) else {})}
    architecture, hook = (
        found.get("architecture") or "standard",
        found.get("hook_name") or found.get("hook_point"),
    )
    if (
        "transcoder" in str(architecture)
        or found.get("hook_name_out") not in (None, hook)
        or found.get("hook_head_index")
    ):
        raise RequestError(
            f"{where}: a transcoder or an SAE of one head ({str(architecture)[:40]}); only SAEs, which write to the place they read, can be edited here"
        )
    if "batchtopk" in str(architecture):
        raise RequestError(
            f"{where}: a {str(architecture)[:40]} SAE in training, whose activations depend on what else is in the batch; "
            "save it with SAELens' save_inference_model (a JumpReLU SAE) and load that"
        )
    if str(architecture) == "temporal":
        raise RequestError(
            f"{where}: a temporal SAE, whose activations depend on the tokens before; only SAEs that read one position are edited here"
        )
    if not isinstance(hook, str):
        raise RequestError(f"{where} has no hook_name; expected e.g. blocks.31.hook_resid_post")
    model = found.get("model_name")
    notes = ("normalize_activations is expected_average_only_in; as in SAELens, nothing is rescaled",)
    scaled = config.get("normalize_activations") in ("expected_average_only_in", True)
    try:
        site = Site.parse(hook)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    return SaeInfo(
        site,
        model if isinstance(model, str) else None,
        str(architecture),
        notes=notes if scaled else (),
        normalization=_normalization(config, where),
    )


def _normalization(config: dict[str, Any], where: str) -> str:
    """How SAELens scales what it encodes and scales back what it decodes; an average folded in or left out scales nothing."""
    name = config.get("normalize_activations")
    if name in (None, False, True, "none", "expected_average_only_in"):
        return "none"
    if name not in ("constant_norm_rescale", "layer_norm"):
        raise RequestError(
            f"{where}: normalize_activations is {str(name)[:40]!r}, which cannot be edited exactly unless it is folded into the "
            "weights (SAELens: fold_activation_whitening, fold_activation_norm_scaling_factor); save the folded SAE and load that"
        )
    return str(name)


def is_plain(config: dict[str, Any]) -> bool:
    """Whether SAELens' encode is one matrix product and a (Jump)ReLU for this config."""
    kwargs = config.get("activation_fn_kwargs") or {}
    return (
        (config.get("architecture") or "standard") in ("standard", "jumprelu")
        and config.get("normalize_activations", "none")
        in (None, False, True, "none", "expected_average_only_in")
        and config.get("activation_fn", config.get("activation_fn_str", "relu")) in (None, "relu")
        and not (isinstance(kwargs, dict) and kwargs.get("k"))
        and not config.get("finetuning_scaling_factor")
    )


def _rescaled(config: Any) -> bool:
    """Whether activations are in units of the decoder row's length (TopK with rescale_acts_by_decoder_norm)."""
    return bool(getattr(config, "rescale_acts_by_decoder_norm", False))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
