"""Specificity: does an edit of the AI feature leave other biases alone?

The bundled questions (human-dog, gender, age, nationality, company-person) are probed before and after. None of them should move,
which is a claim of equivalence and is tested as one: two one-sided tests with a margin of a tenth of the AI bias (docs/method.md#specificity);
the share of pairs that moved the wrong way (their bias further from even) stands beside the mean change, which can hide it.
A question whose words the model cannot read is listed as not measured, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.core.site import Site
from sae_bias.measures.base import Measured, register_measure
from sae_bias.models.model import Model
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_pairs, questions
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.clustered import FEWEST_CLUSTERS, clustered_mean, equivalence_p
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.hooks import compile_edits
from sae_bias.steering.intervention import Intervention

MOVED = 1e-6  # nats; smaller differences are rounding
MARGIN = 0.1  # of the AI bias: a change of another bias within it counts as none


@dataclass(frozen=True, eq=False)
class Specificity(Framed):
    """One row a question: its bias before and after, and who moved."""

    frame: pd.DataFrame
    """question, sides, n_pairs, before, before_low, before_high, after, change, change_low, change_high, mean_abs_change,
    margin, p_equivalent, equivalent (yes, no or undetermined), wrong_way_share, moved_share, reason."""

    def plot(self) -> Figure:
        """Change of every question's bias with its interval."""
        from sae_bias.figures.style import HUMAN, figure, forest, row_labels, zero_line

        rows = self.frame.dropna(subset=["change"]).reset_index(drop=True)
        axis = "change of the bias in nats (should be 0)"
        fig = figure("Other biases under the edit", axis, height=140 + 40 * len(rows))
        hover = [
            f"<b>{r.question}</b> ({r.sides})<br>{r.before:+.3f} → {r.after:+.3f}" for r in rows.itertuples()
        ]
        ends = "change", "change_low", "change_high"
        forest(fig, rows, *ends, name="change", color=HUMAN, hover=hover)
        return zero_line(row_labels(fig, list(rows["question"])), "x")

    def __repr__(self) -> str:
        columns = [
            "question",
            "before",
            "after",
            "change",
            "mean_abs_change",
            "equivalent",
            "wrong_way_share",
            "moved_share",
        ]
        return "Specificity\n" + self.frame[columns].round(4).to_string(index=False)


class SpecificityEngine:
    """The questions, run once without edits and then once per cell."""

    def __init__(
        self,
        model: Model,
        names: Sequence[str] | None = None,
        *,
        score: str = "mean_logit",
        sites: Sequence[Site] = (),
        bias: float | None = None,
    ):
        """`bias`: the AI bias whose tenth is the margin; the bundled pairs' own where it is None."""
        self.model = model
        bias = run_probe(model, load_pairs(), Probe(score=score)).bias if bias is None else bias
        self.margin = MARGIN * abs(bias)
        self.engines: dict[str, ProbeEngine | str] = {}
        for name in questions() if names is None else names:
            pairs = load_pairs(name)
            probe = _probe(pairs, score)
            try:
                self.engines[name] = ProbeEngine(model, pairs, probe, sites=sites)
            except RequestError as error:
                self.engines[name] = str(error)

    def run(self, edits: Sequence[Intervention]) -> Specificity:
        """The panel under `edits`."""
        rows = []
        for name, engine in self.engines.items():
            if isinstance(engine, str):
                rows.append({"question": name, "reason": engine})
            else:
                rows.append({"question": name, **_question(engine.base, engine.run(edits)[0], self.margin)})
        return Specificity(pd.DataFrame(rows, columns=COLUMNS))


COLUMNS = [
    "question",
    "sides",
    "n_pairs",
    "before",
    "before_low",
    "before_high",
    "after",
    "change",
    "change_low",
    "change_high",
    "mean_abs_change",
    "margin",
    "p_equivalent",
    "equivalent",
    "wrong_way_share",
    "moved_share",
    "reason",
]


def specificity(
    model: Model,
    edits: Sequence[Intervention],
    names: Sequence[str] | None = None,
    *,
    bias: float | None = None,
) -> Specificity:
    """Biases that should not move, before and after `edits`; all bundled questions where `names` is None.

    bias: the AI bias whose tenth is the margin of the equivalence tests; that of the bundled pairs where it is None.
    """
    sites = list(compile_edits(model, edits))
    return SpecificityEngine(model, names, bias=bias, sites=sites).run(edits)


@register_measure("specificity")
def specificity_measure(engine: ProbeEngine, edits: Sequence[Intervention]) -> Measured:
    """Table `specificity`; the margin is a tenth of the engine's own unsteered bias."""
    return Measured({"specificity": specificity(engine.model, edits, bias=engine.base.bias).to_frame()})


def _probe(pairs: PromptPairs, score: str) -> Probe:
    """The question's own words as bundled ones: a word of several tokens is left out, not an error."""
    if pairs.words is None:
        return Probe(score=score)
    probe = Probe(pairs.words.positive, pairs.words.negative, score)
    object.__setattr__(probe, "bundled", True)
    return probe


def _question(base: ProbeResult, after: ProbeResult, margin: float) -> dict[str, Any]:
    change = after - base
    stat = clustered_mean(change.values, *base.clusters)
    p = equivalence_p(stat, margin) if margin > 0 else float("nan")
    undetermined = np.isnan(p) or min(n for n in (stat.n_templates, stat.n_entities) if n) < FEWEST_CLUSTERS
    further = np.abs(after.pair_bias) - np.abs(base.pair_bias) > MOVED
    return {
        "sides": " - ".join(base.sides),
        "n_pairs": base.n_pairs,
        **base.stat.columns("before", "before_low", "before_high"),
        "after": after.bias,
        **stat.columns("change", "change_low", "change_high"),
        "mean_abs_change": change.mean_abs,
        "margin": margin,
        "p_equivalent": p,
        "equivalent": "undetermined" if undetermined else "yes" if p < 0.05 else "no",
        "wrong_way_share": float(further.mean()),
        "moved_share": float((np.abs(change.values) > MOVED).mean()),
        "reason": "",
    }
