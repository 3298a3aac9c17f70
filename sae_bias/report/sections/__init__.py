"""The sections of a report in reading order, each made from one table of a run folder, left out where that is absent."""

from collections.abc import Callable
from dataclasses import replace

from sae_bias.core.errors import RequestError
from sae_bias.report.parts import Section
from sae_bias.report.sections import behavior as behavior_sections
from sae_bias.report.sections import calibration as calibration_sections
from sae_bias.report.sections import features as feature_sections
from sae_bias.report.sections import probe as probe_sections
from sae_bias.report.sections import published as published_sections
from sae_bias.report.sections import suppression as suppression_sections
from sae_bias.runs.folder import Run

Build = Callable[[Run], Section]
CALIBRATION = "Calibration"
BIAS, FEATURE, SUPPRESSED, TEXT, PUBLISHED = (
    "The bias",
    "The feature",
    "Turning it down",
    "What it writes and chooses",
    "The published study",
)


def sections(run: Run) -> list[Section]:
    """Every section whose table the run has, in reading order."""
    built = []
    for group, name, build in _SECTIONS:
        if not _present(run, name):
            continue
        try:
            built.append(replace(build(run), group=group))
        except KeyError as error:
            have = ", ".join(map(str, run.tables[name].columns))
            raise RequestError(
                f"{run.folder / 'tables' / name}.parquet has no column {error}; it has {have}. Run the"
                " command that wrote it again."
            ) from error
    return built


def _present(run: Run, table: str) -> bool:
    return table in run.tables and not (table == "comparison" and run.organism)


_SECTIONS: tuple[tuple[str, str, Build], ...] = (
    (CALIBRATION, "marks", calibration_sections.marks_section),
    (CALIBRATION, "design", calibration_sections.design_section),
    (CALIBRATION, "coverage", calibration_sections.coverage_section),
    (CALIBRATION, "power", calibration_sections.power_section),
    (CALIBRATION, "trained_saes", calibration_sections.trained_section),
    (CALIBRATION, "effects", calibration_sections.effects_section),
    (PUBLISHED, "models", published_sections.models_section),
    (PUBLISHED, "comparison", published_sections.comparison_section),
    (PUBLISHED, "tuning", published_sections.tuning_section),
    (BIAS, "pairs", probe_sections.bias_section),
    (BIAS, "pairs", probe_sections.spread_section),
    (BIAS, "words", probe_sections.words_section),
    (BIAS, "levels", probe_sections.levels_section),
    (BIAS, "checks", probe_sections.checks_section),
    (BIAS, "check_words_left_out", probe_sections.words_left_out_section),
    (BIAS, "check_scores", probe_sections.scores_section),
    (BIAS, "check_nuisances", probe_sections.nuisances_section),
    (BIAS, "check_audit", probe_sections.audit_section),
    (BIAS, "word_audit", probe_sections.word_audit_section),
    (FEATURE, "ranking", feature_sections.ranking_section),
    (FEATURE, "activation", feature_sections.activation_section),
    (FEATURE, "rejected", feature_sections.rejected_section),
    (FEATURE, "cumulative", feature_sections.cumulative_section),
    (FEATURE, "ladder", feature_sections.ladder_section),
    (FEATURE, "ceilings", feature_sections.ceilings_section),
    (SUPPRESSED, "sweep", suppression_sections.sweep_section),
    (SUPPRESSED, "sweep", suppression_sections.frontier_section),
    (SUPPRESSED, "controls", suppression_sections.controls_section),
    (SUPPRESSED, "specificity", suppression_sections.specificity_section),
    (SUPPRESSED, "compare", suppression_sections.methods_section),
    (SUPPRESSED, "examples", suppression_sections.examples_section),
    (TEXT, "generations", behavior_sections.generations_section),
    (TEXT, "judge_parts", behavior_sections.judge_section),
    (TEXT, "scenario_categories", behavior_sections.scenario_section),
    (TEXT, "scenario_arms", behavior_sections.scenario_arms_section),
    (TEXT, "roles", behavior_sections.role_section),
    (TEXT, "identity", behavior_sections.identity_section),
    (PUBLISHED, "switches", published_sections.probe_switches_section),
    (PUBLISHED, "switches_probe", published_sections.probe_switches_section),
    (PUBLISHED, "switches_intervention", published_sections.intervention_switches_section),
)
