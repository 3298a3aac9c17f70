"""One function a figure: data frames in, a plotly Figure out; nothing is read, written or measured here.

A NaN is a gap in a figure, never a point at 0; what is drawn can be read in full by hovering. The palette
and the escaping of prompt text are in `figures.style`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias.figures import style
from sae_bias.figures.style import (  # fmt: skip
    AI,
    COSTS,
    GOLD,
    GREEN,
    HUMAN,
    INK,
    KINDS,
    NEUTRAL,
    PURPLE,
    SIDES,
    plain,
    points,
    says,
    short,
)


def sweep_curve(sweep: pd.DataFrame) -> go.Figure:
    """Bias against strength: report split solid with its interval, tune dotted, controls and baselines."""
    fig = style.figure("Bias against strength", "strength of the intervention", "bias in nats", height=480)
    base = (sweep["bias"] - sweep["change"]).dropna()
    lead = style.lead_split(sweep)
    for kind in ("control", "mismatch", "direction", "opposite", "candidate"):
        rows = sweep[(sweep["kind"] == kind) & sweep["strength"].notna()]
        splits = [lead] if kind != "candidate" else [s for s in rows["split"].unique() if s != lead] + [lead]
        for split in splits:
            style.strength_lines(fig, rows[rows["split"] == split], kind, dotted=split != lead, split=split)
    style.constant_lines(fig, sweep[sweep["strength"].isna() & (sweep["split"] == lead)])
    if len(base):
        at = sweep.loc[base.index, "split"] == lead
        fig.add_hline(
            y=(base[at] if at.any() else base).iloc[0],
            line={"color": INK, "dash": "dash", "width": 1.2},
            annotation={"text": "no intervention", "yshift": 10},
        )
    return style.zero_line(fig, "y")


AXIS = {
    "cost": "cost: the worst KL in nats a token, or 1 − β where that is more",
    "kl": "KL in nats a token, the worst of the text kinds",
}
_TICKS = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10]
LOG_COST = {"type": "log", "tickvals": _TICKS, "ticktext": ["≤ 0.0001", "0.001", "0.01", "0.1", "1", "10"]}


def frontier(sweep: pd.DataFrame) -> go.Figure:
    """Reduction against cost, the largest of KL, KL_off and 1 − β: up and left is better."""
    axis = "cost" if "cost" in sweep else "kl"
    cost = sweep["cost"] if axis == "cost" else sweep[[c for c in COSTS if c in sweep]].max(axis=1)
    rows = sweep.assign(kl=cost)[sweep["split"] == style.lead_split(sweep)].dropna(subset=["kl", "reduction"])
    rows = rows[(rows["kl"] != 0) | (rows["change"] != 0)]  # the base itself
    title, removed = "Bias removed against what it costs", "share of the bias removed"
    fig = style.figure(title, AXIS[axis], removed, height=460)
    wide = len(rows) > 0 and rows["kl"].max() > 0.2
    for kind in ("control", "mismatch", "opposite", "direction", "candidate"):
        name, color, dash = KINDS[kind]
        size, opacity = (5, 0.5) if kind == "control" else (9, 1)
        for i, (edit, part) in enumerate(rows[rows["kind"] == kind].groupby("intervention", sort=False)):
            part = part.sort_values("strength")
            x = part["kl"].clip(lower=1e-4) if wide else part["kl"]
            joined = kind != "control" and part["strength"].notna().sum() > 1
            round_ = kind == "control" or joined
            marker = {"size": size, "opacity": opacity, "symbol": "circle" if round_ else "diamond"}
            points(
                fig, x, part["reduction"], color=color, marker=marker, line={"color": color, "dash": dash, "width": 1.5},
                mode="lines+markers" if joined else "markers", showlegend=kind != "control" or i == 0,
                name=name if kind == "control" else f"{name}: {style.edit_name(edit)}",
                hover=[style.cell_hover(row) for row in part.to_dict("records")],
            )  # fmt: skip
    fig.update_yaxes(tickformat=".0%")
    if wide:
        fig.update_xaxes(**LOG_COST)
    return style.zero_line(fig, "y")


def controls_histogram(
    controls: pd.DataFrame, reduction: float | None = None, percentile95: float | None = None, *, column: str = "reduction"
) -> go.Figure:  # fmt: skip
    """What the controls remove (`column`), with the feature and the controls' 95th percentile as lines."""
    axes = {"specific_reduction": "specific reduction", "removed_nats": "bias removed, nats"}
    show = "{:.2f} nats" if column == "removed_nats" else "{:.0%}"
    axis = axes.get(column, "share of the bias removed")
    fig = style.figure("The feature against its controls", axis, "controls")
    bins = style.bins(controls, [column])
    for (kind, rows), color in zip(controls.groupby("kind"), (NEUTRAL, PURPLE, GREEN, GOLD, HUMAN)):
        fig.add_histogram(
            x=rows[column].dropna(), xbins=bins, name=f"{plain(kind)} ({len(rows)})", marker_color=color, opacity=0.75,
            hovertemplate=f"{plain(kind)}<br>%{{x}}: %{{y}} controls<extra></extra>",
        )  # fmt: skip
    for value, text, color, dash in (
        (percentile95, "95th percentile", NEUTRAL, "dot"),
        (reduction, "the feature", AI, "solid"),
    ):
        if value is not None and np.isfinite(value):
            said = f"{text} {show.format(value)}".replace("-", "−")
            label = {"text": said, "font": {"color": color}, "yanchor": "bottom", "xanchor": "center"}
            line = {"color": color, "width": 2.5, "dash": dash}
            fig.add_vline(value, line=line, annotation=label, annotation_position="top")
    bottom = 90 if controls["kind"].nunique() > 1 else 56
    fig.update_layout(barmode="stack", bargap=0.04, legend={"y": -0.3, "yanchor": "top"}, margin={"b": bottom})  # fmt: skip
    return fig if column == "removed_nats" else fig.update_xaxes(tickformat=".0%")


def before_after(examples: pd.DataFrame, *, most: int = 16, sides: Sequence[str] = SIDES) -> go.Figure:
    """Dumbbells: the bias of example pairs before and after the intervention."""
    title, axis = "Example pairs, before and after", style.bias_axis(sides)
    fig, rows = style.rows_of(examples.head(most), title, axis, pitch=30, top=140)
    ends = rows["bias_before"], rows["bias_after"]
    style.links(fig, *ends, line={"color": NEUTRAL, "width": 2}, opacity=0.55)
    for values, name, color, symbol in zip(ends, ("before", "after"), (AI, GREEN), ("diamond", "circle")):
        hover = f"<b>{name}: {{{values.name}}} nats</b><br>{{ai:wrap}}<br><i>against</i><br>{{human:wrap}}"
        marker = {"symbol": symbol, "size": 10}
        points(fig, values, rows.index, name=name, color=color, hover=says(rows, hover), marker=marker)
    return style.row_labels(fig, [short(t, 52) for t in rows["ai"]], zero=True)


def specificity(frame: pd.DataFrame) -> go.Figure:
    """Biases that should not move, before and after the edit; a question that could not be asked is left out."""
    axis = "bias in nats (the first side less the second)"
    fig, rows = style.rows_of(frame.dropna(subset=["before"]), "Other biases, before and after", axis, pitch=40)  # fmt: skip
    hover = "<b>{question}</b>, before: {before} nats"
    ends = "before", "before_low", "before_high"
    style.forest(fig, rows, *ends, y=rows.index + 0.12, name="before", color=HUMAN, hover=hover)
    after = "<b>{question}</b>, after: {after} nats<br>change {change}; {wrong_way_share:.0%} of pairs moved further from 0"
    marker = {"symbol": "diamond", "size": 10}
    points(fig, rows["after"], rows.index - 0.12, name="after", color=GREEN, hover=says(rows, after), marker=marker)  # fmt: skip
    labels = [short(s.replace(" - ", " − "), 34) for s in rows["sides"].fillna("")]
    return style.row_labels(fig, labels, zero=True)


def methods_at_cost(frame: pd.DataFrame) -> go.Figure:
    """Share removed against cost, a line a method (table `compare_curves`), of the difference in differences where there are twins;
    of the bias, and against KL alone, in runs of an older sae-bias."""
    colors = {"candidate": AI, "direction": HUMAN, "opposite": PURPLE, "control": NEUTRAL}
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
    x = "cost" if "cost" in frame else "kl"
    twins = "did_reduction" in frame and bool(frame["did_reduction"].notna().any())
    y, of = ("did_reduction", "difference in differences") if twins else ("reduction", "bias")
    fig = style.figure("Removed at its cost", AXIS[x], f"share of the {of} removed", height=560)
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        part = part.reindex(part["share"].abs().sort_values(kind="stable").index)
        kind = str(part["kind"].iloc[0])
        hover = f"<b>{{method}}</b><br>share taken out {{share}}<br>removed {{{y}:.1%}}<br>{x} {{{x}}}"
        lead = kind == "candidate"
        line = {"color": colors.get(kind, GREEN), "dash": "solid" if lead else dashes[i % len(dashes)]}
        points(
            fig, part[x].clip(lower=1e-4), part[y], mode="lines+markers", name=short(method, 44), hover=says(part, hover),
            line=line | {"width": 3 if lead else 1.5}, opacity=0.55 if kind == "control" else 1.0,
        )  # fmt: skip
    fig.update_xaxes(**LOG_COST)
    return style.zero_line(fig.update_yaxes(tickformat=".0%"), "y")
