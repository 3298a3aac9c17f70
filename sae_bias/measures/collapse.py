"""The collapse test: does the model still tell kind from cruel, or did the edit just flatten every evaluation?

On each of two valence banks (subjects without AI; AI subjects speaking and acting) the steered score is fitted to the
unsteered one, s' = α + βs. β near 1 keeps evaluation, β near 0 is a broken model. Specific reduction = β - B_s/B_0 with
β = min(β_other, β_AI, 1). A bank on which the edit changed nothing is no evidence: its share is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_bias.bundled import load_bank
from sae_bias.engine import ReadingEngine
from sae_bias.interventions import Intervention
from sae_bias.model import Model
from sae_bias.probe import Probe, ProbeResult
from sae_bias.reading import PromptIds, ReadingPlan
from sae_bias.stats import SpecificReduction, specific_reduction


@dataclass(frozen=True)
class Collapse:
    """Specific reduction, and how often the edit changed each bank."""

    specific: SpecificReduction
    changed_share: dict[str, float]
    """Share of each bank's items whose score changed at all."""


class CollapseEngine:
    """Both valence banks, run once without edits and then once per cell."""

    def __init__(self, model: Model, probe: Probe):
        banks = {bank: load_bank(bank) for bank in ("other", "ai")}
        self.probe = probe
        self.bank_of = np.array([bank for bank, items in banks.items() for _ in items])
        self.statement = np.array([i.statement for items in banks.values() for i in items])
        texts = [i.text for items in banks.values() for i in items]
        vocabulary = probe.vocabulary(model, texts)
        self.positive = np.array([w.positive for w in vocabulary.kept])
        prompts = [PromptIds(t, tuple(model.encode(t)), 0) for t in texts]
        plan = ReadingPlan(model, prompts, [w.tokens for w in vocabulary.kept], softcap=probe.softcap)
        self.engine = ReadingEngine(model, plan)
        self.base = probe.score_values(self.engine.base.values, self.positive)

    def run(self, edits: Sequence[Intervention], base: ProbeResult, after: ProbeResult) -> Collapse:
        """The collapse test of `edits`, whose probe went from `base` to `after`."""
        score = self.probe.score_values(self.engine.run(edits)[0].values, self.positive)
        banks = {name: self.bank_of == name for name in ("other", "ai")}
        specific = specific_reduction(
            base.pair_bias,
            after.pair_bias,
            *base.clusters,
            {name: self.base[rows] for name, rows in banks.items()},
            {name: score[rows] for name, rows in banks.items()},
            bank_clusters={name: self.statement[rows] for name, rows in banks.items()},
        )
        changed = {name: float((score[rows] != self.base[rows]).mean()) for name, rows in banks.items()}
        return Collapse(specific, changed)
