"""Small SAEs written to disk for the tests, in the Gemma Scope 1, Gemma Scope 2 and SAELens layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE = 24, 512


def random_sae(d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights under Gemma Scope 2 names; about a third of the features fire on unit-variance inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "w_enc": normal(d_in, d_sae) / d_in**0.5,
        "w_dec": normal(d_sae, d_in) / d_in**0.5,
        "b_enc": normal(d_sae) * 0.1,
        "b_dec": normal(d_in) * 0.1,
        "threshold": torch.rand(d_sae, generator=generator) * 0.5,
    }


def gemma_scope_2_config(layer: int, d_sae: int = D_SAE, **changes: Any) -> dict[str, Any]:
    """A config.json as Gemma Scope 2 folders carry it."""
    return {
        "hf_hook_point_in": f"model.layers.{layer}.output",
        "hf_hook_point_out": f"model.layers.{layer}.output",
        "width": d_sae,
        "model_name": "gemma-v3-12b-it",
        "architecture": "jump_relu",
        "l0": 60.0,
        "affine_connection": False,
        "type": "sae",
        **changes,
    }


def write_gemma_scope_2(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """params.safetensors, and config.json where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()},
        folder / "params.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gemma_scope_1(
    folder: Path, weights: dict[str, Tensor], compressed: bool = False, order: Any = "C"
) -> Path:
    """params.npz with the names W_enc, W_dec, b_enc, b_dec, threshold."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        name.replace("w_", "W_"): np.asarray(tensor.numpy(), order=order) for name, tensor in weights.items()
    }
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **arrays)
    return folder


def write_saelens(
    folder: Path, weights: dict[str, Tensor], architecture: str = "jumprelu", **changes: Any
) -> Path:
    """cfg.json and sae_weights.safetensors as SAELens saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = weights["w_enc"].shape
    tensors = {name.replace("w_", "W_"): tensor.contiguous() for name, tensor in weights.items()}
    if architecture != "jumprelu":
        del tensors["threshold"]
    metadata = {
        "hook_name": "blocks.3.hook_resid_post",
        "model_name": "test-model",
        "sae_lens_version": "6.54.12",
    }
    config = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": metadata, **changes,
    }  # fmt: skip
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_sparse_gemma_scope_2(folder: Path, d_in: int, d_sae: int, layer: int = 31) -> Path:
    """A full-size params.safetensors that is all holes: its header is real, its numbers read as zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        "b_dec": [d_in],
        "b_enc": [d_sae],
        "threshold": [d_sae],
        "w_dec": [d_sae, d_in],
        "w_enc": [d_in, d_sae],
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        n_bytes = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header).encode()
    with (folder / "params.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(gemma_scope_2_config(layer, d_sae)))
    return folder


def reference_acts(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """h · 1[h > threshold], h = x · w_enc + b_enc."""
    h = x @ weights["w_enc"] + weights["b_enc"]
    return h * (h > weights["threshold"])
