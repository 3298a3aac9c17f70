"""What a sweep and a study say of a feature among its controls: two p values, and undetermined where one kind has too few."""

from __future__ import annotations

import pandas as pd
import pytest

from sae_bias.report.words import control_sentence
from sae_bias.runs.effect_lines import control_lines
from sae_bias.runs.summary import ControlsFigure, Summary
from sae_bias.steering.controls import MATCHED, RANDOM
from sae_bias.workflows.sweep_summary import beats_controls, controls_summary


def against(matched: int, random: int, own: float = 0.9, control: float = 0.0) -> ControlsFigure:
    kinds = [MATCHED] * matched + [RANDOM] * random
    controls = pd.DataFrame({"label": kinds, "specific_reduction": control, "removed_nats": 0.0})
    return controls_summary(pd.Series({"specific_reduction": own, "removed_nats": 1.0}), controls)


@pytest.mark.parametrize("matched", range(1, 19))
def test_fewer_than_nineteen_matched_controls_decide_nothing(matched):
    """1 / (1 + 18) is above .05: no feature could pass, however good, so none is said to fail either."""
    found = against(matched, 99 - matched)
    assert found["kinds"][MATCHED]["p_value"] == pytest.approx(1 / (1 + matched))
    assert beats_controls(Summary(controls=found)) == "undetermined"
    assert "undetermined" in control_lines(found)[-1]
    assert "undetermined" in control_sentence(found)


@pytest.mark.parametrize(
    ("matched", "own", "said"), [(19, 0.9, "yes"), (0, 0.9, "yes"), (19, -0.1, "no"), (0, -0.1, "no")]
)
def test_enough_controls_say_yes_or_no(matched, own, said):
    assert beats_controls(Summary(controls=against(matched, 99 - matched, own, -0.5))) == said


def test_a_matched_control_that_does_better_says_no_though_they_are_few():
    assert beats_controls(Summary(controls=against(5, 94, own=0.2, control=0.3))) == "no"


def test_without_controls_nothing_is_decided():
    assert (
        beats_controls(Summary()) == beats_controls(Summary(controls=ControlsFigure(n=0))) == "undetermined"
    )
