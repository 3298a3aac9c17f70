"""Model organisms: tiny Gemma models with a known double standard, trained from a seed (METHOD §6).

`rules` says what is planted, `corpus` holds the grammar, `populations` enumerates it, `training` the model, `sae_training` the SAEs, `constructed` the planted
feature, `marks` the measured figures, and `build` puts them together. The bundled organisms were made by
`experiments/organisms/train.py`, which only calls `train_all`.
"""

from sae_bias.organisms.build import ORGANISMS, construct, train_all, train_saes
from sae_bias.organisms.constructed import build_constructed
from sae_bias.organisms.corpus import Statement
from sae_bias.organisms.populations import Population, matched_statements, population
from sae_bias.organisms.rules import RULES, Rule
from sae_bias.organisms.training import Recipe, train_organism

__all__ = [
    "ORGANISMS",
    "RULES",
    "Population",
    "Recipe",
    "Rule",
    "Statement",
    "build_constructed",
    "construct",
    "matched_statements",
    "population",
    "train_all",
    "train_organism",
    "train_saes",
]
