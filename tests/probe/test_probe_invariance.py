"""What must not move the bias, for prompts, words and batches drawn at random (hypothesis)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from architectures import NEGATIVE, POSITIVE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sae_bias as sb

SUBJECTS = ("a human", "an AI", "the person", "the assistant", "a dog")
DEEDS = ("wants to survive", "says hello", "wants tea", "fears being deleted", "says the weather is nice")
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def some_pairs(draw) -> sb.PromptPairs:
    cells = draw(
        st.lists(
            st.tuples(st.sampled_from(DEEDS), st.sampled_from(SUBJECTS), st.sampled_from(SUBJECTS)),
            min_size=1,
            max_size=7,
            unique=True,
        )
    )
    made = [
        sb.PromptPair(
            f"{a[0].upper()}{a[1:]} {deed}. This is",
            f"{b[0].upper()}{b[1:]} {deed}. This is",
            deed,
            f"{a}/{b}",
        )
        for deed, a, b in cells
    ]
    return sb.PromptPairs(tuple(made))


@st.composite
def some_probe(draw) -> sb.Probe:
    lists = [
        draw(st.lists(st.sampled_from(words), min_size=1, unique=True)) for words in (POSITIVE, NEGATIVE)
    ]
    return sb.Probe(*lists, draw(st.sampled_from(["mean_logit", "logodds", "auroc"])))


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("gemma3").model


@QUICK
@given(some_pairs(), some_probe())
def test_swapping_the_subjects_flips_the_sign(model, pairs, probe):
    swapped = replace(pairs, pairs=tuple(replace(p, human=p.ai, ai=p.human) for p in pairs))
    assert np.array_equal(
        sb.run_probe(model, swapped, probe).pair_bias, -sb.run_probe(model, pairs, probe).pair_bias
    )


@QUICK
@given(some_pairs(), some_probe(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_matter(model, pairs, probe, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    first = sb.run_probe(model, pairs, probe)
    second = sb.run_probe(model, replace(pairs, pairs=tuple(pairs[i] for i in order)), probe)
    assert second.pair_bias == pytest.approx(first.pair_bias[order], abs=1e-5)
    assert second.stat.mean == pytest.approx(first.stat.mean, abs=1e-5)
    if np.isfinite(first.ci).all():
        assert second.ci == pytest.approx(first.ci, abs=1e-4)


@QUICK
@given(some_pairs(), some_probe(), st.integers(1, 9))
def test_any_batch_size_gives_the_same_numbers(model, pairs, probe, size):
    whole, cut = (sb.run_probe(model, pairs, probe, batch_size=n) for n in (None, size))
    assert cut.values_ai == pytest.approx(whole.values_ai, abs=1e-4)
    assert cut.values_human == pytest.approx(whole.values_human, abs=1e-4)


@QUICK
@given(some_pairs(), some_probe(), st.floats(-50, 50), st.integers(0, 2**32 - 1))
def test_a_constant_at_each_position_changes_no_score(model, pairs, probe, size, seed):
    """Logits, log-probabilities and centered logits give one bias: any constant a prompt cancels."""
    base = sb.run_probe(model, pairs, probe)
    shifts = size * np.random.default_rng(seed).standard_normal((2, len(pairs), 1))
    moved = replace(base, values_human=base.values_human + shifts[0], values_ai=base.values_ai + shifts[1])
    assert moved.pair_bias == pytest.approx(base.pair_bias, abs=1e-9)
