"""Methods at equal KL: the interpolation, what each method does at share 1, and that the planted feature leads."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_bias as sb
from sae_bias.models.catalog import organism_folder
from sae_bias.workflows.compare import at_kl, compare_methods, equal_kl


def test_a_curve_is_read_by_interpolation():
    kl, reduction = np.array([0.0, 0.01, 0.03]), np.array([0.0, 0.4, 0.8])
    assert at_kl(kl, reduction, 0.005) == (pytest.approx(0.2), True)
    assert at_kl(kl, reduction, 0.02) == (pytest.approx(0.6), True)
    assert at_kl(kl, reduction, 0.1) == (0.8, False)


def test_the_most_removed_before_the_level_counts():
    """A curve that overshoots and comes back: more strength is not more reduction."""
    kl, reduction = np.array([0.0, 0.01, 0.02, 0.04]), np.array([0.0, 0.9, 0.5, 0.1])
    assert at_kl(kl, reduction, 0.03) == (0.9, True)
    assert at_kl(np.zeros(3), np.array([0.0, 0.5, 0.3]), 0.01) == (0.5, False)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_more_kl_never_gives_less(points, a, b):
    kl, reduction = (np.array([0.0, *v]) for v in zip(*points))
    low, high = sorted((a, b))
    assert at_kl(kl, reduction, low)[0] <= at_kl(kl, reduction, high)[0] + 1e-12
    assert at_kl(kl, reduction, low)[0] >= 0


def test_methods_are_walked_from_no_change_outwards():
    frame = pd.DataFrame(
        {
            "method": ["m"] * 3 + ["n"],
            "share": [-2.0, -0.5, -1.0, 1.0],
            "kl": [0.3, 0.1, 0.2, 0.0],
            "reduction": [0.9, 0.1, 0.2, 0.7],
        }
    )
    table = equal_kl(frame, [0.15]).set_index("method")
    assert table.loc["m", "kl_0.15"] == pytest.approx(0.15)
    assert (table.loc["n", "kl_0.15"], table.loc["n", "reached_0.15"]) == (0.7, False)


@pytest.fixture(scope="module")
def comparison():
    truth = json.loads((organism_folder("planted") / "truth.json").read_text())["constructed"]
    model, pairs = sb.load_model("organism:planted"), sb.load_pairs()
    report = tuple(dict.fromkeys(p.template for p in pairs if p.corpus is False))
    discover = tuple(t for t in pairs.templates if t not in report)
    feature = f"organism:planted/constructed#{truth['index']}"
    return compare_methods(model, feature, pairs, discover=discover, report=report, shares=(0.5, 1.0), k=3)


def test_every_baseline_has_its_curve(comparison):
    methods = set(comparison.table["method"])
    for name in (
        "feature",
        "feature, opposite sign",
        "difference of means",
        "difference of means without massive dimensions",
        "probe direction",
        "probe direction, norm-relative steering",
        "subspace of 3",
        "random subspace of 3",
        "random direction 0",
    ):
        assert name in methods
    assert any(m.startswith("difference of means, layer") for m in methods)
    assert any("same gate" in m or m.startswith("matched") for m in methods)
    assert np.isfinite(comparison.frame[["kl", "reduction", "specific_reduction"]].to_numpy()).all()


def test_the_planted_feature_removes_more_than_random_at_equal_kl(comparison):
    at = comparison.table.set_index("method")["kl_0.03"]
    random = max(v for m, v in at.items() if str(m).startswith("random"))
    assert at["feature"] >= 0.8
    assert at["feature"] > random + 0.3
    opposite = comparison.frame[comparison.frame["method"] == "feature, opposite sign"]
    assert (opposite["share"] < 0).all()
    assert (opposite["reduction"] < 0).all()


def test_a_comparison_prints_and_draws(comparison):
    assert "did not reach" in repr(comparison)
    names = {trace.name for trace in comparison.plot().data}
    assert "difference of means" in names
    assert "R²" in repr(comparison.ridge)


def test_templates_are_never_in_both_splits(gemma3, pairs, probe):
    with pytest.raises(sb.SaeBiasError, match="both discover and report"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe, discover=["hello"], report=["hello"])
    with pytest.raises(sb.SaeBiasError, match="or neither"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe, discover=["hello"])
    with pytest.raises(sb.SaeBiasError, match="at least 4"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe)
