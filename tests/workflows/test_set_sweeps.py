"""Sweeps of several features edited together: one cell a setting, controls of the whole set, strengths in each feature's unit."""

from __future__ import annotations

import json

import pytest
import torch
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.runs.copies import edit_from_facts
from sae_bias.runs.folder import RunFolder
from sae_bias.saes.load import as_feature
from sae_bias.steering.controls import mismatch_edits
from sae_bias.steering.edits import edit_features
from sae_bias.workflows.sweep_summary import controls_summary, summarize_sweep

INDEX = 3


@pytest.fixture
def two(tmp_path):
    """Feature 3 of an SAE after layer 1 and feature 3 of one after layer 2."""
    return [
        f"{write_gemma_scope_2(tmp_path / f'sae{k}', random_sae(32, 24, seed=k), gemma_scope_2_config(k, 24))}#{INDEX}"
        for k in (1, 2)
    ]


def test_strengths_are_in_each_features_unit(two):
    edit = edit_features("clamp", two, -0.5, units=[4.0, 10.0], positions="last")
    assert [e.value for e in edit.parts] == [-2.0, -5.0] and edit.strength == -0.5
    assert {e.positions for e in edit.parts} == {"last"}
    assert [e.factor for e in edit_features("scale", two, 0.5, units=[4.0, 10.0]).parts] == [0.5, 0.5]
    assert edit_features("ablate", two[:1]) == sb.Ablate(two[0])
    with pytest.raises(sb.RequestError, match="each once"):
        edit_features("ablate", [two[0], two[0]])


def test_a_sets_controls_keep_every_gate_and_size(gemma3, pairs, probe, two, tmp_path):
    edit = edit_features("clamp", two, -2.0)
    out = tmp_path / "run"
    result = sb.run_sweep(gemma3.model, pairs, sb.Sweep([edit], controls=4), probe=probe, out=out)
    controls = result.frame[result.frame["kind"] == "control"]
    assert len(controls) == 4 and controls["cell"].nunique() == 4
    candidate = result.frame[result.frame["kind"] == "candidate"].iloc[0]
    assert controls_summary(candidate, controls)["kinds"].keys() == {"random direction, same gate"}

    x = torch.randn(2, 5, 32)
    cells = json.loads((out / "sweep.json").read_text())
    rows = []
    for cell in cells["cells"][-4:]:
        again = edit_from_facts(cell["edits"][0], cells["directions"], gemma3.model)
        for name, part in zip(two, again.parts, strict=True):
            own, twin = as_feature(name), as_feature(part.feature)
            assert twin.site == own.site and torch.equal(twin.activation(x), own.activation(x))
            torch.testing.assert_close(twin.w_dec.norm(), own.w_dec.norm())
            assert abs(torch.cosine_similarity(twin.w_dec, own.w_dec, dim=0)) < 0.99
            rows.append(twin.w_dec)
        after, _ = sb.run_sweep(gemma3.model, pairs, sb.Sweep([again]), probe=probe), None
        stored = RunFolder(out).read_cell(cell["cell"])
        assert abs(after.frame["bias"].iloc[-1] - stored["bias"].mean()) < 1e-6
    assert len({tuple(r.tolist()) for r in rows}) == 8


HOOKS = ("z", "attn_out", "mlp_out")  # as wide as the residual in this model


def test_mismatches_stand_beside_the_controls_and_in_no_p(gemma3, pairs, probe, two, tmp_path):
    model = sb.load_model(
        gemma3.folder, dtype=torch.float64
    )  # in float32 two orders of computing differ by more
    first, other = two[0], two[1].partition("#")[0]
    sweep = sb.Sweep([sb.Ablate(first)], controls=3, mismatches=[other])
    result = sb.run_sweep(model, pairs, sweep, probe=probe, out=tmp_path / "run")
    found = result.frame[result.frame["kind"] == "mismatch"].set_index("label")
    assert list(found.index) == [
        "the same, 1 layers earlier",
        "the same, 1 layers later",
        *(f"the same at {kind}" for kind in HOOKS),
        f"feature {INDEX} of {sb.load_sae(other).id}",
    ]
    places = (sb.Site(0), sb.Site(2), *(sb.Site(1, kind) for kind in HOOKS))
    edits = [*(sb.Ablate(first, at=site) for site in places), sb.Ablate(two[1])]
    for label, edit in zip(found.index, edits, strict=True):
        with sb.intervene(model, edit):
            after = sb.run_probe(model, pairs, probe)
        assert found.loc[label, "bias"] == pytest.approx(after.bias, abs=1e-6)
    summary = summarize_sweep(result.frame, first, INDEX)
    assert [m["label"] for m in summary["mismatches"]] == list(found.index)
    without = result.frame[result.frame["kind"] != "mismatch"]
    assert repr(summary["controls"]) == repr(summarize_sweep(without, first, INDEX)["controls"])
    with pytest.raises(sb.RequestError, match="own SAE"):
        mismatch_edits(model, sb.Ablate(first), [first.partition("#")[0]])


def test_a_set_is_mismatched_as_a_whole(gemma3, two):
    sets = mismatch_edits(gemma3.model, edit_features("clamp", two, -2.0))
    places = [[(part.site.layer, part.site.kind) for part in e.parts] for e, _ in sets]
    assert places[:2] == [[(0, "resid_post"), (1, "resid_post")], [(2, "resid_post"), (3, "resid_post")]]
    assert places[2:] == [[(1, kind), (2, kind)] for kind in HOOKS]
