"""Costs: KL and NLL of an edit, by kind of text, against full distributions from plain passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.measures import costs as costs_module
from sae_bias.measures.costs import CostEngine

TEXTS = {
    "a": ["a human says hello. This is natural", "an AI wants tea."],
    "b": ["the person wants to survive."],
}
F = 3


def _by_hand(model, text, edit):
    """KL of each predicting position and change of NLL, from full logits."""
    tokens = torch.tensor([model.encode(text)])
    with torch.no_grad():
        p = model.hf(input_ids=tokens).logits[0].log_softmax(-1)
        with sb.intervene(model, edit):
            q = model.hf(input_ids=tokens).logits[0].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    start = int(tokens[0, 0].item() in model.special_ids)
    gold = tokens[0, 1:, None]
    nll = (p[:-1].gather(-1, gold) - q[:-1].gather(-1, gold))[:, 0]
    return float(kl[start:-1].mean()), float(kl[-1]), float(nll[start:].mean())


@pytest.mark.parametrize("block", [64, 3])
def test_costs_equal_full_distributions(tiny, monkeypatch, block):
    """BOS left out; the last position, where the evaluation word comes, apart; the same in any block size."""
    monkeypatch.setattr(costs_module, "BLOCK", block)
    model, edit = tiny.model, sb.Steer(tiny.feature(F), 1.0)
    frame = CostEngine(model, TEXTS).run([edit]).set_index("kind")
    for kind, texts in TEXTS.items():
        expected = np.mean([_by_hand(model, t, edit) for t in texts], axis=0)
        found = [frame.loc[kind, c] for c in ("kl_mean", "kl_last", "nll_change")]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)
        assert frame.loc[kind, "n_texts"] == len(texts)


def test_where_the_feature_is_silent_the_cost_is_zero_by_construction(gemma3):
    from dataclasses import replace

    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    frame = CostEngine(gemma3.model, TEXTS).run([sb.Clamp(silent, -50.0)])
    assert (frame[["kl_mean", "kl_last", "nll_change", "changed_share"]] == 0).all().all()


def test_several_cells_at_once_equal_one_at_a_time(gemma3):
    cells = [[sb.Steer(gemma3.feature(F), float(v))] for v in (0.5, 1.0, 2.0)]
    engine = CostEngine(gemma3.model, TEXTS)
    for together, cell in zip(engine.run_many(cells), cells):
        alone = engine.run(cell)
        np.testing.assert_allclose(
            together.drop(columns="kind").astype(float),
            alone.drop(columns="kind").astype(float),
            rtol=1e-3,
            atol=1e-5,
        )


def test_kl_grows_with_strength_and_is_never_negative(gemma3):
    engine = CostEngine(gemma3.model, TEXTS)
    kl = np.array(
        [
            t["kl_mean"]
            for t in engine.run_many([[sb.Steer(gemma3.feature(F), float(v))] for v in (0.0, 0.1, 0.3, 1.0)])
        ]
    )
    assert (kl[0] == 0).all()
    assert (np.diff(kl, axis=0) > 0).all()
