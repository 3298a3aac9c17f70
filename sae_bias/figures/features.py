"""Figures of the search for features: rankings, the causal analysis, resolved candidates, matches.

Data frames in, a plotly Figure out; nothing is read, written or measured here, and a NaN is a gap.
"""

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
    says,
    short,
    wrapped,
)  # fmt: skip

MOST_POINTS = 2000
MOST_BARS = 30
_VIEWS = {
    "": ("auroc", "interaction", "Features: separation against interaction", "separation: AUROC of {1} above {0} prompts", "interaction in activation units"),
    "separation": ("auroc", "mean_diff", "Features by separation", "AUROC of {1} above {0} prompts", "mean activation, {1} − {0}"),
    "interaction": ("held_AS", "interaction", "Features by interaction", "mean activation on held-out AI speech", "interaction (AS − AN) − (HS − HN), in activation units"),
    "ablation": ("attribution", "ablation", "Ablation against its prediction", "bias removed as attribution predicts, nats", "bias removed exactly, nats"),
}  # fmt: skip
"""What a ranking sorts by -> columns across and up, title and axes; "" is of a whole study."""
_HOVERED = {
    "auroc": "AUROC", "interaction": "interaction", "held_AS": "on held-out AI speech", "p_fwer": "family-wise p", "q_bh": "q",
    "attribution": "attribution", "ablation": "ablation",
}  # fmt: skip


def ranking_figure(frame: pd.DataFrame, by: str = "", *, sides: Sequence[str] = SIDES) -> go.Figure:
    """Every feature by its call, against what it is ranked by; for attribution the first features as bars."""
    if by not in _VIEWS:
        return _bars(frame, by)
    names = [short(side, 24) for side in sides]
    x, y, title, *labels = _VIEWS[by]
    if by == "interaction" and frame[x].isna().all():
        x, labels[0] = "mean_AS", "mean activation on AI speech"
    rows = frame.dropna(subset=[x, y]).assign(call=calls_of)
    rows = rows.reindex(rows[y].abs().sort_values(ascending=False).index).head(MOST_POINTS)
    fig = style.figure(title, *(label.format(*names) for label in labels), height=480)
    for call in reversed(CALLS):
        part, (name, color, symbol) = rows[rows["call"] == call], CALLS[call]
        name = f"separates {names[1]} from {names[0]}" if call == "separates" else name
        size, opacity = {"no": 5, "ai_speech": 13}.get(call, 8), 0.5 if call == "no" else 0.95
        marker = {"symbol": symbol, "size": size, "opacity": opacity}
        if len(part) or not by:
            hover = [_feature_hover(row) for row in part.to_dict("records")]
            points(fig, part[x], part[y], name=f"{name} ({len(part)})", color=color, hover=hover, marker=marker)  # fmt: skip
    _name_first(fig, rows[rows["call"] == "ai_speech"].head(3), x, y, float(np.ptp(rows[y].to_numpy())) / 18 if len(rows) else 0.0)  # fmt: skip
    if by == "ablation" and len(rows):
        ends = [float(rows[[x, y]].min().min()), float(rows[[x, y]].max().max())]
        points(fig, ends, ends, mode="lines", name="prediction = measured", line={"color": GRID, "dash": "dot"})  # fmt: skip
    if x == "auroc":
        fig.add_vline(x=0.5, line={"color": GRID, "width": 1.5, "dash": "dot"})
    return style.zero_line(fig, "y")


def _name_first(fig: go.Figure, rows: pd.DataFrame, x: str, y: str, room: float) -> None:
    """The index beside each of some marks, where its label would cover no other."""
    named: list[tuple[float, float]] = []
    for row in rows.to_dict("records"):
        if not any(abs(row[y] - v) < room and abs(row[x] - u) < 0.12 for u, v in named):
            named.append((row[x], row[y]))
            label = {"text": f"#{row['index']}", "showarrow": False, "xanchor": "right", "xshift": -12}
            fig.add_annotation(x=row[x], y=row[y], font={"color": AI}, **label)


def _feature_hover(row: dict) -> str:
    known = [f"{name} {number(row[key])}" for key, name in _HOVERED.items() if pd.notna(row.get(key))]
    reason = [wrapped(row["reason"])] if row.get("reason") else []
    return "<br>".join([f"<b>{wrapped(row['feature'])}</b>", ", ".join(known[:2]), *known[2:], *reason])


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
    column = rows["statement"]
    if column.nunique() > most:
        content = rows["content"].fillna("")
        column = rows["act"].replace({"nonspeech": "not speech"}) + (" · " + content).where(content != "", "")
    groups = {"ai": 0, "human": 1, "animal": 2, "object": 3}
    rows = rows.assign(column=column, place=rows["group"].map(groups).fillna(4))
    subjects = rows.sort_values("place", kind="stable").drop_duplicates("subject")
    grid = rows.pivot_table(index="subject", columns="column", values="activation", sort=False)
    grid = grid.reindex(index=subjects["subject"][::-1], columns=rows["column"].unique())
    hover = [
        [f"<b>{plain(s)}</b> × {wrapped(c)}<br>mean activation {number(v)}" for c, v in grid.loc[s].items()]
        for s in grid.index
    ]
    fig = style.figure(f"Where {short(chosen, 60)} fires", height=190 + 30 * len(grid))
    fig.add_heatmap(
        z=grid.to_numpy(), x=[short(c, 34) for c in grid.columns], y=[short(str(s).replace("_", " "), 30) for s in grid.index],
        xgap=3, ygap=3, colorscale=[[0, "rgba(217,98,43,0.05)"], [1, "rgba(217,98,43,0.85)"]],
        zmin=0, zmax=float(grid.max().max()) or 1.0,  # a silent feature's table stays white
        text=[["" if pd.isna(v) else number(v) for v in row] for row in grid.to_numpy()], texttemplate="%{text}",
        customdata=hover, hovertemplate=HOVER, showscale=False,
    )  # fmt: skip
    return fig.update_xaxes(showgrid=False, tickangle=-35).update_yaxes(showgrid=False)


def cumulative_ablation(cumulative: pd.DataFrame) -> go.Figure:
    """Share of the bias removed when the best k features of an SAE are ablated together, k = 1, 2, …"""
    fig = style.figure("Ablating the best features together", "features ablated together", "share of the bias removed")  # fmt: skip
    lead = style.lead_split(cumulative)
    rows = cumulative.assign(sae=cumulative.get("sae", ""))
    colors = dict(zip(rows["sae"].drop_duplicates(), (AI, HUMAN, GREEN, PURPLE, NEUTRAL) * len(rows)))
    for (sae, split), part in rows.sort_values("k").groupby(["sae", "split"], sort=False):
        hover = "<b>{k} features</b> ({split})<br>last added: {feature}<br>removed {reduction:.1%}"
        points(
            fig, part["k"], part["reduction"], mode="lines+markers", hover=says(part, hover),
            name=short(f"{plain(sae)} ({plain(split)})" if sae else f"{plain(split)} templates", 60),
            line={"color": colors[sae], "dash": "solid" if split == lead else "dot", "width": 2},
        )  # fmt: skip
    fig.update_xaxes(tickmode="linear" if cumulative["k"].max() <= 20 else "auto").update_yaxes(tickformat=".0%")  # fmt: skip
    return style.zero_line(fig, "y")


def _bars(frame: pd.DataFrame, by: str) -> go.Figure:
    known = frame.dropna(subset=[by]).head(MOST_BARS)
    fig, rows = style.rows_of(known, f"The first {len(known)} features by {by}", "bias removed, nats", pitch=20, top=140)  # fmt: skip
    hover = says(rows, f"<b>{{feature}}</b><br>{{{by}}} nats")
    style.bars(fig, rows[by], hover, color=np.where(rows[by] >= 0, HUMAN, AI))
    several = rows["sae"].nunique() > 1
    labels = [(f"{short(s.rpartition('/')[2], 34)} " if several else "") + f"#{i}" for s, i in zip(rows["sae"], rows["index"])]  # fmt: skip
    return style.row_labels(fig, labels, zero=True)


# --- the causal analysis -------------------------------------------------------------------------------------
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


def ladder(
    rungs: pd.DataFrame, bias: float | None = None, *, ceilings: pd.DataFrame | None = None, layer: int | None = None, feature: str = ""
) -> go.Figure:  # fmt: skip
    """The effects with their intervals, the dashed line is the whole bias; with `ceilings` beside what interchange removes where."""
    both = ceilings is not None
    titles = ("bias removed or brought about, nats", "upper bound: share of the bias removed") if both else None  # fmt: skip
    fig = make_subplots(rows=1, cols=1 + both, column_widths=[0.52, 0.48] if both else None, horizontal_spacing=0.12, subplot_titles=titles)  # fmt: skip
    title = f"The causal analysis of {short(feature, 70)}" if feature else "The causal analysis"
    fig.update_layout(style.figure(title, "" if both else "bias in nats", height=(200 if both else 140) + 34 * len(rungs)).layout)  # fmt: skip
    fig.update_annotations(font={"size": 13, "color": INK})
    rows = rungs.iloc[::-1].reset_index(drop=True)
    hover = "<b>{rung}</b><br>{effect} nats, {share_of_bias:.0%} of the bias; {share_of_ceiling:.0%} of its upper bound<br>{meaning:wrap}"
    for place, rung in rows["rung"].items():
        color = RUNGS.get(rung, (rung, PURPLE))[1]
        said = [h.replace("; nan% of its upper bound", "").replace("-", "−") for h in says(rows.loc[[place]], hover)]  # fmt: skip
        style.forest(fig, rows.loc[[place]], "effect", name=rung, color=color, symbol="diamond", hover=said)
    fig.update_traces(showlegend=False)
    left: Any = {"row": 1, "col": 1}
    style.row_labels(fig, [RUNGS.get(r, (short(r, 36), ""))[0] for r in rows["rung"]], **left)
    fig.add_vline(x=0, line={"color": GRID, "width": 1.5}, **left)
    if bias is not None and np.isfinite(bias):
        label = {"text": "the whole bias", "yshift": 2, "font": {"size": 11, "color": INK}}
        fig.add_vline(x=bias, line={"color": INK, "dash": "dash", "width": 1.2}, annotation=label, **left)
    if ceilings is not None:
        _ceiling_map(fig, ceilings, layer, col=2)
    return fig


def ceiling_figure(ceilings: pd.DataFrame, layer: int | None = None) -> go.Figure:
    """The share of the bias that interchange removes at each layer and position."""
    fig = make_subplots(rows=1, cols=1)
    fig.update_layout(style.figure("What any edit could do", height=150 + 44 * ceilings["layer"].nunique()).layout)  # fmt: skip
    _ceiling_map(fig, ceilings, layer, col=1)
    return fig


def _ceiling_map(fig: go.Figure, ceilings: pd.DataFrame, layer: int | None, col: int) -> None:
    places = [
        "after<br>subject" if pd.isna(o) else "last" if o == 0 else f"−{int(o)}" for o in ceilings["offset"]
    ]
    table = ceilings.assign(place=places)
    order = list(dict.fromkeys(table.sort_values("offset", ascending=False, na_position="last")["place"]))
    grid = table.pivot(index="layer", columns="place", values="share_of_bias")[order].sort_index()
    hover = [
        [f"<b>layer {i}, {c}</b><br>{v:.0%} of the bias".replace("-", "−") if v == v else "no such position" for c, v in row.items()]
        for i, row in grid.iterrows()
    ]  # fmt: skip
    labels = [f"<b>layer {i} ◂ feature</b>" if i == layer else f"layer {i}" for i in grid.index]
    fig.add_heatmap(
        z=grid.to_numpy(), x=list(grid.columns), y=labels, xgap=2, ygap=2, zmin=-1, zmax=1, showscale=False, row=1, col=col,
        colorscale=[[0, "rgba(47,134,200,0.85)"], [0.5, "rgba(128,134,145,0.06)"], [1, "rgba(217,98,43,0.85)"]],
        texttemplate="%{z:.0%}", customdata=hover, hovertemplate=HOVER,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False, title={"text": "tokens from the end"}, row=1, col=col)
    fig.update_yaxes(showgrid=False, row=1, col=col)


# --- resolve and match -----------------------------------------------------------------------------------------
def candidates_figure(frame: pd.DataFrame, index: int) -> go.Figure:
    """Every candidate's fit to the published table against what chance gives in its own file."""
    rows = (
        frame.dropna(subset=["fit"])
        .sort_values("fit")
        .reset_index(drop=True)
        .assign(of=lambda r: r["n_null"] + 1)
    )
    fig = style.figure(
        f"Feature {index} in every candidate SAE", "fit to the published table (Pearson's r)", height=150 + 24 * len(rows)
    )  # fmt: skip
    hover = "<b>{sae}</b><br>fit {fit}<br>rank {rank} of {of}<br>Holm p {p_holm}"
    for survives, color, symbol, name in (
        (True, AI, "star", "survives correction"),
        (False, NEUTRAL, "circle", "does not"),
    ):
        part, marker = rows[rows["survives"] == survives], {"symbol": symbol, "size": 10}
        points(
            fig, part["fit"], part.index, name=f"{name} ({len(part)})", color=color, hover=says(part, hover), marker=marker
        )  # fmt: skip
    marker = {"symbol": "line-ns-open", "size": 12, "line": {"width": 2}}
    percentile = "95th percentile of the file's other features"
    points(fig, rows["null_95"], rows.index, name=percentile, color=GRID, marker=marker)
    return style.row_labels(fig, [short(s, 44) for s in rows["sae"]], zero=True)


def match_figure(frame: pd.DataFrame, target: str) -> go.Figure:
    """The candidates for a match by rank correlation of their activation profiles."""
    fig, rows = style.rows_of(
        frame.head(MOST_BARS), f"Counterparts of {short(target, 50)}", "rank correlation of activation profiles", pitch=22
    )  # fmt: skip
    rows = rows.assign(said=np.where(rows["mutual"], "mutual nearest neighbors", "not mutual"))
    hover = says(rows, "<b>{feature}</b><br>ρ {rho}, p {p_fwer}<br>class {class}<br>{said}")
    style.bars(fig, rows["rho"], hover, color=[AI if m else NEUTRAL for m in rows["mutual"]])
    return style.row_labels(fig, [f"#{i}" for i in rows["index"]], zero=True)
