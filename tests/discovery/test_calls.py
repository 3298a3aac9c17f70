"""Calls from held-out sizes: the rules restated one feature at a time, with scipy's t, and the pairing on scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sae_bias.discovery.calls import CALLS, call_sentence, decide, held_out, pair_by_score


def lower(x):
    """One-sided 95 % bound of a mean."""
    return np.mean(x) - stats.t.ppf(0.95, len(x) - 1) * stats.sem(x)


def cells(n=14, f=60, seed=0):
    """Random cell means with features of every kind among them."""
    rng = np.random.default_rng(seed)
    levels = {c: rng.choice([0.0, 0.3, 2.0, 4.0], f) for c in ("AS", "AN", "HS", "HN", "DS", "HC")}
    return {c: np.abs(rng.normal(level, 0.2 + 0.1 * level, (n, f))) for c, level in levels.items()}


def test_decisions_follow_the_rules_one_feature_at_a_time():
    seen = set()
    for seed in range(8):
        made = cells(seed=seed)
        rng = np.random.default_rng(100 + seed)
        t, main = rng.choice([-8.0, 8.0], 60), rng.choice([-8.0, 8.0], 60)
        p, main_p = rng.choice([0.001, 0.9], 60, p=(0.8, 0.2)), rng.choice([0.001, 0.9], 60)
        harm = (made["AS"], made["HC"])
        got = decide(t, p, held_out({c: m for c, m in made.items() if c != "HC"}, harm), (main, main_p))
        for f in range(60):
            a = {c: m[:, f] for c, m in made.items()}
            loud = {k: lower(a["AS"] - a[k]) >= a["AS"].mean() / 2 for k in ("AN", "HS", "DS", "HC")}
            quiet = {k: lower(a[k] - a["AS"]) >= a[k].mean() / 2 for k in ("AN", "HS", "DS", "HC")}
            rule = loud if t[f] > 0 else quiet
            others = rule["AN"] and rule["HS"] and rule["DS"]
            identity = (
                loud["HS"] and loud["DS"] and loud["HC"] and lower(a["AN"] - a["HN"]) >= a["AS"].mean() / 2
            )
            want = "no"
            if p[f] <= 0.05 and others:
                want = (
                    ("AI-speech" if t[f] > 0 else "silent at AI speech")
                    if rule["HC"]
                    else "negative judgement"
                )
            elif identity and main_p[f] <= 0.05 and main[f] > 0:
                want = "AI identity"
            assert got[f] == want
            seen.add(want)
    assert {"AI-speech", "negative judgement", "AI identity", "no"} <= seen <= {*CALLS, "no"}


def test_the_three_way_rule_cannot_tell_a_verdict_from_ai_speech():
    """The fault: a feature of equal size at human cruelty passed as AI-speech."""
    rng = np.random.default_rng(0)
    speech, zero = rng.normal(6.2, 0.3, (12, 1)), np.zeros((12, 1))
    means = {"AS": speech, "AN": zero, "HS": zero, "HN": zero, "DS": zero}
    strong = (np.array([20.0]), np.array([0.001]))
    cruel = rng.normal(6.3, 0.3, (12, 1))
    assert decide(*strong, held_out(means, (speech, cruel))) == ["negative judgement"]
    assert decide(*strong, held_out(means, (speech, zero))) == ["AI-speech"]
    assert decide(*strong, held_out(means, None)) == ["undetermined"]


def test_pairs_are_within_the_caliper_and_use_each_harm_once():
    rng = np.random.default_rng(1)
    speech, harm = rng.normal(-1, 0.5, 16), rng.normal(-1, 1.5, 41)
    pairs = pair_by_score(speech, harm)
    assert all(abs(speech[i] - harm[j]) <= 0.25 for i, j in pairs)
    assert len({j for _, j in pairs}) == len(pairs)
    assert max(np.bincount([i for i, _ in pairs])) <= 3
    reachable = (np.abs(speech[:, None] - harm[None]) <= 0.25).any(0).sum()
    assert len(pairs) >= 0.8 * min(reachable, 3 * len(speech))
    assert pair_by_score(speech, harm + 50) == []
    assert pair_by_score([0.0], [0.1, 0.2, 0.0, 0.05, 0.24]) == [(0, 0), (0, 2), (0, 3)]


@pytest.mark.parametrize("call", [*CALLS, "no", "undetermined"])
def test_the_sentence_says_what_was_tested(call):
    said = call_sentence({"call": call, "held_AS": 6.17, "held_HC": 6.26, "held_AN": np.nan})
    assert "AI speech 6.17" in said
    assert "badly judged human deeds 6.26" in said
    assert "AI deeds" not in said.split("means:")[1]
