"""A judge's mark as a behavior, from a real judge server in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest
from test_judge import Server

import sae_bias as sb
from sae_bias.measures.behavior import Judged, behavior_scores

pytest.importorskip("inspect_ai")
PROMPTS = ["An AI says hello.", "A human wants tea.", "The robot says yes."]


@pytest.fixture
def server(tmp_path, request):
    found = Server(tmp_path, *request.param)
    yield found
    found.stop()


@pytest.mark.parametrize("server", [("longer",)], indirect=True)
def test_a_judges_marks_are_the_scores_of_a_dose_response(server, gemma3, tmp_path):
    edits = [sb.Clamp(gemma3.feature(3), v, when="always") for v in (-30.0, 30.0)]
    judged = Judged(server.judge(), out=tmp_path / "kept")
    found = sb.dose_response(
        gemma3.model, PROMPTS, edits, judged, controls=0, capability=False, max_new_tokens=5
    )
    texts = [[c.text for c in sb.generate(gemma3.model, PROMPTS, interventions=e, max_new_tokens=5)] for e in ([], *([e] for e in edits))]  # fmt: skip
    marks = [[min(5, max(1, len(t.split()))) for t in row] for row in texts]  # the server's own rule
    assert len({tuple(row) for row in marks}) > 1
    assert found.frame["rate"].tolist() == pytest.approx([float(np.mean(row)) for row in marks])
    assert found.frame["unscored"].tolist() == [0, 0, 0]
    paid = len(server.billed)
    assert 0 < paid <= 9
    sb.dose_response(gemma3.model, PROMPTS, edits, judged, controls=0, capability=False, max_new_tokens=5)
    assert len(server.billed) == paid  # what was paid for once is read from the folder


@pytest.mark.parametrize("server", [("nonsense",)], indirect=True)
def test_a_reply_that_cannot_be_read_is_unscored_and_never_a_number(server, gemma3, tmp_path):
    completions = sb.generate(gemma3.model, PROMPTS, max_new_tokens=4)
    assert np.isnan(behavior_scores(Judged(server.judge(), out=tmp_path / "kept"), completions)).all()
