"""Residual capture and resuming the pass: the plain model's numbers, from any layer."""

from __future__ import annotations

import independent
import numpy as np
import pytest
import torch
from architectures import N_LAYERS, PAIRS, needs_bridge

import sae_bias as sb
from sae_bias.measures.fidelity import check_fidelity
from sae_bias.models.forward import Kept, capture_layers, forward, log_sum_exp, plan_batches
from sae_bias.prompts.grid import GridPrompt

TEXTS = [p[2] for p in PAIRS] + [p[3] for p in PAIRS]
CLOSE = 1e-4


def test_residuals_are_the_plain_models(tiny):
    plain = independent.Plain.load(tiny.folder)
    for layer in range(N_LAYERS):
        found = sb.residuals(tiny.model, TEXTS, layer, positions="all")
        for text, x in zip(TEXTS, found):
            torch.testing.assert_close(x, plain.residual(text, layer), atol=CLOSE, rtol=1e-5)
        last = sb.residuals(tiny.model, TEXTS, f"blocks.{layer}.hook_resid_post")
        torch.testing.assert_close(last, torch.stack([x[-1] for x in found]), atol=0, rtol=0)


def test_residuals_are_what_the_bridge_calls_resid_post(gemma3):
    model = gemma3.fresh()
    ids = torch.tensor([model.encode(TEXTS[0])])
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(ids)
    torch.testing.assert_close(
        cache["blocks.1.hook_resid_post"][0],
        sb.residuals(model, TEXTS[:1], 1, positions="all")[0],
        atol=CLOSE,
        rtol=1e-5,
    )


@pytest.mark.parametrize("bridged", [False, True])
def test_resuming_is_the_whole_pass(tiny, bridged):
    """From every layer: exact on plain Hugging Face modules, to 1e-5 through the bridge's."""
    if bridged:
        needs_bridge(tiny)
    model = tiny.fresh()
    if bridged:
        assert model.bridge is not None
    tokens = torch.tensor([model.encode(TEXTS[0])] * 2)
    whole = forward(model, tokens).resid
    originals = list(model.layer_list)
    for layer, x in capture_layers(model, tokens, range(N_LAYERS)).items():
        resumed = forward(model, tokens, resume=Kept(layer, x)).resid
        torch.testing.assert_close(resumed, whole, atol=1e-4 if bridged else 0, rtol=0)
    assert all(a is b for a, b in zip(originals, model.layer_list)), "the layers must be back in place"


def test_layers_are_back_after_an_error(gemma3):
    model = gemma3.fresh()
    tokens = torch.tensor([model.encode(TEXTS[0])])
    originals = list(model.layer_list)
    with pytest.raises(RuntimeError):
        forward(model, tokens, resume=Kept(1, torch.zeros(1, 3, 5)))
    assert all(a is b for a, b in zip(originals, model.layer_list))
    assert not any(m._forward_hooks for m in model.hf.modules())


def test_layers_above_the_wanted_one_are_not_run(gemma3):
    model = gemma3.fresh()
    ran = []
    handle = model.layer(3).register_forward_hook(lambda *_: ran.append(3))
    capture_layers(model, torch.tensor([model.encode(TEXTS[0])]), [1])
    handle.remove()
    assert ran == []


def test_logits_of_some_rows_are_rows_of_all(tiny):
    final = forward(tiny.model, torch.tensor([tiny.model.encode(TEXTS[0])]))
    with torch.no_grad():
        whole = tiny.model.hf(input_ids=torch.tensor([tiny.model.encode(TEXTS[0])])).logits
    torch.testing.assert_close(final.logits(), whole, atol=CLOSE, rtol=1e-5)
    torch.testing.assert_close(final.logits([5, 300, 7]), final.logits()[..., [5, 300, 7]], atol=1e-5, rtol=0)
    normalizer = torch.cat([log_sum_exp(z) for _, z in final.blocks()])
    torch.testing.assert_close(
        normalizer, whole.double().logsumexp(-1)[0], atol=CLOSE, rtol=1e-5, check_dtype=False
    )


def test_batches_are_of_one_length_and_complete():
    sequences = [[1] * n for n in (3, 5, 3, 4, 5, 3)]
    batches = plan_batches(sequences, torch.device("cpu"), batch_size=2)
    assert sorted(i for b in batches for i in b.index) == list(range(6))
    assert [b.tokens.shape for b in batches] == [(2, 3), (1, 3), (1, 4), (2, 5)]
    assert all(len(sequences[i]) == b.tokens.shape[1] for b in batches for i in b.index)


def test_sites_are_checked(gemma3):
    with pytest.raises(sb.RequestError, match=r"layer 4 does not exist.*layers 0 to 3"):
        sb.residuals(gemma3.model, TEXTS, 4)
    for site in ("blocks.1.hook_resid_pots", "blocks.1.attn.hook_q", "nonsense", -1):
        with pytest.raises(sb.RequestError):
            sb.residuals(gemma3.model, TEXTS, site)
    with pytest.raises(sb.RequestError, match="positions="):
        sb.residuals(gemma3.model, TEXTS, 1, positions="first")
    assert sb.Site.parse("blocks.2.hook_resid_pre") == sb.Site(1), "before layer 2 is after layer 1"


def test_the_fidelity_gate_passes_here_and_stops_on_another_residual(gemma3, monkeypatch):
    found = check_fidelity(gemma3.model, gemma3.sae, n_texts=4)
    assert found.residual_max_rel_error < 1e-4
    from sae_bias.measures import fidelity

    def off(model, tokens, layers, **kwargs):
        return {k: v * 1.01 for k, v in capture_layers(model, tokens, layers, **kwargs).items()}

    monkeypatch.setattr(fidelity, "capture_layers", off)
    with pytest.raises(sb.GateError):
        check_fidelity(gemma3.model, gemma3.sae, n_texts=4)


def test_activation_table_reads_the_encoder(gemma3):
    subjects = {"an AI": "ai", "a human": "human", "a dog": "animal"}
    statements = {"hello": "says hello.", "yes": "says yes."}
    grid = sb.PromptGrid(
        tuple(
            GridPrompt(f"{s} {text} This is", s, group, name, "speech", name)
            for name, text in statements.items()
            for s, group in subjects.items()
        )
    )
    plain, sae = independent.Plain.load(gemma3.folder), independent.PlainSae.load(gemma3.sae_folder)
    acts = [sae.acts(plain.residual(p.text, 1)) for p in grid]
    loud_at_bos = int((acts[0][0] - acts[0][1:].max(0).values).argmax())
    assert acts[0][0, loud_at_bos] > acts[0][1:, loud_at_bos].max()
    for k in (3, 7, loud_at_bos):
        last = sb.activation_table(gemma3.model, f"{gemma3.sae_folder}#{k}", grid)
        np.testing.assert_allclose(last.activations, [float(a[-1, k]) for a in acts], atol=CLOSE)
        top = sb.activation_table(gemma3.model, f"{gemma3.sae_folder}#{k}", grid, positions="max")
        np.testing.assert_allclose(top.activations, [float(a[1:, k].max()) for a in acts], atol=CLOSE)
    assert list(last.to_frame().index) == list(subjects)
    assert list(last.to_frame().columns) == list(statements)
