"""Figures of how sure a result is: the probe's checks, the study's open choices, other questions, other methods, other models."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from sae_bias.core.text import number
from sae_bias.figures import style
from sae_bias.figures.style import AI, COLORS, HOVER, HUMAN, NEUTRAL, SIDES, plain, points, short, wrapped


def bias_by_template(
    pairs: pd.DataFrame, overall: dict | None = None, *, sides: Sequence[str] = SIDES
) -> go.Figure:
    """Forest plot: mean bias of every template with a t interval over entities, the overall one as a band."""
    rows = pairs.groupby("template", sort=False)["bias"].agg(["mean", "std", "count"])
    rows["text"] = pairs.groupby("template", sort=False)["ai"].first() if "ai" in pairs else ""
    rows = rows.sort_values("mean")
    half = stats.t.ppf(0.975, np.maximum(rows["count"] - 1, 1)) * rows["std"] / np.sqrt(rows["count"])
    hover = [
        f"<b>{plain(t)}</b><br>{wrapped(r.text)}<br>bias {number(r.mean_)} nats, {r.count_} pairs"
        for t, r in zip(rows.index, rows.rename(columns={"mean": "mean_", "count": "count_"}).itertuples())
    ]
    fig = style.figure("Bias of every template", style.bias_axis(sides), height=130 + 20 * len(rows))
    ends = rows.assign(low=rows["mean"] - half, high=rows["mean"] + half).reset_index()
    style.forest(fig, ends, "mean", "low", "high", name="one template", color=HUMAN, hover=hover)
    style.row_labels(fig, [short(str(t).replace("_", " "), 34) for t in rows.index])
    style.zero_line(fig, "x")
    if overall and pd.notna(overall.get("mean")):
        style.overall_band(fig, overall)
    return fig


def bias_distribution(pairs: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """Histogram of the bias of every pair, with the mundane twins of the same pairs behind it."""
    fig = style.figure("Spread of the bias over pairs", style.bias_axis(sides), "pairs")
    twin, own = (
        ("mundane twin (“wants tea”)", "survival prompt")
        if tuple(sides) == SIDES
        else ("mundane twin", "pair")
    )
    shown = {"control_bias": (twin, NEUTRAL), "bias": (own, AI)}
    bins = style.bins(pairs, [c for c in shown if c in pairs])
    for column, (name, color) in shown.items():
        values = pairs[column].dropna() if column in pairs else pd.Series(dtype=float)
        if values.empty:
            continue
        hover = f"{name}<br>%{{x}} nats: %{{y}} pairs<extra></extra>"
        fig.add_histogram(
            x=values, xbins=bins, name=name, marker_color=color, opacity=0.68, hovertemplate=hover
        )
        fig.add_vline(x=values.mean(), line={"color": color, "width": 2, "dash": "dash"})
    fig.update_layout(barmode="overlay", bargap=0.04)
    return style.zero_line(fig, "x")


def word_contributions(words: pd.DataFrame) -> go.Figure:
    """Bars: what every evaluation word adds to the bias; positive and negative words apart."""
    rows = words.dropna(subset=["diff"]).sort_values("diff")
    fig = style.figure(
        "What every word adds", "contribution to the bias in nats", height=130 + 18 * len(rows)
    )
    for side, color in (("positive", HUMAN), ("negative", AI)):
        mask = (rows["side"] == side).to_numpy()
        y = np.flatnonzero(mask)
        hover = [
            f"<b>{plain(w)}</b> ({side} word)<br>{number(d)} nats"
            for w, d in rows.loc[mask, ["word", "diff"]].to_numpy()
        ]
        marker = {"color": color, "pattern": {"shape": "/" if side == "negative" else ""}}
        bars = {"orientation": "h", "marker": marker, "customdata": hover, "hovertemplate": HOVER}
        fig.add_bar(x=rows["diff"][mask], y=y, name=f"{side} words", **bars)
    style.row_labels(fig, [short(w, 24) for w in rows["word"]])
    return style.zero_line(fig, "x")


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
        part = rows[rows["kind"] == kind]
        hover = [
            f"<b>{plain(s)}</b> ({name})<br>{number(v)} nats" for s, v in zip(part["subject"], part["score"])
        ]
        style.forest(fig, part, "score", name=name, color=color, symbol=symbol, hover=hover)
    unknown = np.where(rows["score"].isna(), " (undefined)", "")
    return style.row_labels(fig, [short(s, 30) + note for s, note in zip(rows["subject"], unknown)])


def checks(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias as reported and under every check that gives it an interval (table `checks`)."""
    rows = frame.dropna(subset=["ci_low", "ci_high"]).iloc[::-1].reset_index(drop=True)
    fig = style.figure("The bias, checked in other ways", style.bias_axis(sides), height=140 + 30 * len(rows))
    first = rows.index == len(rows) - 1  # the primary figure heads the table
    for name, color, symbol, part in (
        ("as reported", AI, "diamond", rows[first]),
        ("checked another way", HUMAN, "circle", rows[~first]),
    ):
        hover = [
            f"<b>{plain(c)}</b><br>{number(v)} nats<br>{wrapped(s)}"
            for c, v, s in zip(part["check"], part["value"], part["says"].fillna(""))
        ]
        style.forest(fig, part, "value", name=name, color=color, symbol=symbol, hover=hover)
    return style.zero_line(style.row_labels(fig, [short(c, 40) for c in rows["check"]]), "x")


def words_left_out(frame: pd.DataFrame, bias: float | None = None, *, most: int = 40) -> go.Figure:
    """The bias without each word in turn, the most moving ones on top; the line is the bias with all of them."""
    rows = frame.dropna(subset=["bias"]).head(most).iloc[::-1].reset_index(drop=True)
    fig = style.figure("The bias without one word", "bias in nats", height=140 + 20 * len(rows))
    hover = [
        f"<b>without {plain(w)}</b> ({plain(s)} word)<br>{number(b)} nats, 95% interval {number(lo)} to {number(hi)}<br>change {number(c)}"
        for w, s, b, lo, hi, c in rows[["word", "side", "bias", "ci_low", "ci_high", "change"]].itertuples(
            index=False
        )
    ]
    points(
        fig, rows["bias"], rows.index, name="without the word", color=HUMAN, hover=hover, marker={"size": 8}
    )
    if bias is not None and np.isfinite(bias):
        line = {"color": AI, "width": 2}
        fig.add_vline(bias, line=line)
        fig.add_scatter(x=[None], y=[None], mode="lines", name="with every word", line=line)
    return style.row_labels(fig, [short(w, 24) for w in rows["word"]])


def specification_curve(frame: pd.DataFrame, of: str) -> go.Figure:
    """Every specification in order of size with its interval; behind it what 95 % of random word lists give."""
    rows = frame.sort_values("estimate").reset_index(drop=True)
    fig = style.figure(
        "The figure under every choice", "specifications, smallest first", f"{of} in nats", height=460
    )
    if "null_low" in rows and rows["null_low"].notna().any():
        points(
            fig, [*rows.index, *rows.index[::-1]], [*rows["null_high"], *rows["null_low"][::-1]], mode="lines", line={"width": 0},
            fill="toself", fillcolor="rgba(128,134,145,0.25)", name="95% of random word lists",
        )  # fmt: skip
    hover = [
        f"<b>{number(r.estimate)} nats</b> [{number(r.ci_low)}, {number(r.ci_high)}]<br>stem {plain(repr(r.stem))}<br>{plain(r.score)},"
        f" {plain(r.words)}<br>left out: {plain(r.left_out)}"
        for r in rows.itertuples()
    ]
    for (stem, part), color in zip(rows.groupby("stem", sort=False), COLORS * len(rows)):
        ends = {"array": part["ci_high"] - part["estimate"], "arrayminus": part["estimate"] - part["ci_low"]}
        points(
            fig, part.index, part["estimate"], name=f"stem “{short(str(stem), 30)}”", color=color, marker={"size": 5},
            hover=[hover[i] for i in part.index], error_y={"type": "data", "width": 0, "thickness": 0.7, **ends},
        )  # fmt: skip
    return style.zero_line(fig, "y")


def variance_shares(frame: pd.DataFrame) -> go.Figure:
    """Bars: the share of the spread that lies between templates, entities, stems and words."""
    rows = frame.sort_values("share")
    fig = style.figure("Where the spread comes from", "share of the variance", height=140 + 26 * len(rows))
    fig.add_bar(
        x=rows["share"], y=np.arange(len(rows)), orientation="h", marker_color=HUMAN, showlegend=False
    )
    fig.update_xaxes(tickformat=".0%")
    return style.row_labels(fig, [str(s) for s in rows["source"]])
