"""SAEs of other families rank and edit through the full path, with SAELens' own numbers; transcoders are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sae_bias as sb
from sae_bias.discovery.attribution import attribution, exact_ablation
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
    "normed": {"normalize_activations": "layer_norm"},
}


def lens_sae(kind, resid):
    """A SAELens SAE whose features fire on this model's residuals."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post", model_name="tiny")
    name = {"normed": "standard"}.get(kind, kind)
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
            spread = 1.0 / scale if parameter_name == "W_enc" and kind != "normed" else 0.2
            parameter.normal_(std=spread)
        sae.W_dec.normal_(std=0.1 * scale / 32**0.5)
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


def test_it_edits_with_the_error_kept(family, gemma3, pairs, probe):
    lens, sae = family
    ranked = sb.rank_features(gemma3.model, sae, pairs, by="attribution", probe=probe)
    index = int(ranked.frame["index"].iloc[0])
    engine = ProbeEngine(gemma3.model, pairs, probe)
    removed = exact_ablation(engine, [sae.feature(index)])[0]

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        acts = lens.encode(x)
        delta = -acts[..., index, None] * lens.W_dec[index]
        delta[:, 0] = 0.0  # BOS is left alone
        return (x + delta, *output[1:]) if isinstance(output, tuple) else x + delta

    handle = gemma3.model.layer(LAYER).register_forward_hook(hook)
    try:
        with torch.no_grad():
            z = {t: gemma3.model.hf(torch.tensor([gemma3.model.encode(t)])).logits[0, -1] for p in pairs for t in (p.human, p.ai)}  # fmt: skip
    finally:
        handle.remove()
    base, words = engine.base, [w.tokens[0] for w in engine.base.vocabulary.kept]
    score = {t: base.probe.score_values(v[words].numpy()[None], base.positive)[0] for t, v in z.items()}
    by_hand = base.bias - np.mean([score[p.human] - score[p.ai] for p in pairs])
    assert removed == pytest.approx(by_hand, rel=1e-3, abs=2e-3)
    assert len(attribution(engine, sae)) == D_SAE


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
