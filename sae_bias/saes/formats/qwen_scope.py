"""Qwen Scope SAEs of the residual after a layer, converted from their pickles: `layer7.sae.safetensors` in a folder of its own.

    a = TopK(ReLU(x · W_encᵀ + b_enc))        x̂ = a · W_decᵀ + b_dec

with W_enc [d_sae, d_in] and W_dec [d_in, d_sae] as stored. How many features are active stands nowhere but in the repository's name,
such as `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`, which has to be in the path. By release name SAELens reads the published files itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_bias.core.errors import RequestError
from sae_bias.saes.formats import register_format
from sae_bias.saes.formats.dictionary_learning import build, named_tensors
from sae_bias.saes.formats.saelens import lens_sae
from sae_bias.saes.ids import SaeId
from sae_bias.saes.sae import Sae

_REPOSITORY = re.compile(r"SAE-Res-(?P<model>[^/]+?)-W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6})")
_FILE = re.compile(r"layer(\d{1,4})\.sae\.safetensors")


@register_format("qwen_scope")
class QwenScope:
    """One `layerN.sae.safetensors`; the repository's name in the path says model, width and k."""

    weights = ("layer*.sae.safetensors",)

    @staticmethod
    def matches(folder: Path) -> bool:
        return len(list(folder.glob(QwenScope.weights[0]))) == 1

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        path = next(folder.glob(QwenScope.weights[0]))
        layer, names = _FILE.fullmatch(path.name), list(_REPOSITORY.finditer(path.absolute().as_posix()))
        if layer is None or not names:
            raise RequestError(
                f"{path}: how many features are active? Keep Qwen Scope's repository name in the path, e.g. "
                "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer7/layer7.sae.safetensors"
            )
        weights = named_tensors(
            path, {name: [name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, turned=("W_enc", "W_dec")
        )
        d_in, d_sae = weights["W_enc"].shape
        if d_sae != int(names[-1]["width"]) * 1024:
            raise RequestError(f"{path}: encoder {[d_sae, d_in]} and {names[-1][0]} do not fit one another")
        lens = build(
            "topk", weights, f"blocks.{layer[1]}.hook_resid_post", f"Qwen/{names[-1]['model']}",
            k=int(names[-1]["k"]), apply_b_dec_to_input=False,
        )  # fmt: skip
        return lens_sae(sae_id, lens, path)
