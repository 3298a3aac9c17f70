"""SAE formats beside Gemma Scope's and SAELens': read exactly as their own libraries encode and decode; each SAE opened once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

import sae_bias as sb
from sae_bias.saes import formats
from sae_bias.saes.load import expand_saes

D_IN, D_SAE, K = 24, 72, 5


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


# --- Llama Scope and Qwen Scope, against SAELens' own loader of the published layout ----------------------
def write_llama_scope(root, hook="blocks.15.hook_resid_post", dtype=torch.bfloat16, **changes):
    """A folder as fnlp/Llama3_1-8B-Base-LXR-8x has one a layer."""
    folder = root / "Llama3_1-8B-Base-L15R-8x"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    weights = linear_weights(**{"decoder.bias": normal(D_IN, seed=3) * 0.1})
    save_file(
        {n: t.to(dtype).contiguous() for n, t in weights.items()},
        folder / "checkpoints" / "final.safetensors",
    )
    config = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        **changes,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    return folder


def write_r1_distill(root, hook="blocks.15.hook_resid_post", **changes):
    """A folder as fnlp/Llama-Scope-R1-Distill has one a layer."""
    folder = root / "800M-Slimpajama-0-OpenR1-Math-220k" / "L15R"
    folder.mkdir(parents=True, exist_ok=True)
    weights = linear_weights(
        **{
            "decoder.bias": normal(D_IN, seed=3) * 0.1,
            "log_jumprelu_threshold": normal(D_SAE, seed=4) * 0.5 - 1,
            f"dataset_average_activation_norm.{hook}": torch.tensor(NORM, dtype=torch.float64),
        }
    )
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "sae_weights.safetensors")
    config = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "act_fn": "jumprelu", **changes}
    (folder / "config.json").write_text(json.dumps(config | {"expansion_factor": D_SAE // D_IN}))
    return folder


LLAMA = {
    "one threshold": (write_llama_scope, "llama_scope_lxr_8x", "l15r_8x"),
    "own thresholds": (write_r1_distill, "llama_scope_r1_distill", "l15r_800m_slimpajama"),
}
NORM = 3.7


@pytest.fixture
def published(tmp_path, monkeypatch):
    """SAELens' downloads come from tmp_path; its table's scaling factors are those of the small files."""
    loaders = "sae_lens.loading.pretrained_sae_loaders"

    def local(repo_id="", filename="", subfolder="", **_):
        place = tmp_path if (tmp_path / subfolder / filename).exists() else tmp_path / repo_id.split("/")[-1]
        return str(place / subfolder / filename)

    monkeypatch.setattr(f"{loaders}.hf_hub_download", local)
    monkeypatch.setattr("sae_lens.saes.sae.get_norm_scaling_factor", lambda *_: D_IN**0.5 / NORM)
    monkeypatch.setitem(
        import_module(loaders).QWEN_SCOPE_MODEL_INFO, "Qwen3-1.7B-Base", ("Qwen/Qwen3-1.7B-Base", D_IN)
    )
    return tmp_path


def assert_is_the_lens(sae, lens, x):
    """The same weights bit for bit, the same features on, and SAELens' encode and decode."""
    w_enc, b_enc, threshold = sae.columns(0, sae.d_sae)
    assert torch.equal(w_enc, lens.W_enc) and torch.equal(b_enc, lens.b_enc)
    assert torch.equal(sae.W_dec_rows(range(sae.d_sae)), lens.W_dec) and torch.equal(sae.b_dec, lens.b_dec)
    if hasattr(lens, "threshold"):
        assert torch.equal(threshold, lens.threshold)
    with torch.no_grad():
        acts = lens.encode(x)
        assert 0.05 < (acts > 0).float().mean() < 0.5
        assert torch.equal(sae.encode(x) > 0, acts > 0)
        assert_reads(sae, x, acts, lens.decode(acts))


@pytest.mark.parametrize("layout", LLAMA)
def test_llama_scope_is_read_as_saelens_reads_it(published, layout):
    from sae_lens import SAE

    write, release, name = LLAMA[layout]
    folder = write(published)
    lens, x = SAE.from_pretrained(release, name), normal(40, D_IN, seed=9)
    for sae in (sb.load_sae(folder), sb.load_sae(f"{release}/{name}")):
        assert (sae.site.layer, sae.model_name) == (15, "meta-llama/Llama-3.1-8B")
        assert_is_the_lens(sae, lens, x)
    assert sb.load_sae(folder).reduces_to_one_row, "read in slices"
    assert expand_saes(published) == [str(next(folder.rglob("*.safetensors")).parent)]
    assert sb.load_sae(expand_saes(published)[0]).d_sae == D_SAE


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_llama_scope_of_attention_and_mlp_has_that_site(tmp_path, kind):
    sae = sb.load_sae(write_llama_scope(tmp_path, hook=f"blocks.3.hook_{kind}"))
    assert str(sae.site) == f"blocks.3.hook_{kind}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"},
            "a transcoder",
        ),
        ({"sae_type": "crosscoder"}, "crosscoder"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"act_fn": "topk"}, "act_fn 'topk'"),
        ({"dataset_average_activation_norm": {"in": 0}}, "norm.in is 0; expected a number above 0"),
        ({"jump_relu_threshold": "0.4"}, "jump_relu_threshold is '0.4'; expected a number"),
        ({"dataset_average_activation_norm": None}, "has no dataset_average_activation_norm"),
    ],
)
def test_llama_scope_that_is_no_such_sae_is_refused(tmp_path, changes, said):
    with pytest.raises(sb.RequestError, match=said):
        sb.load_sae(write_llama_scope(tmp_path, **changes))


def write_qwen_scope(root, d_sae=32 * 1024):
    """The pickle of layer 7 as Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 has one, of a narrower model."""
    folder = root / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir()
    weights = {
        "W_enc": normal(d_sae, D_IN) / D_IN**0.5,
        "W_dec": normal(D_IN, d_sae, seed=2),
        "b_enc": normal(d_sae, seed=1) * 0.1,
        "b_dec": normal(D_IN, seed=3) * 0.1,
    }
    torch.save(weights, folder / "layer7.sae.pt")
    return folder, weights


def test_qwen_scope_is_read_as_saelens_reads_it(published):
    from sae_lens import SAE

    folder, _ = write_qwen_scope(published)
    with pytest.raises(sb.RequestError) as refused:
        sb.load_sae(folder / "layer7.sae.pt")
    line = re.search(r'python -c "(.*?)"', str(refused.value))
    assert line is not None
    subprocess.run([sys.executable, "-c", line[1]], cwd=folder, check=True)
    release, x = "qwen-scope-3-1.7b-base-w32k-l50/layer7", normal(40, D_IN, seed=9)
    lens = SAE.from_pretrained(*release.split("/"))
    for sae in (sb.load_sae(folder / "layer7"), sb.load_sae(release)):
        assert (sae.site.layer, sae.model_name, sae.architecture) == (7, "Qwen/Qwen3-1.7B-Base", "topk")
        assert torch.equal(sae.encode(x), lens.encode(x))
        assert int((sae.encode(x) > 0).sum(1).max()) == 50
        assert_reads(sae, x, lens.encode(x), lens.decode(lens.encode(x)))
    (folder / "layer7").rename(published / "elsewhere")
    with pytest.raises(sb.RequestError, match="how many features are active"):
        sb.load_sae(published / "elsewhere")


def test_qwen_scope_of_another_width_than_its_name_is_refused(published):
    folder, weights = write_qwen_scope(published, d_sae=1024)
    (folder / "layer7").mkdir()
    save_file(weights, folder / "layer7" / "layer7.sae.safetensors")
    with pytest.raises(sb.RequestError, match="W32K-L0_50 do not fit"):
        sb.load_sae(folder / "layer7")
