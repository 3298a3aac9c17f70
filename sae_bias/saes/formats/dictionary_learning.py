"""SAEs of dictionary_learning (github.com/saprmarks/dictionary_learning), their state dict saved as `ae.safetensors`.

The folder has the trainer's `config.json`. Gated and JumpReLU dictionaries measure activations along decoder rows of length 1, so the
lengths are folded into the encoder; a BatchTopK dictionary is a JumpReLU one at its stored threshold, as its own encode is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.saes.formats import register_format
from sae_bias.saes.formats.saelens import lens_sae, read_config
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Sae
from sae_bias.saes.tensors import all_tensors

WEIGHTS, CONFIG = "ae.safetensors", "config.json"
_KINDS = {  # dict_class -> SAELens' architecture, whether the encoder subtracts b_dec, whether activations are along unit rows
    "AutoEncoder": ("standard", True, False),
    "AutoEncoderNew": ("standard", False, False),
    "AutoEncoderTopK": ("topk", True, False),
    "BatchTopKSAE": ("jumprelu", True, False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, False),
    "JumpReluAutoEncoder": ("jumprelu", False, True),
    "GatedAutoEncoder": ("gated", True, True),
}
_NAMES = {  # SAELens' name -> those of dictionary_learning
    "W_enc": ("W_enc", "encoder.weight"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_enc": ("b_enc", "encoder.bias"),
    "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
    "b_mag": ("mag_bias",),
    "b_gate": ("gate_bias",),
    "r_mag": ("r_mag",),
    "threshold": ("threshold",),
}
_WANTED = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_mag", "b_gate", "r_mag"),
}


@register_format("dictionary_learning")
class DictionaryLearning:
    """`ae.safetensors` beside the trainer's `config.json`."""

    weights = (WEIGHTS,)

    @staticmethod
    def matches(folder: Path) -> bool:
        return (folder / WEIGHTS).is_file()

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        where = str(folder / CONFIG)
        trainer = read_config(folder / CONFIG).get("trainer")
        if not isinstance(trainer, dict):
            raise RequestError(
                f"{where} has no trainer block; expected the config.json that dictionary_learning writes"
            )
        kind = str(trainer.get("dict_class"))
        if kind not in _KINDS:
            raise RequestError(f"{where}: dict_class {kind[:60]!r}; expected one of {', '.join(_KINDS)}")
        architecture, subtracts, unit_rows = _KINDS[kind]
        wanted = ("W_enc", "W_dec", "b_dec", *_WANTED[architecture])
        weights = named_tensors(folder / WEIGHTS, {name: _NAMES[name] for name in wanted})
        if "threshold" in weights and weights["threshold"].ndim == 0:  # one for all features
            weights["threshold"] = weights["threshold"].repeat(len(weights["W_dec"]))
        options: dict[str, Any] = {"k": _k(trainer, where)} if architecture == "topk" else {}
        lens = build(
            architecture,
            weights,
            _hook(trainer, where),
            trainer.get("lm_name"),
            apply_b_dec_to_input=subtracts,
            **options,
        )
        if unit_rows:
            lens.fold_W_dec_norm()
        return lens_sae(sae_id, lens, folder / WEIGHTS)


def build(architecture: str, weights: dict[str, Tensor], hook: str, model: Any, **options: Any) -> Any:
    """A SAELens SAE with these weights."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    d_in, d_sae = weights["W_enc"].shape
    metadata = SAEMetadata(hook_name=hook, model_name=model if isinstance(model, str) else None)
    lens = sae_class(config_class(d_in=d_in, d_sae=d_sae, metadata=metadata, **options))
    lens.load_state_dict(weights)
    return lens.eval()


def named_tensors(
    path: Path, names: Mapping[str, Sequence[str]], turned: str | tuple[str, ...] = ".weight"
) -> dict[str, Tensor]:
    """The tensors of a file under SAELens' names: the first of each one's own names that is there, transposed where it ends in `turned`.

    Raises:
        RequestError: one is missing, or encoder and decoder do not fit one another.
    """
    stored, found = all_tensors(path), {}
    for name, own_names in names.items():
        own = next((n for n in own_names if n in stored), None)
        if own is None:
            raise RequestError(
                f"{path} has no {' or '.join(own_names)}; it holds {', '.join(sorted(stored))[:120]}"
            )
        found[name] = stored[own].T.contiguous() if own.endswith(turned) else stored[own]
    d_in, d_sae = found["W_enc"].shape
    if found["W_dec"].shape != (d_sae, d_in):
        raise RequestError(
            f"{path}: encoder {[d_in, d_sae]} and decoder {list(found['W_dec'].shape)} do not fit one another"
        )
    return found


def _hook(trainer: dict[str, Any], where: str) -> str:
    layer, module = (
        trainer.get("layer"),
        str(trainer.get("submodule_name") or f"resid_post_layer_{trainer.get('layer')}"),
    )
    if not isinstance(layer, int) or not re.match("resid_post", module):
        raise RequestError(
            f"{where}: layer {layer!r}, submodule_name {module[:60]!r}; expected an SAE of the residual after a layer, e.g. resid_post_layer_8"
        )
    return f"blocks.{layer}.hook_resid_post"


def _k(trainer: dict[str, Any], where: str) -> int:
    k = trainer.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise RequestError(f"{where}: k is {str(k)[:40]!r}; expected how many features are active")
    return k
