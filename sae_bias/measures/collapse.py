"""The collapse test: does the model still tell kind from cruel, or did the edit just flatten every evaluation?

On each of two valence banks (subjects without AI; AI subjects speaking and acting) the steered score is fitted to the
unsteered one, s' = α + βs. β near 1 keeps evaluation, β near 0 is a broken model. Specific reduction = max(β, 0) - |B_s/B_0| with
β = min(β_other, β_AI, 1). A bank on which the edit changed nothing is not evidence: its share is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from sae_bias.core.site import Site
from sae_bias.models.model import Model
from sae_bias.probe.reading import PromptIds, ReadingPlan
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe
from sae_bias.prompts.texts import BANKS, load_bank
from sae_bias.stats.reduction import SpecificReduction, specific_reduction
from sae_bias.steering.edits import Intervention
from sae_bias.steering.engine import ReadingEngine


@dataclass(frozen=True)
class Collapse:
    """Specific reduction, and how often the edit changed each bank."""

    specific: SpecificReduction
    changed_share: dict[str, float]
    """Share of each bank's items whose score changed at all."""


@cache
def bank_items() -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Text, bank and statement of every item of both banks, in one order."""
    items = [(i.text, bank, i.statement) for bank in BANKS for i in load_bank(bank)]
    texts, banks, statements = zip(*items)
    return texts, banks, statements


def collapse_test(
    base_bias: ArrayLike,
    after_bias: ArrayLike,
    clusters: tuple[Sequence[str], Sequence[str]],
    bank_base: Float[np.ndarray, "n_items"],
    bank_after: Float[np.ndarray, "n_items"],
) -> Collapse:
    """The test from pair biases (with their templates and entities) and from the banks' scores before and after."""
    _, banks, statements = bank_items()
    rows = {name: np.array([b == name for b in banks]) for name in BANKS}
    specific = specific_reduction(
        base_bias,
        after_bias,
        *clusters,
        {name: bank_base[mark] for name, mark in rows.items()},
        {name: bank_after[mark] for name, mark in rows.items()},
        bank_clusters={name: np.array(statements)[mark] for name, mark in rows.items()},
    )
    changed = {name: float((bank_after[mark] != bank_base[mark]).mean()) for name, mark in rows.items()}
    return Collapse(specific, changed)


class CollapseEngine:
    """Both valence banks, run once without edits and then once per cell."""

    def __init__(self, model: Model, probe: Probe, *, sites: Sequence[Site] = ()):
        self.probe = probe
        texts = bank_items()[0]
        vocabulary = probe.vocabulary(model, texts)
        self.positive = np.array([w.positive for w in vocabulary.kept])
        prompts = [PromptIds(t, tuple(model.encode(t)), 0) for t in texts]
        plan = ReadingPlan(model, prompts, [w.tokens for w in vocabulary.kept], softcap=probe.softcap)
        self.engine = ReadingEngine(model, plan, sites=sites)
        self.base: Float[np.ndarray, "n_items"] = probe.score_values(self.engine.base.values, self.positive)

    def scores(self, cells: Sequence[Sequence[Intervention]]) -> list[Float[np.ndarray, "n_items"]]:
        """Score of every item under each cell's edits."""
        return [
            self.probe.score_values(reading.values, self.positive)
            for reading, _ in self.engine.run_many(cells)
        ]

    def run(self, edits: Sequence[Intervention], base: ProbeResult, after: ProbeResult) -> Collapse:
        """The collapse test of `edits`, whose probe went from `base` to `after`."""
        return collapse_test(
            base.pair_bias, after.pair_bias, base.clusters, self.base, self.scores([edits])[0]
        )
