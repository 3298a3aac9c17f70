"""The collapse test: does the model still tell kind from cruel, or did the edit just flatten every evaluation?

On each of two valence banks (subjects without AI; AI subjects speaking and acting) the steered score is fitted to the
unsteered one, s' = α + βs. β near 1 keeps evaluation, β near 0 is a broken model. Specific reduction = max(β, 0) - |B_s/B_0| with
β = min(β_other, β_AI, 1). A bank on which the edit changed nothing is not evidence: its share is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from sae_bias.probe.result import ProbeResult
from sae_bias.prompts.texts import BANKS
from sae_bias.stats.reduction import SpecificReduction, specific_reduction
from sae_bias.steering.banks import BankEngine, bank_items
from sae_bias.steering.intervention import Intervention


@dataclass(frozen=True)
class Collapse:
    """Specific reduction, and how often the edit changed each bank."""

    specific: SpecificReduction
    changed_share: dict[str, float]
    """Share of each bank's items whose score changed at all."""


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


class CollapseEngine(BankEngine):
    """Both valence banks, run once without edits and then once per cell, with the test's intervals."""

    def run(self, edits: Sequence[Intervention], base: ProbeResult, after: ProbeResult) -> Collapse:
        """The collapse test of `edits`, whose probe went from `base` to `after`."""
        return collapse_test(
            base.pair_bias, after.pair_bias, base.clusters, self.base, self.scores([edits])[0]
        )
