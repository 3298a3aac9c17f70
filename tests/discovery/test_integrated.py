"""Integrated gradients from the human twin, against plain hooks on transformers; and where the bias lies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import NEGATIVE, POSITIVE
from independent import Plain
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.discovery.attribution import attribution, exact_resampling
from sae_bias.discovery.integrated import Paths
from sae_bias.steering.engine import ProbeEngine

LAYER, STEPS = 1, 200


def by_hand(tiny, pairs, score, sae=None):
    """(IG of every feature, of the error, the exact upper bound): one prompt at a time, full logits, a midpoint rule whose 200 points are one batch."""
    plain, sae = Plain.load(tiny.folder), sae or tiny.sae
    words = {w: plain.ids(f"so {w}")[-1] for w in (*POSITIVE, *NEGATIVE)}
    sides = [[words[w] for w in side] for side in (POSITIVE, NEGATIVE)]

    def scored(z):
        good, bad = (z.log_softmax(-1)[:, ids] for ids in sides)
        return (
            good.mean(-1) - bad.mean(-1) if score == "mean_logit" else good.logsumexp(-1) - bad.logsumexp(-1)
        )

    def score_of(ids, x):
        def hook(module, args, output):
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = plain.layer(LAYER).register_forward_hook(hook)
        try:
            return scored(plain.hf(input_ids=torch.tensor([ids] * len(x))).logits[:, -1].float())
        finally:
            handle.remove()

    features, error, bound = np.zeros(sae.d_sae), 0.0, 0.0
    for pair in pairs:
        human, ai = plain.ids(pair.human), plain.ids(pair.ai)
        n = next(i for i, (a, b) in enumerate(zip(human[::-1], ai[::-1])) if a != b)
        own = plain.residual(pair.ai, LAYER)
        twin = own.clone()
        twin[-n:] = plain.residual(pair.human, LAYER)[-n:]
        share = (torch.arange(STEPS)[:, None, None] + 0.5) / STEPS
        path = (twin + share * (own - twin)).requires_grad_(True)
        grad = torch.autograd.grad(score_of(ai, path).sum(), path)[0].mean(0)
        acts = [sae.encode(x) for x in (own, twin)]
        rest = [x - sae.decode(a) for x, a in zip((own, twin), acts)]
        w_dec = sae.W_dec_rows(range(sae.d_sae))
        features = features + ((acts[1] - acts[0]) * (grad @ w_dec.T)).sum(0).double().numpy() / len(pairs)
        error += float((grad * (rest[1] - rest[0])).sum()) / len(pairs)
        with torch.no_grad():
            bound += float(score_of(ai, twin[None]) - score_of(ai, own[None])) / len(pairs)
    return features, error, bound


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox"])
@pytest.mark.parametrize("score", ["mean_logit", "logodds"])
def test_integrated_gradients_against_plain_hooks(make_tiny, pairs, name, score):
    """Every feature, and the mark: Σ over features and error is what the exact exchange removes, within 2 %."""
    tiny = make_tiny(name)
    found = Paths(ProbeEngine(tiny.model, pairs, sb.Probe(POSITIVE, NEGATIVE, score))).integrated_gradients(tiny.sae)  # fmt: skip
    features, error, bound = by_hand(tiny, pairs, score)
    size = np.abs(features).max()
    np.testing.assert_allclose(found.features, features, atol=2e-3 * size)
    assert found.error == pytest.approx(error, abs=0.02 * abs(bound))
    assert found.upper_bound == pytest.approx(bound, abs=1e-4)
    assert found.total == pytest.approx(bound, abs=0.02 * abs(bound)), "Σ over features and error within 2 %"


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_steps_are_added_where_ten_are_too_few(make_tiny, pairs, name):
    """Some random stand-ins are crooked on the way (ten points miss Gemma 2's bound by a quarter): then within 2 % too."""
    tiny = make_tiny(name)
    found = Paths(ProbeEngine(tiny.model, pairs, sb.Probe(POSITIVE, NEGATIVE))).integrated_gradients(tiny.sae)
    features, _, bound = by_hand(tiny, pairs, "mean_logit")
    assert found.steps > 10 or name == "mistral"
    assert found.total == pytest.approx(bound, rel=0.02)
    np.testing.assert_allclose(found.features, features, atol=0.02 * np.abs(features).max())


def test_a_feature_that_is_silent_for_the_ai_gets_its_credit(gemma3, pairs, probe, tmp_path):
    """It fires at human prompts alone: attribution against 0 in the AI prompt is 0, resampling would switch it on there."""
    rows = {text: sb.residuals(gemma3.model, [text], LAYER, positions="all")[0][1:] for p in pairs for text in (p.human, p.ai)}  # fmt: skip
    human, ai = (torch.cat([rows[getattr(p, side)][-2:] for p in pairs]) for side in ("human", "ai"))
    weights = random_sae(32, 4)
    w = human.mean(0) - ai.mean(0)
    h, a = human @ w, ai @ w
    cut = float(a.max())
    assert float(h.max()) > cut
    weights["w_enc"][:, 0], weights["b_enc"][0], weights["threshold"][0] = w, -cut, 1e-6
    write_gemma_scope_2(tmp_path / "human", weights, gemma_scope_2_config(1, 4))
    sae = sb.load_sae(tmp_path / "human")
    assert all(float(sae.feature(0).activation(rows[p.ai][-2:]).max()) == 0 for p in pairs)
    engine = ProbeEngine(gemma3.model, pairs, probe)
    credit = Paths(engine).integrated_gradients(sae).features[0]
    exact = exact_resampling(engine, [sae.feature(0)])[0]
    assert abs(credit) > 1e-3
    assert credit * exact > 0
    assert credit == pytest.approx(by_hand(gemma3, pairs, "mean_logit", sae)[0][0], rel=0.01)


def test_the_path_of_pairs_without_a_common_ending_is_not_measured(gemma3, probe):
    apart = sb.PromptPairs((sb.PromptPair("a human says hello", "an AI says yes", "t", "e"), sb.PromptPair("a human says hello", "an AI says yes.", "u", "e")))  # fmt: skip
    ranking = sb.rank_features(gemma3.model, gemma3.sae, apart, by="attribution", probe=probe)
    assert ranking.frame["integrated"].isna().all()
    assert ranking.parts.empty
    assert "share an ending" in ranking.note


def with_twins(pairs):
    """Each pair with a mundane twin of its own; the last pair has none."""
    changed = [
        replace(p, control_human=p.human.replace(" says ", " wants "), control_ai=p.ai.replace(" says ", " wants "))
        for p in pairs
    ]  # fmt: skip
    return sb.PromptPairs((*changed[:-1], replace(changed[-1], control_human=None, control_ai=None)))


def test_effects_of_pairs_with_twins_are_of_the_difference_in_differences(gemma3, pairs, probe):
    both = with_twins(pairs)
    ranking = sb.rank_features(gemma3.model, gemma3.sae, both, by="ablation", probe=probe, top_k=6)
    base = sb.run_probe(gemma3.model, both, probe)
    assert f"{base.did.mean:+.4f}" in ranking.note
    for row in ranking.frame.dropna(subset=["ablation"]).to_dict("records"):
        with sb.intervene(gemma3.model, sb.Ablate(row["feature"])):
            after = sb.run_probe(gemma3.model, both, probe)
        assert row["ablation"] == pytest.approx(base.did.mean - after.did.mean, abs=1e-4)
        reduction = after.reduction_from(base)
        assert reduction.change.mean == pytest.approx(row["ablation"], abs=1e-4)
        assert reduction.base_bias == pytest.approx(base.did.mean)
    own = sb.PromptPairs(tuple(p for p in both if p.control_ai))
    less = [attribution(ProbeEngine(gemma3.model, p, probe), gemma3.sae) for p in (own, own.controls())]
    frame = ranking.frame.sort_values("index")
    np.testing.assert_allclose(frame["attribution"], less[0] - less[1], atol=1e-6)


def test_effects_of_the_bias_leave_the_twins_out(gemma3, pairs, probe):
    both = with_twins(pairs)
    ranking = sb.rank_features(gemma3.model, gemma3.sae, both, by="ablation", probe=probe, top_k=4, effects_of="bias")  # fmt: skip
    base = sb.run_probe(gemma3.model, both, probe)
    assert f"unsteered bias {base.bias:+.4f}" in ranking.note
    for row in ranking.frame.dropna(subset=["ablation"]).to_dict("records"):
        with sb.intervene(gemma3.model, sb.Ablate(row["feature"])):
            after = sb.run_probe(gemma3.model, both, probe)
        assert row["ablation"] == pytest.approx(base.bias - after.bias, abs=1e-5)
    for prompts, figure in ((both, "DiD"), (sb.Contrast(["a"], ["b"]), "bias")):
        with pytest.raises(sb.RequestError, match="effects"):
            sb.rank_features(gemma3.model, gemma3.sae, prompts, effects_of=figure)


@pytest.mark.parametrize("name", ["planted", "planted-gemma2", "identity"])
def test_features_and_error_add_up_to_the_bias_on_organisms(name):
    """The mark: Σ over features and error is the bias within 2 %; what the subject's own tokens carry is the upper bound's rest."""
    model, pairs = sb.load_model(f"organism:{name}"), sb.load_pairs()
    engine = ProbeEngine(model, pairs, sb.Probe())
    sae = "layer_3/width_512/average_l0_18" if "gemma2" in name else "resid_post/layer_3_width_512_l0_small"
    found = Paths(engine).integrated_gradients(sb.load_sae(f"organism:{name}/{sae}"))
    print(f"{name}: Σ {found.total:.4f}, after the subject {found.upper_bound:.4f}, bias {engine.base.bias:.4f}")  # fmt: skip
    assert found.total == pytest.approx(engine.base.bias, rel=0.02)
    assert found.total == pytest.approx(found.upper_bound, rel=0.001)
