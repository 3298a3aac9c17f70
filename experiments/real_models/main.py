"""One command a model: collect text, harvest residuals, train the SAEs and their randomized twins, measure their quality.

Each step is skipped where its result is there already, so the same command takes up a stopped run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import sae_bias as sb
from real_models.harvest import SCALE, Shards, harvest, windows
from real_models.quality import HeldOut
from real_models.texts import TextPlan, collect
from real_models.training import JumpReluWeights, SaeRecipe, randomized, save, train

RANDOMIZED_ROWS = 8_192
ALIVE_ROWS = 50_000


def arguments(model: str, layers: Sequence[int], out: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "out", nargs="?", default=out, help=f"folder for text, residuals and SAEs (default {out})"
    )
    parser.add_argument("--model", default=model, help=f"model name or folder (default {model})")
    parser.add_argument("--layers", type=int, nargs="+", default=list(layers), help="read after these layers")
    parser.add_argument(
        "--tokens", type=int, default=1_100_000, help="most residuals a layer (default 1,100,000)"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="NAME",
        help="more text: a folder, a file or a hub dataset",
    )
    parser.add_argument(
        "--samples", type=int, default=TextPlan.n_samples, help="texts the model writes itself"
    )
    parser.add_argument("--width", type=int, default=SaeRecipe.width, help="features an SAE (default 8192)")
    parser.add_argument(
        "--k", type=float, default=SaeRecipe.k, help="live features a token, on average (default 50)"
    )
    parser.add_argument(
        "--steps", type=int, default=SaeRecipe.steps, help="training steps of 1,024 residuals (default 1,200)"
    )
    parser.add_argument(
        "--relative", action="store_true", help="long residuals count by their relative error"
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=64,
        help="held-out windows of 256 tokens for the quality figures; 0 leaves them out",
    )
    return parser.parse_args()


def main(model: str, layers: Sequence[int], out: str, description: str) -> None:
    given = arguments(model, layers, out, description)
    folder = Path(given.out)
    data = _data_folder()
    start = time.monotonic()
    lm = sb.load_model(given.model, device="cpu")
    rows = collect(lm, data, TextPlan(n_samples=given.samples, extra=tuple(given.text)), folder)
    training = windows(lm, [row["text"] for row in rows if row["split"] == "train"])
    held_out = windows(lm, [row["text"] for row in rows if row["split"] == "held_out"])
    n = harvest(lm, training, given.layers, folder / "residuals", most_tokens=given.tokens)
    print(f"{n:,} residuals a layer after {(time.monotonic() - start) / 60:.0f} minutes")
    table = []
    for layer in given.layers:
        recipe = SaeRecipe(layer, given.width, given.k, given.steps, relative=given.relative)
        table += _one_layer(lm, recipe, folder, held_out, given.windows)
        if table:
            pd.DataFrame(table).to_csv(folder / "quality.csv", index=False, float_format="%.4f")
    print(pd.DataFrame(table).round(4).T.to_string())
    print(f"done after {(time.monotonic() - start) / 60:.0f} minutes; the SAEs are in {folder / 'sae'}")


def _one_layer(
    lm: sb.Model, recipe: SaeRecipe, folder: Path, held_out: list[list[int]], n_windows: int
) -> list[dict[str, object]]:
    """Train, save and measure the SAE of one layer and its randomized twin."""
    target = folder / "sae" / "resid_post" / recipe.folder
    twin = folder / "sae" / "resid_post_randomized" / recipe.folder
    rows = Shards(folder / "residuals", recipe.layer).load()
    alive = rows[:: max(1, len(rows) // ALIVE_ROWS)].float() * SCALE
    if not (target / "params.safetensors").is_file():
        weights = train(rows, SCALE, recipe, folder / "work" / recipe.folder)
        _save_with_l0(lm, weights, target, recipe, alive, len(rows))
    weights = load(target)
    if not (twin / "params.safetensors").is_file():
        control = randomized(weights, alive[:: max(1, len(alive) // RANDOMIZED_ROWS)])
        _save_with_l0(lm, control, twin, recipe, alive, len(rows))
    del rows
    if not n_windows:
        return []
    held = HeldOut(lm, recipe.layer, held_out, n_windows)
    found: list[dict[str, object]] = []
    for name, sae in (("trained", weights), ("randomized", load(twin))):
        figures = held.quality(sae, alive)
        found.append({"model": lm.name, "layer": recipe.layer, "width": recipe.width, "sae": name} | figures)
        print(pd.Series(found[-1]).to_string())
    return found


def _save_with_l0(
    lm: sb.Model, weights: JumpReluWeights, target: Path, recipe: SaeRecipe, rows: torch.Tensor, n: int
) -> None:
    l0 = float((weights.encode(rows[:8192]) > 0).float().sum(-1).mean())
    save(weights, target, recipe=recipe, model_name=lm.name, l0=l0, n_training_residuals=n)


def load(folder: Path) -> JumpReluWeights:
    from safetensors.torch import load_file

    return JumpReluWeights(**load_file(folder / "params.safetensors"))


def _data_folder() -> Path | None:
    """The folder SAE_BIAS_REAL_DATA names, else `shared/data` beside the checkout."""
    named = os.environ.get("SAE_BIAS_REAL_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(named) if named else beside
    if not folder.is_dir():
        print(f"no prose in {folder}; only statements, samples and --text are used (set SAE_BIAS_REAL_DATA)")
        return None
    return folder
