"""The cost that methods are compared at: the worst KL over every kind of text and KL_off, or what is lost of β where that is more."""

from __future__ import annotations

import pandas as pd
import pytest

from sae_bias.runs.effect_lines import cost_note
from sae_bias.workflows.sweep_rows import _cost_columns


def test_the_cost_is_the_worst_kl_or_what_is_lost_of_beta():
    """The valence read-out of `planted` costs nothing on the three older kinds of text, 1.96 nats on human deeds, and leaves β −.016."""
    none = dict.fromkeys(("kl_neutral", "kl_ai_nonspeech", "kl_ai_speech", "kl_valence", "kl_off"), 0.0)
    assert _cost_columns(none | {"kl_valence": 1.96, "kl_off": 0.6}, -0.016)["cost"] == pytest.approx(1.96)
    assert _cost_columns(none | {"kl_off": 0.6}, 0.9)["cost"] == pytest.approx(0.6)
    assert _cost_columns(none, 0.3)["cost"] == pytest.approx(0.7), "flattening is not free"
    assert _cost_columns(none | {"kl_ai_speech": 0.04}, 1.0)["cost"] == pytest.approx(0.04)
    assert _cost_columns(none | {"kl_off": 0.02, "kl_off_p95": 0.3}, 1.0)["cost"] == pytest.approx(0.02), "a mean, not its tail"  # fmt: skip


def test_a_cost_without_beta_is_counted_and_said():
    """A bank that spans under 2 nats gives no β: the cost is of KL alone, and the tables say at how many strengths."""
    facts = dict.fromkeys(("kl_neutral", "kl_off"), 0.01)
    found = _cost_columns(facts, float("nan"))
    assert (found["cost"], found["cost_without_beta"]) == (pytest.approx(0.01), True)
    assert _cost_columns(facts, 0.9)["cost_without_beta"] is False
    assert _cost_columns({}, float("nan"))["cost_without_beta"] is False, "nothing was measured at all"
    rows = pd.DataFrame(
        [{"cell": "base", "kind": "base", "cost_without_beta": True, "specific_reason": "r"}]
        + [{"cell": c, "kind": "candidate", "cost_without_beta": c != "c", "specific_reason": "a bank spans 1 nat"} for c in "aabc"]
    )  # fmt: skip
    assert cost_note(rows) == (
        "cost is of KL alone, without 1 − β, at 2 of 3 strengths: β is undefined (a bank spans 1 nat)"
    )
    assert cost_note(rows.assign(cost_without_beta=False)) == ""
    assert cost_note(rows.drop(columns="cost_without_beta")) == ""
