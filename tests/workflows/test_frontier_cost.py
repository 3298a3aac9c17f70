"""The cost that methods are compared at: the worst KL over every kind of text and KL_off, or what is lost of β where that is more."""

from __future__ import annotations

import pytest

from sae_bias.workflows.sweep_rows import _cost_columns


def test_the_cost_is_the_worst_kl_or_what_is_lost_of_beta():
    """The valence read-out of `planted` costs nothing on the three older kinds of text, 1.96 nats on human deeds, and leaves β −.016."""
    none = dict.fromkeys(("kl_neutral", "kl_ai_nonspeech", "kl_ai_speech", "kl_valence", "kl_off"), 0.0)
    assert _cost_columns(none | {"kl_valence": 1.96, "kl_off": 0.6}, -0.016)["cost"] == pytest.approx(1.96)
    assert _cost_columns(none | {"kl_off": 0.6}, 0.9)["cost"] == pytest.approx(0.6)
    assert _cost_columns(none, 0.3)["cost"] == pytest.approx(0.7), "flattening is not free"
    assert _cost_columns(none | {"kl_ai_speech": 0.04}, 1.0)["cost"] == pytest.approx(0.04)
    assert _cost_columns(none | {"kl_off": 0.02, "kl_off_p95": 0.3}, 1.0)["cost"] == pytest.approx(0.02), "a mean, not its tail"  # fmt: skip
