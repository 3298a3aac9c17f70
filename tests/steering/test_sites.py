"""Sites inside a layer: what is read, edited, swept and ranked there is what plain hooks and SAELens' own encode and decode give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from independent import Plain, PlainSae
from sae_files import (
    gemma_scope_2_config,
    random_sae,
    write_gemma_scope_1,
    write_gemma_scope_2,
    write_saelens,
)

import sae_bias as sb
from sae_bias.core.site import KINDS, Site
from sae_bias.measures.fidelity import check_fidelity
from sae_bias.models.forward import capture_layers
from sae_bias.models.sites import site_width
from sae_bias.steering.controls import mismatch_edits

LAYER = 1
AFTER = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
PLACES = {  # written down from transformers' own modules: attention, its projection, MLP
    "gemma2": ("self_attn", "o_proj", "mlp"), "gemma3": ("self_attn", "o_proj", "mlp"), "gemma3_multimodal": ("self_attn", "o_proj", "mlp"),
    "gemma4": ("self_attn", "o_proj", "mlp"), "mistral": ("self_attn", "o_proj", "mlp"), "llama": ("self_attn", "o_proj", "mlp"),
    "qwen2": ("self_attn", "o_proj", "mlp"), "qwen3": ("self_attn", "o_proj", "mlp"), "qwen3_5": ("self_attn", "o_proj", "mlp"),
    "phi3": ("self_attn", "o_proj", "mlp"), "gpt_neox": ("attention", "dense", "mlp"), "gpt2": ("attn", "c_proj", "mlp"),
    "gptj": ("attn", "out_proj", "mlp"), "falcon": ("self_attention", "dense", "mlp"), "opt": ("self_attn", "out_proj", ""),
}  # fmt: skip


def plain_hook(plain: Plain, name: str, kind: str, see):
    """`see` at a site of the plain model: a forward pre-hook for `z`, else a forward hook."""
    attention, projection, mlp = PLACES[name]
    layer = plain.layer(LAYER)
    if kind == "z":
        module = getattr(getattr(layer, attention), projection)
        return module.register_forward_pre_hook(lambda m, a: (see(a[0]), *a[1:]))
    after = AFTER[kind] if name.startswith("gemma") else {"attn_out": attention, "mlp_out": mlp}[kind]

    def hook(module, args, output):
        new = see(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return getattr(layer, after).register_forward_hook(hook)


@torch.no_grad()
def plain_read(plain: Plain, name: str, kind: str, ids: list[int]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = plain_hook(plain, name, kind, lambda x: seen.append(x.clone()) or x)
    plain.hf(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0].reshape(len(ids), -1)


def inner_sae(tmp_path, tiny, pairs, kind: str, folder: str = ""):
    """A Gemma Scope 2 SAE at a site inside layer 1 that fires on the model's own tensors there."""
    texts = [t for p in pairs for t in (p.human, p.ai)]
    x = torch.cat([r[1:] for r in sb.residuals(tiny.model, texts, Site(LAYER, kind), positions="all")])
    weights = random_sae(x.shape[-1], 24)
    scale = (x @ weights["w_enc"]).std(0)
    weights["w_enc"] /= scale
    h = x @ weights["w_enc"]
    weights["b_enc"] = -h.median(0).values
    weights["w_dec"] *= float(x.norm(dim=-1).median()) * 0.3
    hook = {"z": "self_attn.o_proj.input", "mlp_out": "post_feedforward_layernorm.output"}[kind]
    config = gemma_scope_2_config(
        LAYER, 24, hf_hook_point_in=f"model.layers.{LAYER}.{hook}", hf_hook_point_out=None
    )
    name = folder or {"z": "attn_out", "mlp_out": "mlp_out"}[kind]
    return write_gemma_scope_2(tmp_path / name / f"layer_{LAYER}_width_24_l0_big", weights, config)


@pytest.mark.parametrize("kind", ["z", "attn_out", "mlp_out"])
def test_what_is_read_is_what_a_plain_hook_sees(kind, tiny, pairs):
    model, plain, ids = tiny.model, Plain.load(tiny.folder), tiny.model.encode(pairs.pairs[0].ai)
    if (tiny.name, kind) == ("opt", "mlp_out"):  # its MLP sees batch and positions as one axis
        with pytest.raises(sb.RequestError, match="resid_post only"):
            capture_layers(model, torch.tensor([ids]), [Site(LAYER, kind)])
        return
    own = capture_layers(model, torch.tensor([ids]), [Site(LAYER, kind)])[Site(LAYER, kind)][0]
    expected = plain_read(plain, tiny.name, kind, ids)
    assert own.shape == expected.shape and own.shape[1] == site_width(model, Site(LAYER, kind))
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "llama", "mistral", "qwen3", "gpt2", "gpt_neox", "falcon"]
)
def test_attention_and_mlp_add_up_to_the_residual(name, make_tiny, pairs):
    model = make_tiny(name).model
    wanted = [Site(0), Site(LAYER, "attn_out"), Site(LAYER, "mlp_out"), Site(LAYER)]
    x = capture_layers(model, torch.tensor([model.encode(pairs.pairs[0].ai)]), wanted)
    torch.testing.assert_close(x[wanted[0]] + x[wanted[1]] + x[wanted[2]], x[wanted[3]])


@pytest.mark.parametrize("kind", ["z", "mlp_out"])
def test_an_edit_is_a_plain_hook_with_the_same_delta(kind, gemma3, pairs, probe, tmp_path):
    folder = inner_sae(tmp_path, gemma3, pairs, kind)
    plain, sae, model = Plain.load(gemma3.folder), PlainSae.load(folder), gemma3.model
    own = sb.load_sae(folder)
    assert own.site == Site(LAYER, kind)
    prompts = [t for p in pairs for t in (p.human, p.ai)]
    edits = {"ablate": (sb.Ablate(f"{folder}#3"), lambda a: 0 * a), "clamp": (sb.Clamp(f"{folder}#3", 7.0), lambda a: torch.where(a > 0, 7.0, a))}  # fmt: skip
    for edit, rule in edits.values():
        delta = sae.edit({3: rule})
        moved = 0.0
        for prompt, logits in zip(prompts, sb.logits(model, prompts, edit)):
            ids = plain.ids(prompt)
            keep = torch.tensor([i not in plain.special for i in ids])[:, None]
            with torch.no_grad():
                base = plain.hf(input_ids=torch.tensor([ids])).logits[0, -1]
                handle = plain_hook(
                    plain, "gemma3", kind, lambda x, k=keep, d=delta: x + torch.where(k, d(x[0]), 0.0)[None]
                )
                expected = plain.hf(input_ids=torch.tensor([ids])).logits[0, -1]
                handle.remove()
            torch.testing.assert_close(logits.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
            moved = max(moved, float((expected - base).abs().max()))
        assert moved > 1e-2
    cells = [sb.Clamp(f"{folder}#{f}", 7.0) for f in (3, 4, 5)]
    swept = sb.run_sweep(model, pairs, sb.Sweep(interventions=cells), probe=probe).to_frame()
    for cell, edit in zip(swept["bias"].tolist()[1:], cells):
        with sb.intervene(model, edit):
            assert cell == pytest.approx(sb.run_probe(model, pairs, probe).bias, abs=1e-4)


@pytest.mark.parametrize("kind", ["z", "mlp_out"])
def test_ranking_and_activations_are_saelens_own(kind, gemma3, pairs, tmp_path):
    from sae_lens import SAE
    from sklearn.metrics import roc_auc_score

    folder = inner_sae(tmp_path, gemma3, pairs, kind)
    weights = PlainSae.load(folder).w
    hook = {"z": f"blocks.{LAYER}.attn.hook_z", "mlp_out": f"blocks.{LAYER}.hook_mlp_out"}[kind]
    as_lens = write_saelens(
        tmp_path / "lens", weights, apply_b_dec_to_input=False, metadata={"hook_name": hook},
        reshape_activations="hook_z" if kind == "z" else "none",
    )  # fmt: skip
    lens, plain = SAE.load_from_disk(as_lens), Plain.load(gemma3.folder)
    if kind == "z":
        lens.turn_off_forward_pass_hook_z_reshaping()
    texts = [[p.ai for p in pairs], [p.human for p in pairs]]
    acts = [
        [lens.encode(plain_read(plain, "gemma3", kind, plain.ids(t))).detach().numpy() for t in side]
        for side in texts
    ]
    for given in (folder, as_lens):
        ranking = sb.rank_features(gemma3.model, str(given), sb.Contrast(*texts), reduce="last").to_frame()
        by_index = ranking.set_index("index")["auroc"]
        last = [np.stack([a[-1] for a in side]) for side in acts]
        for f in range(24):
            labels = [1] * len(last[0]) + [0] * len(last[1])
            assert by_index[f] == pytest.approx(
                roc_auc_score(labels, np.r_[last[0][:, f], last[1][:, f]]), abs=1e-6
            )
        found = sb.activations(gemma3.model, texts[0], f"{given}#5", reduce="last").to_numpy()[:, 0]
        np.testing.assert_allclose(found, last[0][:, 5], rtol=1e-4, atol=1e-5)
    gate = check_fidelity(gemma3.model, sb.load_sae(folder))
    rows = torch.cat([plain_read(plain, "gemma3", kind, ids)[1:] for ids in map(plain.ids, sb.prompts.texts.load_texts("neutral")[:gate_texts()])])  # fmt: skip
    own = lens.encode(rows)
    fvu = (rows - lens.decode(own)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum()
    assert gate.fvu == pytest.approx(float(fvu), rel=1e-4)
    assert gate.l0 == pytest.approx(float((own > 0).sum(-1).float().mean()), rel=1e-3)


def gate_texts() -> int:
    from sae_bias.measures.fidelity import N_TEXTS

    return N_TEXTS


def test_what_is_defined_on_the_residual_says_so(gemma3, pairs, probe, tmp_path):
    folder = inner_sae(tmp_path, gemma3, pairs, "mlp_out")
    with pytest.raises(sb.RequestError, match="resid_post"):
        sb.rank_features(gemma3.model, str(folder), pairs, by="attribution", probe=probe)
    assert len(sb.rank_features(gemma3.model, str(folder), pairs).to_frame()) == 24


def test_the_wrong_hook_stands_beside_the_wrong_layer(gemma3, pairs):
    edit = sb.Steer(gemma3.feature(3), 2.0)
    labels = {label: e.site for e, label in mismatch_edits(gemma3.model, edit)}
    assert labels["the same at mlp_out"] == Site(LAYER, "mlp_out") and labels["the same at attn_out"] == Site(
        LAYER, "attn_out"
    )
    assert ("the same at z" in labels) == (site_width(gemma3.model, Site(LAYER, "z")) == gemma3.model.d_model)
    plain, prompt = Plain.load(gemma3.folder), pairs.pairs[0].ai
    row = PlainSae.load(gemma3.sae_folder).w["w_dec"][3]
    keep = torch.tensor([i not in plain.special for i in plain.ids(prompt)])[:, None]
    handle = plain_hook(plain, "gemma3", "mlp_out", lambda x: x + torch.where(keep, 2.0 * row, 0.0)[None])
    with torch.no_grad():
        expected = plain.hf(input_ids=torch.tensor([plain.ids(prompt)])).logits[0, -1]
    handle.remove()
    (wrong,) = [e for e, label in mismatch_edits(gemma3.model, edit) if label == "the same at mlp_out"]
    torch.testing.assert_close(
        sb.logits(gemma3.model, [prompt], wrong).reshape(-1), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("gemma-scope-2b-pt-att/layer_1/width_24/average_l0_8", "z"), ("gemma-scope-2b-pt-mlp/layer_1/width_24/average_l0_8", "mlp_out"),
        ("gemma-scope-2b-pt-res/layer_1/width_24/average_l0_8", "resid_post"),
    ],
)  # fmt: skip
def test_gemma_scope_1_folders_say_their_site(folder, kind, tmp_path):
    assert sb.load_sae(write_gemma_scope_1(tmp_path / folder, random_sae(16, 24))).site == Site(1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_is_read_back_from_its_name(kind):
    assert Site.parse(str(Site(3, kind))) == Site(3, kind)
    assert sorted([Site(2, kind), Site(1), Site(3, "z")]) == [Site(1), Site(2, kind), Site(3, "z")]
