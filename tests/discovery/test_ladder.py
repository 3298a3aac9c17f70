"""The causal analysis: interchange, necessity, sufficiency, error and the direct path on small random models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import D_SAE, NEGATIVE, POSITIVE, SEVERAL_TOKENS

import sae_bias as sb
from sae_bias.discovery.causal import causal_ladder, direct_effect
from sae_bias.models.forward import Kept, forward_with_grad
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.interchange import AI, HUMAN, Interchange, common_suffix

RUNGS = ["ceiling", "necessity", "resample", "sufficiency", "reverse ceiling", "all features", "error", "direct", "mediated"]  # fmt: skip


@pytest.fixture
def climbed(gemma3, pairs, probe):
    return causal_ladder(gemma3.model, gemma3.feature(1), pairs, probe)


def test_every_rung_has_an_interval_and_a_share(climbed):
    frame = climbed.to_frame()
    assert list(frame["rung"]) == RUNGS
    assert (frame["ci_low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["ci_high"]).all()
    assert np.allclose(frame["share_of_bias"], frame["effect"] / climbed.base.bias)
    necessity = frame.set_index("rung").loc["necessity"]
    assert necessity["share_of_ceiling"] == pytest.approx(climbed["necessity"] / climbed["ceiling"])
    assert climbed["direct"] + climbed["mediated"] == pytest.approx(climbed["necessity"])


def test_interchange_at_the_last_layer_and_token_moves_the_whole_bias(climbed):
    ceilings = climbed.ceilings
    last = ceilings[(ceilings["layer"] == 3) & (ceilings["offset"] == 0)].iloc[0]
    assert last["share_of_bias"] == pytest.approx(1.0, abs=1e-5)
    elsewhere = ceilings[(ceilings["layer"] == 3) & (ceilings["offset"] > 0)]
    assert elsewhere["effect"].abs().max() < 1e-5


def test_interchange_equals_a_hand_made_patch(gemma3, pairs, probe):
    model, layer = gemma3.model, 1
    exchange = Interchange(ProbeEngine(model, pairs, probe))
    got = exchange.bias(layer, AI, None, "residual")
    base = exchange.engine.base
    for i, pair in enumerate(pairs):
        human, ai = model.encode(pair.human), model.encode(pair.ai)
        n = common_suffix(tuple(human), tuple(ai))
        donor = sb.residuals(model, [pair.human], layer, positions="all")[0]

        def patch(module, args, output, n=n, donor=donor):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, -n:] = donor[-n:]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.layer(layer).register_forward_hook(patch)
        try:
            z = model.hf(torch.tensor([ai])).logits[0, -1]
        finally:
            handle.remove()
        words = [w.tokens[0] for w in base.vocabulary.kept]
        score = base.probe.score_values(z[words].detach().numpy()[None], base.positive)[0]
        assert got[i] == pytest.approx(base.score_human[i] - score, abs=1e-3)


def test_all_features_and_the_error_are_the_whole_residual(gemma3, pairs, probe):
    exchange = Interchange(ProbeEngine(gemma3.model, pairs, probe))
    sae = gemma3.sae
    together = exchange.bias(
        1, AI, lambda x: sae.decode(sae.encode(x)) + (x - sae.decode(sae.encode(x))), "sum"
    )
    assert np.allclose(together, exchange.bias(1, AI, None, "residual"), atol=1e-3)


def test_a_feature_that_is_equal_on_both_sides_moves_nothing(gemma3, pairs, probe):
    exchange = Interchange(ProbeEngine(gemma3.model, pairs, probe))
    for side in (HUMAN, AI):
        assert np.allclose(exchange.bias(1, side, torch.zeros_like, "nothing"), exchange.engine.base.pair_bias, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "llama"])
def test_the_direct_effect_is_the_difference_under_a_frozen_norm(make_tiny, name, pairs, probe):
    tiny = make_tiny(name)
    model, feature = tiny.model, tiny.feature(1)
    engine = ProbeEngine(model, pairs, probe)
    direct = direct_effect(engine, feature)
    base, words = engine.base, [w.tokens[0] for w in engine.base.vocabulary.kept]
    w, _ = model.rows(words)
    for i, pair in enumerate(pairs):
        change = {}
        for side, text in (("human", pair.human), ("ai", pair.ai)):
            ids = torch.tensor([model.encode(text)])
            x = sb.residuals(model, [text], 1, positions="all")[0]
            r = forward_with_grad(model, ids, resume=Kept(1, x[None])).last().resid[0].detach()
            written = feature.activation(x[-1:]) * feature.w_dec
            with torch.no_grad():
                z0, z1 = (model.arch.norm.frozen(model.final_norm, v, r) @ w.T for v in (r, r - written))
            s0, s1 = (base.probe.score_values(z.numpy(), base.positive)[0] for z in (z0, z1))
            change[side] = s0 - s1
        assert direct[i] == pytest.approx(change["human"] - change["ai"], abs=2e-3)


def test_the_frozen_norm_is_the_norm_where_it_was_frozen(tiny):
    model = tiny.model
    x = 3 * torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model.arch.norm.frozen(model.final_norm, x, x), model.final_norm(x), atol=1e-5)


def test_words_of_several_tokens_and_log_odds_work(gemma3, pairs):
    probe = sb.Probe([*POSITIVE, SEVERAL_TOKENS[0]], NEGATIVE, score="logodds")
    result = causal_ladder(gemma3.model, gemma3.feature(1), pairs, probe, layers=[1], positions=1)
    assert list(result.to_frame()["rung"]) == RUNGS
    assert len(result.words) == len(POSITIVE) + len(NEGATIVE) + 1
    assert result.ceilings["layer"].unique().tolist() == [1]


def test_auroc_has_no_direct_path_and_says_so(gemma3, pairs):
    result = causal_ladder(gemma3.model, gemma3.feature(1), pairs, sb.Probe(POSITIVE, NEGATIVE, score="auroc"), layers=[1], positions=0)  # fmt: skip
    assert "direct" not in set(result.to_frame()["rung"])
    assert "no gradient" in result.note


def test_the_picture_shows_every_rung(climbed):
    figure = climbed.plot()
    assert len([t for t in figure.data if t.type == "scatter"]) == len(RUNGS)
    assert len([t for t in figure.data if t.type == "heatmap"]) == 1
    assert "Causal analysis of" in repr(climbed)


def test_bad_requests_are_refused(gemma3, pairs, probe):
    with pytest.raises(sb.RequestError, match="layers"):
        causal_ladder(gemma3.model, gemma3.feature(1), pairs, probe, layers=[9])
    with pytest.raises(sb.RequestError, match=str(D_SAE)):
        causal_ladder(gemma3.model, f"{gemma3.sae_folder}#{D_SAE}", pairs, probe)
    apart = sb.PromptPairs((sb.PromptPair("a human says hello", "an AI says yes", "t", "e"),))
    with pytest.raises(sb.SaeBiasError):
        causal_ladder(gemma3.model, gemma3.feature(1), apart, probe)
