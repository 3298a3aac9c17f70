"""Figures that set runs beside published values, models beside models, and choices beside choices."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias.figures import style
from sae_bias.figures.style import AI, COLORS, GREEN, NEUTRAL, SIDES, plain, short, wrapped

NOT_HERE = "<br><i>not re-measured here</i>"


def comparison(frame: pd.DataFrame) -> go.Figure:
    """Published against measured on one axis; a row not measured keeps its published mark."""
    fig, rows = style.rows_of(frame, "Published and measured", "reported value")
    style.published(fig, rows)
    hover = "<b>{name}</b><br>measured {measured}"
    style.forest(fig, rows, "measured", name="measured here", color=GREEN, hover=hover)
    labels = [short(n, 40) + ("" if pd.notna(m) else NOT_HERE) for n, m in zip(rows["name"], rows["measured"])]  # fmt: skip
    return style.row_labels(fig, labels, zero=True)


def compare_runs(
    frame: pd.DataFrame, *, title: str = "The bias of every run", axis: str = "bias in nats (right of 0: AI judged worse)", share: bool = False
) -> go.Figure:  # fmt: skip
    """One figure of several runs with its interval (columns run, mean, ci_low, ci_high); `share` reads as percent."""
    fig, rows = style.rows_of(frame, title, axis, pitch=38, top=140)
    hover = "<b>{run}</b><br>" + ("{mean:.1%}" if share else "{mean} nats")
    style.forest(fig, rows, "mean", name="run", color=AI, symbol="diamond", hover=hover)
    fig.update_layout(showlegend=False)
    if share:
        fig.update_xaxes(tickformat=".0%")
    return style.row_labels(fig, [short(n, 40) for n in rows["run"]], zero=True)


def switches(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias under each choice that the published study leaves open; hollow marks do not count for a verdict."""
    rows = frame[~frame["switch"].str.contains("auroc")]  # a probability, not nats
    rows = rows if "model" in rows else rows.assign(model="")
    names, models = list(dict.fromkeys(rows["switch"]))[::-1], list(dict.fromkeys(rows["model"]))
    height = 150 + (26 + 8 * len(models)) * len(names)
    fig = style.figure("The bias under each open choice", style.bias_axis(sides), height=height)
    for (model, is_open), some in rows.groupby(["model", rows["open"].astype(bool)], sort=False):
        i = models.index(model)
        lift = 0.0 if len(models) == 1 else 0.5 * (i / (len(models) - 1) - 0.5)
        kind = "left open by the study" if is_open else "for comparison only"
        style.forest(
            fig, some, "bias", y=[names.index(s) - lift for s in some["switch"]], color=COLORS[i % len(COLORS)],
            hover=f"<b>{{switch}}</b>{'<br>{model}' if model else ''}<br>{{bias}} nats<br>{{note:wrap}}",
            name=f"{short(model, 30)}: {kind}" if model else kind, symbol="circle" if is_open else "circle-open",
        )  # fmt: skip
    return style.row_labels(fig, [short(n, 36) for n in names], zero=True)


def intervention_switches(frame: pd.DataFrame) -> go.Figure:
    """The reduction at the best strength under each switch: read where it was chosen, and on templates held out."""
    fig, rows = style.rows_of(frame, "The reduction under each open choice", "share of the bias removed", pitch=46)  # fmt: skip
    for key, name, color, symbol, lift in (
        ("in_sample", "chosen and read on all pairs", NEUTRAL, "circle-open", 0.14),
        ("held_out", "held out", AI, "diamond", -0.14),
    ):
        hover = (
            f"<b>{{switch}}</b><br>{name}: {{{key}_reduction:.1%}} at {{{key}_strength}} × largest activation"
        )
        columns = [f"{key}_{c}" for c in ("reduction", "low", "high")]
        style.forest(fig, rows, *columns, y=rows.index + lift, name=name, color=color, symbol=symbol, hover=hover)  # fmt: skip
    fig.update_xaxes(tickformat=".0%")
    return style.row_labels(fig, [wrapped(s, 26) for s in rows["switch"]], zero=True)


def models(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """The bias of every model and form; a published figure is a hollow diamond, also where it was not re-measured here."""
    fig, rows = style.rows_of(frame, "The bias of every model", style.bias_axis(sides))
    rows = rows if "bias" in rows else rows.assign(bias=np.nan)
    rows = rows if "verdict" in rows else rows.assign(verdict="")
    labels = [
        short(m, 34) + ("" if f == "plain" else f" ({plain(f)} form)") + ("" if pd.notna(v) else NOT_HERE)
        for m, f, v in zip(rows["model"], rows["form"], rows["bias"])
    ]
    style.published(fig, rows, "<b>{model}</b><br>published {published}")
    if rows["bias"].notna().any():
        hover = "<b>{model}</b> ({form} form)<br>{bias} nats<br>{verdict}"
        style.forest(fig, rows, "bias", name="measured here", color=GREEN, hover=hover)
    return style.row_labels(fig, labels, zero=True)


def tuning(frame: pd.DataFrame) -> go.Figure:
    """Instruction-tuned less pretrained: the bias, both scores and the levels they are made of."""
    fig, rows = style.rows_of(frame, "What instruction tuning changes", "change in nats (tuned − pretrained)", pitch=30)  # fmt: skip
    hover = "<b>{quantity}</b><br>{tuned} − {pretrained}<br>{change} nats"
    style.forest(fig, rows, "change", name="measured here", color=GREEN, hover=hover)
    style.published(fig, rows)
    return style.row_labels(fig, [short(q, 34) for q in rows["quantity"]], zero=True)
