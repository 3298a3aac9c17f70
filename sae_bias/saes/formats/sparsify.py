"""SAEs of EleutherAI's sparsify (github.com/EleutherAI/sparsify): `sae.safetensors` and `cfg.json` in a folder such as `layers.10`.

a = TopK(ReLU((x − b_dec) · W_encᵀ + b_enc))        x̂ = a · W_dec + b_dec
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_bias.core.errors import RequestError
from sae_bias.saes.formats import register_format
from sae_bias.saes.formats.dictionary_learning import build, named_tensors
from sae_bias.saes.formats.saelens import lens_sae, read_config
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Sae

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_OTHER = ("transcode", "skip_connection", "embed_skip", "gram_lookup", "monet", "encoder_pkm", "encoder_kron", "encoder_monarch", "signed")  # fmt: skip


@register_format("sparsify")
class Sparsify:
    """`sae.safetensors` and `cfg.json`; the folder's name says the layer."""

    weights = (WEIGHTS,)

    @staticmethod
    def matches(folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        where = str(folder / CONFIG)
        config = read_config(folder / CONFIG)
        other = next((name for name in _OTHER if config.get(name)), None)
        if other is not None or config.get("activation", "topk") != "topk":
            what = other or f"activation {config['activation']}"
            raise RequestError(
                f"{where}: {what}; only TopK SAEs of the residual stream are read from sparsify, no transcoders"
            )
        layer = re.search(r"layers[._](\d{1,4})$", folder.absolute().name)
        if layer is None:
            raise RequestError(
                f"{folder}: which layer? sparsify names an SAE of the residual stream layers.L, e.g. layers.10"
            )
        k = config.get("k")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RequestError(f"{where}: k is {str(k)[:40]!r}; expected how many features are active")
        names = {
            "W_enc": ["encoder.weight"],
            "b_enc": ["encoder.bias"],
            "W_dec": ["W_dec"],
            "b_dec": ["b_dec"],
        }
        weights = named_tensors(folder / WEIGHTS, names)
        options: dict[str, Any] = {"k": k, "apply_b_dec_to_input": True}
        lens = build("topk", weights, f"blocks.{layer[1]}.hook_resid_post", None, **options)
        return lens_sae(sae_id, lens, folder / WEIGHTS)
