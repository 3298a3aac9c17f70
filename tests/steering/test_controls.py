"""Controls: the same gate and size in other directions, matched features that match, and the empirical p."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.steering.controls import (
    FACTOR,
    MAX_COSINE,
    control_edits,
    empirical_p,
    matched_features,
    random_twin,
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
