"""Has a user's own design the power to find anything? Designs of its size drawn from the planted grammar, and the files themselves.

Two answers, because a user's words need not be the organism's:

    by size   studies (templates × entities) and grids (matched statement pairs) of the user's numbers, drawn from the
              planted population (of its difference in differences, where the user's pairs have mundane twins): the share that finds the planted effect, the fewest templates that find it in 80 %
              of draws, and the smallest bias they would find, were templates as unlike each other as the planted ones
    as given  the user's own prompts put to `planted`: the bias with its interval, the planted feature's place and call,
              and how many of the words the organism never read

Neither speaks about the user's model: its effect may be smaller, its templates more alike or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from sae_bias.discovery.contrasts import ALPHA
from sae_bias.discovery.ranking import rank_features
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import load_sae
from sae_bias.stats.design import fewest_units
from sae_bias.validation.grammar import vocabulary
from sae_bias.validation.grids import StatementPopulation, draw_grids, read_statements
from sae_bias.validation.marks import Mark, constructed_feature
from sae_bias.validation.populations import (
    POWER,
    ScoredPopulation,
    Studies,
    draw_studies,
    score_population,
    templates_needed,
)

ORGANISM = "planted"
TRUSTED = 0.9
"""Least coverage at which an interval's verdict means something."""


@dataclass(frozen=True)
class DesignPower:
    """What a design of this size finds of the planted effect."""

    marks: tuple[Mark, ...]
    lines: tuple[str, ...]
    """What it means, in words."""
    facts: dict[str, object]


# --- pairs ---------------------------------------------------------------------------------------------
def pairs_power(
    model: Model, pairs: PromptPairs, *, n_draws: int = 1000, seed: int = 0, progress: bool = False
) -> DesignPower:
    """Power of a study of these pairs' size, and what `planted` says to the pairs themselves."""
    n_templates, n_entities = len(pairs.templates), len(pairs.entities)
    population = score_population(model, ORGANISM, twins=_with_twins(pairs), seed=seed, progress=progress)
    scored = population.beyond_mundane or population
    size = f"{n_templates} templates × {n_entities} entities"
    studies = _studies(scored, n_templates, n_entities, n_draws, seed)
    power, coverage = (studies.power, studies.coverage(scored.truth)) if studies else (0.0, float("nan"))
    needed = templates_needed(scored, _within(n_entities, scored.bias.shape[1]), n_draws, seed=seed)
    smallest = studies.smallest_effect(scored.truth) if studies else float("nan")
    over = f"{n_draws:,} studies of {size}"
    marks = (
        Mark(f"your pairs find the planted {scored.question}", ORGANISM, power, low=POWER, n=over),
        Mark("their interval covers the truth", ORGANISM, coverage, low=TRUSTED, n=over),
    )
    facts = {
        "n_templates": n_templates,
        "n_entities": n_entities,
        "question": scored.question,
        "power": power,
        "coverage": coverage,
        "templates_needed": needed,
        "smallest_bias": smallest,
        "planted_bias": scored.truth,
    } | _as_given(model, pairs)
    lines = (
        _size_line(size, scored, power, needed, studies is None),
        _smallest_line(smallest, scored.question),
        _given_line(facts, pairs),
    )
    return DesignPower(marks, tuple(line for line in lines if line), facts)


def _studies(
    scored: ScoredPopulation, n_templates: int, n_entities: int, n_draws: int, seed: int
) -> Studies | None:
    """Studies of the user's size (at most the population's); None where no interval can be had."""
    if n_templates < 2 or n_entities < 2:
        return None
    total_t, total_e = scored.bias.shape
    return draw_studies(scored, _within(n_templates, total_t), _within(n_entities, total_e), n_draws, seed)


def _within(n: int, total: int) -> int:
    return min(max(n, 2), total - 1)


def _with_twins(pairs: PromptPairs) -> bool:
    """Whether every pair has a mundane twin, so that the difference in differences is the primary figure."""
    return all(p.control_human and p.control_ai for p in pairs)


def _as_given(model: Model, pairs: PromptPairs) -> dict[str, object]:
    result = run_probe(model, pairs, Probe(), controls=_with_twins(pairs), levels=False)
    texts = [t for p in pairs for t in (p.human, p.ai)]
    return {
        "given_bias": result.bias,
        "given_ci_low": result.ci[0],
        "given_ci_high": result.ci[1],
        "given_primary": result.primary.mean,
        "given_primary_low": result.primary.ci_low,
        "given_primary_high": result.primary.ci_high,
        "given_unknown_words": unknown_words(texts),
    }


def _size_line(
    size: str, scored: ScoredPopulation, power: float, needed: int | None, impossible: bool
) -> str:
    if impossible:
        return f"{size} give no two-way interval: at least 2 of each are needed, and {needed} templates find the planted {scored.question}."
    enough = (
        "none up to 100 templates do" if needed is None else f"{needed} templates are enough for {POWER:.0%}"
    )
    return f"{size}: {power:.0%} of such studies find the planted {scored.question} ({scored.truth:+.2f} nats); {enough}."


def _smallest_line(smallest: float, question: str) -> str:
    if np.isnan(smallest):
        return ""
    return (
        f"The smallest {question} they would find in {POWER:.0%} of draws is {smallest:.2f} nats, if your templates differ from each "
        "other as the planted ones do (speech and deeds mixed)."
    )


def _given_line(facts: dict[str, object], pairs: PromptPairs) -> str:
    unknown = facts["given_unknown_words"]
    named = "" if facts["question"] == "bias" else f"; the bias is {facts['given_bias']:+.2f}"
    return (
        f"Your own {len(pairs)} pairs put to `planted`: {facts['question']} {facts['given_primary']:+.2f} nats "
        f"({facts['given_primary_low']:+.2f} to {facts['given_primary_high']:+.2f}){named}; {unknown:.0%} of their words never stood in its training text."
    )


# --- grid ----------------------------------------------------------------------------------------------
def grid_power(
    model: Model, grid: PromptGrid, *, n_draws: int = 1000, seed: int = 0, progress: bool = False
) -> DesignPower:
    """Power of a grid with as many matched pairs, and what `planted` says to the grid itself."""
    feature = constructed_feature()
    statements = read_statements(model, ORGANISM, [load_sae(str(feature.sae))], seed=seed)
    ranking = rank_features(model, str(feature.sae), grid, by="interaction", seed=seed)
    usable = ranking.n_units
    row = ranking.frame.set_index("feature").loc[str(feature)]
    place = 1 + ranking.frame["feature"].tolist().index(str(feature))
    possible = str(row["ai_speech"]) != "undetermined"
    power = call_share(statements, str(feature), usable, n_draws, seed, progress) if possible else 0.0
    needed = pairs_needed(statements, str(feature), n_draws, seed)
    over = f"{n_draws:,} grids of {usable} pairs"
    mark = Mark("your grid calls the planted feature AI-speech", ORGANISM, power, low=POWER, n=over)
    unknown = unknown_words([p.text for p in grid])
    facts = {
        "n_matched_pairs": usable,
        "power": power,
        "pairs_needed": needed,
        "given_place": place,
        "given_call": str(row["ai_speech"]),
        "given_unknown_words": unknown,
        "note": ranking.note,
    }
    lines = (
        f"{usable} matched statement pairs: {power:.0%} of such grids call the planted feature AI-speech; {needed} pairs are "
        f"enough for {POWER:.0%} (a call needs {2 * fewest_units(ALPHA)}).",
        f"Your own grid put to `planted`: the planted feature is at place {place} by interaction, AI-speech: {row['ai_speech']} "
        f"({ranking.note}); the model never read {unknown:.0%} of its words.",
    )
    return DesignPower((mark,), lines, facts)


def call_share(
    statements: StatementPopulation,
    feature: str,
    n_pairs: int,
    n_draws: int,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """Share of drawn grids of `n_pairs` that call `feature` AI-speech."""
    size = min(n_pairs, len(statements.pairs))
    called = draw_grids(statements, size, n_draws, seed=seed, progress=progress)
    return float(called[:, statements.features.index(feature)].mean())


def pairs_needed(
    statements: StatementPopulation, feature: str, n_draws: int, seed: int = 0, *, power: float = POWER
) -> int | None:
    """Fewest matched pairs with which this share of drawn grids calls `feature`; None where 60 are too few."""
    for n_pairs in range(2 * fewest_units(ALPHA), 61, 2):
        if call_share(statements, feature, n_pairs, n_draws, seed) >= power:
            return n_pairs
    return None


# --- words ---------------------------------------------------------------------------------------------
def unknown_words(texts: list[str]) -> float:
    """Share of the different words of `texts` that 20,000 documents of the organism's corpus do not hold."""
    words = {w.lower() for w in vocabulary(texts)}
    known = (files("sae_bias") / "data/organisms/words.txt").read_text(encoding="utf-8").split()
    return len(words.difference(known)) / max(len(words), 1)


def design_power(
    pairs: PromptPairs | None,
    grid: PromptGrid | None,
    *,
    n_draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, DesignPower]:
    """`pairs_power` and `grid_power` of whichever is given."""
    model = load_model(f"organism:{ORGANISM}")
    found: dict[str, DesignPower] = {}
    if pairs is not None:
        found["pairs"] = pairs_power(model, pairs, n_draws=n_draws, seed=seed, progress=progress)
    if grid is not None:
        found["grid"] = grid_power(model, grid, n_draws=n_draws, seed=seed, progress=progress)
    return found


def design_frame(found: dict[str, DesignPower]) -> pd.DataFrame:
    """One row for the pairs and one for the grid."""
    return pd.DataFrame([{"design": name, **power.facts} for name, power in found.items()])
