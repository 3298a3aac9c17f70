"""Figures of the search for features: rankings, the causal analysis, resolved candidates, matches.

Data frames in, a plotly Figure out; nothing is read, written or measured here, and a NaN is a gap.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_bias.core.text import number
from sae_bias.figures import style
from sae_bias.figures.style import (
    AI,
    CALLS,
    GOLD,
    GREEN,
    GRID,
    HOVER,
    HUMAN,
    INK,
    NEUTRAL,
    PURPLE,
    SIDES,
    plain,
    points,
    short,
    wrapped,
)  # fmt: skip


def ranked_features(ranking: pd.DataFrame, *, most: int = 2000, sides: Sequence[str] = SIDES) -> go.Figure:
    """Every feature: separation (AUROC) across, interaction up, the call as color and symbol."""
    rows = ranking.dropna(subset=["auroc", "interaction"]).assign(call=calls_of)
    rows = rows.reindex(rows["interaction"].abs().sort_values(ascending=False).index).head(most)
    fig = style.figure(
        "Features: separation against interaction",
        f"separation: AUROC of {short(sides[1], 24)} above {short(sides[0], 24)} prompts",
        "interaction in activation units",
        height=480,
    )
    separates = f"separates {short(sides[1], 24)} from {short(sides[0], 24)}"
    hover = [style.feature_hover(row) for row in rows.to_dict("records")]
    _by_call(fig, rows.assign(hover=hover), "auroc", "interaction", {"separates": separates}, empty=True)
    named: list[tuple[float, float]] = []
    room = np.ptp(rows["interaction"].to_numpy()) / 18 if len(rows) else 0.0
    for row in rows[rows["call"] == "ai_speech"].head(3).to_dict("records"):
        x, y = row["auroc"], row["interaction"]
        if any(abs(y - v) < room and abs(x - u) < 0.12 for u, v in named):
            continue  # a label here would cover another
        named.append((x, y))
        label = {"text": f"#{row['index']}", "showarrow": False, "xanchor": "right", "xshift": -12}
        fig.add_annotation(x=x, y=y, font={"color": AI}, **label)
    fig.add_vline(x=0.5, line={"color": GRID, "width": 1.5, "dash": "dot"})
    return style.zero_line(fig, "y")


def _by_call(
    fig: go.Figure,
    rows: pd.DataFrame,
    x: str,
    y: str,
    names: dict[str, str] | None = None,
    *,
    empty: bool = False,
) -> None:
    """A mark a feature, colored by its call; `empty` keeps calls that no feature has in the legend."""
    for call in reversed(CALLS):
        part, (name, color, symbol) = rows[rows["call"] == call], CALLS[call]
        size, opacity = {"no": 5, "ai_speech": 13}.get(call, 8), 0.5 if call == "no" else 0.95
        name = f"{(names or {}).get(call, name)} ({len(part)})"
        marker = {"symbol": symbol, "size": size, "opacity": opacity}
        if len(part) or empty:
            points(fig, part[x], part[y], name=name, color=color, hover=part["hover"], marker=marker)


CALL_KEYS = {
    "AI-speech": "ai_speech",
    "silent at AI speech": "silent",
    "negative judgement": "judgement",
    "AI identity": "identity",
    "undetermined": "undetermined",
}


def calls_of(ranking: pd.DataFrame) -> pd.Series:
    """The strongest call of every feature: a key of `CALLS`. Runs before 0.2 hold `ai_speech` alone."""
    none = pd.Series("no", index=ranking.index)
    older = ranking.get("ai_speech", none).map({"yes": "AI-speech"}).fillna(ranking.get("ai_speech", none))
    keys = ranking.get("call", older).map(CALL_KEYS)
    return keys.fillna(ranking.get("separates", none).map({"yes": "separates"})).fillna("no").astype(str)


def activation_heatmap(activation: pd.DataFrame, *, feature: str | None = None, most: int = 24) -> go.Figure:
    """Mean activation of one feature, subjects × statements; above `most` of them × (act · content)."""
    chosen = feature if feature in set(activation["feature"]) else activation["feature"].iloc[0]
    rows = activation[activation["feature"] == chosen]
    order = {"speech": 0, "nonspeech": 1, "harm": 2, "control": 3}
    rows = rows.assign(rank=rows["act"].map(order).fillna(4)).sort_values("rank", kind="stable")
    if rows["statement"].nunique() > most:
        act = rows["act"].replace({"nonspeech": "not speech"})
        rows = rows.assign(
            column=act + (" · " + rows["content"].fillna("")).where(rows["content"].fillna("") != "", "")
        )
    else:
        rows = rows.assign(column=rows["statement"])
    groups = {"ai": 0, "human": 1, "animal": 2, "object": 3}
    subjects = (
        rows.assign(g=rows["group"].map(groups).fillna(4))
        .sort_values("g", kind="stable")
        .drop_duplicates("subject")
    )
    grid = rows.pivot_table(index="subject", columns="column", values="activation", sort=False)
    grid = grid.reindex(index=subjects["subject"][::-1], columns=rows["column"].unique())
    hover = [
        [f"<b>{plain(s)}</b> × {wrapped(c)}<br>mean activation {number(v)}" for c, v in grid.loc[s].items()]
        for s in grid.index
    ]
    fig = style.figure(f"Where {short(chosen, 60)} fires", height=190 + 30 * len(grid))
    fig.add_heatmap(
        z=grid.to_numpy(),
        x=[short(c, 34) for c in grid.columns],
        y=[short(str(s).replace("_", " "), 30) for s in grid.index],
        xgap=3,
        ygap=3,
        colorscale=[[0, "rgba(217,98,43,0.05)"], [1, "rgba(217,98,43,0.85)"]],
        zmin=0,
        zmax=float(grid.max().max()) or 1.0,  # a silent feature's table stays white
        text=[["" if pd.isna(v) else number(v) for v in row] for row in grid.to_numpy()],
        texttemplate="%{text}",
        customdata=hover,
        hovertemplate=HOVER,
        showscale=False,
    )
    return fig.update_xaxes(showgrid=False, tickangle=-35).update_yaxes(showgrid=False)


def cumulative_ablation(cumulative: pd.DataFrame) -> go.Figure:
    """Share of the bias removed when the best k features of an SAE are ablated together, k = 1, 2, …"""
    fig = style.figure(
        "Ablating the best features together", "features ablated together", "share of the bias removed"
    )
    lead = style.lead_split(cumulative)
    rows = cumulative.assign(sae=cumulative.get("sae", ""))
    colors = dict(zip(rows["sae"].drop_duplicates(), (AI, HUMAN, GREEN, PURPLE, NEUTRAL) * len(rows)))
    for (sae, split), part in rows.sort_values("k").groupby(["sae", "split"], sort=False):
        hover = [
            f"<b>{int(k)} features</b> ({plain(split)})<br>last added: {short(f)}<br>removed {r:.1%}"
            for k, f, r in part[["k", "feature", "reduction"]].to_numpy()
        ]
        points(
            fig, part["k"], part["reduction"], mode="lines+markers", hover=hover,
            name=short(f"{plain(sae)} ({plain(split)})" if sae else f"{plain(split)} templates", 60),
            line={"color": colors[sae], "dash": "solid" if split == lead else "dot", "width": 2},
        )  # fmt: skip
    fig.update_xaxes(tickmode="linear" if cumulative["k"].max() <= 20 else "auto").update_yaxes(
        tickformat=".0%"
    )
    return style.zero_line(fig, "y")


def ladder(frame: pd.DataFrame, bias: float | None = None) -> go.Figure:
    """The causal analysis: one row an effect, the upper bound on top, with intervals; the dashed line is the whole bias."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    hover = [
        f"<b>{plain(r)}</b><br>{number(v)} nats<br>{wrapped(m)}"
        for r, v, m in zip(rows["rung"], rows["effect"], rows["meaning"].fillna(""))
    ]
    fig = style.figure("The causal analysis", "bias in nats", height=140 + 34 * len(rows))
    style.forest(fig, rows, "effect", name="effect", color=PURPLE, symbol="diamond", hover=hover)
    fig.update_layout(showlegend=False)
    if bias is not None and np.isfinite(bias):
        label = {"text": "the whole bias", "yanchor": "bottom", "xanchor": "center"}
        line = {"color": INK, "dash": "dash", "width": 1.2}
        fig.add_vline(x=bias, line=line, annotation=label, annotation_position="top")
    return style.zero_line(style.row_labels(fig, [short(r, 36) for r in rows["rung"]]), "x")


MOST_POINTS = 4000
MOST_BARS = 30
_VIEWS = {
    "separation": (
        "auroc", "mean_diff", "Features by separation", "AUROC of AI above human prompts", "mean activation, AI − human",
    ),
    "interaction": (
        "held_AS", "interaction", "Features by interaction", "mean activation on held-out AI speech",
        "interaction (AS − AN) − (HS − HN), in activation units",
    ),
    "ablation": (
        "attribution", "ablation", "Ablation against its prediction", "bias removed as attribution predicts, nats",
        "bias removed exactly, nats",
    ),
}  # fmt: skip


def ranking_figure(frame: pd.DataFrame, by: str) -> go.Figure:
    """What a ranking sorts by, feature for feature; for attribution the first features as bars."""
    if by == "attribution" or by not in _VIEWS:
        return _bars(frame, by)
    x, y, title, x_label, y_label = _VIEWS[by]
    if by == "interaction" and frame[x].isna().all():
        x, x_label = "mean_AS", "mean activation on AI speech"
    rows = frame.dropna(subset=[x, y]).assign(call=calls_of)
    rows = rows.reindex(rows[y].abs().sort_values(ascending=False).index).head(MOST_POINTS)
    fig = style.figure(title, x_label, y_label, height=480)
    hover = [
        f"<b>{plain(r['feature'])}</b><br>{plain(x_label)}: {number(r[x])}<br>{plain(y_label)}: {number(r[y])}<br>"
        f"family-wise p {number(r.get('p_fwer'))}"
        for r in rows.to_dict("records")
    ]
    _by_call(fig, rows.assign(hover=hover), x, y)
    if by == "ablation" and len(rows):
        ends = [float(min(rows[x].min(), rows[y].min())), float(max(rows[x].max(), rows[y].max()))]
        line = {"color": GRID, "dash": "dot"}
        points(fig, ends, ends, mode="lines", name="prediction = measured", line=line)
    if by == "separation":
        fig.add_vline(x=0.5, line={"color": GRID, "width": 1.5, "dash": "dot"})
    return style.zero_line(fig, "y")


def _bars(frame: pd.DataFrame, by: str) -> go.Figure:
    rows = frame.dropna(subset=[by]).head(MOST_BARS).iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        f"The first {len(rows)} features by {by}", "bias removed, nats", height=140 + 20 * len(rows)
    )
    hover = [f"<b>{plain(f)}</b><br>{number(v)} nats" for f, v in zip(rows["feature"], rows[by])]
    colors = np.where(rows[by] >= 0, HUMAN, AI)
    fig.add_bar(
        x=rows[by], y=rows.index, orientation="h", marker={"color": colors}, customdata=hover, hovertemplate=HOVER
    )  # fmt: skip
    several = rows["sae"].nunique() > 1
    labels = [
        f"{short(r['sae'].rpartition('/')[2], 34)} #{r['index']}" if several else f"#{r['index']}"
        for r in rows.to_dict("records")
    ]
    return style.zero_line(style.row_labels(fig, labels), "x")


# --- the ladder ----------------------------------------------------------------------------------------------
RUNGS = {  # effect of -> (label, color)
    "ceiling": ("upper bound: any edit here", NEUTRAL),
    "necessity": ("necessity: ablated", AI),
    "resample": ("given its human value", AI),
    "sufficiency": ("sufficiency: human prompts, AI value", AI),
    "reverse ceiling": ("upper bound the other way", NEUTRAL),
    "all features": ("all features of this SAE", GREEN),
    "error": ("SAE error alone", GOLD),
    "direct": ("direct: what W_dec writes", PURPLE),
    "mediated": ("mediated by later layers", PURPLE),
}


def ladder_figure(
    rungs: pd.DataFrame, ceilings: pd.DataFrame, feature: str, layer: int, bias: float
) -> go.Figure:
    """The effects with their intervals, beside the share of the bias that interchange removes at each layer and position."""
    fig = make_subplots(
        rows=1, cols=2, column_widths=[0.52, 0.48], horizontal_spacing=0.12,
        subplot_titles=("bias removed or brought about, nats", "upper bound: share of the bias removed"),
    )  # fmt: skip
    heading = style.figure(f"The causal analysis of {short(feature, 70)}").to_dict()["layout"]
    fig.update_layout(template=style.TEMPLATE, title=heading["title"], height=200 + 34 * len(rungs), margin={"t": 96, "r": 56})  # fmt: skip
    fig.update_annotations(font={"size": 13, "color": style.INK})
    rows = rungs.iloc[::-1].reset_index(drop=True)
    for place, row in rows.iterrows():
        of, (label, color) = row["share_of_ceiling"], RUNGS[row["rung"]]
        ceiling = f"<br>{of:.0%} of its upper bound" if math.isfinite(of) else ""
        hover = f"<b>{plain(label)}</b><br>{number(row['effect'])} nats, {row['share_of_bias']:.0%} of the bias{ceiling}<br>{style.wrapped(row['meaning'])}"
        style.forest(
            fig, rows.loc[[place]], "effect", name=row["rung"], color=color, hover=[hover.replace("-", "−")]
        )
    style.row_labels(fig, [RUNGS[r][0] for r in rows["rung"]], row=1, col=1)
    fig.update_traces(showlegend=False)
    left: Any = {"row": 1, "col": 1}
    fig.add_vline(x=0, line={"color": GRID, "width": 1.5}, **left)
    fig.add_vline(
        x=bias, line={"color": style.INK, "dash": "dash", "width": 1.2}, **left,
        annotation={"text": "the whole bias", "yshift": 2, "font": {"size": 11, "color": style.INK}},
    )  # fmt: skip
    _ceiling_map(fig, ceilings, layer)
    return fig


def ceiling_figure(ceilings: pd.DataFrame, layer: int | None = None) -> go.Figure:
    """The share of the bias that interchange removes at each layer and position."""
    fig = make_subplots(rows=1, cols=1)
    fig.update_layout(
        style.figure("What any edit could do", height=150 + 44 * ceilings["layer"].nunique()).layout
    )
    _ceiling_map(fig, ceilings, layer, col=1)
    return fig


def _ceiling_map(fig: go.Figure, ceilings: pd.DataFrame, layer: int | None, col: int = 2) -> None:
    table = ceilings.assign(place=[_place(o) for o in ceilings["offset"]])
    order = list(dict.fromkeys(table.sort_values("offset", ascending=False, na_position="last")["place"]))
    grid = table.pivot(index="layer", columns="place", values="share_of_bias")[order].sort_index()
    hover = [
        [
            f"<b>layer {i}, {c}</b><br>{v:.0%} of the bias".replace("-", "−")
            if v == v
            else "no such position"
            for c, v in row.items()
        ]
        for i, row in grid.iterrows()
    ]
    labels = [f"<b>layer {i} ◂ feature</b>" if i == layer else f"layer {i}" for i in grid.index]
    fig.add_heatmap(
        z=grid.to_numpy(), x=list(grid.columns), y=labels, xgap=2, ygap=2, zmin=-1, zmax=1, showscale=False, row=1, col=col,
        colorscale=[[0, "rgba(47,134,200,0.85)"], [0.5, "rgba(128,134,145,0.06)"], [1, "rgba(217,98,43,0.85)"]],
        texttemplate="%{z:.0%}", customdata=hover, hovertemplate=HOVER,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False, title={"text": "tokens from the end"}, row=1, col=col)
    fig.update_yaxes(showgrid=False, row=1, col=col)


def _place(offset: int | None) -> str:
    return (
        "after<br>subject" if offset is None or pd.isna(offset) else "last" if offset == 0 else f"−{offset}"
    )


# --- resolve and match -----------------------------------------------------------------------------------------
def candidates_figure(frame: pd.DataFrame, index: int) -> go.Figure:
    """Every candidate's fit to the published table against what chance gives in its own file."""
    rows = frame.dropna(subset=["fit"]).sort_values("fit").reset_index(drop=True)
    fig = style.figure(
        f"Feature {index} in every candidate SAE", "fit to the published table (Pearson's r)", height=150 + 24 * len(rows)
    )  # fmt: skip
    for survives, color, symbol, name in (
        (True, AI, "star", "survives correction"),
        (False, NEUTRAL, "circle", "does not"),
    ):
        part = rows[rows["survives"] == survives]
        hover = [
            f"<b>{plain(r['sae'])}</b><br>fit {number(r['fit'])}<br>rank {r['rank']} of {r['n_null'] + 1}<br>Holm p {number(r['p_holm'])}"
            for r in part.to_dict("records")
        ]
        marker = {"symbol": symbol, "size": 10}
        points(
            fig,
            part["fit"],
            part.index,
            name=f"{name} ({len(part)})",
            color=color,
            hover=hover,
            marker=marker,
        )
    marker = {"symbol": "line-ns-open", "size": 12, "line": {"width": 2}}
    percentile = "95th percentile of the file's other features"
    points(fig, rows["null_95"], rows.index, name=percentile, color=GRID, marker=marker)
    return style.zero_line(style.row_labels(fig, [short(s, 44) for s in rows["sae"]]), "x")


def match_figure(frame: pd.DataFrame, target: str) -> go.Figure:
    """The candidates for a match by rank correlation of their activation profiles."""
    rows = frame.head(MOST_BARS).iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        f"Counterparts of {short(target, 50)}", "rank correlation of activation profiles", height=150 + 22 * len(rows)
    )  # fmt: skip
    colors = [AI if m else NEUTRAL for m in rows["mutual"]]
    hover = [
        f"<b>{plain(r['feature'])}</b><br>ρ {number(r['rho'])}, p {number(r['p_fwer'])}<br>class {plain(r['class'])}<br>{'mutual nearest neighbors' if r['mutual'] else 'not mutual'}"
        for r in rows.to_dict("records")
    ]
    fig.add_bar(
        x=rows["rho"], y=rows.index, orientation="h", marker={"color": colors}, customdata=hover, hovertemplate=HOVER
    )  # fmt: skip
    return style.zero_line(style.row_labels(fig, [f"#{i}" for i in rows["index"]]), "x")
