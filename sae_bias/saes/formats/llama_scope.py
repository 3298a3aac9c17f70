"""Llama Scope SAEs (He et al. 2024, arXiv:2410.20526), read in slices and with SAELens' numbers.

Two layouts: `Llama3_1-8B-Base-L15R-8x` holds `hyperparams.json` and `checkpoints/final.safetensors`, with one threshold for all
features; `L15R` of Llama-Scope-R1-Distill holds `config.json` and `sae_weights.safetensors`, with a threshold each. Both were trained
on residuals scaled to a mean norm of √d_in, which SAELens folds into the weights:

    s = √d_in / mean norm        h = x · s W_enc + b_enc        a = h · 1[h > threshold]        x̂ = a · W_dec / s + b_dec / s

As in SAELens, the one threshold of the first layout is multiplied by s, those of the second are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.saes.formats import register_format
from sae_bias.saes.formats.gemma_scope import EncoderFile
from sae_bias.saes.formats.saelens import read_config
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Sae, SaeInfo
from sae_bias.saes.tensors import TensorFile, open_tensor_file

ONE_THRESHOLD = ("hyperparams.json", "checkpoints", "final.safetensors")
OWN_THRESHOLDS = ("config.json", "sae_weights.safetensors")
MODEL = "meta-llama/Llama-3.1-8B"
_NAMES = {
    "w_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "w_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
_UNREAD = ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder")


@register_format("llama_scope")
class LlamaScope:
    """`hyperparams.json` and `checkpoints/final.safetensors`, or `config.json` and `sae_weights.safetensors`."""

    weights = (ONE_THRESHOLD[-1],)

    @staticmethod
    def matches(folder: Path) -> bool:
        return _files(folder) is not None

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        found = _files(folder)
        assert found is not None
        config_path, weights = found
        config = read_config(config_path)
        info = _info(config, str(config_path))
        file = _transposed(open_tensor_file(weights))
        one = config_path.name == ONE_THRESHOLD[0]
        names = _NAMES if one else _NAMES | {"threshold": "log_jumprelu_threshold"}
        _check(file, list(names.values()))
        norm = _mean_norm(config, file, str(config_path))
        scale = file.slots["encoder.weight"].shape[0] ** 0.5 / norm
        threshold = _positive(config.get("jump_relu_threshold"), "jump_relu_threshold", str(config_path)) if one else None  # fmt: skip
        encoder = EncoderFile(
            file, names, scale=scale, threshold=None if threshold is None else threshold * scale
        )
        return Sae(sae_id, encoder, info, weights)


def _files(folder: Path) -> tuple[Path, Path] | None:
    """Config and weights; a folder `checkpoints` stands for the one above it."""
    top = folder.parent if folder.name == "checkpoints" else folder
    if (top / ONE_THRESHOLD[0]).is_file() and top.joinpath(*ONE_THRESHOLD[1:]).is_file():
        return top / ONE_THRESHOLD[0], top.joinpath(*ONE_THRESHOLD[1:])
    config, weights = (folder / name for name in OWN_THRESHOLDS)
    return (config, weights) if config.is_file() and weights.is_file() else None


def _info(config: Mapping[str, Any], where: str) -> SaeInfo:
    """Site and kind, once it is known to be an SAE that this module's equation describes."""
    hook, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    kind = str(config.get("sae_type") or "sae")
    if hook_out not in (None, hook) or kind != "sae":
        raise RequestError(
            f"{where}: reads {str(hook)[:60]!r} and writes {str(hook_out)[:60]!r} ({kind[:40]}), a transcoder or crosscoder; "
            "only SAEs, which write to the place they read, can be edited here"
        )
    other = next((name for name in _UNREAD if config.get(name)), None)
    if other or str(config.get("act_fn", "jumprelu")).lower() != "jumprelu":
        what = other or f"act_fn {str(config['act_fn'])[:40]!r}"
        raise RequestError(f"{where}: {what}; expected a JumpReLU SAE of Llama Scope")
    try:
        return SaeInfo(Site.parse(str(hook)), MODEL)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _mean_norm(config: Mapping[str, Any], file: TensorFile, where: str) -> float:
    """The mean norm of what it reads: in the config, or beside the weights."""
    stated = config.get("dataset_average_activation_norm")
    if isinstance(stated, dict):
        return _positive(stated.get("in"), "dataset_average_activation_norm.in", where)
    name = f"dataset_average_activation_norm.{config.get('hook_point_in')}"
    if name not in file.slots or file.slots[name].shape not in ((), (1,)):
        raise RequestError(
            f"{where} has no dataset_average_activation_norm, and {file.path.name} no {name[:100]}; the weights cannot be scaled"
        )
    file = replace(file, slots={name: replace(file.slots[name], shape=(1,))})
    return _positive(float(file.vector(name)[0]), name, where)


def _positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise RequestError(f"{where}: {name} is {value!r:.40}; expected a number above 0")
    return float(value)


def _transposed(file: TensorFile) -> TensorFile:
    """The file with its two matrices as [d_in, d_sae] and [d_sae, d_in]: it stores torch's Linear weights."""
    slots = {
        name: replace(slot, shape=slot.shape[::-1], column_major=True)
        if name in ("encoder.weight", "decoder.weight") and len(slot.shape) == 2
        else slot
        for name, slot in file.slots.items()
    }
    return replace(file, slots=slots)


def _check(file: TensorFile, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in file.slots]:
        raise RequestError(
            f"{file.path} has no {', '.join(missing)}; it holds {', '.join(sorted(file.slots))[:120]}"
        )
    shapes = {name: file.slots[name].shape for name in names}
    if len(shapes["encoder.weight"]) != 2 or 0 in shapes["encoder.weight"]:
        raise RequestError(
            f"{file.path}: encoder.weight has shape {list(shapes['encoder.weight'])}; expected [d_sae, d_in]"
        )
    d_in, d_sae = shapes["encoder.weight"]
    expected = {"decoder.weight": (d_sae, d_in), "decoder.bias": (d_in,)}
    for name in names[1:]:
        if shapes[name] != expected.get(name, (d_sae,)):
            raise RequestError(
                f"{file.path}: {name} does not fit encoder.weight [{d_sae}, {d_in}]; one is damaged"
            )
