"""Figures of how sure a result is: the probe's checks, the study's open choices, other questions, other methods, other models."""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias import plot_style as style
from sae_bias.plot_style import (
    AI,
    GOLD,
    GREEN,
    HOVER,
    HUMAN,
    NEUTRAL,
    PURPLE,
    SIDES,
    number,
    plain,
    short,
    wrapped,
)

MODEL_COLORS = (AI, HUMAN, GREEN, PURPLE, GOLD, NEUTRAL)


def checks(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias as reported and under every check that gives it an interval (table `checks`)."""
    rows = frame.dropna(subset=["ci_low", "ci_high"]).iloc[::-1].reset_index(drop=True)
    fig = style.figure("The bias, checked in other ways", style.bias_axis(sides), height=140 + 30 * len(rows))
    first = rows["check"] == "bias"
    for name, color, symbol, part in (
        ("as reported", AI, "diamond", rows[first]),
        ("checked another way", HUMAN, "circle", rows[~first]),
    ):
        hover = [
            f"<b>{plain(c)}</b><br>{number(v)} nats<br>{wrapped(s)}"
            for c, v, s in zip(part["check"], part["value"], part["says"].fillna(""))
        ]
        style.forest(
            fig, part["value"], part["ci_low"], part["ci_high"], y=part.index, name=name, color=color,
            symbol=symbol, hover=hover,
        )  # fmt: skip
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
    fig.add_scatter(
        x=rows["bias"], y=rows.index, mode="markers", name="without the word", marker={"color": HUMAN, "size": 8},
        customdata=hover, hovertemplate=HOVER,
    )  # fmt: skip
    if bias is not None and np.isfinite(bias):
        fig.add_vline(x=bias, line={"color": AI, "width": 2})
        fig.add_scatter(
            x=[None], y=[None], mode="lines", name="with every word", line={"color": AI, "width": 2}
        )
    return style.row_labels(fig, [short(w, 24) for w in rows["word"]])


def switches(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias under each choice that the published study leaves open; hollow marks do not count for a verdict."""
    rows = frame[~frame["switch"].str.contains("auroc")].copy()  # a probability, not nats
    names = list(dict.fromkeys(rows["switch"]))[::-1]
    models = list(dict.fromkeys(rows.get("model", pd.Series("", index=rows.index))))
    fig = style.figure(
        "The bias under each open choice",
        style.bias_axis(sides),
        height=150 + (26 + 8 * len(models)) * len(names),
    )
    for i, model in enumerate(models):
        part = rows[rows["model"] == model] if "model" in rows else rows
        lift = 0.0 if len(models) == 1 else 0.5 * (i / (len(models) - 1) - 0.5)
        color = MODEL_COLORS[i % len(MODEL_COLORS)]
        for is_open in (True, False):
            some = part[part["open"].astype(bool) == is_open]
            if some.empty:
                continue
            hover = [
                f"<b>{plain(s)}</b>{'<br>' + plain(model) if model else ''}<br>{number(b)} nats<br>{wrapped(n)}"
                for s, b, n in zip(some["switch"], some["bias"], some["note"])
            ]
            kind = "left open by the study" if is_open else "for comparison only"
            style.forest(
                fig, some["bias"], some["ci_low"], some["ci_high"], y=[names.index(s) - lift for s in some["switch"]],
                name=f"{short(model, 30)}: {kind}" if model else kind, color=color,
                symbol="circle" if is_open else "circle-open", hover=hover,
            )  # fmt: skip
    return style.zero_line(style.row_labels(fig, [short(n, 36) for n in names]), "x")


def intervention_switches(frame: pd.DataFrame) -> go.Figure:
    """The reduction at the best strength under each switch: read where it was chosen, and on templates held out."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        "The reduction under each open choice", "share of the bias removed", height=150 + 46 * len(rows)
    )
    for key, name, color, symbol, lift in (
        ("in_sample", "chosen and read on all pairs", NEUTRAL, "circle-open", 0.14),
        ("held_out", "held out", AI, "diamond", -0.14),
    ):
        hover = [
            f"<b>{plain(s)}</b><br>{name}: {v:.1%} at {number(at)} × largest activation"
            for s, v, at in zip(rows["switch"], rows[f"{key}_reduction"], rows[f"{key}_strength"])
        ]
        low, high = rows[f"{key}_low"], rows[f"{key}_high"]
        style.forest(
            fig, rows[f"{key}_reduction"], low, high, y=rows.index + lift, name=name, color=color,
            symbol=symbol, hover=hover,
        )  # fmt: skip
    fig.update_xaxes(tickformat=".0%")
    return style.zero_line(style.row_labels(fig, [wrapped(s, 26) for s in rows["switch"]]), "x")


def specificity(frame: pd.DataFrame) -> go.Figure:
    """Biases that should not move, before and after the edit; a question that could not be asked is left out."""
    rows = frame.dropna(subset=["before"]).iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        "Other biases, before and after", "bias in nats (the first side less the second)", height=150 + 40 * len(rows)
    )  # fmt: skip
    hover = [f"<b>{plain(q)}</b>, before: {number(b)} nats" for q, b in zip(rows["question"], rows["before"])]
    style.forest(
        fig, rows["before"], rows["before_low"], rows["before_high"], y=rows.index + 0.12, name="before",
        color=HUMAN, symbol="circle", hover=hover,
    )  # fmt: skip
    after = [
        f"<b>{plain(q)}</b>, after: {number(a)} nats<br>change {number(c)}; {w:.0%} of pairs moved further from 0"
        for q, a, c, w in zip(rows["question"], rows["after"], rows["change"], rows["wrong_way_share"])
    ]
    fig.add_scatter(
        x=rows["after"], y=rows.index - 0.12, mode="markers", name="after", customdata=after, hovertemplate=HOVER,
        marker={"color": GREEN, "symbol": "diamond", "size": 10},
    )  # fmt: skip
    labels = [short(s.replace(" - ", " − "), 34) for s in rows["sides"].fillna("")]
    return style.zero_line(style.row_labels(fig, labels), "x")


def methods_at_cost(frame: pd.DataFrame) -> go.Figure:
    """Bias removed against KL, a line a method (table `compare_curves`)."""
    colors = {"candidate": AI, "direction": HUMAN, "opposite": PURPLE, "control": NEUTRAL}
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
    fig = style.figure(
        "Bias removed at its cost", "KL in nats a token, the worst of the text kinds", "share of the bias removed", height=560,
    )  # fmt: skip
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        part = part.reindex(part["share"].abs().sort_values(kind="stable").index)
        kind = str(part["kind"].iloc[0])
        hover = [
            f"<b>{plain(method)}</b><br>share taken out {number(r.share)}<br>removed {r.reduction:.1%}<br>KL {number(r.kl)}"
            for r in part.itertuples()
        ]
        lead = kind == "candidate"
        line = {"color": colors.get(kind, GREEN), "dash": "solid" if lead else dashes[i % len(dashes)]}
        fig.add_scatter(
            x=part["kl"].clip(lower=1e-4), y=part["reduction"], mode="lines+markers", name=short(method, 44),
            line=line | {"width": 3 if lead else 1.5}, opacity=0.55 if kind == "control" else 1.0,
            customdata=hover, hovertemplate=HOVER,
        )  # fmt: skip
    ticks = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10]
    fig.update_xaxes(type="log", tickvals=ticks, ticktext=["≤ 0.0001", "0.001", "0.01", "0.1", "1", "10"])
    return style.zero_line(fig.update_yaxes(tickformat=".0%"), "y")


def models(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias of every model and form; a published figure is a hollow diamond, also where it was not re-measured here."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    value = rows["bias"] if "bias" in rows else pd.Series(np.nan, index=rows.index)
    labels = [
        short(m, 34)
        + ("" if f == "plain" else f" ({plain(f)} form)")
        + ("" if pd.notna(v) else "<br><i>not re-measured here</i>")
        for m, f, v in zip(rows["model"], rows["form"], value)
    ]
    fig = style.figure("The bias of every model", style.bias_axis(sides), height=150 + 44 * len(rows))
    if "published" in rows and rows["published"].notna().any():
        known = rows[rows["published"].notna()]
        hover = [
            f"<b>{plain(m)}</b><br>published {number(p)}" for m, p in zip(known["model"], known["published"])
        ]
        fig.add_scatter(
            x=known["published"].astype(float), y=known.index, mode="markers", name="published",
            marker={"symbol": "diamond-open", "size": 12, "color": PURPLE, "line": {"width": 2}},
            customdata=hover, hovertemplate=HOVER,
        )  # fmt: skip
    if value.notna().any():
        said = rows["verdict"] if "verdict" in rows else pd.Series("", index=rows.index)
        hover = [
            f"<b>{plain(m)}</b> ({plain(f)} form)<br>{number(v)} nats<br>{plain(s)}"
            for m, f, v, s in zip(rows["model"], rows["form"], value, said)
        ]
        style.forest(
            fig, value, rows["ci_low"], rows["ci_high"], name="measured here", color=GREEN, hover=hover
        )
    return style.zero_line(style.row_labels(fig, labels), "x")


def tuning(frame: pd.DataFrame) -> go.Figure:
    """Instruction-tuned less pretrained: the bias, both scores and the levels they are made of."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        "What instruction tuning changes", "change in nats (tuned − pretrained)", height=150 + 30 * len(rows)
    )
    hover = [
        f"<b>{plain(q)}</b><br>{plain(t)} − {plain(p)}<br>{number(c)} nats"
        for q, t, p, c in zip(rows["quantity"], rows["tuned"], rows["pretrained"], rows["change"])
    ]
    style.forest(
        fig,
        rows["change"],
        rows["ci_low"],
        rows["ci_high"],
        name="measured here",
        color=GREEN,
        hover=hover,
    )
    if "published" in rows and rows["published"].notna().any():
        known = rows[rows["published"].notna()]
        fig.add_scatter(
            x=known["published"].astype(float), y=known.index, mode="markers", name="published",
            marker={"symbol": "diamond-open", "size": 12, "color": PURPLE, "line": {"width": 2}},
            hovertemplate="published %{x}<extra></extra>",
        )  # fmt: skip
    return style.zero_line(style.row_labels(fig, [short(q, 34) for q in rows["quantity"]]), "x")
