"""Fitted edits: what the loss asks for, that the fit reaches it, and that it is specific where it was not fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.steering.banks import BankEngine, specific_reductions
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.fit import _Fit, fit_direction, fit_split
from sae_bias.workflows.fit_loss import bank_half

SAE = "organism:planted/resid_post/layer_3_width_512_l0_small"


@pytest.fixture(scope="module")
def model():
    return sb.load_model("organism:planted")


@pytest.fixture(scope="module")
def fit(model):
    pairs = sb.load_pairs()
    found_on = pairs.select(templates=fit_split(pairs, 0)["discover"][:4])
    return _Fit(model, sb.load_sae(SAE), found_on, sb.Probe(), 0, False, "scales")


def test_scales_of_one_cost_what_the_unedited_bias_costs(fit):
    """By hand from the probe's scores: D of the AI prompts against their twins' scores, and nothing else."""
    base = fit.engine.base
    gap = base.score_ai - base.score_human
    expected = np.square(gap).mean() + 4 * gap.mean() ** 2
    loss = fit.loss(torch.ones(len(fit.index)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_slope_of_the_loss_is_its_finite_difference(fit):
    k = torch.ones(len(fit.index)).requires_grad_(True)
    (slope,) = torch.autograd.grad(fit.loss(k), k)
    for f in slope.abs().argsort(descending=True)[:3].tolist():
        step = torch.zeros(len(fit.index))
        step[f] = 0.02
        with torch.no_grad():
            change = (fit.loss(1 + step) - fit.loss(1 - step)) / 0.04
        assert float(change) == pytest.approx(float(slope[f]), rel=0.02)


def test_a_fit_edits_as_the_scales_that_it_returns(model, fit):
    """The fitted pass and the edit under plain interventions give the same scores."""
    k = torch.linspace(-1, 2, len(fit.index))
    edit = sb.FeatureSet("by hand", tuple(fit._refs()), tuple(k.tolist()))
    after = fit.engine.run([edit])[0]
    scores = np.zeros(len(fit.engine.reading.plan.prompts))
    for item in fit.pair_items:
        with torch.no_grad():
            scores[list(item.batch.index)] = fit.prompts.read(item, fit.edited(item, k))[0].numpy()
    place = np.array(fit.engine.reading._place)
    assert scores[place[:, 1]] == pytest.approx(after.score_ai, abs=1e-3)
    assert scores[place[:, 0]] == pytest.approx(after.score_human, abs=1e-3)


def test_report_templates_and_half_of_the_statements_are_never_read(fit):
    pairs = sb.load_pairs()
    assert not set(fit_split(pairs, 0)["discover"]) & set(fit_split(pairs, 0)["report"])
    read = sorted(i for item in fit.prompts.bank_items for i in item.batch.index)
    assert read == np.flatnonzero(bank_half(0) & fit.prompts.others).tolist()


@pytest.mark.parametrize("rule", [sb.ProjectOut, sb.RectifiedProjectOut])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_learned_direction_is_more_specific_than_the_one_it_starts_from(model, positions, rule):
    pairs, site = sb.load_pairs(), sb.load_sae(SAE).site
    split = fit_split(pairs, 0)
    found_on, report = (pairs.select(templates=split[name][:6]) for name in ("discover", "report"))
    rectified = rule is sb.RectifiedProjectOut
    learned = fit_direction(model, site, found_on, positions=positions, rectified=rectified, steps=15)
    assert float(learned.basis.norm()) == pytest.approx(1, abs=1e-5)
    engine, banks = ProbeEngine(model, report, sb.Probe()), BankEngine(model, sb.Probe())
    means = sb.difference_of_means(model, found_on, site)
    cells = [[rule(learned, positions=positions)], [sb.ProjectOut(means, positions=positions)]]
    own, before = specific_reductions(engine, banks, cells)
    print(
        f"specific reduction at {positions}: {rule.__name__} learned {own:.3f}, difference of means {before:.3f}"
    )
    assert own > before + 0.05


def test_a_kind_or_a_score_that_cannot_be_fitted_is_refused(model):
    pairs = sb.load_pairs()
    with pytest.raises(sb.RequestError, match="expected scales or gated"):
        sb.fit_feature_set(model, SAE, pairs, kind="greedy")
    with pytest.raises(sb.RequestError, match="mean_logit"):
        sb.fit_feature_set(model, SAE, pairs, probe=sb.Probe(score="logodds"))


def test_a_gated_counterfactual_is_specific_where_it_was_not_fitted(model):
    """Report templates and the unseen half of the banks of the organism whose bias is known."""
    pairs = sb.load_pairs()
    report = _report(model, pairs, "gated")
    assert report["specific"] >= 0.75
    assert report["kl_off"] <= 0.05
    assert abs(report["human_moved"]) <= 0.05


@pytest.mark.slow
def test_learned_scales_are_specific_where_they_were_not_fitted(model):
    report = _report(model, sb.load_pairs(), "scales")
    assert report["specific"] >= 0.75
    assert abs(report["human_moved"]) <= 0.2


def _report(model, pairs, kind):
    edit = sb.fit_feature_set(model, SAE, pairs, kind=kind)
    assert len(edit.features) <= 25
    return sb.fit_report(model, edit, pairs).set_index("split").loc["report"]
