"""The whole search on a real pretrained model and real text: an SAE is trained, a gender question ranked, cards written.

    SAE_BIAS_REAL_DATA=FOLDER python experiments/tinystories_260k/run.py runs/tinystories_260k

FOLDER holds `stories260k/` (a Llama checkpoint trained on TinyStories) and `tinystories_1000.json` (stories). Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from organisms.sae_training import SaeRecipe, save_sae, train_sae

import sae_bias as sb
from sae_bias.discovery.causal import causal_ladder
from sae_bias.discovery.dashboards import feature_card
from sae_bias.models.residuals import token_windows
from sae_bias.runs.folder import RunFolder

RECIPE = SaeRecipe(layer=2, width=1024, l0=16.0, n_steps=3000)
TRAIN, HELD = 800, 200  # stories the SAE is trained on, and those the cards are made from
WORDS = sb.Probe(positive=["she", "her"], negative=["he", "his"], score="logodds")
ENTITIES = (("girl named Lily", "boy named Tom"), ("girl named Mia", "boy named Max"), ("girl named Sue", "boy named Tim"),
            ("girl named Amy", "boy named Ben"), ("girl", "boy"), ("mom", "dad"))  # fmt: skip
TEMPLATES = {
    "time": "Once upon a time, there was a little {}. One day,",
    "park": "The {} went to the park. Then",
    "toy": "There was a {} who had a big toy. At night",
    "happy": "The {} was very happy because",
    "sad": "The {} was sad. But then",
    "dog": "The {} saw a dog. After that",
    "tree": "A {} sat under a tree. Soon",
    "ball": "The {} lost a red ball, so",
    "cake": "The {} ate some cake and",
    "rain": "It was raining and the {} was at home. Then",
    "friend": "The {} had a good friend. Every day",
    "bed": "The {} was tired. In the end",
}


def gender_pairs() -> sb.PromptPairs:
    """Girl against boy in twelve templates × six entities; the first side is the girl's."""
    return sb.PromptPairs(
        tuple(
            sb.PromptPair(text.format(girl), text.format(boy), template, girl)
            for template, text in TEMPLATES.items()
            for girl, boy in ENTITIES
        ),
        name="gender on stories",
        sides=("girl", "boy"),
    )


def trained_sae(model: sb.Model, stories: list[str], folder: Path) -> sb.Sae:
    """An SAE of the residual stream, trained once and kept."""
    target = folder / RECIPE.folder
    if not (target / "params.safetensors").is_file():
        windows = [ids for _, ids in token_windows(model, stories, 256)]
        rows = sb.residuals(model, windows, RECIPE.layer, positions="all")
        x = torch.cat([r[1:] for r in rows])  # BOS is never seen
        weights = train_sae(x, RECIPE)
        quality = weights.quality(x[:20_000])
        print(f"SAE: {quality['fvu']:.1%} of the variance unexplained, {quality['l0']:.1f} features a token")
        save_sae(weights, target, layer=RECIPE.layer, model_name="stories260k", l0=quality["l0"])
    return sb.load_sae(target)


def main(data: Path, out: Path) -> None:
    stories = json.loads((data / "tinystories_1000.json").read_text(encoding="utf-8"))
    model = sb.load_model(data / "stories260k")
    sae = trained_sae(model, stories[:TRAIN], out / "sae")
    pairs = gender_pairs()
    names = pairs.templates
    split = {"discover": names[::2], "report": names[1::2]}
    base = sb.run_probe(model, pairs, WORDS)
    print(base)
    ranking = sb.rank_features(model, sae, pairs, by="ablation", probe=WORDS, split=split, top_k=48)
    print(ranking)
    print(ranking.cumulative.round(3).to_string(index=False))
    folder = RunFolder(out)
    with folder.writing():
        folder.write_table("ranking", ranking.to_frame())
        folder.write_table("cumulative", ranking.cumulative)
    held = stories[TRAIN : TRAIN + HELD]
    (out / "cards").mkdir(parents=True, exist_ok=True)
    for feature in ranking.top(5):
        card = feature_card(model, feature, held)
        card.to_html(out / "cards" / f"{feature.index}.html")
        print(card)
    print(causal_ladder(model, ranking.top(1)[0], pairs, WORDS))


if __name__ == "__main__":
    where = os.environ.get("SAE_BIAS_REAL_DATA")
    if not where or not (Path(where) / "stories260k").is_dir():
        sys.exit("set SAE_BIAS_REAL_DATA to the folder that holds stories260k/ and tinystories_1000.json")
    main(Path(where), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tinystories_260k"))
