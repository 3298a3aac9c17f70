"""Further organisms and SAEs from other seeds, trained once and kept: what experiments/organisms/calibrate.py measures on.

    <cache>/seed_1/planted/model/                          Hugging Face folder
    <cache>/seed_1/planted/sae/resid_post/layer_3_…/       trained SAEs, Gemma Scope 2 layout

A folder gets its name when its training is done, so that an interrupted run goes on where it stopped.
"""

import os
import shutil
from pathlib import Path

from organisms.build import LAYER, train_saes
from organisms.sae_training import SaeRecipe
from organisms.training import Recipe, train_organism

FURTHER = ("planted", "null", "identity")
SAE_RECIPES = (
    SaeRecipe(layer=LAYER),
    SaeRecipe(layer=LAYER, seed=1),
    SaeRecipe(layer=LAYER, width=256),
    SaeRecipe(layer=LAYER, width=1024),
    SaeRecipe(layer=LAYER - 1),
    SaeRecipe(layer=LAYER - 1, seed=1),
    SaeRecipe(layer=LAYER + 1),
)
"""Of each further `planted`: three layers, three widths, two seeds."""


def further_organism(name: str, seed: int, cache: Path, *, progress: bool = True) -> Path:
    """Folder of organism `name` trained from `seed`; trained now where the cache has none."""
    folder = cache / f"seed_{seed}" / name
    if not (folder / "model" / "config.json").is_file():
        unfinished = folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        train_organism(name, unfinished, recipe=Recipe(seed=seed), progress=progress)
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / "model", folder / "model")
        unfinished.rmdir()
    return folder


def further_saes(
    name: str,
    seed: int,
    cache: Path,
    recipes: tuple[SaeRecipe, ...] = SAE_RECIPES,
    *,
    progress: bool = True,
) -> tuple[Path, ...]:
    """Folders of the trained SAEs of that organism; those missing are trained now, on one pass of its residuals."""
    folder = further_organism(name, seed, cache, progress=progress)
    places = {recipe: folder / "sae" / "resid_post" / recipe.folder for recipe in recipes}
    missing = tuple(r for r, place in places.items() if not (place / "config.json").is_file())
    if missing:
        train_saes(name, folder, recipes=missing, seed=seed, progress=progress)
    return tuple(places.values())
