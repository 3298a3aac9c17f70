"""Interventions: each rule equal to an independent script on every architecture, and values that behave as values."""

from __future__ import annotations

import json
import math

import independent
import numpy as np
import pytest
import torch
from architectures import NEGATIVE, PAIRS, POSITIVE, SEVERAL_TOKENS, needs_bridge
from independent import ablate, cap, clamp_active, clamp_always, scale

import sae_bias as sb
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.intervention import edit_of, from_dict

CLOSE = 1e-4
LAYER = 1
F, G = 3, 11
"""Two features of the tiny SAEs, both active on the pairs (asserted)."""


def cases(tiny, positions):
    """Name → (our interventions, the independent Δ)."""
    sae = independent.PlainSae.load(tiny.sae_folder)
    f, g = tiny.feature(F), tiny.feature(G)
    at = {"positions": positions}
    return {
        "ablate": ([sb.Ablate(f, **at)], sae.edit({F: ablate})),
        "scale": ([sb.Scale(f, 2.5, **at)], sae.edit({F: scale(2.5)})),
        "clamp_active": ([sb.Clamp(f, -2.0, **at)], sae.edit({F: clamp_active(-2.0)})),
        "clamp_always": ([sb.Clamp(f, 1.5, when="always", **at)], sae.edit({F: clamp_always(1.5)})),
        "cap": ([sb.Cap(f, 0.4, **at)], sae.edit({F: cap(0.4)})),
        "mean": ([sb.SetMean(f, 0.3, **at)], sae.edit({F: clamp_always(0.3)})),
        "steer": ([sb.Steer(f, 0.8, **at)], sae.steer(F, 0.8)),
        "steer_norm_relative": ([sb.Steer(f, 0.2, norm_relative=True, **at)], sae.steer(F, 0.2, True)),
        "project_out": ([sb.ProjectOut(f, **at)], sae.project_out(F)),
        "two_features": (
            [sb.Ablate(f, **at), sb.Clamp(g, 3.0, **at)],
            sae.edit({F: ablate, G: clamp_active(3.0)}),
        ),
    }


@pytest.mark.parametrize("positions", ["all", "last"])
def test_interventions_equal_the_independent_script(tiny, pairs, probe, positions):
    """Inside `intervene` and through the resumed engine, for each rule (≤ 1e-4 in float32): every other pair's human, the others' AI."""
    plain = independent.Plain.load(tiny.folder)
    engine = ProbeEngine(tiny.model, pairs, probe)

    def compared(result) -> np.ndarray:
        return np.concatenate([result.score_human[::2], result.score_ai[1::2]])

    moved = {}
    for name, (edits, delta) in cases(tiny, positions).items():
        expected = [
            plain.score(text, POSITIVE, NEGATIVE, edit=delta, layer=LAYER, positions=positions)
            for text in [p[2] for p in PAIRS[::2]] + [p[3] for p in PAIRS[1::2]]
        ]
        with sb.intervene(tiny.model, edits):
            hooked = sb.run_probe(tiny.model, pairs, probe)
        resumed, _ = engine.run(edits)
        for result in (hooked, resumed):
            np.testing.assert_allclose(compared(result), expected, atol=CLOSE, rtol=0, err_msg=name)
        moved[name] = np.abs(expected - compared(engine.base)).max()
    assert positions == "last" or min(moved.values()) > 1e-3, (
        f"an edit that moves nothing proves nothing: {moved}"
    )


def test_interventions_equal_the_independent_script_under_logodds_of_several_tokens(tiny, pairs):
    """The edit reaches the words' own tokens under positions="all", and only the prompt's last token under "last"."""
    plain = independent.Plain.load(tiny.folder)
    words = ((*POSITIVE, SEVERAL_TOKENS[0]), (*NEGATIVE, SEVERAL_TOKENS[1]))
    two = pairs[:2]
    engine = ProbeEngine(tiny.model, two, sb.Probe(*words, "logodds"))
    for positions in ("all", "last"):
        edits, delta = cases(tiny, positions)["steer"]
        expected = [plain.score(p[2], *words, "logodds", delta, LAYER, positions) for p in PAIRS[:2]]
        with sb.intervene(tiny.model, edits):
            hooked = sb.run_probe(tiny.model, two, sb.Probe(*words, "logodds"))
        np.testing.assert_allclose(hooked.score_human, expected, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(engine.run(edits)[0].score_human, expected, atol=CLOSE, rtol=0)


def test_bridge_calls_inside_intervene_equal_hugging_face_calls(tiny):
    needs_bridge(tiny)
    model = tiny.fresh()
    ids = torch.tensor([model.encode(PAIRS[0][2])])
    edits = [sb.Clamp(tiny.feature(F), -2.0), sb.Steer(tiny.feature(G), 0.5)]
    with torch.no_grad():
        base = model.hf(input_ids=ids).logits
        with sb.intervene(model, edits):
            before = model.hf(input_ids=ids).logits
        bridge = model.bridge
        with sb.intervene(model, edits):
            hf, bridged = model.hf(input_ids=ids).logits, bridge(ids)
        after = bridge(ids)
    torch.testing.assert_close(hf, before, atol=CLOSE, rtol=0)
    torch.testing.assert_close(bridged, before, atol=CLOSE, rtol=0)
    torch.testing.assert_close(after, base, atol=CLOSE, rtol=0)
    assert (bridged - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_clamp_and_ablate_equal_saelens_error_term_clamp(make_tiny, name):
    """SAETransformerBridge with use_error_term=True and a hook on hook_sae_acts_post is the same delta (≤ 1e-4)."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    tiny = make_tiny(name)
    model = tiny.fresh()
    weights = independent.PlainSae.load(tiny.sae_folder).w
    hook_name = f"blocks.{LAYER}.hook_resid_post"
    config = JumpReLUSAEConfig(
        d_in=32,
        d_sae=weights["w_enc"].shape[1],
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(hook_name=hook_name),
    )
    lens = JumpReLUSAE(config)
    state = {k.replace("w_", "W_"): v for k, v in weights.items()}
    lens.load_state_dict(state)
    bridge = model.bridge
    bridge.__class__ = SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    ids = torch.tensor([model.encode(PAIRS[0][3])])
    ordinary = ~torch.isin(ids, torch.tensor(sorted(model.special_ids)))
    for edit, rule in (
        (sb.Ablate(tiny.feature(F)), ablate),
        (sb.Clamp(tiny.feature(F), -3.0), clamp_active(-3.0)),
        (sb.Clamp(tiny.feature(F), 2.0, when="always"), clamp_always(2.0)),
        (sb.Scale(tiny.feature(F), 3.0), scale(3.0)),
    ):

        def set_feature(acts, hook, rule=rule):
            acts = acts.clone()
            acts[..., F] = torch.where(ordinary, rule(acts[..., F]), acts[..., F])
            return acts

        with torch.no_grad():
            with bridge.saes(lens, use_error_term=True):
                theirs = bridge.run_with_hooks(ids, fwd_hooks=[(bridge.get_sae_hook_name(lens), set_feature)])
                base = bridge(ids)
            with sb.intervene(model, edit):
                here = bridge(ids)
            torch.testing.assert_close(base, bridge(ids), atol=CLOSE, rtol=0)
        torch.testing.assert_close(here, theirs, atol=CLOSE, rtol=0)
        assert (here - base).abs().max() > 1e-2


# ── directions ──────────────────────────────────────────────────────────────────────────────────────────────


def orthonormal(k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(32, k, generator=torch.Generator().manual_seed(1))).Q.T.contiguous()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_projecting_out_leaves_nothing_along_the_basis(gemma3, k, affine):
    mean = torch.linspace(-1, 1, 32) if affine else None
    direction = sb.Direction("test", sb.Site(LAYER), orthonormal(k), mean)
    before = sb.residuals(gemma3.model, [PAIRS[0][2]], LAYER, positions="all")[0]
    with sb.intervene(gemma3.model, sb.ProjectOut(direction)):
        after = sb.residuals(gemma3.model, [PAIRS[0][2]], LAYER, positions="all")[0]
    target = torch.zeros(k) if mean is None else direction.basis @ mean
    torch.testing.assert_close(
        after[1:] @ direction.basis.T, target.expand(len(after) - 1, k), atol=1e-4, rtol=0
    )
    rest = torch.eye(32) - direction.basis.T @ direction.basis
    torch.testing.assert_close(after @ rest, before @ rest, atol=1e-4, rtol=0)
    assert torch.equal(after[0], before[0]), "BOS is left alone"


def test_steering_needs_one_direction(gemma3):
    edit = sb.Steer(sb.Direction("test", sb.Site(LAYER), orthonormal(2)), 1.0)
    with pytest.raises(sb.RequestError, match="needs one direction"), sb.intervene(gemma3.model, edit):
        pass


def test_reconstruct_is_the_saes_output(gemma3):
    """A labeled control: x' = decode(encode(x)) at every ordinary position, the error thrown away."""
    x = sb.residuals(gemma3.model, [PAIRS[0][2]], LAYER, positions="all")[0]
    with sb.intervene(gemma3.model, sb.Reconstruct(str(gemma3.sae_folder))):
        after = sb.residuals(gemma3.model, [PAIRS[0][2]], LAYER, positions="all")[0]
    sae = independent.PlainSae.load(gemma3.sae_folder)
    rebuilt = sae.acts(x) @ sae.w["w_dec"] + sae.w["b_dec"]
    torch.testing.assert_close(after[1:], rebuilt[1:], atol=1e-4, rtol=0)
    assert torch.equal(after[0], x[0])


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────

NAME = "some-release/some_sae#7"
VALUES = [
    sb.Ablate(NAME),
    sb.Scale(NAME, 0.5, positions="last"),
    sb.Clamp(NAME, -20.0),
    sb.Clamp(NAME, -20.0, when="always"),
    sb.Cap(NAME, 2.0),
    sb.SetMean(NAME, 0.1),
    sb.Steer(NAME, 3.0, norm_relative=True, positions="generated"),
    sb.ProjectOut(NAME),
    sb.Reconstruct("some-release/some_sae"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{v.kind}-{v.positions}")
def test_values_survive_a_file(value):
    again = from_dict(json.loads(json.dumps(value.to_dict())))
    assert again == value
    assert hash(again) == hash(value)
    assert again.describe() == value.describe()


def test_every_value_says_which_rule_it_is():
    assert len({v.describe() for v in VALUES}) == len(VALUES)
    assert "where a > 0" in sb.Clamp(NAME, 1.0).describe()
    assert "every position" in sb.Clamp(NAME, 1.0, when="always").describe()
    assert sb.Clamp(NAME, -20).strength == -20
    assert math.isnan(sb.Ablate(NAME).strength)


def test_a_string_a_reference_and_a_feature_are_one_feature(gemma3):
    name = f"{gemma3.sae_folder}#{F}"
    ref = sb.FeatureRef.parse(name)
    assert sb.Ablate(name) == sb.Ablate(ref)
    assert sb.Ablate(name).target == sb.Ablate(sb.load_feature(ref)).target == str(ref)


def test_wrong_values_are_refused():
    for make, message in (
        (lambda: sb.Clamp(NAME, math.nan), "finite"),
        (lambda: sb.Scale(NAME, math.inf), "finite"),
        (lambda: sb.Steer(NAME, True), "finite"),
        (lambda: sb.Cap(NAME, "2"), "finite"),
        (lambda: sb.Clamp(NAME, 1.0, when="sometimes"), "expected 'active' or 'always'"),
        (lambda: sb.Ablate(NAME, positions="first"), "expected one of"),
        (lambda: sb.Ablate(2511), "must be"),
        (lambda: sb.Ablate("no-index"), "expected <release>"),
        (lambda: sb.Ablate("a/b#x"), "whole number"),
        (lambda: from_dict({"kind": "abolish"}), "no edit 'abolish'"),
        (lambda: from_dict({"kind": "clamp", "feature": NAME}), "clamp"),
        (lambda: edit_of("ablate", NAME, 1.0), "has no strength"),
        (lambda: edit_of("clamp", NAME), "needs a strength"),
        (lambda: edit_of("scale", NAME, 1.0, when="always"), "only clamp has it"),
        (lambda: edit_of("patch", NAME), "expected one of ablate"),
        (lambda: sb.EditSet("none", ()), "needs edits"),
        (lambda: sb.EditSet("last", (sb.Ablate(NAME),), positions="last"), "to each of its edits"),
    ):
        with pytest.raises(sb.RequestError, match=message):
            make()


def test_directions_compare_by_their_numbers():
    a, b = (sb.Direction(n, sb.Site(1), orthonormal(1)) for n in ("a", "b"))
    assert a == b
    assert sb.Steer(a, 1.0) == sb.Steer(b, 1.0)
    assert a != sb.Direction("a", sb.Site(2), orthonormal(1))
    assert a != sb.Direction("a", sb.Site(1), -orthonormal(1))
    with pytest.raises(sb.RequestError, match="digest only"):
        from_dict(sb.Steer(a, 1.0).to_dict())
