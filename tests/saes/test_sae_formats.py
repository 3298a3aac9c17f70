"""SAE formats beside Gemma Scope's and SAELens': read exactly as their own libraries encode and decode; each SAE opened once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import sae_bias as sb
from sae_bias.saes import formats

D_IN, D_SAE, K = 24, 64, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear_weights(**more):
    """A torch Linear encoder and decoder: [d_sae, d_in] and [d_in, d_sae]."""
    return {
        "encoder.weight": normal(D_SAE, D_IN) / D_IN**0.5,
        "encoder.bias": normal(D_SAE, seed=1) * 0.1,
        "decoder.weight": normal(D_IN, D_SAE, seed=2) * torch.linspace(0.5, 2, D_SAE),
        **more,
    }


def relu_jump(h, threshold):
    return torch.relu(h) * (torch.relu(h) > threshold)


def auto_encoder(x, w):
    """dictionary_learning's AutoEncoder."""
    a = torch.relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return a, a @ w["decoder.weight"].T + w["bias"]


def top_k(x, w):
    """Its AutoEncoderTopK: the k largest of the ReLU."""
    h = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    a = torch.zeros_like(h).scatter(-1, h.topk(K).indices, h.topk(K).values)
    return a, a @ w["decoder.weight"].T + w["b_dec"]


def batch_top_k(x, w):
    """Its BatchTopKSAE outside training: what exceeds the stored threshold."""
    a = relu_jump((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], w["threshold"])
    return a, a @ w["decoder.weight"].T + w["b_dec"]


def jump_relu(x, w):
    """Its JumpReluAutoEncoder: activations along decoder rows of length 1."""
    length = w["W_dec"].norm(dim=1)
    a = relu_jump(x @ w["W_enc"] + w["b_enc"], w["threshold"]) * length
    return a, (a / length) @ w["W_dec"] + w["b_dec"]


def gated(x, w):
    """Its GatedAutoEncoder, likewise."""
    length = w["decoder.weight"].norm(dim=0)
    pre = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    a = ((pre + w["gate_bias"]) > 0) * torch.relu(w["r_mag"].exp() * pre + w["mag_bias"]) * length
    return a, (a / length) @ w["decoder.weight"].T + w["decoder_bias"]


def gated_weights():
    w = linear_weights(decoder_bias=normal(D_IN, seed=3) * 0.1)
    del w["encoder.bias"]
    return w | {
        name: normal(D_SAE, seed=i) * 0.2 for i, name in enumerate(("r_mag", "gate_bias", "mag_bias"), 4)
    }


KINDS = {
    "AutoEncoder": (auto_encoder, lambda: linear_weights(bias=normal(D_IN, seed=3) * 0.1)),
    "AutoEncoderTopK": (
        top_k,
        lambda: linear_weights(b_dec=normal(D_IN, seed=3) * 0.1, threshold=torch.tensor(0.3)),
    ),
    "BatchTopKSAE": (
        batch_top_k,
        lambda: linear_weights(b_dec=normal(D_IN, seed=3) * 0.1, threshold=torch.tensor(0.3)),
    ),
    "GatedAutoEncoder": (gated, gated_weights),
    "JumpReluAutoEncoder": (
        jump_relu,
        lambda: {
            "W_enc": normal(D_IN, D_SAE) / D_IN**0.5,
            "b_enc": normal(D_SAE, seed=1) * 0.1,
            "W_dec": normal(D_SAE, D_IN, seed=2),
            "b_dec": normal(D_IN, seed=3) * 0.1,
            "threshold": torch.rand(D_SAE, generator=torch.Generator().manual_seed(0)) * 0.5,
        },
    ),
}


def write_dictionary(folder, kind, weights, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "ae.safetensors")
    facts = {"dict_class": kind, "layer": 3, "lm_name": "test-model", "k": K, **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": facts, "buffer": {"ctx_len": 128}}))
    return folder


def assert_reads(sae, x, acts, decoded):
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), decoded, atol=1e-5, rtol=1e-5)
    f = int(acts.sum(0).argmax())
    edited = sae.encode(x)
    edited[:, f] = 0
    torch.testing.assert_close(
        -sae.feature(f).write(x, acts[:, f]),
        sae.decode(edited, x) - sae.decode(sae.encode(x), x),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_encodes_and_decodes_as_its_own_code(tmp_path, kind):
    rule, make = KINDS[kind]
    weights, x = make(), normal(30, D_IN, seed=9)
    sae = sb.load_sae(write_dictionary(tmp_path / "trainer_0", kind, weights))
    assert (str(sae.site), sae.model_name) == ("blocks.3.hook_resid_post", "test-model")
    assert_reads(sae, x, *rule(x, weights))


def test_sparsify_encodes_and_decodes_as_its_own_code(tmp_path):
    w = {
        "encoder.weight": normal(D_SAE, D_IN) / D_IN**0.5,
        "encoder.bias": normal(D_SAE, seed=1) * 0.1,
        "W_dec": normal(D_SAE, D_IN, seed=2),
        "b_dec": normal(D_IN, seed=3) * 0.1,
    }
    folder = tmp_path / "layers.10"
    folder.mkdir()
    save_file(w, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps({"k": K, "d_in": D_IN, "num_latents": D_SAE, "normalize_decoder": True})
    )
    x = normal(30, D_IN, seed=9)
    h = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    acts = torch.zeros_like(h).scatter(-1, h.topk(K).indices, h.topk(K).values)
    sae = sb.load_sae(folder)
    assert sae.site.layer == 10
    assert_reads(sae, x, acts, acts @ w["W_dec"] + w["b_dec"])
    (folder / "cfg.json").write_text(json.dumps({"k": K, "d_in": D_IN, "transcode": True}))
    with pytest.raises(sb.RequestError, match="no transcoders"):
        sb.load_sae(folder)


def test_a_pickle_is_answered_with_the_line_that_converts_it(tmp_path):
    folder = tmp_path / "trainer_0"
    folder.mkdir()
    torch.save({"bias": torch.zeros(2)}, folder / "ae.pt")
    for name in (folder, folder / "ae.pt"):
        with pytest.raises(sb.RequestError, match=r"weights_only=True.*ae\.safetensors"):
            sb.load_sae(name)


def test_that_line_converts(tmp_path):
    import re
    import subprocess
    import sys

    rule, make = KINDS["AutoEncoder"]
    folder = write_dictionary(tmp_path / "trainer_0", "AutoEncoder", make())
    (folder / "ae.safetensors").unlink()
    torch.save(make(), folder / "ae.pt")
    with pytest.raises(sb.RequestError) as refused:
        sb.load_sae(folder / "ae.pt")
    line = re.search(r'python -c "(.*?)"', str(refused.value))
    assert line is not None
    subprocess.run([sys.executable, "-c", line[1]], cwd=folder, check=True)
    x = normal(5, D_IN, seed=9)
    torch.testing.assert_close(sb.load_sae(folder).encode(x), rule(x, make())[0])


@pytest.mark.parametrize("name", ["w_enc", "w_dec"])
def test_transposed_weights_are_named(tmp_path, name):
    from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

    weights = random_sae()
    weights[name] = weights[name].T
    folder = write_gemma_scope_2(tmp_path / "layer_3", weights, gemma_scope_2_config(3))
    with pytest.raises(sb.RequestError, match=rf"{name} is transposed.*{name}\.T"):
        sb.load_sae(folder)


def test_an_sae_is_opened_once_and_again_when_its_files_change(tmp_path, monkeypatch):
    from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

    from sae_bias.saes.formats.gemma_scope import GemmaScope

    opened = []
    real = GemmaScope.open
    monkeypatch.setattr(GemmaScope, "open", staticmethod(lambda *a: opened.append(a) or real(*a)))
    folder = write_gemma_scope_2(tmp_path / "layer_3", random_sae(), gemma_scope_2_config(3))
    first, feature = sb.load_sae(folder), sb.load_feature(f"{folder}#5")
    assert sb.load_sae(str(folder)) is first
    assert sb.Ablate(feature) == sb.Ablate(sb.load_feature(f"{folder}#5"))
    assert len(opened) == 1
    write_gemma_scope_2(folder, random_sae(seed=1), gemma_scope_2_config(3))
    again = sb.load_feature(f"{folder}#5")
    assert len(opened) == 2
    assert sb.Ablate(again) != sb.Ablate(feature), "other weights are another feature"


def test_every_format_says_which_files_are_its_own():
    assert {"params.safetensors", "sae_weights.safetensors", "ae.safetensors", "sae.safetensors"} <= set(
        formats.weights_files()
    )
