"""SAEs of other families rank and edit through the full path, with SAELens' own numbers; transcoders are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.discovery.attribution import attribution
from sae_bias.discovery.causal import causal_ladder
from sae_bias.discovery.dashboards import feature_card
from sae_bias.discovery.matching import match_features
from sae_bias.discovery.resolve import resolve_index
from sae_bias.steering.engine import ProbeEngine

LAYER, D_SAE = 1, 40
FAMILIES = {
    "topk": {"k": 6},
    "batchtopk": {"k": 6},
    "gated": {},
    "standard": {},
    "jumprelu": {},
    "topk_rescaled": {"k": 6, "rescale_acts_by_decoder_norm": True},
    "topk_rescaled_normed": {
        "k": 6,
        "rescale_acts_by_decoder_norm": True,
        "normalize_activations": "constant_norm_rescale",
    },
    "standard_layer_norm": {"normalize_activations": "layer_norm"},
    "jumprelu_constant_norm": {"normalize_activations": "constant_norm_rescale"},
    "standard_average_in": {"normalize_activations": "expected_average_only_in"},
}


def lens_sae(kind, resid):
    """A SAELens SAE whose features fire on this model's residuals."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post", model_name="tiny")
    name = kind.partition("_")[0]
    torch.manual_seed(3)
    if kind == "batchtopk":
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=32, d_sae=D_SAE, metadata=metadata, **FAMILIES[kind])
        )
    else:
        sae_class, config_class = get_sae_class(name)
        sae = sae_class(config_class(d_in=32, d_sae=D_SAE, metadata=metadata, **FAMILIES[kind]))
    scale = float(resid.norm(dim=-1).mean())
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            normed = "norm" in kind
            spread = 1.0 / scale if parameter_name == "W_enc" and not normed else 0.2
            parameter.normal_(std=spread)
        sae.W_dec.normal_(std=0.1 if normed else 0.1 * scale / 32**0.5)
        sae.W_dec *= torch.linspace(0.5, 2.0, D_SAE)[:, None]  # rows of unlike length
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae.eval()


@pytest.fixture(params=list(FAMILIES))
def family(request, gemma3, pairs, tmp_path):
    resid = torch.cat(sb.residuals(gemma3.model, [p.ai for p in pairs], LAYER, positions="all"))
    lens = lens_sae(request.param, resid)
    if request.param == "batchtopk":  # its inference form is a JumpReLU
        from sae_lens import SAE

        with torch.no_grad():
            acts = lens.encode(resid)
        lens.topk_threshold.fill_(float(acts[acts > 0].median()))
        lens.save_inference_model(tmp_path / "batchtopk")
        return SAE.load_from_disk(tmp_path / "batchtopk"), sb.load_sae(tmp_path / "batchtopk")
    return lens, sb.load_sae(lens)


def test_a_batchtopk_sae_in_training_is_refused(gemma3):
    with pytest.raises(sb.RequestError, match="save_inference_model"):
        sb.load_sae(lens_sae("batchtopk", torch.randn(9, 32)))


def test_it_ranks_by_saelens_own_activations(family, gemma3, pairs):
    lens, sae = family
    frame = sb.rank_features(gemma3.model, sae, pairs).to_frame().set_index("index").sort_index()
    with torch.no_grad():
        human, ai = (lens.encode(sb.residuals(gemma3.model, [getattr(p, s) for p in pairs], LAYER)) for s in ("human", "ai"))  # fmt: skip
    assert np.allclose(frame["mean_diff"], (ai - human).mean(0), atol=1e-4)
    assert np.allclose(frame["fire_ai"], (ai > 0).float().mean(0))
    by_interaction = sb.rank_features(gemma3.model, sae, sb.load_grid()[:400], by="interaction")
    assert by_interaction.family_size == D_SAE


def decoded_change(lens, x, index, edit):
    """decode(edited) − decode(unedited) by SAELens itself, whose encode leaves the size for the decode that follows."""
    acts = lens.encode(x)
    before = lens.decode(acts)
    edited = lens.encode(x).clone()
    edited[..., index] = edit(edited[..., index])
    return lens.decode(edited) - before


def bias_by_plain_hooks(model, engine, pairs, lens, index, edit, size=1.0):
    """The probe's bias with SAELens' own change added by a plain forward hook of Hugging Face's model, BOS left alone."""

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        delta = size * decoded_change(lens, x, index, edit)
        delta[:, 0] = 0.0
        return (x + delta, *output[1:]) if isinstance(output, tuple) else x + delta

    handle = model.layer(LAYER).register_forward_hook(hook)
    try:
        with torch.no_grad():
            z = {t: model.hf(torch.tensor([model.encode(t)])).logits[0, -1] for p in pairs for t in (p.human, p.ai)}  # fmt: skip
    finally:
        handle.remove()
    base, words = engine.base, [w.tokens[0] for w in engine.base.vocabulary.kept]
    score = {t: base.probe.score_values(v[words].numpy()[None], base.positive)[0] for t, v in z.items()}
    return np.mean([score[p.human] - score[p.ai] for p in pairs])


EDITS = {
    "ablate": (lambda f: sb.Ablate(f), torch.zeros_like),
    "scale": (lambda f: sb.Scale(f, -2.0), lambda a: -2.0 * a),
    "clamp always": (lambda f: sb.Clamp(f, 3.0, when="always"), lambda a: torch.full_like(a, 3.0)),
    "steer": (lambda f: sb.Steer(f, 4.0), lambda a: a + 4.0),
}


def test_an_edit_is_saelens_own_decode_edited_less_unedited(family, gemma3, pairs, probe):
    lens, sae = family
    engine = ProbeEngine(gemma3.model, pairs, probe)
    index = _busiest(engine, sae)
    for name, (make, rule) in EDITS.items():
        found = engine.run([make(sae.feature(index))])[0].bias
        by_hand = bias_by_plain_hooks(gemma3.model, engine, pairs, lens, index, rule)
        assert found == pytest.approx(by_hand, abs=2e-5), name
        assert abs(by_hand - engine.base.bias) > 1e-4, f"an edit that does nothing tests nothing: {name}"


def _busiest(engine, sae) -> int:
    """The feature of largest attributed effect."""
    return int(np.abs(attribution(engine, sae)).argmax())


def test_attribution_is_the_slope_of_saelens_own_ablation(family, gemma3, pairs, probe):
    lens, sae = family
    engine = ProbeEngine(gemma3.model, pairs, probe)
    attributed = attribution(engine, sae)
    assert len(attributed) == D_SAE
    for index in np.argsort(-np.abs(attributed))[:2]:
        up, down = (
            bias_by_plain_hooks(gemma3.model, engine, pairs, lens, int(index), torch.zeros_like, size)
            for size in (0.02, -0.02)
        )
        assert attributed[index] == pytest.approx((down - up) / 0.04, rel=0.02, abs=1e-4)


def test_the_causal_analysis_writes_what_the_edits_write(family, gemma3, pairs, probe):
    lens, sae = family
    engine = ProbeEngine(gemma3.model, pairs, probe)
    feature = sae.feature(index := _busiest(engine, sae))
    rungs = causal_ladder(gemma3.model, feature, pairs, probe, layers=[LAYER], positions=0).rungs
    effect = rungs.set_index("rung")["effect"]
    resampled = engine.base.bias - engine.run([sb.Resample(feature)])[0].bias
    assert effect["resample"] == pytest.approx(resampled, abs=2e-5)
    x = sb.residuals(gemma3.model, [p.ai for p in pairs], LAYER)
    with torch.no_grad():
        written = -decoded_change(lens, x, index, torch.zeros_like)
    torch.testing.assert_close(feature.write(x, feature.activation(x)), written, atol=2e-5, rtol=1e-4)


def test_normalization_that_cannot_be_exact_is_refused():
    resid = torch.randn(9, 32)
    lens = lens_sae("standard", resid)
    lens.cfg.normalize_activations = "covariance_whitening"
    with pytest.raises(sb.RequestError, match="folded"):
        sb.load_sae(lens)


def test_a_normalizing_sae_decodes_with_the_residuals_it_read():
    sae = sb.load_sae(lens_sae("jumprelu_constant_norm", torch.randn(9, 32)))
    with pytest.raises(sb.RequestError, match=r"decode\(acts, x\)"):
        sae.decode(sae.encode(torch.randn(2, 32)))


def test_a_temporal_sae_is_refused(tmp_path):
    from sae_files import random_sae, write_saelens

    folder = write_saelens(tmp_path / "temporal", random_sae(), "temporal")
    with pytest.raises(sb.RequestError, match="temporal SAE"):
        sb.load_sae(folder)


def test_card_ladder_resolve_and_match_take_the_full_path(gemma3, pairs, probe):
    resid = torch.cat(sb.residuals(gemma3.model, [p.ai for p in pairs], LAYER, positions="all"))
    sae = sb.load_sae(lens_sae("topk", resid))
    assert not sae.reduces_to_one_row
    ranked = sb.rank_features(gemma3.model, sae, pairs, by="attribution", probe=probe)
    feature = sae.feature(int(ranked.frame["index"].iloc[0]))
    grid = sb.PromptGrid(
        tuple(p for p in sb.load_grid() if p.statement.startswith("published")), name="published"
    )
    assert feature_card(gemma3.model, feature, [p.human for p in pairs], grid=grid).activity.n_tokens > 0
    rungs = causal_ladder(gemma3.model, feature, pairs, probe, layers=[LAYER], positions=1).to_frame()["rung"]
    assert {"all features", "error"} <= set(rungs)
    assert resolve_index(gemma3.model, feature.index, sae).to_frame()["status"].tolist() == ["read"]
    found = match_features(feature, gemma3.model, gemma3.model, sae, grid)
    assert found.candidates["rho"].iloc[0] == pytest.approx(1.0, abs=1e-6)


def test_transcoders_are_refused():
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class("transcoder")
    lens = sae_class(config_class(d_in=32, d_sae=8, d_out=32, apply_b_dec_to_input=False))
    with pytest.raises(sb.RequestError, match=r"transcoder|hook_name"):
        sb.load_sae(lens)
