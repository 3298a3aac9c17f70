"""Figures say what the frames say: no point for a NaN, no tag from a prompt obeyed."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from run_fixture import UNTRUSTED, _frames

from sae_bias.figures import features as features_figures
from sae_bias.figures import probe as probe_figures
from sae_bias.figures import published as published_figures
from sae_bias.figures import style as style_figures
from sae_bias.figures import sweep as sweep_figures

FRAMES = _frames(np.random.default_rng(0), 120)
FIGURES = {
    "bias_by_template": lambda f: probe_figures.bias_by_template(
        f["pairs"], {"mean": 1.2, "ci_low": 1.0, "ci_high": 1.4}
    ),
    "bias_distribution": lambda f: probe_figures.bias_distribution(f["pairs"]),
    "word_contributions": lambda f: probe_figures.word_contributions(f["words"]),
    "levels": lambda f: probe_figures.levels(f["levels"]),
    "ranking_figure": lambda f: features_figures.ranking_figure(f["ranking"]),
    "activation_heatmap": lambda f: features_figures.activation_heatmap(f["activation"]),
    "sweep_curve": lambda f: sweep_figures.sweep_curve(f["sweep"]),
    "frontier": lambda f: sweep_figures.frontier(f["sweep"]),
    "controls_histogram": lambda f: sweep_figures.controls_histogram(f["controls"], 0.83, 0.1),
    "cumulative_ablation": lambda f: features_figures.cumulative_ablation(f["cumulative"]),
    "ladder": lambda f: features_figures.ladder(f["ladder"]),
    "before_after": lambda f: sweep_figures.before_after(f["examples"]),
}


def strings(value):
    """Every text that plotly would draw: data, layout, hover."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (s for v in value.values() for s in strings(v))
    elif isinstance(value, list):
        yield from (s for v in value for s in strings(v))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_title_axes_and_marks_and_survives_json(name):
    figure = FIGURES[name](FRAMES)
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text
    assert len(figure.data) > 0
    assert "NaN" not in (figure.to_json() or "")


@pytest.mark.parametrize("name", FIGURES)
def test_untrusted_text_is_escaped_in_every_figure(name):
    texts = list(strings(json.loads(FIGURES[name](FRAMES).to_json() or "{}")))
    assert not [t for t in texts if "<script" in t or "<img" in t or "<b>bold" in t]


@pytest.mark.parametrize("name", FIGURES)
def test_frames_are_left_as_they_were(name):
    before = {k: v.copy() for k, v in FRAMES.items()}
    FIGURES[name](FRAMES)
    for key, frame in before.items():
        pd.testing.assert_frame_equal(frame, FRAMES[key])


def test_plain_keeps_every_letter_of_an_untrusted_text():
    assert style_figures.plain("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert "<br>" in style_figures.wrapped(UNTRUSTED)
    assert "<script" not in style_figures.wrapped(UNTRUSTED)


def test_forest_shows_the_template_means_in_order():
    figure = probe_figures.bias_by_template(FRAMES["pairs"])
    expected = FRAMES["pairs"].groupby("template")["bias"].mean().sort_values()
    np.testing.assert_allclose(np.asarray(figure.data[0].x, dtype=float), expected.to_numpy())


def test_one_pair_a_template_has_a_point_and_no_interval():
    pairs = pd.DataFrame({"template": ["a", "b"], "ai": ["x", "y"], "bias": [1.0, 2.0]})
    figure = probe_figures.bias_by_template(pairs)
    assert list(figure.data[0].x) == [1.0, 2.0]
    assert np.isnan(np.asarray(figure.data[0].error_x.array, dtype=float)).all()


def test_a_missing_score_is_a_gap_that_says_undefined_and_never_a_zero():
    figure = probe_figures.levels(FRAMES["levels"])
    neutral = next(t for t in figure.data if t.name == "neutral")
    values = np.asarray(neutral.x, dtype=float)
    assert np.isnan(values).sum() == 1
    assert not (values == 0).any()
    assert any("undefined" in label for label in figure.layout.yaxis.ticktext)


def test_dead_features_are_not_drawn_and_calls_differ_in_symbol():
    figure = features_figures.ranking_figure(FRAMES["ranking"])
    assert sum(len(t.x) for t in figure.data) == FRAMES["ranking"]["auroc"].notna().sum()
    assert len({t.marker.symbol for t in figure.data}) == len(figure.data)


def test_a_feature_that_fails_the_call_is_never_drawn_as_ai_speech():
    ranking = FRAMES["ranking"].assign(ai_speech="no", separates="yes")
    assert set(features_figures.calls_of(ranking)) == {"separates"}


def test_a_silent_features_heat_map_is_not_colored():
    frame = pd.DataFrame(
        {
            "subject": ["an AI", "a human"],
            "group": ["ai", "human"],
            "statement": "says hello",
            "act": "speech",
            "content": None,
            "feature": "x#1",
            "activation": 0.0,
        }
    )
    heat = features_figures.activation_heatmap(frame).data[0]
    assert heat.zmin == 0 and heat.zmax > 0


def test_heat_map_means_are_the_frames():
    frame = FRAMES["activation"]
    heat = features_figures.activation_heatmap(frame, most=10_000).data[0]
    cell = frame[(frame["subject"] == "An AI") & (frame["statement"] == "speech mundane 0")][
        "activation"
    ].iloc[0]
    z = np.asarray(heat.z, dtype=float)
    assert z[list(heat.y).index("An AI"), list(heat.x).index("speech mundane 0")] == pytest.approx(cell)


def test_the_sweep_leads_with_the_report_split():
    figure = sweep_figures.sweep_curve(FRAMES["sweep"])
    report = next(t for t in figure.data if t.name == "the feature: clamp (report)")
    rows = (
        FRAMES["sweep"]
        .query("kind == 'candidate' and split == 'report' and intervention == 'clamp'")
        .sort_values("strength")
    )
    np.testing.assert_allclose(np.asarray(report.y, dtype=float), rows["bias"].to_numpy())


def test_a_sweep_of_edits_without_strengths_draws():
    rows = FRAMES["sweep"][FRAMES["sweep"]["strength"].isna()]
    assert len(sweep_figures.sweep_curve(rows).data) > 0


def test_the_frontier_uses_the_worst_text_kind_or_the_lost_evaluation():
    rows = (
        FRAMES["sweep"]
        .query("kind == 'direction' and split == 'report' and intervention == 'steer'")
        .sort_values("strength")
    )
    line = next(
        t for t in sweep_figures.frontier(FRAMES["sweep"]).data if t.name == "difference of means: steer"
    )
    worst = rows[list(style_figures.COSTS)].max(axis=1)
    np.testing.assert_allclose(np.asarray(line.x, dtype=float), np.maximum(worst, 1 - rows["beta"]))
    older = FRAMES["sweep"].drop(columns=["cost", "kl_valence", "kl_off"])
    line = next(t for t in sweep_figures.frontier(older).data if t.name == "difference of means: steer")
    np.testing.assert_allclose(np.asarray(line.x, dtype=float), rows["kl_ai_speech"])


def test_a_figure_not_measured_here_has_no_measured_mark():
    frame = pd.DataFrame(
        {
            "name": ["A1", "A7"],
            "published": [0.764, 0.963],
            "measured": [0.7, np.nan],
            "ci_low": [0.6, np.nan],
            "ci_high": [0.8, np.nan],
        }
    )
    figure = published_figures.comparison(frame)
    assert np.isnan(np.asarray(figure.data[1].x, dtype=float)).tolist() == [True, False]
    assert ["not re-measured here" in t for t in figure.layout.yaxis.ticktext] == [True, False]
