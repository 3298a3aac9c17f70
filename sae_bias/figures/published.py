"""Figures that set runs beside published values, models beside models, and choices beside choices."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias.core.text import number
from sae_bias.figures import style
from sae_bias.figures.style import AI, COLORS, GREEN, NEUTRAL, SIDES, plain, short, wrapped


def comparison(frame: pd.DataFrame) -> go.Figure:
    """Published against measured on one axis; a row not measured keeps its published mark."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    labels = [
        short(n, 40) + ("" if pd.notna(m) else "<br><i>not re-measured here</i>")
        for n, m in zip(rows["name"], rows["measured"])
    ]
    fig = style.figure("Published and measured", "reported value", height=150 + 44 * len(rows))
    style.published(fig, rows, [f"published {number(p)}" for p in rows["published"]])
    hover = [f"<b>{plain(n)}</b><br>measured {number(m)}" for n, m in zip(rows["name"], rows["measured"])]
    style.forest(fig, rows, "measured", name="measured here", color=GREEN, hover=hover)
    return style.zero_line(style.row_labels(fig, labels), "x")


def compare_runs(
    frame: pd.DataFrame,
    *,
    title: str = "The bias of every run",
    axis: str = "bias in nats (right of 0: AI judged worse)",
    share: bool = False,
) -> go.Figure:
    """One figure of several runs with its interval (columns run, mean, ci_low, ci_high); `share` reads as percent."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    hover = [
        f"<b>{plain(n)}</b><br>{f'{m:.1%}' if share else number(m) + ' nats'}"
        for n, m in zip(rows["run"], rows["mean"])
    ]
    fig = style.figure(title, axis, height=140 + 38 * len(rows))
    style.forest(fig, rows, "mean", name="run", color=AI, symbol="diamond", hover=hover)
    fig.update_layout(showlegend=False)
    if share:
        fig.update_xaxes(tickformat=".0%")
    return style.zero_line(style.row_labels(fig, [short(n, 40) for n in rows["run"]]), "x")


def switches(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias under each choice that the published study leaves open; hollow marks do not count for a verdict."""
    rows = frame[~frame["switch"].str.contains("auroc")].copy()  # a probability, not nats
    names = list(dict.fromkeys(rows["switch"]))[::-1]
    models = list(dict.fromkeys(rows.get("model", pd.Series("", index=rows.index))))
    height = 150 + (26 + 8 * len(models)) * len(names)
    fig = style.figure("The bias under each open choice", style.bias_axis(sides), height=height)
    for i, model in enumerate(models):
        part = rows[rows["model"] == model] if "model" in rows else rows
        lift = 0.0 if len(models) == 1 else 0.5 * (i / (len(models) - 1) - 0.5)
        color = COLORS[i % len(COLORS)]
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
                fig, some, "bias", y=[names.index(s) - lift for s in some["switch"]], hover=hover, color=color,
                name=f"{short(model, 30)}: {kind}" if model else kind, symbol="circle" if is_open else "circle-open",
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
        columns = [f"{key}_{c}" for c in ("reduction", "low", "high")]
        style.forest(
            fig, rows, *columns, y=rows.index + lift, name=name, color=color, symbol=symbol, hover=hover
        )
    fig.update_xaxes(tickformat=".0%")
    return style.zero_line(style.row_labels(fig, [wrapped(s, 26) for s in rows["switch"]]), "x")


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
        style.published(fig, known, hover)
    if value.notna().any():
        said = rows["verdict"] if "verdict" in rows else pd.Series("", index=rows.index)
        hover = [
            f"<b>{plain(m)}</b> ({plain(f)} form)<br>{number(v)} nats<br>{plain(s)}"
            for m, f, v, s in zip(rows["model"], rows["form"], value, said)
        ]
        style.forest(fig, rows, "bias", name="measured here", color=GREEN, hover=hover)
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
    style.forest(fig, rows, "change", name="measured here", color=GREEN, hover=hover)
    if "published" in rows and rows["published"].notna().any():
        known = rows[rows["published"].notna()]
        style.published(fig, known, [f"published {number(p)}" for p in known["published"]])
    return style.zero_line(style.row_labels(fig, [short(q, 34) for q in rows["quantity"]]), "x")
