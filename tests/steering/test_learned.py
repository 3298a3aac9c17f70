"""Learned edits: what they write is what their features' own edits write, off the gate nothing changes, and files keep them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sae_bias as sb
from sae_bias.core.site import Site
from sae_bias.steering.directions import Direction
from sae_bias.steering.intervention import from_dict

TEXT = ["An AI says hello. This is", "A dog wants tea. This is"]


def logits(model, edits) -> torch.Tensor:
    out = []
    for text in TEXT:
        ids = torch.tensor([model.encode(text)])
        with torch.no_grad(), sb.intervene(model, *edits):
            out.append(model.hf(input_ids=ids).logits[0])
    return torch.cat(out)


def refs(gemma3, *indices):
    return [str(gemma3.feature(i).ref) for i in indices]


def test_a_feature_set_is_its_scales_in_one_encoding(gemma3):
    names, scales = refs(gemma3, 1, 3, 5), (0.2, 2.5, -1.0)
    together = logits(gemma3.model, [sb.FeatureSet("three", names, scales)])
    apart = logits(gemma3.model, [sb.Scale(f, k) for f, k in zip(names, scales)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together, logits(gemma3.model, []), atol=1e-3)


def test_a_scale_of_one_is_the_identity(gemma3):
    same = logits(gemma3.model, [sb.FeatureSet("same", refs(gemma3, 1, 3), (1.0, 1.0))])
    assert torch.equal(same, logits(gemma3.model, []))


def test_a_gate_that_is_off_changes_no_bit_and_one_that_is_on_writes_the_prediction(gemma3):
    names = refs(gemma3, 1, 3)
    zero = ((0.0, 0.0), (0.0, 0.0))
    off = sb.GatedCounterfactual("off", names, (0.0, 0.0), -1.0, zero, (0.0, 0.0))
    assert torch.equal(logits(gemma3.model, [off]), logits(gemma3.model, []))
    on = sb.GatedCounterfactual("on", names, (0.0, 0.0), 1.0, zero, (0.0, 0.0))
    ablated = logits(gemma3.model, [sb.Ablate(f) for f in names])
    assert torch.allclose(logits(gemma3.model, [on]), ablated, atol=1e-5)


def test_a_rectified_projection_acts_on_the_directions_own_side_alone(gemma3):
    """x' = x - s·ReLU((x - μ)·r) r, by plain hooks on the Hugging Face model; where (x - μ)·r < 0 no bit changes."""
    layer = gemma3.feature(3).site.layer
    torch.manual_seed(0)
    r, mean = torch.nn.functional.normalize(torch.randn(2, gemma3.model.d_model), dim=1)
    along = Direction("by hand", Site(layer), r[None], mean)
    ids = torch.tensor([gemma3.model.encode("An AI says hello to a friend.")])

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        step = 0.7 * ((x - mean) @ r).clamp(min=0)[..., None] * r
        step[:, 0] = 0  # BOS
        seen.append((step.norm(dim=-1) == 0).float().mean().item())
        return (x - step, *output[1:]) if isinstance(output, tuple) else x - step

    seen = []
    with torch.no_grad():
        with sb.intervene(gemma3.model, sb.RectifiedProjectOut(along, share=0.7)):
            ours = gemma3.model.hf(input_ids=ids).logits
        handle = gemma3.model.layer(layer).register_forward_hook(hook)
        by_hand = gemma3.model.hf(input_ids=ids).logits
        handle.remove()
    assert 0.1 < seen[0] < 0.9
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)


def test_they_stand_in_files(gemma3):
    names = refs(gemma3, 1, 3)
    for edit in (
        sb.FeatureSet("set", names, (0.5, 2.0)),
        sb.GatedCounterfactual("gate", names, (1.0, -1.0), 0.5, ((1.0, 0.0), (0.0, 1.0)), (0.0, 0.1)),
    ):
        for one in (edit, replace(edit, share=0.5)):
            assert from_dict(one.to_dict()) == one
            assert one.key() == from_dict(one.to_dict()).key()
        assert "share" not in edit.key()  # as files from before there were shares
        assert replace(edit, share=0.5).key() not in (edit.key(), replace(edit, share=0.25).key())
        assert replace(edit, share=0.5).describe() == f"0.5 of the way to {edit.describe()}"


@pytest.mark.parametrize("names", [(), ("a/b#1", "a/b#1")])
def test_no_feature_or_one_twice_is_refused(names):
    with pytest.raises(sb.RequestError, match="each once"):
        sb.FeatureSet("bad", names, tuple(1.0 for _ in names))


def test_a_wrong_number_of_scales_is_refused(gemma3):
    with pytest.raises(sb.RequestError, match="1 scales for 2 features"):
        sb.FeatureSet("bad", refs(gemma3, 1, 3), (1.0,))
