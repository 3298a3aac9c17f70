"""What an `intervene` block promises: exact edits, special tokens left alone, nothing left behind."""

from __future__ import annotations

import warnings
from dataclasses import replace

import independent
import numpy as np
import pytest
import torch
from architectures import NEGATIVE, PAIRS, POSITIVE, needs_bridge
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.models.forward import row_positions
from sae_bias.steering.context import PassInfo, position_mask
from sae_bias.steering.hooks import HookNeverFiredError

PROMPT = PAIRS[2][3]  # "Today an AI fears being deleted. This is"
F, G, LAYER = 3, 11, 1
MODES = ("all", "last", "subject", "prompt", "generated")


def tokens_of(model, text=PROMPT):
    return torch.tensor([model.encode(text)])


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model.hf(input_ids=tokens, **kwargs).logits


def hook_count(model) -> int:
    modules = set(model.hf.modules())
    if model._bridge is not None:
        modules |= set(model._bridge.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


# ── identities ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_empty_edit_is_bit_identical(gemma3, dtype):
    model = sb.load_model(gemma3.folder, dtype=dtype)
    tokens = tokens_of(model)
    base = logits(model, tokens)
    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    for edits in ((), (sb.Scale(gemma3.feature(F), 1.0),), (sb.Ablate(silent),), (sb.Clamp(silent, -20.0),)):
        with sb.intervene(model, *edits):
            assert torch.equal(logits(model, tokens), base), edits


def test_scale_by_one_is_the_identity(tiny):
    tokens = tokens_of(tiny.model)
    base = logits(tiny.model, tokens)
    with sb.intervene(tiny.model, sb.Scale(tiny.feature(F), 1.0), sb.Scale(tiny.feature(G), 1.0)) as receipt:
        assert torch.equal(logits(tiny.model, tokens), base)
    assert receipt.positions_changed == 0


def test_ablate_is_clamp_to_zero_and_scale_by_zero(tiny):
    tokens, feature, seen = tokens_of(tiny.model), tiny.feature(F), []
    edits = [
        sb.Ablate(feature),
        sb.Clamp(feature, 0.0),
        sb.Clamp(feature, 0.0, when="always"),
        sb.Scale(feature, 0.0),
        sb.Cap(feature, 0.0),
    ]
    for edit in edits:
        with sb.intervene(tiny.model, edit):
            seen.append(logits(tiny.model, tokens))
    assert all(torch.equal(z, seen[0]) for z in seen)
    assert not torch.equal(seen[0], logits(tiny.model, tokens))


def test_steering_there_and_back_is_the_base(tiny):
    tokens, feature = tokens_of(tiny.model), tiny.feature(F)
    base = logits(tiny.model, tokens)
    with sb.intervene(tiny.model, sb.Steer(feature, 3.0), sb.Steer(feature, -3.0)):
        assert torch.equal(logits(tiny.model, tokens), base)
    with sb.intervene(tiny.model, sb.Steer(feature, 3.0)), sb.intervene(tiny.model, sb.Steer(feature, -3.0)):
        assert torch.equal(logits(tiny.model, tokens), base)


def test_two_features_compose_in_any_order_and_as_nested_blocks(tiny):
    """Both read the unedited residual, so order and nesting change nothing, to the bit."""
    model, tokens = tiny.model, tokens_of(tiny.model)
    a, b = sb.Clamp(tiny.feature(F), -4.0), sb.Clamp(tiny.feature(G), 6.0, when="always")
    results = []
    for edits in ((a, b), (b, a)):
        with sb.intervene(model, *edits):
            results.append(logits(model, tokens))
        with sb.intervene(model, list(edits)):
            results.append(logits(model, tokens))
        with sb.intervene(model, edits[0]), sb.intervene(model, edits[1]):
            results.append(logits(model, tokens))
    assert all(torch.equal(z, results[0]) for z in results)
    sae = independent.PlainSae.load(tiny.sae_folder)
    delta = sae.edit({F: independent.clamp_active(-4.0), G: independent.clamp_always(6.0)})
    plain = independent.Plain.load(tiny.folder).logits(tokens[0].tolist(), delta, LAYER)
    torch.testing.assert_close(results[0][0], plain, atol=1e-4, rtol=0)


def test_the_same_edit_given_twice_counts_twice(gemma3):
    edit = sb.Steer(gemma3.feature(F), 0.5)
    tokens = tokens_of(gemma3.model)
    with sb.intervene(gemma3.model, edit, edit):
        twice = logits(gemma3.model, tokens)
    with sb.intervene(gemma3.model, sb.Steer(gemma3.feature(F), 1.0)):
        torch.testing.assert_close(twice, logits(gemma3.model, tokens), atol=1e-4, rtol=0)


def test_edits_at_two_sites(gemma3, tmp_path):
    """The later site reads the residual that the earlier edit left."""
    model, tokens = gemma3.model, tokens_of(gemma3.model)
    weights = random_sae(32, 16)
    weights["threshold"] -= 1.0
    write_gemma_scope_2(tmp_path / "late", weights, gemma_scope_2_config(2, 16))
    late = sb.load_feature(f"{tmp_path / 'late'}#5")
    edits = [sb.Clamp(gemma3.feature(F), 5.0, when="always"), sb.Clamp(late, 3.0, when="always")]
    plain = independent.Plain.load(gemma3.folder)
    sae = independent.PlainSae.load(gemma3.sae_folder)
    second = independent.PlainSae.load(tmp_path / "late").edit({5: independent.clamp_always(3.0)})
    keep = torch.tensor([i not in plain.special for i in tokens[0].tolist()])[:, None]
    handle = plain.layer(2).register_forward_hook(
        lambda m, a, o: o + torch.where(keep, second(o[0]), 0.0)[None]
    )
    expected = plain.logits(tokens[0].tolist(), sae.edit({F: independent.clamp_always(5.0)}), LAYER)
    handle.remove()
    with sb.intervene(model, edits):
        torch.testing.assert_close(logits(model, tokens)[0], expected, atol=1e-4, rtol=0)


def test_the_sae_error_is_kept(tiny):
    """x' - x lies along the decoder row alone: nothing else of the residual is touched (docs/method.md#mistake-1)."""
    model, feature = tiny.model, tiny.feature(F)
    before = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    with sb.intervene(model, sb.Clamp(feature, 7.0, when="always")):
        after = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    unit = feature.w_dec / feature.w_dec.norm()
    change = after - before
    torch.testing.assert_close((change @ unit)[:, None] * unit, change, atol=1e-4, rtol=0)
    assert change.norm() > 1


# ── where an edit acts ──────────────────────────────────────────────────────────────────────────────────────


def test_special_tokens_are_left_alone_by_id(tiny):
    """BOS, EOS and PAD wherever they stand; the ordinary token at index 0 is edited (docs/method.md#mistake-6, docs/method.md#mistake-7)."""
    model = tiny.model
    special = sorted(model.special_ids)
    ids = [*special, *model.encode(PROMPT), special[-1]]
    tokens = torch.tensor([ids])
    seen = []
    handle = None
    with sb.intervene(model, sb.Steer(tiny.feature(F), 2.0)):
        handle = model.layer(LAYER).register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
        logits(model, tokens)
    logits(model, tokens)
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1).reshape(-1)
    assert changed.tolist() == [i not in model.special_ids for i in ids]


@pytest.mark.parametrize("mode", ["all", "last", "subject"])
def test_positions(gemma3, pairs, mode):
    """Which residuals change, by name, on a prompt whose subject is its third token (after BOS and "Today")."""
    model = gemma3.model
    before = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    with (
        sb.intervene(model, sb.Steer(gemma3.feature(F), 2.0, positions=mode)),
        row_positions(model, torch.tensor([len(before)]), torch.tensor([2])),
    ):
        after = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    n = len(before)
    expected = {"all": range(1, n), "last": [n - 1], "subject": range(2, n)}[mode]
    assert (after != before).any(-1).nonzero()[:, 0].tolist() == list(expected)


def test_from_the_subject_equals_the_independent_script(gemma3, pairs, probe):
    sae, plain = independent.PlainSae.load(gemma3.sae_folder), independent.Plain.load(gemma3.folder)
    with sb.intervene(gemma3.model, sb.Steer(gemma3.feature(F), 1.0, positions="subject")):
        found = sb.run_probe(gemma3.model, pairs, probe)
    _, _, human, ai = PAIRS[2]
    h, a = plain.ids(human), plain.ids(ai)
    start = next(i for i in range(len(h)) if h[i] != a[i])
    assert start > 1
    z = plain.logits(h, sae.steer(F, 1.0), LAYER, [i >= start for i in range(len(h))])[-1]
    pos, neg = ([float(z[plain.word(human, w)[0]]) for w in ws] for ws in (POSITIVE, NEGATIVE))
    assert found.score_human[2] == pytest.approx(np.mean(pos) - np.mean(neg), abs=1e-4)


def test_the_subject_must_be_known(gemma3):
    with (
        pytest.raises(sb.RequestError, match="known subject"),
        sb.intervene(gemma3.model, sb.Ablate(gemma3.feature(F), positions="subject")),
    ):
        logits(gemma3.model, tokens_of(gemma3.model))


def test_position_masks_follow_one_contract_in_prefill_and_cache():
    """The mask of a pass over cached tokens is the tail of the mask of the whole pass, in every mode."""
    tokens = torch.tensor(
        [[0, 0, 2, 7, 8, 9, 5, 6], [2, 4, 7, 8, 3, 9, 5, 6]]
    )  # left-padded row 0; BOS 2, PAD 0
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    ends, subject = torch.tensor([6, 6]), torch.tensor([4, 3])
    for mode in MODES:
        whole = position_mask(PassInfo(tokens, 0, padding, ends, subject), mode, frozenset({0, 2}))
        for cut in range(1, 8):
            part = position_mask(
                PassInfo(tokens[:, cut:], cut, padding, ends, subject), mode, frozenset({0, 2})
            )
            assert torch.equal(part, whole[:, cut:]), (mode, cut)
    assert not whole[0, :3].any()


@pytest.mark.parametrize("mode", ["all", "last", "prompt"])
def test_left_padding_changes_nothing(tiny, mode):
    """A padded row in a batch equals the same prompt alone, edits included."""
    model = tiny.model
    short, long = model.encode(PAIRS[4][3]), model.encode(PROMPT)
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else 0
    gap = len(long) - len(short)
    assert gap > 0
    batch = torch.tensor([[pad] * gap + short, long])
    mask = torch.tensor([[0] * gap + [1] * len(short), [1] * len(long)])
    places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() makes them: GPT-2's are absolute
    for edit in (
        sb.Steer(tiny.feature(F), 1.5, positions=mode),
        sb.Clamp(tiny.feature(F), 4.0, when="always", positions=mode),
    ):
        with sb.intervene(model, edit) as receipt:
            padded = logits(model, batch, attention_mask=mask, position_ids=places)
        with sb.intervene(model, edit) as plain:
            alone = logits(model, torch.tensor([short]))
            other = logits(model, torch.tensor([long]))
        torch.testing.assert_close(
            padded[0, gap:], alone[0], atol=1e-3, rtol=0
        )  # RoPE at other absolute positions
        torch.testing.assert_close(padded[1], other[0], atol=1e-3, rtol=0)
        assert receipt.edits[0].positions_seen == plain.edits[0].positions_seen


def test_inputs_without_token_ids_are_refused(gemma3):
    model = gemma3.model
    embeds = model.hf.get_input_embeddings()(tokens_of(model))
    with pytest.raises(sb.RequestError, match="token ids"), sb.intervene(model, sb.Ablate(gemma3.feature(F))):
        model.hf(inputs_embeds=embeds)
    assert model._edits is None


# ── nothing left behind ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bridged", [False, True])
def test_hooks_are_gone_afterwards(tiny, bridged):
    if bridged:
        needs_bridge(tiny)
    model = tiny.fresh()
    if bridged:
        model.bridge(tokens_of(model))  # the bridge puts hooks of its own on at its first pass
    before = hook_count(model)
    base = logits(model, tokens_of(model))
    with sb.intervene(model, sb.Steer(tiny.feature(F), 2.0)):
        assert hook_count(model) > before
        assert not torch.equal(logits(model, tokens_of(model)), base)
    assert hook_count(model) == before
    assert model._edits is None
    assert torch.equal(logits(model, tokens_of(model)), base)


def test_hooks_are_gone_after_an_exception(gemma3):
    model = gemma3.fresh()
    before, base = hook_count(model), logits(model, tokens_of(model))
    outer, inner = sb.Ablate(gemma3.feature(G)), sb.Steer(gemma3.feature(F), 2.0)
    with pytest.raises(ZeroDivisionError), sb.intervene(model, inner):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), sb.intervene(model, outer), sb.intervene(model, inner):
        raise ZeroDivisionError
    with pytest.raises(IndexError), sb.intervene(model, sb.Steer(gemma3.feature(F), 2.0)):
        logits(model, torch.tensor([[10**6]]))
    with pytest.raises(KeyboardInterrupt), sb.intervene(model, sb.Steer(gemma3.feature(F), 2.0)):
        raise KeyboardInterrupt
    assert hook_count(model) == before
    assert model._edits is None
    assert torch.equal(logits(model, tokens_of(model)), base)


def test_an_inner_blocks_end_leaves_the_outer_one(gemma3):
    model, tokens = gemma3.model, tokens_of(gemma3.model)
    outer = sb.Steer(gemma3.feature(F), 2.0)
    with sb.intervene(model, outer):
        alone = logits(model, tokens)
        with pytest.raises(ZeroDivisionError), sb.intervene(model, sb.Steer(gemma3.feature(G), 2.0)):
            raise ZeroDivisionError
        assert torch.equal(logits(model, tokens), alone)


def test_the_users_own_hooks_survive_and_fire(tiny, pairs, probe):
    """A TransformerLens hook and a plain module hook stay in place and act, inside the block and after it."""
    needs_bridge(tiny)
    model = tiny.fresh()
    bridge, fired = model.bridge, []
    name = next(n for n in ("blocks.2.hook_resid_post", "blocks.2.hook_out") if n in bridge.hook_dict)
    bridge.add_hook(name, lambda x, hook: fired.append("lens") or x)
    handle = model.layer(3).register_forward_hook(lambda *_: fired.append("plain"))
    bridge(tokens_of(model))  # the bridge puts hooks of its own on at its first pass
    before = hook_count(model)
    fired.clear()
    with sb.intervene(model, sb.Ablate(tiny.feature(F))):
        bridge(tokens_of(model))
        assert set(fired) == {"lens", "plain"}
        fired.clear()
        sb.run_probe(model, pairs, probe)
        assert set(fired) == {"lens", "plain"}
    fired.clear()
    bridge(tokens_of(model))
    assert set(fired) == {"lens", "plain"}
    assert hook_count(model) == before
    handle.remove()


def test_run_with_hooks_inside_intervene_sees_the_edited_residual(gemma3):
    model, seen = gemma3.fresh(), {}
    tokens = tokens_of(model)

    def keep(x, hook):
        seen["x"] = x.clone()

    with torch.no_grad():
        model.bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", keep)])
        before = seen["x"]
        with sb.intervene(model, sb.Steer(gemma3.feature(F), 2.0)):
            model.bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", keep)])
    expected = before[0, 1:] + 2.0 * gemma3.feature(F).w_dec
    torch.testing.assert_close(seen["x"][0, 1:], expected, atol=1e-4, rtol=0)


# ── receipts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hook_that_never_fired_is_an_error(gemma3):
    with (
        pytest.raises(HookNeverFiredError, match="did nothing"),
        sb.intervene(gemma3.model, sb.Ablate(gemma3.feature(F))),
    ):
        pass
    with pytest.raises(HookNeverFiredError), sb.intervene(gemma3.model, sb.Ablate(gemma3.feature(F))):
        logits(gemma3.fresh(), tokens_of(gemma3.model))
    assert issubclass(HookNeverFiredError, sb.SaeBiasError)


def test_a_feature_that_never_fired_is_a_fact(gemma3):
    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    with sb.intervene(gemma3.model, sb.Ablate(silent), sb.Ablate(gemma3.feature(G))) as receipt:
        logits(gemma3.model, tokens_of(gemma3.model))
    assert [e.positions_active == 0 for e in receipt.edits] == [True, False]
    assert np.isnan(receipt.edits[0].max_act)
    assert receipt.edits[1].max_act > 0


def test_the_receipt_says_what_was_done(gemma3):
    model, feature = gemma3.model, gemma3.feature(F)
    x = sb.residuals(model, [PROMPT], LAYER, positions="all")[0][1:]
    acts = feature.activation(x)
    fired = acts > 0
    with sb.intervene(model, sb.Clamp(feature, 9.0)) as receipt:
        logits(model, tokens_of(model))
    (edit,) = receipt.edits
    assert receipt.hook_calls == 1
    assert edit.positions_seen == len(x)
    assert edit.positions_active == edit.positions_changed == int(fired.sum()) > 0
    assert edit.written_inactive == edit.markers_changed == 0
    assert edit.mean_before == pytest.approx(float(acts[fired].mean()), rel=1e-5)
    assert edit.mean_after == pytest.approx(9.0, rel=1e-5)
    assert edit.max_act == pytest.approx(float(acts.max()), rel=1e-5)
    size = (9.0 - acts[fired]).abs() * feature.w_dec.norm() / x[fired].norm(dim=-1)
    assert edit.relative_change == pytest.approx(float(size.mean()), rel=1e-4)
    assert receipt.to_frame()["positions_changed"][0] == edit.positions_changed
    assert "changed" in repr(receipt)


def test_turn_markers_are_counted_apart(gemma3):
    model = gemma3.model
    ids = model.encode_chat([{"role": "user", "content": "a human says hello."}])
    with sb.intervene(model, sb.Steer(gemma3.feature(F), 1.0)) as receipt:
        logits(model, torch.tensor([ids]))
    (edit,) = receipt.edits
    assert edit.positions_changed == len(ids) - 1
    assert edit.markers_changed == sum(i in model.turn_marker_ids for i in ids) == 3


def test_a_negative_always_clamp_warns_once_with_the_share(gemma3, pairs, probe):
    """It writes where nothing fired (docs/method.md#mistake-2); `active` never does."""
    negative = sb.Clamp(gemma3.feature(F), -20.0, when="always")
    message = r"had not fired \(\d+% of those seen\)"
    with pytest.warns(UserWarning, match=message) as caught, sb.intervene(gemma3.model, negative) as receipt:
        sb.run_probe(gemma3.model, pairs, probe)
    assert len(caught) == 1
    (edit,) = receipt.edits
    assert edit.written_inactive == edit.positions_seen - edit.positions_active > 0
    assert f"{edit.written_inactive / edit.positions_seen:.0%}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clamp in (sb.Clamp(gemma3.feature(F), -20.0), sb.Clamp(gemma3.feature(F), 0.0, when="always")):
            with sb.intervene(gemma3.model, clamp) as receipt:
                sb.run_probe(gemma3.model, pairs, probe)
            assert receipt.edits[0].written_inactive == 0


def test_an_active_clamp_leaves_silent_positions_alone(tiny):
    model, feature = tiny.model, tiny.feature(F)
    before = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    with sb.intervene(model, sb.Clamp(feature, -20.0)):
        after = sb.residuals(model, [PROMPT], LAYER, positions="all")[0]
    silent = feature.activation(before) == 0
    assert silent.any()
    assert torch.equal(after[silent], before[silent])


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_feature_edited_twice_is_refused(gemma3):
    feature = gemma3.feature(F)
    for edits in (
        (sb.Ablate(feature), sb.Clamp(feature, 1.0)),
        (sb.Ablate(feature), sb.Scale(str(feature.ref), 2.0)),
    ):
        with pytest.raises(sb.RequestError, match="edited twice"), sb.intervene(gemma3.model, *edits):
            pass
    with sb.intervene(gemma3.model, sb.Ablate(feature)):
        with (
            pytest.raises(sb.RequestError, match="edited twice"),
            sb.intervene(gemma3.model, sb.Clamp(feature, 1.0)),
        ):
            pass
        logits(gemma3.model, tokens_of(gemma3.model))
    assert gemma3.model._edits is None


def test_an_sae_of_another_width_is_refused(gemma3, tmp_path):
    write_gemma_scope_2(tmp_path / "narrow", random_sae(24, 16), gemma_scope_2_config(1, 16))
    for edit in (
        sb.Ablate(f"{tmp_path / 'narrow'}#3"),
        sb.Steer(f"{tmp_path / 'narrow'}#3", 1.0),
        sb.Reconstruct(str(tmp_path / "narrow")),
    ):
        with (
            pytest.raises(sb.RequestError, match=r"d_in 24, but .* d_model 32"),
            sb.intervene(gemma3.model, edit),
        ):
            pass


def test_a_layer_the_model_lacks_is_refused(gemma3, tmp_path):
    write_gemma_scope_2(tmp_path / "deep", random_sae(32, 16), gemma_scope_2_config(9, 16))
    with (
        pytest.raises(sb.RequestError, match="layer 9 does not exist"),
        sb.intervene(gemma3.model, sb.Ablate(f"{tmp_path / 'deep'}#3")),
    ):
        pass
    with (
        pytest.raises(sb.RequestError, match="it has 48 features"),
        sb.intervene(gemma3.model, sb.Ablate(f"{gemma3.sae_folder}#48")),
    ):
        pass


def test_what_is_no_intervention_is_refused(gemma3):
    with (
        pytest.raises(sb.RequestError, match="expected interventions"),
        sb.intervene(gemma3.model, gemma3.feature(F)),
    ):
        pass


def test_the_last_token_of_a_right_padded_batch_is_edited(gemma3, pairs):
    """A user's own batch, padded on the right: each row's last real token, as in that row alone."""
    model = gemma3.model
    ids = [model.encode(t) for t in (pairs[0].ai, pairs[0].ai + " " + pairs[0].ai)]
    n, pad = max(map(len, ids)), model.tokenizer.pad_token_id or 0
    tokens = torch.tensor([row + [pad] * (n - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in ids])
    edit = sb.Clamp(gemma3.feature(F), 5.0, when="always", positions="last")
    with torch.no_grad(), sb.intervene(model, edit) as receipt:
        together = model.hf(input_ids=tokens, attention_mask=mask).logits
    assert receipt.positions_changed == 2
    for row, own in enumerate(ids):
        with torch.no_grad(), sb.intervene(model, edit):
            alone = model.hf(input_ids=torch.tensor([own])).logits[0, -1]
        torch.testing.assert_close(together[row, len(own) - 1], alone, atol=1e-4, rtol=1e-4)
