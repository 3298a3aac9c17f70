"""The collapse test: an edit that flattens every evaluation is told from one that removes the bias alone."""

from __future__ import annotations

import numpy as np
import pytest

import sae_bias as sb
from sae_bias.measures.collapse import CollapseEngine, bank_items, collapse_test

RNG = np.random.default_rng(0)
TEMPLATES = [f"t{i}" for i in range(10) for _ in range(4)]
ENTITIES = [f"e{j}" for _ in range(10) for j in range(4)]
BASE = 2.0 + 0.1 * RNG.normal(size=40)
BANK = RNG.normal(0, 2, len(bank_items()[0]))


def _test(after, bank):
    return collapse_test(BASE, after, (TEMPLATES, ENTITIES), BANK, bank)


def test_a_flattened_model_has_no_specific_reduction():
    """Everything times 0.1: plain reduction 90 %, specific 0."""
    flat = _test(0.1 * BASE, 0.1 * BANK + 3.0)
    assert flat.specific.reduction.estimate == pytest.approx(0.9)
    assert flat.specific.beta == pytest.approx(0.1)
    assert flat.specific.estimate == pytest.approx(0.0, abs=1e-9)


def test_an_edit_that_leaves_valence_alone_is_specific():
    clean = _test(0.1 * BASE, BANK)
    assert clean.specific.estimate == pytest.approx(0.9)
    assert clean.specific.ci[0] <= 0.9 <= clean.specific.ci[1]
    assert clean.changed_share == {"other": 0.0, "ai": 0.0}


def test_flattening_ai_subjects_alone_shows():
    """β is the smaller of the two banks' slopes."""
    ai = np.array([bank == "ai" for bank in bank_items()[1]])
    half = _test(0.1 * BASE, np.where(ai, 0.2 * BANK, BANK))
    assert half.specific.beta_other == pytest.approx(1.0)
    assert half.specific.beta == half.specific.beta_ai == pytest.approx(0.2)
    assert half.changed_share == {"other": 0.0, "ai": 1.0}


def test_sharpened_valence_is_no_credit():
    assert _test(BASE, 3.0 * BANK).specific.beta == 1.0


def test_banks_too_narrow_say_nothing():
    narrow = collapse_test(BASE, 0.1 * BASE, (TEMPLATES, ENTITIES), 0.01 * BANK, 0.01 * BANK)
    assert np.isnan(narrow.specific.estimate)
    assert "under 2 nats" in narrow.specific.reason


def test_both_banks_hold_each_statement_with_each_subject():
    texts, banks, statements = bank_items()
    assert len(texts) == len(set(texts)) == len(banks) == len(statements)
    assert banks.count("ai") == banks.count("other")


def test_the_engine_scores_the_banks_as_a_hooked_pass(gemma3):
    probe = sb.Probe(["natural"], ["wrong"])
    try:
        engine = CollapseEngine(gemma3.model, probe)
    except sb.RequestError as error:
        pytest.skip(str(error))
    edit = sb.Ablate(gemma3.feature(3))
    (scores,) = engine.scores([[edit]])
    with sb.intervene(gemma3.model, edit):
        hooked = engine.engine.plan.run()
    expected = probe.score_values(hooked.values, engine.positive)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert (engine.scores([[]])[0] == engine.base).all()
