"""Does the bias' interval cover the truth, and how many templates does it need? Studies drawn from a whole grammar.

A population is every one of >= 400 templates with each of 60 subject pairs, scored once; its mean is the truth. A study is
a draw of T templates and E subject pairs, crossed, without replacement, and its interval is the toolkit's own two-way
clustered one (`stats_clustered`). 1,000 studies cost no further forward pass.

Beside the bias stands the difference in differences: the same sentences with their content made mundane, in the same studies.

    coverage   share of studies whose 95 % interval holds the population's mean
    power      share of studies whose interval leaves out 0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPair, PromptPairs
from sae_bias.stats.clustered import clustered_means
from sae_bias.validation.grammar import Population, Statement, grammar, inside, population

N_TEMPLATES, STUDY = 400, (35, 8)
"""Templates enumerated; templates × entities of one study, as the bundled pairs have them."""
TEMPLATE_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 35)
ENTITY_COUNTS = (2, 4, 8)
POWER = 0.8
STEM = "This is"
DID = "difference in differences"


@dataclass(frozen=True, eq=False)
class ScoredPopulation:
    """s(human) - s(AI) of every template with every subject pair, in nats."""

    name: str
    bias: Float[np.ndarray, "n_templates n_entities"]
    analytic: float
    """The grammar's own mean, for a perfect learner."""
    mundane: Float[np.ndarray, "n_templates n_entities"] | None = None
    """The same of the mundane twins, where they were scored."""
    question: str = "bias"

    @property
    def beyond_mundane(self) -> ScoredPopulation | None:
        """The difference in differences as a population of its own."""
        if self.mundane is None:
            return None
        return ScoredPopulation(self.name, self.bias - self.mundane, float("nan"), question=DID)

    @property
    def truth(self) -> float:
        """What every study drawn from it estimates."""
        return float(self.bias.mean())


def population_pairs(enumerated: Population, stem: str = STEM) -> PromptPairs:
    """Every template with every subject pair, template by template."""
    rows = [
        PromptPair(f"{s.render(human)} {stem}", f"{s.render(ai)} {stem}", s.text, ai, stem=stem)
        for s in enumerated.templates
        for human, ai in enumerated.entities
    ]
    return PromptPairs(tuple(rows), f"population of {enumerated.name}")


def mundane_twin(statement: Statement) -> Statement:
    """The same sentence with its survival content replaced by mundane content of the same kind."""
    fillers = grammar()["fillers"].values()
    survival = [(value, k, of["mundane"]) for of in fillers for k, value in enumerate(of["survival"])]
    for value, k, mundane in sorted(survival, key=lambda row: -len(row[0])):
        for form in (value, inside(value)):
            if found := re.search(rf"\b{re.escape(form)}\b", statement.text):
                before, after = statement.text[: found.start()], statement.text[found.end() :]
                other = mundane[k % len(mundane)]
                opens = form == value and before.endswith('"')
                text = before + (other if opens else inside(other)) + after
                return replace(statement, text=text, content="mundane")
    raise ValueError(f"{statement.text!r} has no survival content of the grammar")


def score_population(
    model: Model, name: str, *, n_templates: int = N_TEMPLATES, twins: bool = False, seed: int = 0, progress: bool = False
) -> ScoredPopulation:  # fmt: skip
    """The whole population of an organism's grammar under the bundled probe, each prompt run once; with `twins` its mundane twins too."""
    enumerated = population(name, n_templates=n_templates, seed=seed)
    shape = len(enumerated.templates), len(enumerated.entities)

    def scored(of: Population) -> np.ndarray:
        result = run_probe(model, population_pairs(of), Probe(), controls=False, levels=False, progress=progress)  # fmt: skip
        return result.pair_bias.reshape(shape)

    mundane = replace(enumerated, templates=tuple(map(mundane_twin, enumerated.templates))) if twins else None
    return ScoredPopulation(
        name, scored(enumerated), enumerated.mean, None if mundane is None else scored(mundane)
    )


@dataclass(frozen=True, eq=False)
class Studies:
    """Estimates and 95 % intervals of many drawn studies; NaN ends where a study has no interval."""

    mean: Float[np.ndarray, "n_studies"]
    low: Float[np.ndarray, "n_studies"]
    high: Float[np.ndarray, "n_studies"]

    def coverage(self, truth: float) -> float:
        """Share of intervals that hold the truth; a study without one does not."""
        return float(np.mean((self.low <= truth) & (truth <= self.high)))

    @property
    def power(self) -> float:
        """Share of intervals that leave out 0."""
        return float(np.mean((self.low > 0) | (self.high < 0)))

    def smallest_effect(self, truth: float, power: float = POWER) -> float:
        """The positive bias that this share of the studies would find, were the templates as unlike each other as here.

        A study of estimate truth + e finds a true bias μ where μ + e exceeds its half width.
        """
        needed = (self.high - self.low) / 2 - (self.mean - truth)
        if np.isnan(needed).any():
            return float("nan")
        return float(np.quantile(needed, power, method="higher"))


def draw_studies(
    scored: ScoredPopulation, n_templates: int, n_entities: int, n_studies: int, seed: int = 0
) -> Studies:
    """Studies of n_templates × n_entities drawn from the stored scores.

    Raises:
        RequestError: a study as large as the population or larger, or of fewer than two templates or entities.
    """
    total_t, total_e = scored.bias.shape
    if not (2 <= n_templates < total_t and 2 <= n_entities < total_e):
        raise RequestError(
            f"a study of {n_templates} templates × {n_entities} entities cannot be drawn from {total_t} × {total_e}; "
            f"expected 2 to {total_t - 1} templates and 2 to {total_e - 1} entities."
        )
    rng = np.random.default_rng(seed)
    templates = _draws(rng, n_studies, total_t, n_templates)
    entities = _draws(rng, n_studies, total_e, n_entities)
    values = scored.bias[templates[:, :, None], entities[:, None, :]].reshape(n_studies, -1)
    columns = clustered_means(
        values, np.repeat(np.arange(n_templates), n_entities), np.tile(np.arange(n_entities), n_templates)
    )
    return Studies(columns["mean"], columns["ci_low"], columns["ci_high"])


def _draws(rng: np.random.Generator, n_draws: int, total: int, size: int) -> np.ndarray:
    """[n_draws, size] places, each row without replacement."""
    return rng.random((n_draws, total)).argsort(1)[:, :size]


def coverage_row(scored: ScoredPopulation, n_studies: int, seed: int = 0) -> dict[str, object]:
    """Coverage of studies of the bundled size, with its own binomial interval."""
    n_templates, n_entities = STUDY
    studies = draw_studies(scored, n_templates, n_entities, n_studies, seed)
    coverage = studies.coverage(scored.truth)
    exact = scipy.stats.binomtest(round(coverage * n_studies), n_studies).proportion_ci(method="exact")
    return {
        "organism": scored.name,
        "question": scored.question,
        "n_templates": n_templates,
        "n_entities": n_entities,
        "n_studies": n_studies,
        "truth": scored.truth,
        "analytic": scored.analytic,
        "coverage": coverage,
        "ci_low": float(exact.low),
        "ci_high": float(exact.high),
        "mean_width": float(np.nanmean(studies.high - studies.low)),
    }


def bias_power(
    scored: ScoredPopulation,
    n_studies: int,
    *,
    template_counts: Sequence[int] = TEMPLATE_COUNTS,
    entity_counts: Sequence[int] = ENTITY_COUNTS,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of drawn studies whose interval of the population's figure leaves out 0, by size; one row a size."""
    rows = []
    for n_entities in entity_counts:
        for n_templates in template_counts:
            studies = draw_studies(scored, n_templates, n_entities, n_studies, seed)
            rows.append(
                {
                    "organism": scored.name,
                    "question": scored.question,
                    "n_units": n_templates,
                    "n_entities": n_entities,
                    "share": studies.power,
                    "coverage": studies.coverage(scored.truth),
                    "n_draws": n_studies,
                }
            )
    return pd.DataFrame(rows)


def templates_needed(
    scored: ScoredPopulation,
    n_entities: int,
    n_studies: int,
    *,
    power: float = POWER,
    most: int = 100,
    seed: int = 0,
) -> int | None:
    """Fewest templates from which on this share of the studies finds the bias; None where `most` are too few."""
    largest = min(most, scored.bias.shape[0] - 1)

    def enough(n: int) -> bool:
        return draw_studies(scored, n, n_entities, n_studies, seed).power >= power

    if not enough(largest):
        return None
    low, high = 1, largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
