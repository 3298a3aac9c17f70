"""Suppression on `planted`, whose truth is known: the planted feature goes and little else, the valence read-out breaks everything."""

from __future__ import annotations

import json

import numpy as np
import pytest

import sae_bias as sb
from sae_bias.discovery.attribution import attribution, exact_ablation
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.specificity import specificity
from sae_bias.models.catalog import organism_folder
from sae_bias.steering.controls import empirical_p, observed_max
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.cells import Cell

CONSTRUCTED = "organism:planted/constructed"
TRAINED = "organism:planted/resid_post/layer_2_width_512_l0_small"
KINDS = ("neutral", "ai_nonspeech", "ai_speech", "valence")


@pytest.fixture(scope="module")
def planted():
    return sb.load_model("organism:planted")


@pytest.fixture(scope="module")
def features():
    """The planted feature and the valence read-out, as truth.json names them."""
    truth = json.loads((organism_folder("planted") / "truth.json").read_text())["constructed"]
    return tuple(f"{CONSTRUCTED}#{truth[name]}" for name in ("index", "valence_index"))


@pytest.fixture(scope="module")
def result(planted, features):
    """Ablation of both, a grid of clamps and 99 controls; the report templates never occur in the training corpus."""
    pairs = sb.load_pairs()
    report = list(dict.fromkeys(p.template for p in pairs if p.corpus is False))
    tune = [t for t in pairs.templates if t not in report]
    top = observed_max(planted, features[0], pairs.select(templates=tune))
    cells = [sb.Ablate(features[0]), Cell((sb.Ablate(features[1]),), "direction", "valence read-out")]
    cells += [sb.Clamp.relative(features[0], share, top) for share in (-0.5, -1.0)]
    sweep = sb.Sweep(cells, controls=99, costs=True, splits={"tune": tune, "report": report})
    return sb.run_sweep(planted, pairs, sweep)


def test_ablation_removes_the_planted_bias_at_little_cost(result):
    """No strength is chosen: ≥ 80 % specific reduction on report templates, KL ≤ 0.05 on each kind of text."""
    report = result.frame[result.frame["split"] == "report"]
    row = report[(report["intervention"] == "ablate") & (report["kind"] == "candidate")].iloc[0]
    assert row["specific_reduction"] >= 0.9
    assert row["spec_low"] > 0.7
    assert all(row[f"kl_{kind}"] < 0.05 for kind in KINDS)
    assert row["kl_off"] < 0.05
    assert (row["removed_nats"], row["did_removed_nats"]) == (
        pytest.approx(row["ai_shift"] - row["human_shift"]),
        pytest.approx(row["did_removed_nats"]),
    )
    assert row["did_removed_nats_low"] > 0
    assert row["wrong_way_share"] <= 0.05


def test_it_removes_more_than_its_controls(result):
    report = result.frame[result.frame["split"] == "report"]
    ablated = report[(report["intervention"] == "ablate") & (report["kind"] == "candidate")][
        "reduction"
    ].iloc[0]
    controls = report.loc[report["kind"] == "control", "reduction"].to_numpy()
    assert len(controls) >= 99
    assert ablated > np.quantile(controls, 0.95)
    assert empirical_p(ablated, controls) <= 0.01


def test_the_valence_read_out_is_exposed_by_the_collapse_test(result):
    """Its plain reduction is high, its specific one is not: it flattened every evaluation."""
    report = result.frame[
        (result.frame["split"] == "report") & (result.frame["label"] == "valence read-out")
    ].iloc[0]
    assert report["reduction"] >= 0.8
    assert report["specific_reduction"] <= 0
    assert report["spec_high"] < 0.2
    assert report["beta"] < 0.2


def test_the_valence_read_out_costs_at_the_evaluation(result):
    """On the three older kinds of text its ablation costs nothing at all."""
    report = result.frame[
        (result.frame["split"] == "report") & (result.frame["label"] == "valence read-out")
    ].iloc[0]
    assert max(report[f"kl_{kind}"] for kind in KINDS[:3]) < 0.001
    assert report["kl_valence"] > 0.05
    assert report["kl_off"] > 0.05
    assert report["cost"] >= 1 - report["beta"] > 0.9


def test_a_clamp_that_turns_the_bias_round_is_not_specific(planted):
    """The most causal feature of the trained SAE below: −40 and −100 turn bias and valence round. β − B_s/B_0 read .78 and 1.14."""
    sae, pairs, probe = sb.load_sae(TRAINED), sb.load_pairs(), sb.Probe()
    engine = ProbeEngine(planted, pairs, probe)
    first = [f"{TRAINED}#{i}" for i in np.argsort(-np.abs(attribution(engine, sae)))[:8]]
    strongest = first[int(np.argmax(exact_ablation(engine, first)))]
    held, banks = ProbeEngine(planted, pairs.select(corpus=False), probe), CollapseEngine(planted, probe)
    for value in (-40.0, -100.0):
        edit = sb.Clamp(strongest, value)
        found = banks.run([edit], held.base, held.run([edit])[0]).specific
        assert found.beta - (1 - found.reduction.estimate) > 0.5
        assert found.ci_high < 0


def test_the_best_strength_stands_apart_and_is_flagged_outside_the_observed_range(result):
    best = result.best_strength()
    assert best.in_sample >= 0.8
    assert np.isfinite([best.held_out, best.held_out_low, best.held_out_high]).all()
    clamps = result.frame[result.frame["intervention"] == "clamp"]
    assert clamps["outside_observed"].all()


def test_other_biases_do_not_move(planted, features):
    """No AI speaks in the other questions, so the planted feature is silent there."""
    panel = specificity(planted, [sb.Ablate(features[0])]).frame
    measured = panel[panel["reason"] == ""]
    assert len(measured) >= 3
    assert (measured["mean_abs_change"] < 0.02).all()
    assert (measured["wrong_way_share"] <= 0.25).all()
    assert set(measured["equivalent"]) <= {"yes", "undetermined"}
    assert (measured["p_equivalent"] < 0.05).all()


def test_the_panel_sees_an_edit_that_breaks_everything(planted, features):
    panel = specificity(planted, [sb.Ablate(features[1])]).frame
    assert panel["moved_share"].max() > 0.9
    assert panel["mean_abs_change"].max() > 1e-3
    strict = specificity(planted, [sb.Ablate(features[1])], bias=1e-3).frame
    assert (strict["margin"] == 1e-4).all()
    assert "no" in set(strict["equivalent"])
