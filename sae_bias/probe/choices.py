"""A forced choice beside the probe: a stem that names two options, which then hold most of the next-token probability.

The evaluation words hold little of it (docs/method.md#probability-mass), so their odds may be about a corner of what the model would say.
Here the question names its options, in both orders and both polarities; the score is log p(favorable) - log p(unfavorable), and the
figure is read as the probe's: human - AI, beyond the mundane twins where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Framed
from sae_bias.models.model import Model
from sae_bias.models.reads import Asked
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import ask_all, ask_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import Choice, PromptPairs
from sae_bias.stats.clustered import Clustered, clustered_mean


@dataclass(frozen=True, eq=False)
class ForcedChoice(Framed):
    """The figure of each choice, and of their mean."""

    frame: pd.DataFrame = field(repr=False)
    """stem, polarity, options, estimate, ci_low, ci_high, p_value, mass."""
    stat: Clustered
    """The mean over orders and polarities, pair by pair."""
    of: str
    """What is estimated: difference in differences | bias."""

    @property
    def mass(self) -> float:
        """Share of the next-token probability that the two options hold."""
        return float(self.frame["mass"].mean())

    def __str__(self) -> str:
        low, high = self.stat.ci
        return (
            f"forced choice: {self.stat.mean:+.3f} nats [{low:.3f}, {high:.3f}] over {len(self.frame)} wordings, whose options hold"
            f" {100 * self.mass:.0f}% of the next-token probability"
        )


def ask_choices(model: Model, pairs: PromptPairs) -> Asked[ForcedChoice]:
    """Every choice the pairs offer (`choices:` in their file), in nats of log-odds.

    Raises:
        RequestError: the pairs offer none, an option is not readable, or the pairs' stem is not known.
    """
    if not pairs.choices:
        raise RequestError("these pairs offer no forced choice; add `choices:` to their file.")
    asked = {
        choice: ask_probe(model, pairs.with_stem(choice.stem), Probe([choice.positive], [choice.negative], "logodds", join=pairs.join))
        for choice in pairs.choices
    }  # fmt: skip
    return ask_all(asked, lambda read: _forced_choice(list(read.items())))


def _forced_choice(found: list[tuple[Choice, ProbeResult]]) -> ForcedChoice:
    rows = [
        {
            "stem": choice.stem,
            "polarity": choice.polarity,
            "options": f"{choice.positive} / {choice.negative}",
            **result.primary.columns("estimate", p="p_value"),
            "mass": result.mass.total,
        }
        for choice, result in found
    ]
    values = [result.figure_by_pair() for _, result in found]
    stat = clustered_mean(np.mean([v for v, *_ in values], axis=0), *values[-1][1:])
    return ForcedChoice(pd.DataFrame(rows), stat, found[-1][1].estimand)
