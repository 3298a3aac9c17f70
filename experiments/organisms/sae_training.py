"""Trains JumpReLU SAEs on an organism's residuals and writes them in the Gemma Scope 2 (or 1) folder layout.

    h = x·W_enc + b_enc,  a = h·1[h > threshold],  x̂ = a·W_dec + b_dec
    loss = |x - x̂|² / d + c·(L0 / target - 1)²

with straight-through gradients for the threshold (Rajamanoharan et al. 2024, arXiv:2407.14435). Decoder rows have
norm 1 when saved, and BOS is never seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import trange


@dataclass(frozen=True)
class SaeRecipe:
    """How an SAE is trained."""

    layer: int = 3
    width: int = 512
    seed: int = 0
    l0: float = 16.0
    """Live features a token that the penalty aims at."""
    l0_name: str = "small"
    n_steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 2e-3

    @property
    def folder(self) -> str:
        """Folder name in the Gemma Scope 2 manner."""
        twin = f"_seed_{self.seed}" if self.seed else ""
        return f"layer_{self.layer}_width_{self.width}_l0_{self.l0_name}{twin}"


@dataclass
class SaeWeights:
    """The five tensors of a JumpReLU SAE."""

    w_enc: Float[Tensor, "d_in d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    b_dec: Float[Tensor, "d_in"]
    threshold: Float[Tensor, "d_sae"]

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Activations a = h·1[h > threshold]; b_dec is not subtracted first."""
        h = x @ self.w_enc + self.b_enc
        return torch.where(h > self.threshold, h, torch.zeros_like(h))

    def decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """Reconstruction."""
        return acts @ self.w_dec + self.b_dec

    def quality(self, x: Float[Tensor, "n d_in"]) -> dict[str, float]:
        """Fraction of variance unexplained, and the mean number of live features."""
        acts = self.encode(x)
        unexplained = (x - self.decode(acts)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        return {"fvu": round(unexplained.item(), 4), "l0": round((acts > 0).float().sum(-1).mean().item(), 2)}


class _Step(torch.autograd.Function):
    """1[h > threshold], with a rectangle-kernel gradient for the threshold (and h)."""

    WIDTH = 0.1

    @staticmethod
    def forward(ctx, h, threshold):
        ctx.save_for_backward(h, threshold)
        return (h > threshold).float()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, threshold = ctx.saved_tensors
        near = ((h - threshold).abs() < _Step.WIDTH / 2).float() / _Step.WIDTH
        return grad * near, (-grad * near).sum(0)


def train_sae(x: Float[Tensor, "n d_in"], recipe: SaeRecipe, *, progress: bool = True) -> SaeWeights:
    """A JumpReLU SAE of residuals x (without BOS)."""
    generator = torch.Generator().manual_seed(1000 + recipe.seed)
    d_in, d_sae = x.shape[1], recipe.width
    scale = x.pow(2).sum(-1).mean().sqrt() / d_in**0.5
    data = x / scale
    w_dec = torch.randn(d_sae, d_in, generator=generator)
    w_dec = (w_dec / w_dec.norm(dim=-1, keepdim=True)).requires_grad_()
    w_enc = w_dec.detach().T.clone().requires_grad_()
    b_enc = torch.zeros(d_sae, requires_grad=True)
    b_dec = data.mean(0).clone().requires_grad_()
    log_threshold = torch.full((d_sae,), 0.5).log().requires_grad_()
    parameters = [w_enc, w_dec, b_enc, b_dec, log_threshold]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    for step in trange(recipe.n_steps, desc=f"SAE {recipe.folder}", mininterval=2, disable=not progress):
        batch = data[torch.randint(len(data), (recipe.batch_size,), generator=generator)]
        rate = min(1.0, 3 * (1 - step / recipe.n_steps)) * recipe.learning_rate
        optimizer.param_groups[0]["lr"] = rate
        h = batch @ w_enc + b_enc
        live = _Step.apply(h, log_threshold.exp())
        error = (batch - (h * live) @ w_dec - b_dec).pow(2).sum(-1).mean() / d_in
        push = min(1.0, step / (0.4 * recipe.n_steps))
        loss = error + 0.1 * push * (live.sum(-1).mean() / recipe.l0 - 1).clamp(min=0).pow(2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        return SaeWeights(
            w_enc.detach().clone(),
            w_dec.detach().clone(),
            b_enc.detach() * scale,
            b_dec.detach() * scale,
            log_threshold.detach().exp() * scale,
        )


def save_sae(
    weights: SaeWeights, folder: Path, *, layer: int, model_name: str, l0: float, **more: object
) -> None:
    """`params.safetensors` and `config.json` in the Gemma Scope 2 layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().float().contiguous() for k, v in vars(weights).items()}
    save_file(tensors, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": f"model.layers.{layer}.output",
        "hf_hook_point_out": f"model.layers.{layer}.output",
        "width": weights.w_enc.shape[1],
        "model_name": model_name,
        "architecture": "jump_relu",
        "l0": l0,
        "affine_connection": False,
        "type": "sae",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_gemma_scope_1(weights: SaeWeights, folder: Path) -> None:
    """`params.npz` in the Gemma Scope 1 layout; layer, width and L0 stand in the folder's name alone."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k.replace("w_", "W_"): v.detach().float().numpy() for k, v in vars(weights).items()}
    np.savez(folder / "params.npz", **arrays)


def gemma_scope_1_name(layer: int, width: int, l0: float) -> str:
    """Folder name in the Gemma Scope 1 manner: `layer_20/width_512/average_l0_71`."""
    return f"layer_{layer}/width_{width}/average_l0_{round(l0)}"


def load_weights(folder: Path) -> SaeWeights:
    """The five tensors of a saved SAE, in either layout."""
    if not (folder / "params.npz").is_file():
        return SaeWeights(**load_file(folder / "params.safetensors"))
    with np.load(folder / "params.npz", allow_pickle=False) as arrays:
        return SaeWeights(**{k.replace("W_", "w_"): torch.from_numpy(v) for k, v in arrays.items()})
