"""Figures of the probe: the bias by template and pair, words, subjects, and how sure it is under its checks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy.special import stdtrit

from sae_bias.figures import style
from sae_bias.figures.style import AI, COLORS, HUMAN, NEUTRAL, SIDES, points, says, short


def bias_by_template(pairs: pd.DataFrame, overall: dict | None = None, *, sides: Sequence[str] = SIDES) -> go.Figure:  # fmt: skip
    """Forest plot: mean bias of every template with a t interval over entities, the overall one as a band."""
    by = pairs.groupby("template", sort=False)
    rows = by["bias"].agg(["mean", "std", "count"]).assign(text=by["ai"].first() if "ai" in pairs else "")
    rows = rows.sort_values("mean").reset_index()
    half = stdtrit(np.maximum(rows["count"] - 1, 1), 0.975) * rows["std"] / np.sqrt(rows["count"])
    rows = rows.assign(low=rows["mean"] - half, high=rows["mean"] + half)
    fig = style.figure("Bias of every template", style.bias_axis(sides), height=130 + 20 * len(rows))
    hover = "<b>{template}</b><br>{text:wrap}<br>bias {mean} nats, {count} pairs"
    style.forest(fig, rows, "mean", "low", "high", name="one template", color=HUMAN, hover=hover)
    style.row_labels(fig, [short(str(t).replace("_", " "), 34) for t in rows["template"]], zero=True)
    if overall and pd.notna(overall.get("mean")):
        style.overall_band(fig, overall)
    return fig


def bias_distribution(pairs: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """Histogram of the bias of every pair, with the mundane twins of the same pairs behind it."""
    fig = style.figure("Spread of the bias over pairs", style.bias_axis(sides), "pairs")
    survival = tuple(sides) == SIDES
    twin, own = ("mundane twin (“wants tea”)", "survival prompt") if survival else ("mundane twin", "pair")
    shown = {"control_bias": (twin, NEUTRAL), "bias": (own, AI)}
    bins = style.bins(pairs, [c for c in shown if c in pairs])
    for column, (name, color) in shown.items():
        if column in pairs and pairs[column].notna().any():
            values, hover = pairs[column].dropna(), f"{name}<br>%{{x}} nats: %{{y}} pairs<extra></extra>"
            fig.add_histogram(x=values, xbins=bins, name=name, marker_color=color, opacity=0.68, hovertemplate=hover)  # fmt: skip
            fig.add_vline(x=values.mean(), line={"color": color, "width": 2, "dash": "dash"})
    fig.update_layout(barmode="overlay", bargap=0.04)
    return style.zero_line(fig, "x")


def word_contributions(words: pd.DataFrame) -> go.Figure:
    """Bars: what every evaluation word adds to the bias; positive and negative words apart."""
    rows = words.dropna(subset=["diff"]).sort_values("diff")
    fig = style.figure("What every word adds", "contribution to the bias in nats", height=130 + 18 * len(rows))  # fmt: skip
    for side, color, shape in (("positive", HUMAN, ""), ("negative", AI, "/")):
        mask = (rows["side"] == side).to_numpy()
        hover = says(rows[mask], f"<b>{{word}}</b> ({side} word)<br>{{diff}} nats")
        style.bars(
            fig, rows["diff"][mask], hover, y=np.flatnonzero(mask), color=color, name=f"{side} words", marker={"pattern": {"shape": shape}}
        )  # fmt: skip
    return style.row_labels(fig, [short(w, 24) for w in rows["word"]], zero=True)


def levels(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """Score of every subject with its interval: how much is an AI penalty, how much a human bonus."""
    rows = frame.sort_values("score", na_position="first").reset_index(drop=True)
    axis = "score in nats (further right: judged better)"
    fig = style.figure("How every subject is judged", axis, height=150 + 24 * len(rows))
    for kind, name, color, symbol in (
        ("human", short(sides[0], 30), HUMAN, "circle"),
        ("ai", short(sides[1], 30), AI, "diamond"),
        ("neutral", "neutral", NEUTRAL, "square"),
    ):
        part = rows[rows["kind"] == kind].assign(name=sides[kind == "ai"] if kind != "neutral" else kind)
        hover = "<b>{subject}</b> ({name})<br>{score} nats"
        style.forest(fig, part, "score", name=name, color=color, symbol=symbol, hover=hover)
    unknown = np.where(rows["score"].isna(), " (undefined)", "")
    return style.row_labels(fig, [short(s, 30) + note for s, note in zip(rows["subject"], unknown)])


def checks(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias as reported and under every check that gives it an interval (table `checks`)."""
    known = frame.dropna(subset=["ci_low", "ci_high"])
    fig, rows = style.rows_of(known, "The bias, checked in other ways", style.bias_axis(sides), pitch=30, top=140)  # fmt: skip
    hover, first = (
        "<b>{check}</b><br>{value} nats<br>{says:wrap}",
        rows.index == len(rows) - 1,
    )  # heads the table
    style.forest(fig, rows[first], "value", name="as reported", color=AI, symbol="diamond", hover=hover)
    style.forest(fig, rows[~first], "value", name="checked another way", color=HUMAN, hover=hover)
    return style.row_labels(fig, [short(c, 40) for c in rows["check"]], zero=True)


def words_left_out(
    frame: pd.DataFrame, of: str, headline: float | None = None, *, most: int = 40
) -> go.Figure:
    """The primary figure without each word in turn, the most moving ones on top; the line is the figure with all of them."""
    known = frame.dropna(subset=["primary"]).head(most)
    fig, rows = style.rows_of(known, f"The {of} without one word", f"{of} in nats", pitch=20, top=140)
    hover = "<b>without {word}</b> ({side} word)<br>{primary} nats, 95% interval {primary_low} to {primary_high}<br>change {change}"
    points(
        fig, rows["primary"], rows.index, name="without the word", color=HUMAN, hover=says(rows, hover), marker={"size": 8}
    )  # fmt: skip
    if headline is not None and np.isfinite(headline):
        line = {"color": AI, "width": 2}
        fig.add_vline(headline, line=line)
        fig.add_scatter(x=[None], y=[None], mode="lines", name="with every word", line=line)
    return style.row_labels(fig, [short(w, 24) for w in rows["word"]])


def specification_curve(frame: pd.DataFrame, of: str) -> go.Figure:
    """Every specification in order of size with its interval; behind it what 95 % of random word lists give."""
    rows = frame.sort_values("estimate").reset_index(drop=True).assign(shown=lambda r: r["stem"].map(repr))
    fig = style.figure("The figure under every choice", "specifications, smallest first", f"{of} in nats", height=460)  # fmt: skip
    if "null_low" in rows and rows["null_low"].notna().any():
        points(
            fig, [*rows.index, *rows.index[::-1]], [*rows["null_high"], *rows["null_low"][::-1]], mode="lines", line={"width": 0},
            fill="toself", fillcolor="rgba(128,134,145,0.25)", name="95% of random word lists",
        )  # fmt: skip
    hover = "<b>{estimate} nats</b> [{ci_low}, {ci_high}]<br>stem {shown}<br>{score}, {words}<br>left out: {left_out}"  # fmt: skip
    for (stem, part), color in zip(rows.groupby("stem", sort=False), COLORS * len(rows)):
        ends = {"array": part["ci_high"] - part["estimate"], "arrayminus": part["estimate"] - part["ci_low"]}
        points(
            fig, part.index, part["estimate"], name=f"stem “{short(str(stem), 30)}”", color=color, marker={"size": 5},
            hover=says(part, hover), error_y={"type": "data", "width": 0, "thickness": 0.7, **ends},
        )  # fmt: skip
    return style.zero_line(fig, "y")


def variance_shares(frame: pd.DataFrame) -> go.Figure:
    """Bars: the share of the spread that lies between templates, entities, stems and words."""
    rows = frame.sort_values("share")
    fig = style.figure("Where the spread comes from", "share of the variance", height=140 + 26 * len(rows))
    style.bars(fig, rows["share"], says(rows, "<b>{source}</b><br>{share:.1%}"), color=HUMAN, showlegend=False)  # fmt: skip
    fig.update_xaxes(tickformat=".0%")
    return style.row_labels(fig, [str(s) for s in rows["source"]])
