"""Attribution is the derivative of the bias with respect to each feature; exact ablation is an intervention like any other."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import D_SAE, NEGATIVE, POSITIVE, SEVERAL_TOKENS
from passes import layer_tokens
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.discovery.attribution import (
    ablation_effects,
    attribution,
    carriers,
    cumulative_ablation,
    exact_ablation,
    exact_resampling,
    resampling_effects,
)
from sae_bias.stats.clustered import Clustered
from sae_bias.steering.engine import ProbeEngine

SEVERAL = ((*POSITIVE, SEVERAL_TOKENS[0]), (*NEGATIVE, SEVERAL_TOKENS[1]))

EPS = {"gemma2": 0.001, "gemma3": 0.01, "gpt_neox": 0.01, "mistral": 0.01}
"""Steps of the finite difference: Gemma 2's random stand-in curves more."""


def finite_differences(engine, sae, eps=0.01, features=None):
    """(B(a·(1 + ε)) - B(a·(1 - ε))) / 2ε of each feature, by exact edits that keep the SAE error."""
    slopes = []
    for i in range(sae.d_sae) if features is None else features:
        up, down = (engine.run([sb.Scale(sae.feature(i), 1 + e)])[0].bias for e in (eps, -eps))
        slopes.append((up - down) / (2 * eps))
    return np.array(slopes)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_neox", "mistral"])
@pytest.mark.parametrize("score", ["mean_logit", "logodds"])
def test_attribution_is_the_finite_difference(make_tiny, pairs, name, score):
    """Features across the SAE, summed over both prompts and over positions, softcaps and several-token words included."""
    tiny = make_tiny(name)
    words = SEVERAL if score == "logodds" else (POSITIVE, NEGATIVE)
    engine = ProbeEngine(tiny.model, pairs, sb.Probe(*words, score))
    some = range(0, D_SAE, 3 if score == "mean_logit" else 6)
    expected = finite_differences(engine, tiny.sae, EPS[name], some)
    found = attribution(engine, tiny.sae)[list(some)]
    size = np.abs(expected).max()
    assert size > 0.05
    np.testing.assert_allclose(found, expected, atol=0.03 * size)
    assert np.corrcoef(found, expected)[0, 1] > 0.999


def test_without_softcap_too(gemma2, pairs):
    engine = ProbeEngine(gemma2.model, pairs, sb.Probe(POSITIVE, NEGATIVE, softcap=False))
    expected = finite_differences(engine, gemma2.sae, EPS["gemma2"])
    np.testing.assert_allclose(attribution(engine, gemma2.sae), expected, atol=0.03 * np.abs(expected).max())


def test_the_sae_error_and_the_decoder_bias_are_held_constant(gemma3, pairs, probe, tmp_path):
    """Another b_dec leaves x and every a as they are, so it may not move the attribution."""
    from safetensors.torch import load_file

    weights = load_file(gemma3.sae_folder / "params.safetensors")
    weights["b_dec"] = weights["b_dec"] + 5.0
    write_gemma_scope_2(tmp_path / "shifted", weights, gemma_scope_2_config(1, D_SAE))
    engine = ProbeEngine(gemma3.model, pairs, probe)
    np.testing.assert_allclose(
        attribution(engine, sb.load_sae(tmp_path / "shifted")), attribution(engine, gemma3.sae)
    )


def test_special_tokens_carry_no_attribution(gemma3, pairs, probe, tmp_path):
    """A feature that fires at BOS alone cannot be ablated, so nothing is attributed to it (docs/method.md#mistake-6)."""
    rows = sb.residuals(gemma3.model, [p.ai for p in pairs], 1, positions="all")
    bos, rest = rows[0][0], torch.cat([r[1:] for r in rows])
    w = bos / bos.norm() - rest.mean(0) / rest.mean(0).norm()
    weights = random_sae(32, 4)
    weights["w_enc"][:, 0], weights["b_enc"][0] = w, 0.0
    weights["threshold"][0] = (float(bos @ w) + float((rest @ w).max())) / 2
    assert float(bos @ w) > float((rest @ w).max())
    write_gemma_scope_2(tmp_path / "bos", weights, gemma_scope_2_config(1, 4))
    sae = sb.load_sae(tmp_path / "bos")
    engine = ProbeEngine(gemma3.model, pairs, probe)
    assert attribution(engine, sae)[0] == 0
    result, receipt = engine.run([sb.Ablate(sae.feature(0))])
    assert result is engine.base
    assert [e.positions_active for e in receipt.edits] == [0]


def test_a_last_layer_feature(gemma3, pairs, probe, tmp_path):
    weights = random_sae(32, 8)
    write_gemma_scope_2(tmp_path / "last", weights, gemma_scope_2_config(3, 8))
    sae = sb.load_sae(tmp_path / "last")
    engine = ProbeEngine(gemma3.model, pairs, probe)
    expected = finite_differences(engine, sae)
    np.testing.assert_allclose(
        attribution(engine, sae), expected, atol=max(0.03 * np.abs(expected).max(), 1e-4)
    )


def test_auroc_has_no_gradient(gemma3, pairs):
    engine = ProbeEngine(gemma3.model, pairs, sb.Probe(POSITIVE, NEGATIVE, "auroc"))
    with pytest.raises(sb.RequestError, match="gradient"):
        attribution(engine, gemma3.sae)


def test_nothing_is_left_on_the_model(gemma3, pairs, probe):
    model = gemma3.fresh()
    attribution(ProbeEngine(model, pairs, probe), gemma3.sae)
    assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
    assert not any(m._forward_hooks for m in model.hf.modules())


def test_exact_ablation_is_intervene_and_run_probe(tiny, pairs, probe):
    features = [tiny.feature(i) for i in (3, 11, 20)]
    engine = ProbeEngine(tiny.model, pairs, probe)
    found = exact_ablation(engine, features)
    for value, feature in zip(found, features):
        with sb.intervene(tiny.model, sb.Ablate(feature)):
            after = sb.run_probe(tiny.model, pairs, probe)
        assert value == pytest.approx(engine.base.bias - after.bias, abs=1e-4)
        assert value == pytest.approx(after.reduction_from(engine.base).change.mean, abs=1e-4)


def test_workers_give_the_same_bits(gemma3, pairs, probe):
    features = [gemma3.feature(i) for i in (3, 11, 20)]
    engine = ProbeEngine(gemma3.model, pairs, probe)
    for exact in (exact_ablation, exact_resampling):
        assert np.array_equal(exact(engine, features, workers=2), exact(engine, features))
    assert multiprocessing.active_children() == []


def test_a_feature_is_resampled_only_in_prompts_that_it_changes(gemma3, pairs, probe):
    """One that is silent runs nothing; one that is active runs the later layers once for each prefix of the AI prompts at most."""
    engine = ProbeEngine(gemma3.model, pairs, probe)
    exact_resampling(engine, [gemma3.feature(3)])  # the residuals are kept
    silent = replace(gemma3.feature(3), threshold=torch.tensor(1e9))
    with layer_tokens(gemma3.model, (0, 2)) as count:
        assert exact_resampling(engine, [silent]).tolist() == [0.0]
    assert not count.by_layer
    with layer_tokens(gemma3.model, (0, 2)) as count:
        exact_resampling(engine, [gemma3.feature(3)])
    assert set(count.by_layer) == {2}
    assert count.by_layer[2] <= sum(len(gemma3.model.encode(p.ai)) for p in pairs)


def test_cumulative_ablation_is_joint(gemma3, pairs, probe):
    """Row k ablates the first k together, from one encoding of the unedited residual."""
    features = [gemma3.feature(i) for i in (3, 11, 20)]
    engine = ProbeEngine(gemma3.model, pairs, probe)
    frame = cumulative_ablation(engine, features)
    assert frame["k"].tolist() == [1, 2, 3]
    for k, bias in zip(frame["k"], frame["bias"]):
        with sb.intervene(gemma3.model, [sb.Ablate(f) for f in features[:k]]):
            assert bias == pytest.approx(sb.run_probe(gemma3.model, pairs, probe).bias, abs=1e-4)
    np.testing.assert_allclose(frame["change"], engine.base.bias - frame["bias"], atol=1e-9)
    part = cumulative_ablation(engine, features[:1], templates=["hello"])
    with sb.intervene(gemma3.model, sb.Ablate(features[0])):
        only = sb.run_probe(gemma3.model, pairs.select(templates=["hello"]), probe)
    assert part["bias"][0] == pytest.approx(only.bias, abs=1e-4)


def test_a_silent_feature_has_no_effect(gemma3, pairs, probe):
    engine = ProbeEngine(gemma3.model, pairs, probe)
    silent = replace(gemma3.feature(3), threshold=torch.tensor(1e9))
    assert exact_ablation(engine, [silent]).tolist() == [0.0]


def test_resampling_is_the_human_value_put_into_the_ai_prompt_by_hand(gemma3, pairs, probe):
    """Exact resampling against a plain hook that adds (a_human - a_ai) times the decoder row over the shared ending."""
    engine = ProbeEngine(gemma3.model, pairs, probe)
    feature = gemma3.feature(3)
    model, layer = gemma3.model, feature.site.layer
    rows = []
    for pair in pairs:
        human, ai = model.encode(pair.human), model.encode(pair.ai)
        shared = shared_ending(human, ai)
        x = [sb.residuals(model, [text], layer, positions="all")[0] for text in (pair.human, pair.ai)]
        acts = [feature.activation(v.float()) for v in x]
        delta = torch.zeros(len(ai), 1)
        delta[-shared:, 0] = acts[0][-shared:] - acts[1][-shared:]

        def hook(module, args, output, delta=delta):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] == len(delta):
                hidden = hidden + (delta * feature.w_dec).to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.hf.model.layers[layer].register_forward_hook(hook)
        try:
            after = sb.run_probe(
                model, pairs.select(templates=[pair.template], entities=[pair.entity]), probe
            )
        finally:
            handle.remove()
        rows.append(after.score_ai[0])
    found = exact_resampling(engine, [feature])[0]
    assert found == pytest.approx(float(np.mean(np.array(rows) - engine.base.score_ai)), abs=1e-4)
    assert found != pytest.approx(exact_ablation(engine, [feature])[0], abs=1e-6)


def shared_ending(a, b):
    return next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y), min(len(a), len(b)))


def effect(mean, half=0.0005, n_templates=8):
    return Clustered(mean, half / 2, 7.0, mean - half, mean + half, 0.01, 8 * n_templates, n_templates, 8)


CARRIERS = [
    (
        effect(0.30),
        effect(0.001),
        "damage",
    ),  # Gemma 3 270M: 0.30 of 1.87 nats by ablation, 0.001 by resampling
    (effect(0.30), effect(0.25), "carrier"),
    (effect(-0.30), effect(0.20), "damage"),
    (effect(0.001), effect(0.0), "no"),
    (effect(0.001), effect(0.40), "resampling only"),
    (effect(0.30), None, "undetermined"),
    (effect(0.30), effect(0.05, 0.08), "damage"),  # large enough, but pairs disagree
    (effect(0.05, 0.08), effect(0.30), "resampling only"),
    (effect(0.30), effect(0.15, 0.20), "undetermined"),  # it may be as large as the other
    (effect(0.30, n_templates=5), effect(0.25, n_templates=5), "undetermined"),
]


@pytest.mark.parametrize(("ablated", "resampled", "verdict"), CARRIERS)
def test_a_carrier_shows_both_effects(ablated, resampled, verdict):
    assert carriers([ablated], [resampled], 1.87) == [verdict]


def test_each_exact_effect_has_the_interval_of_its_pairs(make_tiny, pairs, probe):
    """Of the difference in differences where one template has mundane twins: the pairs without a twin do not count."""
    tiny = make_tiny("gemma3")
    twin = lambda p: replace(p, control_human=p.human.replace("survive", "tea"), control_ai=p.ai.replace("survive", "tea"))  # noqa: E731  # fmt: skip
    some = replace(pairs, pairs=tuple(twin(p) if p.template == "survive" else p for p in pairs))
    engine = ProbeEngine(tiny.model, some, probe, controls=True)
    (removed,), (resampled,) = (
        of(engine, [tiny.feature(3)]) for of in (ablation_effects, resampling_effects)
    )
    change = engine.run([sb.Ablate(tiny.feature(3))])[0].reduction_from(engine.base).change
    assert (removed.mean, removed.n) == (pytest.approx(change.mean, abs=1e-6), len(engine.base.did.values))
    assert resampled.n == removed.n
    assert exact_resampling(engine, [tiny.feature(3)])[0] == resampled.mean


def test_attribution_inside_inference_mode_is_the_same(gemma3, pairs, probe):
    plain = attribution(ProbeEngine(gemma3.model, pairs, probe), gemma3.sae)
    with torch.inference_mode():
        inside = attribution(ProbeEngine(gemma3.model, pairs, probe), gemma3.sae)
    np.testing.assert_allclose(inside, plain, atol=1e-6)
