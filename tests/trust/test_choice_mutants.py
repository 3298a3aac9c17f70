"""Wrong copies of what decides a comparison, a fit and a choice: each is killed by the test that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_attribution
import test_compare
import test_fit
import test_learned
import test_probe_checks
import test_study
import test_sweep
import torch
from test_fit import model  # noqa: F401  (a fixture of the named tests)
from test_mutations import Mutant, around, kill
from test_probe_checks import full_pairs  # noqa: F401

import sae_bias as sb
from sae_bias.discovery import attribution
from sae_bias.probe import words
from sae_bias.stats import reduction
from sae_bias.stats.clustered import Clustered
from sae_bias.workflows import best_strength, compare, fit_loss, study_steps
from sae_bias.workflows import fit as fitting


def rectified_after_the_share(real: Any, self: sb.GatedCounterfactual, acts: torch.Tensor) -> torch.Tensor:
    """max(0, (1 - s)·a + s·p) in place of a + s·(max(0, p) - a)."""
    twin = acts @ torch.tensor(self.weights).T + torch.tensor(self.intercepts)
    mixed = ((1 - self.share) * acts + self.share * twin).clamp(min=0)
    on = (acts @ torch.tensor(self.gate) + self.bias > 0)[..., None]
    return torch.where(on, acts + (mixed - acts) / self.share, acts)


def carriers_after_damage(real: Any, ranking: Any, suppress: str = "called") -> Any:
    """The largest ablation effect comes first, whatever resampling says."""
    return real(ranking.assign(carrier="no"), suppress)


def everywhere(real: Any, methods: Any, shares: Any) -> Any:
    """Directions act at all positions under both names."""
    return [replace(cell, edits=tuple(replace(e, positions="all") for e in cell.edits)) for cell in real(methods, shares)]  # fmt: skip


def other_means(real: Any, of: Any, pairs: Any, site: Any, **options: Any) -> Any:
    """The means of the prompts one word from the end."""
    short = [replace(p, human=p.human.rsplit(" ", 1)[0], ai=p.ai.rsplit(" ", 1)[0]) for p in pairs]
    return real(of, replace(pairs, pairs=tuple(short)), site, **options)


CHOICE = test_sweep.test_the_strength_is_chosen_by_specific_reduction_and_reported_held_out
MUTANTS = [
    Mutant("the choice goes by β − B_s/B_0", around(reduction, "specific_value", lambda real, beta, left: np.asarray(beta) - np.asarray(left)), test_sweep.test_an_edit_that_turns_the_bias_round_is_not_chosen),
    Mutant("the choice lets any KL_off pass", lambda patch: patch.setattr(best_strength, "MAX_KL_OFF", np.inf), CHOICE),
    Mutant("the choice lets any β pass", lambda patch: patch.setattr(best_strength, "MIN_BETA", -np.inf), CHOICE),
    Mutant("the strength is chosen on report", around(best_strength, "choose_strength", lambda real, frame, tune, report: real(frame, report, report)), CHOICE),
    Mutant("a cost is walked to on report", around(compare.Curve, "at", lambda real, self, level, tune, report: real(self, level, report, report)), test_compare.test_the_strength_comes_from_tune_and_the_figure_from_report),
    Mutant("folded first, interpolated after", around(compare.Curve, "biases", lambda real, self, place: real(replace(self, bias=np.abs(self.bias)), place)), test_compare.test_the_bias_is_interpolated_first_and_folded_after),
    Mutant("every cost counts as reached", around(compare.Curve, "reach", lambda real, self, level: (real(self, level)[0], True)), test_compare.test_a_curve_is_read_by_interpolation),
    Mutant("shares of the bias where there are twins", around(compare, "twin_difference", lambda real, frame: frame["bias"].to_numpy(float)), test_compare.test_shares_are_of_the_difference_in_differences_where_there_are_twins, {"without": 0}),
    Mutant("methods at other positions than their names", around(compare, "_cells", everywhere), test_compare.test_a_method_acts_where_its_name_says),
    Mutant("difference of means one word before the last", around(compare, "difference_of_means", other_means), test_compare.test_the_difference_of_means_compared_is_of_the_last_tokens),
    Mutant("rectified after the share is taken", around(sb.GatedCounterfactual, "new_acts", rectified_after_the_share), test_compare.test_a_share_of_a_fitted_edit_is_that_share_of_the_way, {"share": 0.5}),
    Mutant("the gate is always on", around(sb.GatedCounterfactual, "new_acts", lambda real, self, acts: real(replace(self, gate=(0.0,) * len(self.gate), bias=1.0), acts)), test_learned.test_a_gate_that_is_off_changes_no_bit_and_one_that_is_on_writes_the_prediction),
    Mutant("a fit reads every template", around(fitting, "fit_feature_set", lambda real, of, sae, pairs, **options: real(of, sae, pairs, **{"discover": pairs.templates} | options)), test_fit.test_a_fit_reads_discover_templates_alone, {"kind": "gated"}),
    Mutant("a fit reads the whole valence bank", around(fit_loss, "bank_half", lambda real, seed: np.ones_like(real(seed))), test_fit.test_half_of_the_statements_are_never_read),
    Mutant("a fit is read on the half of the bank that it saw", around(fitting, "bank_half", lambda real, seed: ~real(seed)), test_fit.test_a_fits_report_is_of_the_statements_that_it_never_read),
    Mutant("carriers after damage", around(study_steps, "choose_feature", carriers_after_damage), test_study.test_an_ablation_effect_without_one_of_resampling_is_not_chosen_before_a_carrier),
    Mutant("a carrier by size alone", lambda patch: patch.setattr(Clustered, "distinguishable", True), test_attribution.test_a_carrier_shows_both_effects, dict(zip(("ablated", "resampled", "verdict"), test_attribution.CARRIERS[6]))),
    Mutant("a carrier by its intervals alone", around(attribution, "carriers", lambda real, one, other, bias: real(one, other, 0.0)), test_attribution.test_a_carrier_shows_both_effects, dict(zip(("ablated", "resampled", "verdict"), test_attribution.CARRIERS[0]))),
    Mutant("a word that goes on from another counts twice", around(words, "read_once", lambda real, given: list(given)), test_probe_checks.test_a_word_that_goes_on_from_another_counts_once_in_the_odds_of_its_list, {"side": 1}),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.mistake)
def test_each_mutant_is_killed(mutant, request, make_tiny):
    kill(mutant, request, make_tiny)
