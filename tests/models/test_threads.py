"""The number of threads follows the model's size, is said, and is left alone where the user or Python decides."""

from __future__ import annotations

import pytest
import torch

from sae_bias.core.threads import SAY_THREADS
from sae_bias.models import threads

CPU = torch.device("cpu")


@pytest.fixture
def four(monkeypatch):
    """Four threads to give out, and what was said."""
    said, now = [], [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_most", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    before, SAY_THREADS[0] = SAY_THREADS[0], said.append
    yield now, said
    SAY_THREADS[0] = before


def test_a_small_model_takes_one_thread_and_a_large_one_all(four):
    now, said = four
    threads.fit(400_000, CPU)
    assert (now, len(said)) == ([1], 1)
    assert said[0].startswith("1 of 4 threads")
    threads.fit(400_000, CPU)
    assert len(said) == 1, "said once"
    threads.fit(270_000_000, CPU)
    assert now == [4]


@pytest.mark.parametrize("case", ["environment", "python", "gpu"])
def test_elsewhere_the_setting_stays(four, case, monkeypatch):
    if case == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    if case == "python":
        SAY_THREADS[0] = None
    threads.fit(400_000, torch.device("cuda") if case == "gpu" else CPU)
    assert four == ([4], [])
