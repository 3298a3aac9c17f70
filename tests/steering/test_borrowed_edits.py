"""Edits that read elsewhere (Resample, Patch), strengths in units of the maximum, partial projection, whole-SAE encoders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sae_bias as sb
from sae_bias.models.residuals import residuals
from sae_bias.probe.reading import shared_after_subject
from sae_bias.steering.controls import observed_max
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.intervention import from_dict

F = 3
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def subject_pairs():
    """Subjects of different lengths that share their last word, in three templates."""
    texts = ["{} says hello. This is", "{} wants tea. This is", "Today {} fears being deleted. This is"]
    return sb.PromptPairs(
        tuple(
            sb.PromptPair(t.format(human), t.format(ai), f"t{i}", e, subject_human=human, subject_ai=ai)
            for i, t in enumerate(texts)
            for e, human, ai in (("a", "a human", "an AI"), ("b", "the person", "the assistant person"))
        ),
        name="subjects",
    )


# --- resample ---


def _by_hand(tiny, pair, feature, words):
    """s(AI) with the feature's human value at each matched position, by one plain hook."""
    model = tiny.model
    human, ai = model.encode(pair.human), model.encode(pair.ai)
    first = len(model.encode(pair.ai[: pair.ai.index(pair.subject_ai) + len(pair.subject_ai)]))
    suffix = min(
        len(ai) - first,
        len(human)
        - len(model.encode(pair.human[: pair.human.index(pair.subject_human) + len(pair.subject_human)])),
    )
    x_human = residuals(model, [pair.human], feature.site, positions="all")[0]

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = x.clone()
        for back in range(1, suffix + 1):
            change = feature.activation(x_human[-back]) - feature.activation(x[0, -back])
            new[0, -back] += change * feature.w_dec
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.layer(feature.site.layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            z = model.hf(input_ids=torch.tensor([ai])).logits[0, -1]
    finally:
        handle.remove()
    return [float(z[i]) for i in words]


def test_resample_gives_ai_prompts_the_human_value_after_the_subject(tiny, subject_pairs, probe):
    model, feature = tiny.model, tiny.feature(F)
    silent = replace(feature, threshold=torch.tensor(1e9))
    with sb.intervene(model, sb.Resample(silent)):  # read as the edit is, without any change
        base = sb.run_probe(model, subject_pairs, probe)
    with sb.intervene(model, sb.Resample(feature)) as receipt:
        after = sb.run_probe(model, subject_pairs, probe)
    words = [w.tokens[0] for w in after.vocabulary.kept]
    expected = [_by_hand(tiny, pair, feature, words) for pair in subject_pairs]
    np.testing.assert_allclose(after.values_ai, expected, rtol=1e-4, atol=2e-3)
    np.testing.assert_array_equal(after.values_human, base.values_human)
    assert receipt.positions_changed > 0


@pytest.mark.parametrize("text", ["{0} says that {0} wants tea. This is", "The personal aide of the AI personality says {0} wants tea. This is"])  # fmt: skip
def test_a_subject_is_left_alone_at_its_last_mention_and_as_a_whole_word(gemma3, text):
    """Neither the head noun of its second mention nor a longer word that begins like it stands for the words after the subject."""
    subjects = "the person", "the AI person"
    human, ai = (text.format(s) for s in subjects)
    pair = sb.PromptPair(human, ai, "t", "e", subject_human=subjects[0], subject_ai=subjects[1])
    encode = gemma3.model.encode
    after = len(encode(human)) - len(encode(human.removesuffix(" wants tea. This is")))
    assert shared_after_subject(gemma3.model, pair, encode(human), encode(ai)) == after


def test_the_engine_resamples_as_the_hooks_do(tiny, subject_pairs, probe):
    edit = sb.Resample(tiny.feature(F))
    with sb.intervene(tiny.model, edit):
        hooked = sb.run_probe(tiny.model, subject_pairs, probe)
    run, _ = ProbeEngine(tiny.model, subject_pairs, probe).run([edit])
    np.testing.assert_allclose(run.values_ai, hooked.values_ai, rtol=1e-4, atol=2e-3)
    np.testing.assert_array_equal(
        run.values_human, ProbeEngine(tiny.model, subject_pairs, probe).base.values_human
    )


def test_resampling_after_several_token_words(gemma3, subject_pairs):
    """Word pieces stand in both prompts, so they are matched too."""
    from architectures import SEVERAL_TOKENS

    probe = sb.Probe(["natural", SEVERAL_TOKENS[0]], ["wrong", SEVERAL_TOKENS[1]], "logodds")
    edit = sb.Resample(gemma3.feature(F))
    with sb.intervene(gemma3.model, edit):
        hooked = sb.run_probe(gemma3.model, subject_pairs, probe)
    run, _ = ProbeEngine(gemma3.model, subject_pairs, probe).run([edit])
    np.testing.assert_allclose(run.values_ai, hooked.values_ai, rtol=1e-4, atol=2e-3)
    assert (hooked - sb.run_probe(gemma3.model, subject_pairs, probe)).mean_abs > 0


def test_resample_needs_a_pair(gemma3, subject_pairs, probe):
    """Generation has no pairs, nor has a prompt that is paired in two ways."""
    edit = sb.Resample(gemma3.feature(F))
    with pytest.raises(sb.SaeBiasError, match="paired human prompt"):
        sb.generate(gemma3.model, ["an AI says"], interventions=[edit], max_new_tokens=2)
    ai = subject_pairs[0].ai
    twice = sb.PromptPairs((subject_pairs[0], sb.PromptPair("the person says hello. This is", ai, "t", "e")))
    with pytest.raises(sb.SaeBiasError, match="paired human prompt"), sb.intervene(gemma3.model, edit):
        sb.run_probe(gemma3.model, twice, probe)
    assert not gemma3.model.foreign_hooks()
    assert gemma3.model._edits is None


def test_a_sweep_probes_resampled_cells_and_leaves_their_costs_undefined(gemma3, subject_pairs, probe):
    cells = [sb.Resample(gemma3.feature(F)), sb.Ablate(gemma3.feature(F))]
    frame = sb.run_sweep(gemma3.model, subject_pairs, sb.Sweep(cells), probe=probe).frame
    assert list(frame["intervention"]) == ["none", "resample", "ablate"]
    assert np.isfinite(frame["bias"]).all()


# --- patching between two models ---


@pytest.fixture(scope="module")
def twin(make_tiny):
    """A model of the same architecture with other weights."""
    model = make_tiny("gemma3").fresh()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.name = "twin"
    return model


def test_patching_the_last_layer_reads_the_other_model(gemma3, twin, pairs, probe):
    """All of the twin's last residual through the same unembedding is the twin itself, where the norms agree."""
    model = gemma3.model
    last = sb.Patch(model.n_layers - 1, twin, include_special=True)
    with sb.intervene(model, last):
        patched = sb.run_probe(model, pairs, probe)
    rows, _ = model.rows([w.tokens[0] for w in patched.vocabulary.kept])
    x = residuals(twin, [p.ai for p in pairs], model.n_layers - 1)
    np.testing.assert_allclose(patched.values_ai, model.final_norm(x) @ rows.T, rtol=1e-4, atol=1e-3)


def test_patching_a_model_with_itself_changes_nothing(tiny, pairs, probe):
    base = sb.run_probe(tiny.model, pairs, probe)
    with sb.intervene(tiny.model, sb.Patch(1, tiny.fresh())) as receipt:
        same = sb.run_probe(tiny.model, pairs, probe)
    np.testing.assert_allclose(same.values_ai, base.values_ai, atol=1e-5)
    assert receipt.edits[0].positions_seen > 0


def test_the_engine_patches_as_the_hooks_do(gemma3, twin, pairs, probe):
    edit = sb.Patch(1, twin)
    with sb.intervene(gemma3.model, edit):
        hooked = sb.run_probe(gemma3.model, pairs, probe)
    run, _ = ProbeEngine(gemma3.model, pairs, probe).run([edit])
    np.testing.assert_allclose(run.values_ai, hooked.values_ai, rtol=1e-4, atol=2e-3)
    two, _ = ProbeEngine(gemma3.model, pairs, probe).run([sb.Ablate(gemma3.feature(F)), sb.Patch(2, twin)])
    with sb.intervene(gemma3.model, sb.Ablate(gemma3.feature(F)), sb.Patch(2, twin)):
        both = sb.run_probe(gemma3.model, pairs, probe)
    np.testing.assert_allclose(two.values_ai, both.values_ai, rtol=1e-4, atol=2e-3)


def test_patched_greedy_text_is_the_same_with_and_without_cache(gemma3, twin):
    prompts = ["an AI says hello. This is", "a human"]
    texts = [
        [c.tokens for c in sb.generate(gemma3.model, prompts, interventions=[sb.Patch(1, twin)], max_new_tokens=6, use_cache=cached)]
        for cached in (True, False)
    ]  # fmt: skip
    assert texts[0] == texts[1]
    assert texts[0] != [c.tokens for c in sb.generate(gemma3.model, prompts, max_new_tokens=6)]


def test_patching_between_architectures_is_refused(gemma3, gemma2, pairs, probe):
    with (
        pytest.raises(sb.SaeBiasError, match="one architecture"),
        sb.intervene(gemma3.model, sb.Patch(1, gemma2.model)),
    ):
        sb.run_probe(gemma3.model, pairs, probe)
    with pytest.raises(sb.SaeBiasError, match="needs a Model"):
        sb.Patch(1, "google/gemma-3-12b-it")
    with pytest.raises(sb.SaeBiasError, match="stored by name only"):
        from_dict(sb.Patch(1, gemma2.model).to_dict())


# --- strengths in units of the maximum ---


def test_strength_in_units_of_the_observed_maximum(gemma3, pairs):
    feature = gemma3.feature(F)
    top = observed_max(gemma3.model, feature, pairs)
    texts = [t for p in pairs for t in (p.human, p.ai)]
    rows = residuals(gemma3.model, texts, feature.site, positions="all")
    assert top == pytest.approx(max(float(feature.activation(r[1:]).max()) for r in rows))
    assert sb.Clamp.relative(feature, -2.0, top) == sb.Clamp(feature, -2.0 * top)
    for wrong in (0.0, float("nan"), -1.0):
        with pytest.raises(sb.SaeBiasError, match="never fired"):
            sb.Clamp.relative(feature, 1.0, wrong)


def test_a_feature_that_never_fires_has_no_maximum(gemma3, pairs):
    from dataclasses import replace

    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    with pytest.raises(sb.SaeBiasError, match="no observed maximum"):
        observed_max(gemma3.model, silent, pairs)


# --- projection ---


@quick
@given(share=st.floats(-2, 3), k=st.integers(1, 4), affine=st.booleans(), seed=st.integers(0, 50))
def test_a_share_of_a_projection_leaves_the_rest(gemma3, share, k, affine, seed):
    """(1 - share) of the component along the basis is left, about the mean where there is one; the rest is untouched."""
    site = sb.Site(1)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(32, k, generator=generator)).Q.T.contiguous()
    mean = torch.randn(32, generator=generator) if affine else None
    along = sb.Direction("drawn", site, basis, mean)
    text = ["an AI says hello. This is"]
    x = residuals(gemma3.model, text, site, positions="all")[0]
    with sb.intervene(gemma3.model, sb.ProjectOut(along, share=share)):
        seen: list[torch.Tensor] = []
        handle = gemma3.model.layer(2).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        gemma3.model.base(input_ids=torch.tensor([gemma3.model.encode(text[0])]))
        handle.remove()
    centre = 0.0 if mean is None else mean
    inside = (x - centre) @ basis.T @ basis
    expected = x - share * inside
    np.testing.assert_allclose(
        seen[0][0][1:].detach(), expected[1:], rtol=1e-3, atol=2e-4 * float(x.abs().max())
    )
    np.testing.assert_array_equal(seen[0][0][:1].detach(), x[:1])


def test_a_whole_projection_has_no_strength_and_a_part_has(gemma3):
    whole, half = sb.ProjectOut(gemma3.feature(F)), sb.ProjectOut(gemma3.feature(F), share=0.5)
    assert np.isnan(whole.strength)
    assert half.strength == 0.5
    assert "0.5·P" in half.describe()
    assert whole != half


# --- SAEs whose encoder does not reduce to one column ---


@pytest.fixture(scope="module")
def topk(make_tiny):
    """A TopK SAE of SAELens at layer 1."""
    pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    lens = TopKSAE(
        TopKSAEConfig(d_in=32, d_sae=48, k=6, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    )
    with torch.no_grad():
        lens.W_enc.normal_()
        lens.W_dec.normal_()
    return sb.load_sae(lens)


def test_a_topk_feature_takes_the_full_path(gemma3, topk, pairs, probe):
    """a comes from the whole encoder, the error is kept, and several features share one encoding of the unedited x."""
    assert not topk.reduces_to_one_row
    text = pairs[0].ai
    x = residuals(gemma3.model, [text], 1, positions="all")[0]
    acts = topk.encode(x)
    active = [int(i) for i in (acts[1:] > 0).sum(0).topk(2).indices]
    edits = [sb.Ablate(topk.feature(active[0])), sb.Scale(topk.feature(active[1]), 2.0)]
    seen: list[torch.Tensor] = []
    with sb.intervene(gemma3.model, edits):
        handle = gemma3.model.layer(2).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        gemma3.model.base(input_ids=torch.tensor([gemma3.model.encode(text)]))
        handle.remove()
    w = topk.W_dec_rows(active)
    expected = x - acts[:, active[:1]] * w[0] + acts[:, active[1:]] * w[1]
    np.testing.assert_allclose(seen[0][0][1:].detach(), expected[1:], rtol=1e-4, atol=1e-4)
    result = sb.run_sweep(gemma3.model, pairs, sb.Sweep([edits[0]]), probe=probe)
    with sb.intervene(gemma3.model, edits[0]):
        hooked = sb.run_probe(gemma3.model, pairs, probe)
    assert result.frame["bias"][1] == pytest.approx(hooked.bias, rel=1e-4, abs=1e-4)
