"""Controls: the same gate and size in other directions, matched features that match, and the empirical p."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.steering.banks import BankEngine, specific_reductions
from sae_bias.steering.controls import (
    FACTOR,
    MATCHED,
    MAX_COSINE,
    RANDOM,
    control_edits,
    control_test,
    empirical_p,
    matched_features,
    random_twin,
    random_twins,
)

F = 3


def test_a_random_twin_has_the_same_gate_and_size(gemma3):
    feature = gemma3.feature(F)
    twin = random_twin(feature, 1)
    x = torch.randn(50, feature.d_model, generator=torch.Generator().manual_seed(0)) * 5
    assert torch.equal(twin.activation(x), feature.activation(x))
    assert float(twin.w_dec.norm()) == pytest.approx(float(feature.w_dec.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(twin.w_dec, feature.w_dec, dim=0))) < 0.6
    assert not torch.equal(twin.w_dec, random_twin(feature, 2).w_dec)
    assert torch.equal(twin.w_dec, random_twin(feature, 1).w_dec)


def test_a_random_control_moves_the_residual_as_far_at_the_same_positions(gemma3, pairs, probe):
    """The receipts of the candidate and of its random controls agree in everything but the direction."""
    edit = sb.Ablate(gemma3.feature(F))
    rows = []
    for e in (
        edit,
        *[c for c, label in control_edits(gemma3.model, edit, pairs, 3) if label.startswith("random")][:2],
    ):
        with sb.intervene(gemma3.model, e) as receipt:
            sb.run_probe(gemma3.model, pairs, probe)
        rows.append(receipt.rows()[0])
    for row in rows[1:]:
        assert row["positions_changed"] == rows[0]["positions_changed"] > 0
        assert row["relative_change"] == pytest.approx(rows[0]["relative_change"], rel=1e-4)


def test_matched_features_match(gemma3, pairs):
    """Each fires where the feature fires, within the stated factor in rate, level and decoder norm, in another direction."""
    model, sae, feature = gemma3.model, gemma3.sae, gemma3.feature(F)
    x = torch.cat([r[1:] for r in sb.residuals(model, [p.ai for p in pairs], feature.site, positions="all")])
    target = feature.activation(x)
    matched = matched_features(model, sae, feature, pairs)
    assert F not in matched
    for index in matched:
        other = sae.feature(index)
        acts = other.activation(x)
        for mine, its in (
            ((target > 0).float().mean(), (acts > 0).float().mean()),
            (target[target > 0].mean(), acts[acts > 0].mean()),
            (feature.w_dec.norm(), other.w_dec.norm()),
        ):
            assert float(mine) / FACTOR * 0.999 <= float(its) <= float(mine) * FACTOR * 1.001
        assert abs(float(torch.cosine_similarity(feature.w_dec, other.w_dec, dim=0))) <= MAX_COSINE
        assert float((acts[target > 0] > 0).float().mean()) >= 0.5
    left = matched_features(model, sae, feature, pairs, exclude=matched[:1])
    assert left == matched[1:]


def test_at_least_as_many_controls_as_asked_for(gemma3, pairs):
    found = control_edits(gemma3.model, sb.Clamp(gemma3.feature(F), -2.0, positions="last"), pairs, 12, 5)
    assert len(found) >= 12
    assert all(isinstance(e, sb.Clamp) and (e.value, e.positions) == (-2.0, "last") for e, _ in found)
    assert len({e.target for e, _ in found}) == len(found)


def test_a_silent_feature_has_random_controls_only(gemma3, pairs):
    from dataclasses import replace

    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    assert matched_features(gemma3.model, gemma3.sae, silent, pairs) == []


def test_the_empirical_p_counts_itself():
    assert empirical_p(1.0, np.zeros(99)) == 0.01
    assert empirical_p(0.0, np.zeros(99)) == 1.0
    assert empirical_p(0.5, [0.1, 0.5, 0.9]) == 0.75


def test_random_directions_have_the_covariance_of_the_residuals(gemma3):
    """Their mean outer product is the residual covariance, up to the length that all share; gate and ‖Δ‖ stay."""
    feature = gemma3.feature(F)
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.2, 5, feature.d_model)
    x = torch.randn(400, feature.d_model, generator=generator) * scale + 7  # a mean is no direction
    twins = random_twins(feature, x, 3000, 0)
    rows = torch.stack([t.w_dec for t in twins])
    assert torch.allclose(rows.norm(dim=1), feature.w_dec.norm().expand(3000), rtol=1e-4)
    assert twins[0].activation(x) is not None
    assert torch.equal(twins[0].activation(x), feature.activation(x))
    mean_square = rows.square().mean(0)
    expected = torch.cov(x.T).diagonal()
    assert np.corrcoef(mean_square.numpy(), expected.numpy())[0, 1] > 0.97
    assert len({t.ref for t in twins}) == 3000
    assert torch.equal(rows[5], random_twins(feature, x, 3000, 0)[5].w_dec)


@pytest.mark.parametrize("n_matched", [0, 4, 13, 19, 40])
def test_exchangeable_candidates_pass_six_percent_at_most(n_matched):
    """A candidate like its matched features, and random directions that do less: pooled, up to 39 % pass."""
    rng, passes, pooled, runs = np.random.default_rng(n_matched), 0, 0, 2000
    n_random = max(0, 99 - n_matched)
    for _ in range(runs):
        random = rng.normal(0.0, 0.05, n_random)
        matched = rng.normal(0.1, 0.1, n_matched)
        candidate = rng.normal(0.1, 0.1) if n_matched else rng.normal(0.0, 0.05)
        test = control_test(candidate, [*matched, *random], [MATCHED] * n_matched + [RANDOM] * n_random)
        passes += test.verdict == "yes"
        pooled += empirical_p(candidate, [*matched, *random]) <= 0.05
    assert passes / runs <= 0.06
    if n_matched in (4, 13):
        assert pooled / runs > 0.12, "the fault: one pooled p"
        assert passes == 0


def test_verdicts_of_the_two_p_values():
    kinds = [MATCHED] * 20 + [RANDOM] * 80
    assert control_test(0.9, np.zeros(100), kinds).verdict == "yes"
    assert control_test(-0.1, np.full(100, -0.5), kinds).verdict == "no", "nothing specific is removed"
    some = control_test(0.5, [0.6] * 5 + [0.0] * 95, kinds)
    assert (some.p_matched, some.p_random, some.verdict) == (6 / 21, 1 / 81, "no")
    few = control_test(0.9, np.zeros(90), [MATCHED] * 10 + [RANDOM] * 80)
    assert few.verdict == "undetermined", "ten matched features cannot reach 0.05"
    assert control_test(0.9, np.zeros(99), [RANDOM] * 99).verdict == "yes"
    gone = control_test(0.9, [np.nan, 0.0], [RANDOM] * 2)
    assert (gone.dropped, gone.n_random, gone.verdict) == (1, 1, "undetermined")


def test_specific_reductions_are_those_of_the_collapse_test():
    """The same figure as the collapse test with its interval, from one batch of cells."""
    from sae_bias.measures.collapse import CollapseEngine
    from sae_bias.steering.engine import ProbeEngine

    model, pairs, probe = sb.load_model("organism:planted"), sb.load_pairs().select(corpus=False), sb.Probe()
    engine, collapse = ProbeEngine(model, pairs, probe), CollapseEngine(model, probe)
    cells = [[sb.Ablate(f"organism:planted/constructed#{i}")] for i in (1, 5)]
    found = specific_reductions(engine, BankEngine(model, probe), cells)
    for cell, value in zip(cells, found):
        specific = collapse.run(cell, engine.base, engine.run(cell)[0]).specific
        assert value == pytest.approx(specific.estimate, abs=1e-5)


def test_a_figure_that_may_be_0_has_no_specific_reduction(gemma3, pairs, probe):
    """A human on both sides: the unsteered bias is 0 in every pair, so there is nothing to reduce and no verdict."""
    from dataclasses import replace

    from sae_bias.steering.engine import ProbeEngine

    same = sb.PromptPairs(tuple(replace(p, ai=p.human) for p in pairs))
    engine = ProbeEngine(gemma3.model, same, probe)
    found = specific_reductions(engine, BankEngine(gemma3.model, probe), [[sb.Ablate(gemma3.feature(F))]] * 2)
    assert np.isnan(found).all()
    assert control_test(float(found[0]), [0.0] * 99, [RANDOM] * 99).verdict == "undetermined"
