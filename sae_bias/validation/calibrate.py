"""Does the toolkit recover a planted feature, and report none in a control model? The marks of docs/method.md#pass-marks.

Quick form, on the bundled organisms: their bias against the analytic one; how often intervals cover the truth, and grids call
a feature, over studies and grids drawn from whole grammars (`populations`, `grids`); the constructed feature (`marks`); power
against the number of templates. Full form: organisms and SAEs trained from further seeds (experiments/organisms/calibrate.py, not
in the wheel). A user's own design: `design`. Organisms are tiny models: their figures say whether the toolkit can be trusted, and
nothing about Gemma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from tqdm.auto import tqdm

from sae_bias.models.load import load_model
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_pairs
from sae_bias.saes.load import load_sae
from sae_bias.steering.engine import ProbeEngine
from sae_bias.validation.definitions import (
    ELSEWHERE,
    bundled_saes,
    definition_marks,
    integrated_mark,
    learned_notes,
    learned_table,
    match_mark,
    no_ratio_marks,
    simulation_marks,
)
from sae_bias.validation.grids import (
    N_PAIRS,
    StatementPopulation,
    bundled_size,
    call_power,
    draw_grids,
    read_statements,
)
from sae_bias.validation.marks import (
    Mark,
    bias_marks,
    constructed_feature,
    constructed_marks,
    identity_marks,
    marks_frame,
    organism_truth,
)
from sae_bias.validation.populations import (
    N_TEMPLATES,
    ScoredPopulation,
    bias_power,
    coverage_row,
    score_population,
)

ORGANISMS = ("planted", "null", "identity", "planted-gemma2")
SPARED = ("null", "identity")
"""Organisms in which nothing answers to AI speech, `null-2` and `identity-2` (version 2 of the corpus) too."""
COVERAGE = (0.93, 0.98)
FALSE_CALLS = 0.07


@dataclass(frozen=True)
class Draws:
    """How much is drawn; the pass marks ask for at least 1,000 studies and grids and 99 controls."""

    studies: int = 2000
    grids: int = 2000
    power: int = 500
    """Studies and grids behind each point of the power table."""
    controls: int = 99
    templates: int = N_TEMPLATES
    pairs: int = N_PAIRS
    """Templates and matched statement pairs enumerated."""

    @classmethod
    def of(cls, n: int) -> Draws:
        """`n` studies and grids, and a quarter of that behind each point of the power table."""
        return cls(n, n, max(n // 4, 20))


@dataclass(frozen=True, eq=False)
class Calibration:
    """The marks, and the tables behind them."""

    marks: tuple[Mark, ...]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """`coverage`, `power`, `learned`, and in the full form `saes` and `effects`."""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(m.passed for m in self.marks)

    def to_frame(self) -> pd.DataFrame:
        """One row a mark."""
        return marks_frame(self.marks)

    def __repr__(self) -> str:
        shown = self.to_frame()[["mark", "organism", "required", "measured", "verdict"]]
        return f"Calibration: {sum(m.passed for m in self.marks)} of {len(self.marks)} marks met\n{shown.to_string(index=False)}"


def calibrate(
    organisms: Sequence[str] = ORGANISMS,
    *,
    draws: Draws | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """The quick form: every mark that the bundled weights can answer, in minutes on a CPU."""
    draws = draws or Draws()
    marks: list[Mark] = []
    coverage: list[dict[str, object]] = []
    power: list[pd.DataFrame] = []
    learned: list[pd.DataFrame] = []
    for name in tqdm(organisms, desc="calibrate", unit="organism", disable=not progress):
        model = load_model(f"organism:{name}")
        marks += bias_marks(model, name)
        twins = name.removesuffix("-2") == "planted"
        scored = score_population(model, name, n_templates=draws.templates, twins=twins, progress=progress)
        for figure in filter(None, (scored, scored.beyond_mundane)):
            coverage.append(coverage_row(figure, draws.studies, seed))
            marks.append(coverage_mark(coverage[-1], figure))
            if name.removesuffix("-2") not in SPARED:
                power.append(bias_power(figure, draws.power, seed=seed))
        if "constructed" in organism_truth(name):
            marks += constructed_marks(model, name, n_controls=draws.controls, seed=seed)
            marks += definition_marks(model, name, n_controls=draws.controls, seed=seed)
            learned.append(learned_table(model, bundled_saes(name), seed=seed).assign(organism=name))
        if name.removesuffix("-2") == "identity":
            marks += identity_marks(model, trained_sae(name), name=name, seed=seed)
            marks.append(integrated_mark(ProbeEngine(model, load_pairs(), Probe()), name))
        if name.removesuffix("-2") == "null":
            marks += no_ratio_marks(model, name, seed=seed)
        for sae, question in _families(name).items():
            statements = read_statements(model, name, [load_sae(sae)], n_pairs=draws.pairs)
            wanted = str(constructed_feature(name)) if question == "feature" else None
            rows = call_power(statements, wanted, draws.power, seed=seed, progress=progress)
            power.append(rows.assign(question=question))
            if name.removesuffix("-2") in SPARED:
                marks.append(call_mark(statements, draws.grids, seed=seed, progress=progress))
    marks += simulation_marks()
    if {"planted", "planted-gemma2"} <= set(organisms):
        first, second = "planted", "planted-gemma2"
        models = load_model(f"organism:{first}"), load_model(f"organism:{second}")
        marks.append(match_mark(*models, (first, second)))
    tables = {"coverage": pd.DataFrame(coverage), "power": pd.concat(power, ignore_index=True)}
    notes = [line for t in learned for line in learned_notes(t, str(t["organism"].iloc[0]))]
    if learned:
        tables["learned"] = pd.concat(learned, ignore_index=True)
    return Calibration(tuple(marks), tables, (*notes, *ELSEWHERE))


def trained_sae(name: str) -> str:
    """A bundled organism's first trained SAE at the layer that a constructed one sits at."""
    truth = organism_truth(name)
    first = next(facts["sae"] for facts in truth["saes"] if facts["layer"] == truth["layer"])
    return f"organism:{name}/{first}"


def _families(name: str) -> dict[str, str]:
    """The SAEs whose features the drawn grids call, each with its question in the table `power`."""
    if name.removesuffix("-2") in SPARED:
        return {trained_sae(name): "any call"}
    if "constructed" not in organism_truth(name):
        return {trained_sae(name): "trained"}
    return {str(constructed_feature(name).sae): "feature", trained_sae(name): "trained"}


def coverage_mark(row: dict[str, object], scored: ScoredPopulation, label: str | None = None) -> Mark:
    """Share of the drawn studies' intervals that hold the population's mean."""
    templates, entities = scored.bias.shape
    return Mark(
        "95% intervals that cover the truth"
        + ("" if scored.question == "bias" else f" of the {scored.question}"),
        label or scored.name,
        float(row["coverage"]),  # type: ignore[arg-type]
        *COVERAGE,
        n=f"{row['n_studies']:,} studies of {row['n_templates']} × {row['n_entities']}",
        note=f"truth {scored.truth:+.3f} nats over {templates} × {entities}",
    )


def call_mark(
    statements: StatementPopulation,
    n_grids: int,
    *,
    label: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Mark:
    """Share of drawn grids of the bundled size with any call of the interaction, where there is none to make."""
    size = bundled_size()
    called = draw_grids(statements, size, n_grids, any_call=True, seed=seed, progress=progress)
    return Mark(
        "grids with any call",
        label or statements.name,
        float(called.any(1).mean()),
        high=FALSE_CALLS,
        n=f"{n_grids:,} grids of {size} pairs",
        note=f"{statements.n_features} features, drawn from {len(statements.pairs)} pairs",
    )
