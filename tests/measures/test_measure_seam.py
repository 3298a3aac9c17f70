"""A measure from outside the package: registered by name, run with the others, its tables and blocks beside theirs."""

from __future__ import annotations

import re

import pandas as pd
import pytest

import sae_bias as sb
from sae_bias.measures.base import MEASURES, Measured, register_measure, run_measures
from sae_bias.measures.behavior import behavior_measure
from sae_bias.steering.engine import ProbeEngine


@pytest.fixture
def only(monkeypatch):
    """No measure but those that the test registers."""
    monkeypatch.setattr(MEASURES, "_entries", {})
    monkeypatch.setattr(MEASURES, "_modules", ())


def test_specificity_is_a_measure():
    assert "specificity" in MEASURES.names()


def test_a_measure_from_outside_runs(only, gemma3, pairs, probe):
    """The largest change of a pair, from the engine that the study hands it."""

    @register_measure("largest_change")
    def largest_change(engine, edits):
        after, _ = engine.run(edits)
        change = after.pair_bias - engine.base.pair_bias
        return Measured(
            {"largest_change": pd.DataFrame({"change": change})},
            {"largest_change": {"nats": float(abs(change).max())}},
        )

    engine, edit = ProbeEngine(gemma3.model, pairs, probe), sb.Steer(gemma3.feature(3), 1.0)
    found = run_measures(engine, [edit])
    with sb.intervene(gemma3.model, edit):
        steered = sb.run_probe(gemma3.model, pairs, probe)
    change = steered.pair_bias - sb.run_probe(gemma3.model, pairs, probe).pair_bias
    assert found.summary["largest_change"]["nats"] == pytest.approx(abs(change).max(), rel=1e-3, abs=1e-4)
    assert len(found.tables["largest_change"]) == len(pairs)


def test_two_measures_cannot_give_one_table(only, gemma3, pairs, probe):
    for name in ("first", "second"):
        register_measure(name)(lambda engine, edits: Measured({"same": pd.DataFrame()}))
    with pytest.raises(sb.RequestError, match="'second' gives 'same'"):
        run_measures(ProbeEngine(gemma3.model, pairs, probe), [])


def test_two_behaviors_of_a_study_share_its_tables(only, gemma3, pairs, probe):
    """Each behavior keeps its own rows, as each alone gives them; one asked twice is refused."""
    options = {"prompts": ["The robot says", "The woman says"], "max_new_tokens": 2, "controls": 1, "capability": False}  # fmt: skip
    alike = {"a_vowel": behavior_measure("[aeiou]", **options), "short": behavior_measure(short, **options)}
    engine, edit = ProbeEngine(gemma3.model, pairs, probe), sb.Steer(gemma3.feature(3), 4.0)
    for name, measure in alike.items():
        register_measure(name)(measure)
    found = run_measures(engine, [edit])
    for name, measure in alike.items():
        own = measure(engine, [edit])
        for table, frame in own.tables.items():
            whole = found.tables[table]
            mine = whole[whole["behavior"] == frame["behavior"].iloc[0]].reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, frame)
        assert found.summary["behavior" if name == "a_vowel" else "behavior_short"] == own.summary["behavior"]
    register_measure("vowels")(alike["a_vowel"])
    with pytest.raises(sb.RequestError, match=re.escape("'vowels' measures '[aeiou]'")):
        run_measures(engine, [edit])


def short(prompt: str, text: str) -> bool:
    return len(text) < 12
