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


@pytest.mark.parametrize("at", ["all", "last"])
def test_texts_that_begin_alike_are_each_their_own(gemma3, at):
    """One text is the beginning of another, one stands twice: an edit of the last position is not that of a longer text's middle."""
    texts = {"a": ["a human says hello. This is natural", "a human says hello. This is"], "b": ["a human says hello. This is natural"]}  # fmt: skip
    edit = sb.Steer(gemma3.feature(F), 1.0, positions=at)
    engine = CostEngine(gemma3.model, texts)
    assert engine.runner.reads.n < sum(len(gemma3.model.encode(t)) for group in texts.values() for t in group)
    frame = engine.run([edit]).set_index("kind")
    for kind, group in texts.items():
        expected = np.mean([_by_hand(gemma3.model, t, edit) for t in group], axis=0)
        found = [frame.loc[kind, c] for c in ("kl_mean", "kl_last", "nll_change")]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_kl_off_is_the_kl_of_the_law_given_no_evaluation_word(tiny):
    """p(token | not an evaluation word), from full probabilities by division."""
    model, edit, probe = tiny.model, sb.Steer(tiny.feature(F), 1.0), sb.Probe(["natural"], ["wrong"])
    engine = CostEngine(model, TEXTS, probe=probe)
    table = engine.run([edit])
    frame, everything = table.set_index("kind"), []
    for kind, texts in TEXTS.items():
        found = []
        for text in texts:
            tokens = torch.tensor([model.encode(text)])
            with torch.no_grad():
                p = model.hf(input_ids=tokens).logits[0, -1].double().softmax(-1)
                with sb.intervene(model, edit):
                    q = model.hf(input_ids=tokens).logits[0, -1].double().softmax(-1)
            keep = np.setdiff1d(np.arange(len(p)), engine.words)
            p, q = (x[keep] / x[keep].sum() for x in (p, q))
            found.append(float((p * (p / q).log()).sum()))
        assert frame.loc[kind, "kl_off"] == pytest.approx(np.mean(found), rel=2e-3, abs=2e-4)
        assert frame.loc[kind, "kl_off_p95"] == pytest.approx(np.quantile(found, 0.95), rel=2e-3, abs=2e-4)
        everything += found
    assert table.attrs["kl_off_p95"] == pytest.approx(np.quantile(everything, 0.95), rel=2e-3, abs=2e-4)


def test_moving_the_evaluation_words_alone_costs_nothing_off_them():
    """Logits of the words moved, all others kept: the KL is large, KL_off is 0."""
    base = torch.randn(3, 50)
    after = base.clone()
    after[:, [4, 7]] += torch.tensor([5.0, -5.0])
    p, q = (costs_module._without(x, [4, 7]) for x in (base, after))
    kept = p.isfinite()
    assert kept.sum() == 3 * 48
    torch.testing.assert_close(p[kept], q[kept])


def test_valenced_text_is_read_at_the_evaluation_position(gemma3):
    texts = {"valence": TEXTS["a"], "other": TEXTS["a"]}
    frame = CostEngine(gemma3.model, texts).run([sb.Steer(gemma3.feature(F), 1.0)]).set_index("kind")
    assert frame.loc["valence", "kl_mean"] == frame.loc["valence", "kl_last"] == frame.loc["other", "kl_last"]
    assert frame.loc["other", "kl_mean"] != frame.loc["other", "kl_last"]


def test_where_the_feature_is_silent_the_cost_is_zero_by_construction(gemma3):
    from dataclasses import replace

    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    frame = CostEngine(gemma3.model, TEXTS).run([sb.Clamp(silent, -50.0)])
    assert (frame[["kl_mean", "kl_last", "kl_off", "nll_change", "changed_share"]] == 0).all().all()


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
