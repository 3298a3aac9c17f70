"""Fitted edits: what the loss asks for, that the fit reaches it, and that it is specific where it was not fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import sae_bias as sb
from sae_bias.discovery.attribution import attribution
from sae_bias.prompts.texts import BANKS
from sae_bias.steering.banks import BankEngine, bank_items, specific_reductions
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows import fit as fitting
from sae_bias.workflows.fit import _Fit, fit_direction, fit_split
from sae_bias.workflows.fit_loss import bank_half

SAE = "organism:planted/resid_post/layer_3_width_512_l0_small"
SEEN = bank_half(0)
"""Of each bank item, whether a fit of seed 0 reads it."""


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


def test_half_of_the_statements_are_never_read(model):
    """Whole statements: none is read of some subjects and unread of others."""
    pairs = sb.load_pairs().select(entities=["human"])
    prompts = fitting.FitPrompts(model, sb.load_sae(SAE).site, pairs, sb.Probe(), 0)
    read = np.zeros(len(SEEN), dtype=bool)
    read[[i for item in prompts.bank_items for i in item.batch.index]] = True
    assert read.tolist() == (SEEN & prompts.others).tolist()
    assert read.sum() == pytest.approx(prompts.others.sum() / 2, rel=0.1)
    statements = np.array(bank_items()[2])
    assert not set(statements[read]) & set(statements[prompts.others & ~read])


@pytest.mark.parametrize("kind", ["scales", "gated"])
def test_a_fit_reads_discover_templates_alone(model, monkeypatch, kind):
    seen = []

    def stop(_model, _sae, pairs, *_):
        seen.append(pairs.templates)
        raise sb.RequestError("seen enough")

    monkeypatch.setattr(fitting, "_Fit", stop)
    pairs = sb.load_pairs()
    with pytest.raises(sb.RequestError, match="seen enough"):
        fitting.fit_feature_set(model, SAE, pairs, kind=kind, seed=2)
    assert set(seen[0]) == set(pairs.split(2)["discover"])


def test_a_fits_report_is_of_the_statements_that_it_never_read(model):
    """β of each row by scipy's regression over its own half of the banks."""
    pairs = sb.load_pairs().select(entities=["human", "person"])
    edit = sb.Ablate(f"{SAE}#{_busiest(model, pairs)}")
    rows = sb.fit_report(model, edit, pairs).set_index("split")
    banks = BankEngine(model, sb.Probe())
    after, names = banks.scores([[edit]])[0], np.array(bank_items()[1])
    for split, half in (("discover", SEEN), ("report", ~SEEN)):
        slopes = [
            stats.linregress(banks.base[m], after[m]).slope for m in ((names == b) & half for b in BANKS)
        ]
        assert rows.loc[split, "beta"] == pytest.approx(min(*slopes, 1.0), abs=1e-6)
    assert abs(rows.loc["discover", "beta"] - rows.loc["report", "beta"]) > 1e-3


def _busiest(model, pairs) -> int:
    """The feature that ablation is predicted to take most of the bias with."""
    return int(attribution(ProbeEngine(model, pairs, sb.Probe()), sb.load_sae(SAE)).argmax())


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "rule"), [("last", sb.RectifiedProjectOut), ("all", sb.ProjectOut)])
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
