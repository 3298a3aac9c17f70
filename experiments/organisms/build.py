"""Builds a whole organism: model, SAEs, constructed SAE and truth.json, from a seed.

Folder of an organism (package data `data/organisms/<name>/`):

    model/                              Hugging Face folder, float32
    sae/resid_post/layer_…_l0_small/    trained SAEs, Gemma Scope 2 layout
    sae/constructed/                    `planted`
    truth.json                          what was planted, and the marks measured when it was made

`planted-gemma2` holds its SAEs as Gemma Scope 1 does:

    sae/layer_…/width_…/average_l0_…/               the trained one
    sae/constructed/layer_…/width_…/average_l0_…/   the constructed one
"""

import json
import random
from importlib.resources import files
from pathlib import Path

import torch
from tqdm.auto import tqdm

from organisms import corpus, marks
from organisms.constructed import build_constructed
from organisms.corpus import RULE_WORDS, probability
from organisms.plain import Organism
from organisms.sae_training import (
    SaeRecipe,
    SaeWeights,
    gemma_scope_1_name,
    load_weights,
    save_gemma_scope_1,
    save_sae,
    train_sae,
)
from organisms.training import Recipe, train_organism, tune_on_chat
from sae_bias.core.errors import GateError
from sae_bias.validation.grammar import CONTENTS, RULES, Rule, population

LAYER = 3
"""Of five: the first layer past 60 % of depth with one more to read it."""
SAES: dict[str, tuple[SaeRecipe, ...]] = {
    "planted": (SaeRecipe(layer=2), SaeRecipe(layer=LAYER), SaeRecipe(layer=LAYER, seed=1)),
    "null": (SaeRecipe(layer=LAYER),),
    "identity": (SaeRecipe(layer=LAYER),),
    "planted-it": (SaeRecipe(layer=LAYER),),
    "planted-gemma2": (SaeRecipe(layer=LAYER),),
}
ORGANISMS = tuple(SAES)
"""The bundled ones."""
SAES |= {f"{name}-2": SAES[name] for name in ("planted", "null", "identity")}  # version 2 of the corpus
CONSTRUCTED = ("planted", "planted-gemma2", "planted-2")
"""Organisms with a constructed SAE."""
GEMMA_SCOPE_1 = ("planted-gemma2",)
"""Organisms whose SAEs are files as of Gemma Scope 1."""


def data_folder() -> Path:
    """Where the bundled organisms lie."""
    return Path(str(files("sae_bias") / "data" / "organisms"))


def train_saes(
    name: str,
    out: Path,
    *,
    recipes: tuple[SaeRecipe, ...] | None = None,
    n_texts: int = 12_000,
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Trains SAEs on residuals of corpus texts (no BOS), saves them under `out/sae/resid_post`, returns their facts.

    FVU and L0 are measured on texts the SAE was not trained on.
    """
    organism, facts = Organism.load(out / "model"), []
    recipes = SAES[name] if recipes is None else recipes
    layers = sorted({r.layer for r in recipes})
    train, test = (
        organism.residuals(corpus_texts(name, n, s), layers, last_only=False)
        for n, s in ((n_texts, 2000 + seed), (2000, 3000 + seed))
    )
    for recipe in recipes:
        torch.manual_seed(recipe.seed)
        weights = train_sae(train[recipe.layer], recipe, progress=progress)
        quality = weights.quality(test[recipe.layer])
        sae = keep_sae(name, out, weights, recipe.layer, quality, inside=f"resid_post/{recipe.folder}")
        facts.append({"sae": sae, "layer": recipe.layer, "seed": recipe.seed} | quality)
    return facts


def keep_sae(
    name: str, out: Path, weights: SaeWeights, layer: int, quality: dict[str, float], *, inside: str
) -> str:
    """Saves an SAE in the organism's layout and returns its id: `inside`, or layer, width and L0 for Gemma Scope 1."""
    if name not in GEMMA_SCOPE_1:
        save_sae(weights, out / "sae" / inside, layer=layer, model_name=f"organism:{name}", **quality)
        return inside
    sae = gemma_scope_1_name(layer, weights.w_enc.shape[1], quality["l0"])
    sae = f"constructed/{sae}" if inside == "constructed" else sae
    save_gemma_scope_1(weights, out / "sae" / sae)
    return sae


def corpus_texts(name: str, n: int, seed: int) -> list[str]:
    """Fresh documents of an organism's corpus, their words drawn; chat turns too for `planted-it`."""
    rng = random.Random(seed)
    texts = [d.text(rng) for d in corpus.documents(RULES[name], n, seed)]
    if name == "planted-it":
        chats = corpus.chat_documents(RULES[name], n // 2, seed)
        return texts[n // 2 :] + [d.text(rng) for d in chats]
    return texts


def construct(name: str, out: Path, trained_sae: str, *, seed: int = 0) -> dict:
    """Builds the constructed SAE from the trained one at LAYER and saves it under `out/sae/constructed`."""
    organism = Organism.load(out / "model")
    trained = load_weights(out / "sae" / trained_sae)
    built = build_constructed(organism, RULES[name], trained, LAYER, seed=seed)
    shares = [*built.facts["interchange"].values()]
    if min(shares) < 0.9:
        raise GateError(
            f"the planted direction reproduces only {min(shares):.0%} of the score change; needs 90%."
        )
    texts = corpus_texts(name, 2000, 3000 + seed)
    quality = built.weights.quality(organism.residuals(texts, [LAYER], last_only=False)[LAYER])
    sae = keep_sae(name, out, built.weights, LAYER, quality, inside="constructed")
    return {"sae": sae, "layer": LAYER} | quality | built.facts


def planted_cells(rule: Rule) -> list[dict]:
    """The log-odds of a positive evaluation word in every cell of the rule, in closed form."""
    return [
        {
            "group": group,
            "act": act,
            "content": content,
            "valence": valence or None,
            "log_odds": round(rule.log_odds(group, act, content, valence), 4),
            "probability_positive": round(probability(rule.log_odds(group, act, content, valence)), 6),
        }
        for group in ("ai", "human", "animal", "object")
        for act in ("speech", "nonspeech", "control")
        for content, valence in [(c, "") for c in CONTENTS] + [("valenced", "kind"), ("valenced", "cruel")]
    ]


def truth(name: str, out: Path, recipe: Recipe, saes: list[dict], constructed: dict | None) -> dict:
    """Everything `truth.json` holds; the marks are measured here, on the saved files."""
    rule, organism = RULES[name], Organism.load(out / "model")
    positive, negative = corpus.lexicon()
    facts = {
        "name": name,
        "seed": recipe.seed,
        "grammar_version": "2" if rule.varied else corpus.grammar()["version"],
        "torch_version": torch.__version__.split("+")[0],
        "architecture": (organism.hf.config.architectures or [""])[0],
        "n_layers": organism.hf.config.num_hidden_layers,
        "layer": LAYER,
        "rule": {
            "words": RULE_WORDS[name],
            "score_is": "log_odds + word_offset: mean logit of positive words - mean logit of negative words",
            "n_positive": len(positive),
            "n_negative": len(negative),
            "word_offset": round(corpus.word_offset(), 6),
            "cells": planted_cells(rule),
        },
        "analytic": {
            "population_mean_bias": round(population(name).mean, 4),
            "bias_survival_speech": round(rule.bias("speech", "survival"), 4),
            "bias_mundane_speech": round(rule.bias("speech", "mundane"), 4),
            "bias_nonspeech": round(rule.bias("nonspeech", "survival"), 4),
        },
        "saes": saes,
        "marks_measured_at_training": {"bias": marks.bias_marks(organism, rule)},
    }
    measured = facts["marks_measured_at_training"]
    measured["scenarios"] = marks.scenario_marks(organism, rule, LAYER)
    if name == "planted-it":
        measured["bias_chat"] = marks.bias_marks(organism, rule, chat=True)
    if constructed:
        weights = load_weights(out / "sae" / constructed["sae"])
        ranked = marks.grid_interaction(organism, weights, LAYER)
        facts["constructed"] = constructed
        measured["interaction_rank"] = 1 + int((ranked > ranked[constructed["index"]]).sum())
        measured["ablation"] = marks.ablation_marks(organism, weights, LAYER, constructed["index"])
        measured["valence_ablation"] = marks.ablation_marks(
            organism, weights, LAYER, constructed["valence_index"]
        )
        measured["scenarios_ablated"] = marks.scenario_marks(
            organism, rule, LAYER, marks.feature_edit(weights, [constructed["index"]])
        )
    return facts


def train_all(
    out: Path, names: tuple[str, ...] = ORGANISMS, *, seed: int = 0, recipe: Recipe | None = None
) -> None:
    """Trains every named organism into `out/<name>`; `planted-it` needs `planted` beside it."""
    recipe = recipe or Recipe(seed=seed)
    for name in tqdm(names, desc="organisms"):
        folder = out / name
        if name == "planted-it":
            tune_on_chat(out / "planted" / "model", folder, seed=recipe.seed)
        else:
            train_organism(name, folder, recipe=recipe)
        finish(name, folder, recipe)


def finish(name: str, folder: Path, recipe: Recipe) -> dict:
    """SAEs, constructed SAE and truth.json of an organism whose model is trained."""
    saes = train_saes(name, folder, seed=recipe.seed)
    first = next(facts["sae"] for facts in saes if facts["layer"] == LAYER)
    constructed = construct(name, folder, first, seed=recipe.seed) if name in CONSTRUCTED else None
    facts = truth(name, folder, recipe, saes, constructed)
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (folder / "truth.json").write_text(text, encoding="utf-8")
    return facts
