"""Trains one SAE with SAELens' own trainer and saves it as a Gemma Scope 2 folder.

BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): the k·n largest of a batch's n·d_sae activations are kept, so that features
compete across tokens. SAELens keeps the running mean of the smallest one kept; as the threshold of a JumpReLU it gives the final form

    h = x·W_enc + b_enc,   a = h·1[h > threshold],   x̂ = a·W_dec + b_dec.

Gemma 3 writes some hundred times the usual variance at 0.2 % of positions (lone spaces and apostrophes among them), a quarter of all
variance after layer 12. For training, rows are centered and scaled to mean square 1, both measured with rows longer than `CLIP` medians
shortened to that; the rows themselves stay as long as they are. (Shortened in training too, those rows come out with an unexplained
variance of 500 at their full length: 120 steps, all positions .41 against .82, the usual ones .77 against .76.) Center and scale are
folded back exactly, in float64.

In SmolLM2 the first position of a text is such a row and holds 99 % of the variance after layer 15: there the SAE explains nothing else
(all positions .99, the usual ones −.27). With `relative`, the error of long rows is divided by their length: .999 and .82.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

CLIP = 2.0
CHECKPOINT_EVERY = 100
RESAMPLE_EVERY = 100


@dataclass(frozen=True)
class SaeRecipe:
    """How one SAE is trained."""

    layer: int
    width: int = 8192
    k: float = 50.0
    """Live features a token, on average."""
    steps: int = 1200
    batch_size: int = 1024
    learning_rate: float = 3e-3
    relative: bool = False
    """Let rows longer than `CLIP` usual ones count by their relative error."""
    seed: int = 0
    l0_name: str = "medium"

    @property
    def folder(self) -> str:
        """Folder name in the Gemma Scope 2 manner."""
        twin = f"_seed_{self.seed}" if self.seed else ""
        return f"layer_{self.layer}_width_{self.width // 1024}k_l0_{self.l0_name}{twin}"


@dataclass(frozen=True)
class Normalizer:
    """x → (x − mean)·factor, which is folded into the weights; mean and factor are of rows shortened to `CLIP` medians."""

    mean: Float[Tensor, "d_model"]
    factor: float

    @staticmethod
    def of(rows: Float[Tensor, "n d_model"]) -> Normalizer:
        norms = rows.norm(dim=-1)
        clipped = rows * (CLIP * norms.median() / norms).clamp(max=1.0)[:, None]
        mean = clipped.mean(0)
        factor = 1.0 / float((clipped - mean).pow(2).mean().sqrt())
        return Normalizer(mean, factor)

    def __call__(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return (rows - self.mean) * self.factor


@dataclass
class JumpReluWeights:
    """The five tensors of the saved SAE."""

    w_enc: Float[Tensor, "d_in d_sae"]
    w_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    b_dec: Float[Tensor, "d_in"]
    threshold: Float[Tensor, "d_sae"]

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """a = h·1[h > threshold]."""
        h = x @ self.w_enc + self.b_enc
        return torch.where(h > self.threshold, h, torch.zeros_like(h))

    def decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """Reconstruction."""
        return acts @ self.w_dec + self.b_dec


def train(
    rows: Float[Tensor, "n d_model"], scale: float, recipe: SaeRecipe, work: Path, *, fast: bool = True
) -> JumpReluWeights:
    """Train on float16 `rows` (true residuals divided by `scale`); goes on from the last checkpoint in `work`."""
    normalize = Normalizer.of(rows[:: max(1, len(rows) // 100_000)].float())
    trainer = _trainer(recipe, rows.shape[1], fast=fast)
    done = _restore(trainer, work)
    bar = tqdm(total=recipe.steps, initial=done, desc=f"SAE {recipe.folder}", unit="step", smoothing=0.05)
    data = _batches(rows, normalize, recipe, start=done)
    for step in range(done, recipe.steps):
        batch = next(data)
        if step % RESAMPLE_EVERY == 0 and 0 < step <= recipe.steps * 2 // 3:
            _resample(trainer, batch, seed=step)
        out = trainer.step(batch)
        trainer.n_training_steps += 1
        bar.update()
        if step % 20 == 0:
            unexplained = (out.sae_out.detach() - out.sae_in).pow(2).sum() / (
                out.sae_in - out.sae_in.mean(0)
            ).pow(2).sum()
            bar.set_postfix(fve=f"{1 - float(unexplained):.3f}", dead=int(trainer.dead_neurons.sum()))
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _checkpoint(trainer, work)
    bar.close()
    _calibrate(trainer.sae, normalize, rows)
    return folded(trainer.sae, normalize, scale)


def _trainer(recipe: SaeRecipe, d_in: int, *, fast: bool) -> Any:
    from sae_lens import BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from real_models.sparse_batchtopk import SparseBatchTopK

    torch.manual_seed(recipe.seed)
    sae = SparseBatchTopK(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=recipe.width,
            k=recipe.k,
            apply_b_dec_to_input=False,
            normalize_activations="none",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.learning_rate,
        lr_end=recipe.learning_rate / 20,
        lr_warm_up_steps=20,
        lr_decay_steps=recipe.steps // 3,
        dead_feature_window=15,  # early help for features that fall silent: a window of 100 left half of 8,192 dead
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae.fast = fast
    if recipe.relative:
        sae.longest = CLIP * d_in**0.5
    trainer = SAETrainer(config, sae, iter(()))
    trainer.optimizer.param_groups[0].update(
        fused=True, foreach=False
    )  # the same Adam in one pass over memory
    return trainer


def _batches(rows: Tensor, normalize: Normalizer, recipe: SaeRecipe, start: int) -> Iterator[Tensor]:
    """Batches in an order that depends on the step alone, so that a resumed run sees what it would have seen."""
    per_epoch = len(rows) // recipe.batch_size
    step, order, epoch = start, None, -1
    while True:
        if step // per_epoch != epoch or order is None:
            epoch = step // per_epoch
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(7 * recipe.seed + epoch)
            )
        at = (step % per_epoch) * recipe.batch_size
        yield normalize(rows[order[at : at + recipe.batch_size]].float())
        step += 1


@torch.no_grad()
def _resample(trainer: Any, batch: Float[Tensor, "n d_model"], seed: int) -> None:
    """Give features that fell silent a new start at what is explained worst (Bricken et al. 2023, "Towards Monosemanticity").

    A silent feature's decoder row becomes the error of a row of the batch at the usual length, drawn with probability ∝ its squared error
    over its squared length; its encoder column points the same way, at a fifth of the usual length; its Adam moments are forgotten. (By the squared error
    alone, at the usual length, training of Gemma 3 270M's layer 9 diverged: the few longest rows of a batch draw most of the features, which likely add up at the next such row.)
    """
    sae, dead = trainer.sae, trainer.dead_neurons.nonzero().flatten()
    if not len(dead) or len(dead) == sae.cfg.d_sae:
        return
    alive = (~trainer.dead_neurons).nonzero().flatten()
    error = batch - sae.decode(sae.encode_with_hidden_pre(batch)[0])
    weight = error.pow(2).sum(-1) / batch.pow(2).sum(-1).clamp(min=1.0)
    drawn = torch.multinomial(
        weight, len(dead), replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    direction = torch.nn.functional.normalize(error[drawn], dim=-1)
    sae.W_dec[dead] = direction * sae.W_dec[alive].norm(dim=-1).mean()
    sae.W_enc[:, dead] = 0.2 * direction.T * sae.W_enc[:, alive].norm(dim=0).mean()
    sae.b_enc[dead] = 0.0
    trainer.n_forward_passes_since_fired[dead] = 0
    for parameter, which in ((sae.W_dec, (dead,)), (sae.W_enc, (slice(None), dead)), (sae.b_enc, (dead,))):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in trainer.optimizer.state[parameter]:
                trainer.optimizer.state[parameter][moment][which] = 0.0


def _checkpoint(trainer: Any, work: Path) -> None:
    """Weights, both Adam moments and the counters, as safetensors; written whole or not at all."""
    work.mkdir(parents=True, exist_ok=True)
    tensors = {f"sae.{name}": value for name, value in trainer.sae.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["fired.last"] = trainer.n_forward_passes_since_fired
    tensors["fired.count"] = trainer.act_freq_scores
    tensors["steps"] = torch.tensor(trainer.n_training_steps)
    part = work / "checkpoint.part"
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.replace(work / "checkpoint.safetensors")


def _restore(trainer: Any, work: Path) -> int:
    """Steps already done, with the trainer put back to where they ended."""
    file = work / "checkpoint.safetensors"
    if not file.is_file():
        return 0
    tensors = load_file(file)
    done = int(tensors["steps"])
    trainer.sae.load_state_dict(
        {k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = value
    for _ in range(done):
        trainer.optimizer._opt_called = True
        trainer.lr_scheduler.step()
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    trainer.n_forward_passes_since_fired = tensors["fired.last"]
    trainer.act_freq_scores = tensors["fired.count"]
    trainer.n_training_steps = done
    trainer.n_training_samples = done * trainer.cfg.train_batch_size_samples
    return done


@torch.no_grad()
def _calibrate(sae: Any, normalize: Normalizer, rows: Float[Tensor, "n d_model"], n: int = 16_384) -> None:
    """Set the global threshold so that k features are live on average; the running mean lags behind a short training."""
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:n]
    most = min(512, sae.cfg.d_sae)
    acts = [
        ((normalize(part.float()) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)).topk(most).values
        for part in rows[some].split(2048)
    ]
    kept = torch.cat(acts).flatten().topk(int(sae.cfg.k * len(some))).values
    sae.topk_threshold.fill_(float(kept.min().clamp(min=0)))


@torch.no_grad()
def folded(sae: Any, normalize: Normalizer, scale: float) -> JumpReluWeights:
    """The JumpReLU SAE of true residuals: SAELens' inference form with center and scale put back; decoder rows have norm 1."""
    state = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    w_enc, w_dec, b_enc, b_dec, threshold = (
        state[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    )
    factor = normalize.factor / scale
    mean = normalize.mean.double() * scale
    return JumpReluWeights(
        w_enc.float(),
        w_dec.float(),
        (b_enc / factor - mean @ w_enc).float(),
        (b_dec / factor + mean).float(),
        (threshold / factor).float(),
    )


@torch.no_grad()
def randomized(weights: JumpReluWeights, rows: Float[Tensor, "n d_in"], seed: int = 0) -> JumpReluWeights:
    """A control SAE: encoder rows shuffled over the dimensions, random decoder of equal norms, each feature as often live as before.

    What a search finds in it is the yield of the search itself.
    """
    generator = torch.Generator().manual_seed(seed)
    w_enc = weights.w_enc[torch.randperm(len(weights.w_enc), generator=generator)]
    w_dec = torch.randn(weights.w_dec.shape, generator=generator)
    w_dec *= weights.w_dec.norm(dim=-1, keepdim=True) / w_dec.norm(dim=-1, keepdim=True)
    b_enc = torch.empty_like(weights.b_enc)
    for part in torch.arange(w_enc.shape[1]).split(256):
        h = rows @ weights.w_enc[:, part] + weights.b_enc[part]
        live = (h > weights.threshold[part]).float().mean(0)
        shuffled = (rows @ w_enc[:, part]).sort(0, descending=True).values
        at = (live * len(rows)).long().clamp(max=len(rows) - 1)
        b_enc[part] = weights.threshold[part] - shuffled.gather(0, at[None])[0]
    return JumpReluWeights(w_enc.contiguous(), w_dec, b_enc, weights.b_dec.clone(), weights.threshold.clone())


def save(
    weights: JumpReluWeights, folder: Path, *, recipe: SaeRecipe, model_name: str, l0: float, **more: object
) -> None:
    """`params.safetensors` and `config.json` in the Gemma Scope 2 layout."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "params.part"
    save_file({name: value.contiguous() for name, value in vars(weights).items()}, part)
    part.replace(folder / "params.safetensors")
    config = {
        "hf_hook_point_in": f"model.layers.{recipe.layer}.output",
        "hf_hook_point_out": f"model.layers.{recipe.layer}.output",
        "width": recipe.width,
        "model_name": model_name,
        "architecture": "jump_relu",
        "l0": round(l0, 2),
        "affine_connection": False,
        "type": "sae",
        "recipe": asdict(recipe),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
