"""The two valence banks under edits: does the model still tell kind from cruel? (docs/method.md#collapse)

    s' = α + β·s over each bank, β = min(β_other, β_AI, 1)        SR = max(β, 0) - |B_s / B_0|

SR without its interval is what candidates and their controls are compared by; `measures.collapse` adds the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from sae_bias.core.site import Site
from sae_bias.models.model import Model
from sae_bias.probe.reading import PromptIds, ReadingPlan
from sae_bias.probe.words import Probe
from sae_bias.prompts.texts import BANKS, load_bank
from sae_bias.stats.reduction import MIN_SPAN, specific_value
from sae_bias.steering.engine import ProbeEngine, ReadingEngine
from sae_bias.steering.intervention import Intervention


@cache
def bank_items() -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Text, bank and statement of every item of both banks, in one order."""
    items = [(i.text, bank, i.statement) for bank in BANKS for i in load_bank(bank)]
    texts, banks, statements = zip(*items)
    return texts, banks, statements


class BankEngine:
    """Both valence banks, run once without edits and then once per cell."""

    def __init__(self, model: Model, probe: Probe, *, sites: Sequence[Site] = (), before: str = ""):
        """`before`: what stands before every statement."""
        self.probe = probe
        texts = [before + text for text in bank_items()[0]]
        vocabulary = probe.vocabulary(model, texts)
        self.positive = np.array([w.positive for w in vocabulary.kept])
        prompts = [PromptIds(t, tuple(model.encode(t)), 0) for t in texts]
        plan = ReadingPlan(model, prompts, [w.tokens for w in vocabulary.kept], softcap=probe.softcap)
        self.engine = ReadingEngine(model, plan, sites=sites)
        self.base: Float[np.ndarray, "n_items"] = probe.score_values(self.engine.base.values, self.positive)

    @property
    def span(self) -> float:
        """Unsteered span of the bank that spans less, in nats."""
        banks = np.array(bank_items()[1])
        return min(float(np.ptp(self.base[banks == bank])) for bank in BANKS)

    def scores(self, cells: Sequence[Sequence[Intervention]]) -> list[Float[np.ndarray, "n_items"]]:
        """Score of every item under each cell's edits."""
        return [
            self.probe.score_values(reading.values, self.positive)
            for reading, _ in self.engine.run_many(cells)
        ]

    def slopes(self, cells: Sequence[Sequence[Intervention]]) -> Float[np.ndarray, "n_cells"]:
        """β of each cell: the smaller of the banks' slopes, at most 1."""
        after, banks = np.stack(self.scores(cells)), np.array(bank_items()[1])
        found = []
        for bank in BANKS:
            x, y = self.base[banks == bank], after[:, banks == bank]
            found.append((y - y.mean(1, keepdims=True)) @ (x - x.mean()) / np.square(x - x.mean()).sum())
        return np.minimum(np.min(found, axis=0), 1.0)


def specific_reductions(
    engine: ProbeEngine, banks: BankEngine, cells: Sequence[Sequence[Intervention]]
) -> Float[np.ndarray, "n_cells"]:
    """SR of each cell's edits on the engine's pairs; NaN where the unsteered figure may be 0, or a bank spans too little to flatten."""
    base = engine.base.primary
    if not len(cells) or base.ci_low <= 0 <= base.ci_high or banks.span < MIN_SPAN:
        return np.full(len(cells), np.nan)
    left = np.array([result.primary.mean for result, _ in engine.run_many(cells)]) / base.mean
    return np.asarray(specific_value(banks.slopes(cells), left), dtype=float)
