"""A pass mark (docs/method.md#pass-marks): what is required, what was measured, and whether that is enough.

Are the planted feature and its effect found? The marks of the bundled pairs, the constructed feature and `identity`.

Every figure here is taken with the functions that a study runs: the probe, the ranking, ablation, the collapse test, the
costs and the controls. What is true is read from the organism's rule and its truth.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.text import COST_KINDS
from sae_bias.discovery.ranking import Ranking, rank_features
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.costs import CostEngine, pooled_kl_off
from sae_bias.models.catalog import organism_folder
from sae_bias.models.model import Model
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_grid, load_pairs
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.sae import Sae
from sae_bias.steering.banks import specific_reductions
from sae_bias.steering.controls import ControlTest, control_edits, control_test
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine
from sae_bias.validation.grammar import RULES, analytic_bias, pair_statements


@dataclass(frozen=True)
class Mark:
    """One row of the table that `calibrate` prints."""

    mark: str
    """What is asked, in words."""
    organism: str
    value: float
    """NaN where it could not be measured; then the mark is missed."""
    low: float = -math.inf
    high: float = math.inf
    unit: str = "share"
    n: str = ""
    """Over how much it was measured, in words: "1,000 grids"."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.low <= self.value <= self.high)

    @property
    def verdict(self) -> str:
        return "met" if self.passed else "missed"

    @property
    def required(self) -> str:
        low, high = (_text(v, self.unit) for v in (self.low, self.high))
        if math.isfinite(self.low) and math.isfinite(self.high):
            return low if self.low == self.high else f"{low} to {high}"
        return f"at least {low}" if math.isfinite(self.low) else f"at most {high}"

    @property
    def measured(self) -> str:
        return _text(self.value, self.unit)


def _text(value: float, unit: str) -> str:
    if unit == "share":
        return fmt.percent(value)
    number = fmt.number(value)
    return f"{number} nats" if unit == "nats" else number


def marks_frame(marks: Sequence[Mark]) -> pd.DataFrame:
    """One row a mark, in order: words for a reader, numbers for a program."""
    columns = (
        "mark",
        "organism",
        "required",
        "measured",
        "verdict",
        "n",
        "note",
        "value",
        "low",
        "high",
        "unit",
    )
    return pd.DataFrame([{c: getattr(m, c) for c in columns} for m in marks], columns=columns)  # type: ignore[arg-type]


N_CONTROLS = 99
NULL_BIAS = 0.1


def bias_marks(model: Model, name: str, *, label: str | None = None) -> list[Mark]:
    """Bias of the bundled pairs against the rule's; on `null` the whole interval near 0.

    In corpus within 10 % of the analytic log-odds difference, held out at least 70 % of it.
    """
    pairs, rule, label = load_pairs(), RULES[name], label or name
    if not rule.bias("speech", "survival"):
        result = run_probe(model, pairs, Probe(), controls=rule.varied, levels=False)
        stat = (
            result.did.stat if rule.varied else result.stat
        )  # subjects have effects of their own, which twins share
        furthest = max(map(abs, stat.ci))
        return [
            Mark(
                "whole interval of the difference in differences near 0"
                if rule.varied
                else "whole bias interval near 0",
                label,
                furthest,
                high=NULL_BIAS,
                unit="nats",
                n=f"{result.n_pairs} pairs",
                note=f"{stat.mean:+.3f}, interval {stat.ci[0]:+.3f} to {stat.ci[1]:+.3f}; bias {result.bias:+.3f}",
            )
        ]
    marks = []
    for which, corpus, low, high in (("in-corpus", True, 0.9, 1.1), ("held-out", False, 0.7, np.inf)):
        result = run_probe(model, pairs.select(corpus=corpus), Probe(), controls=False, levels=False)
        statements = [s for s in pair_statements(not corpus) if s.id.endswith(":text")]
        analytic = analytic_bias(rule, statements)
        marks.append(
            Mark(
                f"{which} bias as a share of the analytic",
                label,
                result.bias / analytic,
                low,
                high,
                n=f"{result.n_pairs} pairs",
                note=f"{result.bias:.3f} of {analytic:.3f} nats",
            )
        )
    return marks


def organism_truth(name: str) -> dict[str, Any]:
    """What was planted in a bundled organism, and what was measured when it was made."""
    return json.loads((organism_folder(name) / "truth.json").read_text(encoding="utf-8"))


def constructed_feature(name: str = "planted") -> FeatureRef:
    """The planted feature of an organism's constructed SAE, from its truth.json."""
    facts = organism_truth(name)["constructed"]
    return FeatureRef.parse(f"organism:{name}/{facts['sae']}#{facts['index']}")


@dataclass(frozen=True, eq=False)
class AblationFacts:
    """What ablating one feature did on held-out pairs."""

    removed: float
    """Bias removed, nats."""
    specific: float
    """Specific reduction."""
    kl: dict[str, float]
    """Kind of text → KL, nats a token."""
    controls: np.ndarray
    """Specific reduction of each control."""
    test: ControlTest
    """Where its specific reduction stands among the controls'."""


def ablation_facts(
    model: Model, feature: FeatureRef, pairs: PromptPairs, *, n_controls: int = N_CONTROLS, seed: int = 0
) -> AblationFacts:
    """Ablation of `feature` on `pairs`: reduction, collapse, costs, and the same for its controls."""
    probe, edit = Probe(), Ablate(feature)
    engine = ProbeEngine(model, pairs, probe)
    controls = control_edits(model, edit, pairs, n_controls, seed, family=[feature])
    after, banks = engine.run([edit])[0], CollapseEngine(model, probe)
    collapse = banks.run([edit], engine.base, after)
    others = specific_reductions(engine, banks, [[e] for e, _ in controls])
    costs = CostEngine(model).run([edit])
    return AblationFacts(
        engine.base.bias - after.bias,
        collapse.specific.estimate,
        {**dict(zip(costs["kind"], costs["kl_mean"].astype(float))), "off": pooled_kl_off(costs)},
        others,
        control_test(collapse.specific.estimate, others, [kind for _, kind in controls]),
    )


def constructed_marks(model: Model, name: str, *, n_controls: int = N_CONTROLS, seed: int = 0) -> list[Mark]:
    """The constructed feature: ranked first, called, its ablation removes the bias and nothing else, beats its controls."""
    feature = constructed_feature(name)
    ranking = rank_features(model, str(feature.sae), load_grid(), by="interaction", seed=seed)
    order = ranking.frame["feature"].tolist()
    called = feature in ranking.called("ai_speech")
    held_out = load_pairs().select(corpus=False)
    facts = ablation_facts(model, feature, held_out, n_controls=n_controls, seed=seed)
    over = f"{len(held_out)} held-out pairs"
    marks = [
        Mark(
            "planted feature's place by interaction",
            name,
            1 + order.index(str(feature)),
            1,
            1,
            unit="count",
            n=f"{ranking.family_size} features",
        ),
        Mark("planted feature called AI-speech", name, int(called), 1, 1, unit="count"),
        Mark("its ablation's specific reduction", name, facts.specific, low=0.9, n=over),
    ]
    marks += [
        Mark(
            f"its ablation's KL on {COST_KINDS[kind]}",
            name,
            value,
            high=0.05,
            unit="nats",
            n="nats a token",
        )
        for kind, value in facts.kl.items()
    ]
    beaten = float((facts.controls < facts.specific).mean())
    marks.append(
        Mark(
            "controls that its ablation beats",
            name,
            beaten,
            low=0.95,
            n=f"{len(facts.controls)} controls",
            note=f"specific reduction {facts.specific:.3f}, the controls' median {facts.test.median:+.3f}",
        )
    )
    marks.append(
        Mark("its p among its controls", name, facts.test.p, high=0.05, unit="p", note=facts.test.in_words)
    )
    return marks


def identity_marks(model: Model, sae: Sae | str, *, name: str = "identity", seed: int = 0) -> list[Mark]:
    """Features that tell AI from human whatever is done: found by separation, none of them called AI-speech."""
    ranking: Ranking = rank_features(model, sae, load_pairs(), by="separation", grid=load_grid(), seed=seed)
    frame = ranking.frame
    with_speech = (frame["mean_AS"] - frame["mean_HS"]).abs()
    without = (frame["mean_AN"] - frame["mean_HN"]).abs()
    found = frame[(frame["separates"] == "yes") & (without >= with_speech / 2)]
    called = int((frame["ai_speech"] == "yes").sum())
    best = frame.iloc[0]
    return [
        Mark(
            "features that separate AI from human, without speech too",
            name,
            len(found),
            low=1,
            unit="count",
            n=f"{ranking.family_size} features",
            note=f"the first: AUROC {best['auroc']:.2f}",
        ),
        Mark(
            "features called AI-speech",
            name,
            called,
            0,
            0,
            unit="count",
            n=f"{ranking.family_size} features",
        ),
    ]
