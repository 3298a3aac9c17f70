"""The resumed pass: the plain hooked pass's numbers for the price of the later layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import NEGATIVE, POSITIVE, SEVERAL_TOKENS, needs_bridge
from passes import layer_tokens
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.measures.costs import CostEngine
from sae_bias.steering.engine import ProbeEngine

F, G = 3, 11
CLOSE = 1e-4


def hooked(model, pairs, probe, edits, **options):
    with sb.intervene(model, edits) as receipt:
        return sb.run_probe(model, pairs, probe, **options), receipt


def test_a_cell_equals_the_hooked_pass(tiny, pairs, probe):
    """Receipts included. (`test_interventions` compares both with the independent script.)"""
    engine = ProbeEngine(tiny.model, pairs, probe)
    for edits in (
        [sb.Ablate(tiny.feature(F))],
        [sb.Scale(tiny.feature(F), 3.0), sb.Clamp(tiny.feature(G), 2.0)],
    ):
        resumed, receipt = engine.run(edits)
        whole, expected = hooked(tiny.model, pairs, probe, edits)
        np.testing.assert_allclose(resumed.values_human, whole.values_human, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(resumed.values_ai, whole.values_ai, atol=CLOSE, rtol=0)
        theirs = expected.to_frame().drop(columns=["mean_before", "mean_after", "max_act", "relative_change"])
        assert receipt.to_frame()[theirs.columns].equals(theirs)
        np.testing.assert_allclose(
            receipt.to_frame()["relative_change"], expected.to_frame()["relative_change"], rtol=1e-4
        )


def test_through_the_bridges_modules_too(tiny, pairs, probe):
    needs_bridge(tiny)
    model = tiny.fresh()
    assert model.bridge is not None
    edits = [sb.Clamp(tiny.feature(F), -2.0)]
    resumed, _ = ProbeEngine(model, pairs, probe).run(edits)
    whole, _ = hooked(tiny.model, pairs, probe, edits)
    np.testing.assert_allclose(resumed.pair_bias, whole.pair_bias, atol=CLOSE, rtol=0)


def test_two_sites(gemma3, pairs, probe, tmp_path):
    weights = random_sae(32, 16)
    weights["threshold"] -= 1.0
    for layer in (0, 2):
        write_gemma_scope_2(tmp_path / f"at{layer}", weights, gemma_scope_2_config(layer, 16))
    engine = ProbeEngine(gemma3.model, pairs, probe)
    for edits in (
        [sb.Clamp(gemma3.feature(F), 5.0), sb.Clamp(f"{tmp_path / 'at2'}#5", 3.0, when="always")],
        [
            sb.Steer(f"{tmp_path / 'at2'}#5", 2.0, positions="last"),
            sb.Scale(f"{tmp_path / 'at0'}#1", 4.0),
            sb.Ablate(gemma3.feature(F)),
        ],
    ):
        resumed, receipt = engine.run(edits)
        whole, expected = hooked(gemma3.model, pairs, probe, edits)
        np.testing.assert_allclose(resumed.pair_bias, whole.pair_bias, atol=CLOSE, rtol=0)
        assert receipt.positions_changed == expected.positions_changed


def test_the_last_layer(gemma3, pairs, probe, tmp_path):
    write_gemma_scope_2(tmp_path / "last", random_sae(32, 16), gemma_scope_2_config(3, 16))
    edits = [sb.Steer(f"{tmp_path / 'last'}#2", 2.0)]
    resumed, _ = ProbeEngine(gemma3.model, pairs, probe).run(edits)
    np.testing.assert_allclose(
        resumed.pair_bias, hooked(gemma3.model, pairs, probe, edits)[0].pair_bias, atol=CLOSE, rtol=0
    )


def test_normalizer_and_partly_changed_batches(gemma3, pairs):
    """A feature that fires in some rows of a batch only: the others keep the base numbers, to the bit."""
    probe = sb.Probe(POSITIVE, NEGATIVE, "logodds")
    rows = sb.residuals(gemma3.model, [p.human for p in pairs] + [p.ai for p in pairs], 1, positions="all")
    acts = [float(gemma3.feature(F).activation(x[1:]).max()) for x in rows]
    threshold = torch.tensor(float(np.mean(sorted(acts)[5:7])))
    rare = replace(gemma3.feature(F), threshold=threshold)
    engine = ProbeEngine(gemma3.model, pairs, probe, levels=True)
    resumed, _ = engine.run([sb.Ablate(rare)])
    whole, _ = hooked(gemma3.model, pairs, probe, [sb.Ablate(rare)], levels=True)
    np.testing.assert_allclose(resumed.log_normaliser, whole.log_normaliser, atol=CLOSE, rtol=0)
    np.testing.assert_allclose(resumed.pair_bias, whole.pair_bias, atol=CLOSE, rtol=0)
    changed = np.array([a > float(threshold) for a in acts[:6]])
    assert 0 < changed.sum() < 6
    assert np.array_equal(resumed.values_human[~changed], engine.base.values_human[~changed])
    assert not np.array_equal(resumed.values_human[changed], engine.base.values_human[changed])


def test_where_nothing_changes_the_base_result_is_returned(gemma3, pairs, probe, monkeypatch):
    engine = ProbeEngine(gemma3.model, pairs, probe)
    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    engine.run([sb.Ablate(silent)])
    monkeypatch.setattr(gemma3.model.base, "forward", None)
    result, receipt = engine.run([sb.Ablate(silent)])
    assert result is engine.base
    assert [e.positions_active for e in receipt.edits] == [0]
    assert engine.run([])[0] is engine.base


def test_layers_up_to_the_site_run_once_and_later_ones_once_a_cell_for_each_prefix(
    gemma3, pairs, probe, monkeypatch
):
    monkeypatch.setattr(
        "sae_bias.models.tree.price_of", lambda model: 0.0
    )  # sharing alone decides how rows are cut
    model = gemma3.model
    engine = ProbeEngine(model, pairs, probe)
    engine.run([sb.Steer(gemma3.feature(F), 1.0)])
    ids = [model.encode(t) for p in pairs for t in (p.human, p.ai)]
    distinct = len({tuple(s[: k + 1]) for s in ids for k in range(len(s))})
    assert distinct < sum(map(len, ids))
    with layer_tokens(model, (0, 1, 2)) as count:
        for alpha in (0.5, 1.0, 2.0):
            engine.run([sb.Steer(gemma3.feature(F), alpha)])
    assert set(count.by_layer) == {2}
    assert count.by_layer[2] == 3 * distinct


@pytest.mark.parametrize("at", ["last", "subject", "prompt", "generated"])
def test_edits_at_some_positions_are_those_of_the_hooked_pass(tiny, pairs, at):
    """With words of several tokens, whose pieces come after the prompt's end."""
    probe = sb.Probe((*POSITIVE, SEVERAL_TOKENS[0]), (*NEGATIVE, SEVERAL_TOKENS[1]), "logodds")
    edits = [sb.Steer(tiny.feature(F), 2.0, positions=at)]
    resumed, receipt = ProbeEngine(tiny.model, pairs, probe).run(edits)
    whole, expected = hooked(tiny.model, pairs, probe, edits, levels=False)
    np.testing.assert_allclose(resumed.values_ai, whole.values_ai, atol=CLOSE, rtol=3e-5)
    assert receipt.positions_changed == expected.positions_changed > 0


def test_only_prompts_that_a_feature_changes_run_again(gemma3, pairs, probe):
    """Ablating a feature that fires in one prompt alone costs that prompt's tokens."""
    model = gemma3.model
    texts = [t for p in pairs for t in (p.human, p.ai)]
    acts = [
        float(gemma3.feature(F).activation(x[1:]).max())
        for x in sb.residuals(model, texts, 1, positions="all")
    ]
    top = sorted(acts)
    rare = replace(
        gemma3.feature(F), threshold=torch.tensor((top[-1] + max(a for a in acts if a < top[-1])) / 2)
    )
    hit = [model.encode(t) for t, a in zip(texts, acts) if a == top[-1]]
    engine = ProbeEngine(model, pairs, probe, sites=[rare.site])
    with layer_tokens(model, (0, 2)) as count:
        engine.run([sb.Ablate(rare)])
    assert count.by_layer == {2: len({tuple(s[: k + 1]) for s in hit for k in range(len(s))})}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_size_gives_the_same_numbers(gemma3, pairs, probe, size):
    """In float64, where passes of another shape round alike to far below the tolerance."""
    edits, model = [sb.Clamp(gemma3.feature(F), 4.0)], gemma3.fresh()
    model.hf.double()
    one = ProbeEngine(model, pairs, probe).run(edits)[0]
    other = ProbeEngine(model, pairs, probe, batch_size=size).run(edits)[0]
    np.testing.assert_allclose(other.pair_bias, one.pair_bias, atol=2e-6, rtol=0)
    assert np.abs(one.pair_bias - ProbeEngine(model, pairs, probe).base.pair_bias).max() > 0.1


def test_the_users_own_hooks_fire_and_count(tiny, pairs, probe):
    """With a hook that is not ours the whole pass runs, so it fires below the site as well, and its edits count."""
    needs_bridge(tiny)
    model = tiny.fresh()
    fired = []

    def louder(x, hook):
        fired.append(hook.name)
        return x * 1.5

    edits = [sb.Scale(tiny.feature(F), 3.0)]
    without = hooked(model, pairs, probe, edits)[0]
    name = next(n for n in ("blocks.0.hook_resid_post", "blocks.0.hook_out") if n in model.bridge.hook_dict)
    model.bridge.add_hook(name, louder)
    engine = ProbeEngine(model, pairs, probe)
    for _ in range(2):
        fired.clear()
        resumed, _ = engine.run(edits)
        assert fired, "in every run, though it sits below the site"
    whole = hooked(model, pairs, probe, edits)[0]
    np.testing.assert_allclose(resumed.pair_bias, whole.pair_bias, atol=CLOSE, rtol=0)
    assert np.abs(whole.pair_bias - without.pair_bias).max() > 1e-3
    fired.clear()
    model.bridge(torch.tensor([model.encode(pairs[0].human)]))
    assert fired, "the hook is still there"
    model.bridge.reset_hooks()
    assert np.allclose(hooked(model, pairs, probe, edits)[0].pair_bias, without.pair_bias, atol=CLOSE)


def test_an_open_block_is_refused(gemma3, pairs, probe):
    """Its edits would be mixed with kept residuals that never saw them."""
    engine = ProbeEngine(gemma3.model, pairs, probe)
    with sb.intervene(gemma3.model, sb.Steer(gemma3.feature(G), 1.0)):
        with pytest.raises(sb.RequestError, match="intervene block is open"):
            ProbeEngine(gemma3.model, pairs, probe)
        with pytest.raises(sb.RequestError, match="intervene block is open"):
            engine.run([sb.Ablate(gemma3.feature(F))])
        sb.run_probe(gemma3.model, pairs, probe)


def test_a_negative_always_clamp_warns_here_too(gemma3, pairs, probe):
    engine = ProbeEngine(gemma3.model, pairs, probe)
    with pytest.warns(UserWarning, match="had not fired") as caught:
        engine.run([sb.Clamp(gemma3.feature(F), -20.0, when="always")])
    assert len(caught) == 1


def test_costs_are_the_kl_of_full_distributions(gemma3):
    """KL in nats a token without BOS, what follows the text apart, and 0 where the feature never fires."""
    texts = {
        "a": ["a human says hello. This is natural", "an AI wants tea."],
        "b": ["the person wants to survive."],
    }
    model, edit = gemma3.model, sb.Steer(gemma3.feature(F), 1.0)
    frame = CostEngine(model, texts).run([edit]).set_index("kind")
    for kind, group in texts.items():
        kls = []
        for text in group:
            tokens = torch.tensor([model.encode(text)])
            with torch.no_grad():
                p = model.hf(input_ids=tokens).logits[0].log_softmax(-1)
                with sb.intervene(model, edit):
                    q = model.hf(input_ids=tokens).logits[0].log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1))
        inside = np.mean([float(kl[1:-1].mean()) for kl in kls])
        assert frame.loc[kind, "kl_mean"] == pytest.approx(inside, rel=1e-3, abs=1e-5)
        assert frame.loc[kind, "kl_last"] == pytest.approx(
            np.mean([float(kl[-1]) for kl in kls]), rel=1e-3, abs=1e-5
        )
    silent = replace(gemma3.feature(F), threshold=torch.tensor(1e9))
    nothing = CostEngine(model, texts).run([sb.Ablate(silent)])
    assert (nothing["kl_mean"] == 0).all()
    assert (nothing["changed_share"] == 0).all()
