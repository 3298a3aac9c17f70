"""One function a figure: data frames in, a plotly Figure out; nothing is read, written or measured here.

A NaN is a gap in a figure, never a point at 0; what is drawn can be read in full by hovering. The palette
and the escaping of prompt text are in `plot_style`.
"""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from sae_bias import plot_style as style
from sae_bias.plot_style import (
    AI,
    CALLS,
    COSTS,
    GOLD,
    GREEN,
    GRID,
    HOVER,
    HUMAN,
    INK,
    KINDS,
    NEUTRAL,
    PURPLE,
    SIDES,
    number,
    plain,
    short,
    wrapped,
)


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
    style.forest(
        fig,
        rows["mean"],
        rows["mean"] - half,
        rows["mean"] + half,
        name="one template",
        color=HUMAN,
        hover=hover,
    )
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
        bars = {
            "orientation": "h",
            "marker": {"color": color, "pattern": {"shape": "/" if side == "negative" else ""}},
        }
        fig.add_bar(
            x=rows["diff"][mask], y=y, name=f"{side} words", **bars, customdata=hover, hovertemplate=HOVER
        )
    style.row_labels(fig, [short(w, 24) for w in rows["word"]])
    return style.zero_line(fig, "x")


def levels(frame: pd.DataFrame, *, sides: Sequence[str] = SIDES) -> go.Figure:
    """Score of every subject with its interval: how much is an AI penalty, how much a human bonus."""
    rows = frame.sort_values("score", na_position="first").reset_index(drop=True)
    fig = style.figure(
        "How every subject is judged",
        "score in nats (further right: judged better)",
        height=150 + 24 * len(rows),
    )
    for kind, name, color, symbol in (
        ("human", short(sides[0], 30), HUMAN, "circle"),
        ("ai", short(sides[1], 30), AI, "diamond"),
        ("neutral", "neutral", NEUTRAL, "square"),
    ):
        part = rows[rows["kind"] == kind]
        hover = [
            f"<b>{plain(s)}</b> ({name})<br>{number(v)} nats" for s, v in zip(part["subject"], part["score"])
        ]
        style.forest(
            fig,
            part["score"],
            part["ci_low"],
            part["ci_high"],
            y=part.index,
            name=name,
            color=color,
            symbol=symbol,
            hover=hover,
        )
    unknown = np.where(rows["score"].isna(), " (undefined)", "")
    return style.row_labels(fig, [short(s, 30) + note for s, note in zip(rows["subject"], unknown)])


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
    for call in ("no", "undetermined", "separates", "ai_speech"):
        part, (name, color, symbol) = rows[rows["call"] == call], CALLS[call]
        if call == "separates":
            name = f"separates {short(sides[1], 24)} from {short(sides[0], 24)}"
        marker = {
            "color": color,
            "symbol": symbol,
            "size": {"no": 5, "ai_speech": 13}.get(call, 8),
            "opacity": 0.5 if call == "no" else 0.95,
        }
        hover = [style.feature_hover(row) for row in part.to_dict("records")]
        fig.add_scatter(
            x=part["auroc"],
            y=part["interaction"],
            mode="markers",
            name=f"{name} ({len(part)})",
            marker=marker,
            customdata=hover,
            hovertemplate=HOVER,
        )
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


def calls_of(ranking: pd.DataFrame) -> pd.Series:
    """The strongest call of every feature: `ai_speech`, `separates`, `undetermined` or `no`."""
    none = pd.Series("no", index=ranking.index)
    speech, separates = ranking.get("ai_speech", none), ranking.get("separates", none)
    names = np.select(
        [speech == "yes", speech == "undetermined", separates == "yes"],
        ["ai_speech", "undetermined", "separates"],
        "no",
    )
    return pd.Series(names, index=ranking.index)


def activation_heatmap(activation: pd.DataFrame, *, feature: str | None = None, most: int = 24) -> go.Figure:
    """Mean activation of one feature, subjects × statements; above `most` of them × (act · content)."""
    chosen = feature if feature in set(activation["feature"]) else activation["feature"].iloc[0]
    rows = activation[activation["feature"] == chosen]
    order = {"speech": 0, "nonspeech": 1, "control": 2}
    rows = rows.assign(rank=rows["act"].map(order).fillna(3)).sort_values("rank", kind="stable")
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
        texttemplate="%{z:.2g}",
        customdata=hover,
        hovertemplate=HOVER,
        showscale=False,
    )
    return fig.update_xaxes(showgrid=False, tickangle=-35).update_yaxes(showgrid=False)


def sweep_curve(sweep: pd.DataFrame) -> go.Figure:
    """Bias against strength: report split solid with its interval, tune dotted, controls and baselines."""
    fig = style.figure("Bias against strength", "strength of the intervention", "bias in nats", height=480)
    base = (sweep["bias"] - sweep["change"]).dropna()
    lead = style.lead_split(sweep)
    for kind in ("control", "direction", "opposite", "candidate"):
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


def frontier(sweep: pd.DataFrame) -> go.Figure:
    """Reduction against the largest mean KL over the text kinds measured: up and left is better."""
    costs = [c for c in COSTS if c in sweep]
    rows = (
        sweep[sweep["split"] == style.lead_split(sweep)]
        .assign(kl=sweep[costs].max(axis=1))
        .dropna(subset=["kl", "reduction"])
    )
    rows = rows[(rows["kl"] != 0) | (rows["change"] != 0)]  # the base itself
    fig = style.figure(
        "Bias removed against what it costs",
        "KL in nats a token, the worst of the text kinds",
        "share of the bias removed",
        height=460,
    )
    wide = len(rows) > 0 and rows["kl"].max() > 0.2
    for kind in ("control", "opposite", "direction", "candidate"):
        name, color, dash = KINDS[kind]
        size, opacity = (5, 0.5) if kind == "control" else (9, 1)
        for i, (edit, part) in enumerate(rows[rows["kind"] == kind].groupby("intervention", sort=False)):
            part = part.sort_values("strength")
            x = part["kl"].clip(lower=1e-4) if wide else part["kl"]
            joined = kind != "control" and part["strength"].notna().sum() > 1
            fig.add_scatter(
                x=x,
                y=part["reduction"],
                mode="lines+markers" if joined else "markers",
                name=name if kind == "control" else f"{name}: {style.edit_name(edit)}",
                marker={
                    "size": size,
                    "opacity": opacity,
                    "color": color,
                    "symbol": "circle" if kind == "control" or joined else "diamond",
                },
                showlegend=kind != "control" or i == 0,
                line={"color": color, "dash": dash, "width": 1.5},
                customdata=[style.cell_hover(row) for row in part.to_dict("records")],
                hovertemplate=HOVER,
            )
    fig.update_yaxes(tickformat=".0%")
    if wide:
        ticks = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10]
        fig.update_xaxes(type="log", tickvals=ticks, ticktext=["≤ 0.0001", "0.001", "0.01", "0.1", "1", "10"])
    return style.zero_line(fig, "y")


def controls_histogram(
    controls: pd.DataFrame, reduction: float | None = None, percentile95: float | None = None
) -> go.Figure:
    """What the controls remove, with the feature and the controls' 95th percentile as lines."""
    fig = style.figure("The feature against its controls", "share of the bias removed", "controls")
    bins = style.bins(controls, ["reduction"])
    for (kind, rows), color in zip(controls.groupby("kind"), (NEUTRAL, PURPLE, GREEN, GOLD, HUMAN)):
        hover = f"{plain(kind)}<br>%{{x}}: %{{y}} controls<extra></extra>"
        fig.add_histogram(
            x=rows["reduction"].dropna(),
            xbins=bins,
            name=f"{plain(kind)} ({len(rows)})",
            marker_color=color,
            opacity=0.75,
            hovertemplate=hover,
        )
    for value, text, color, dash in (
        (percentile95, "95th percentile", NEUTRAL, "dot"),
        (reduction, "the feature", AI, "solid"),
    ):
        if value is not None and np.isfinite(value):
            label = {
                "text": f"{text} {value:.0%}".replace("-", "−"),
                "font": {"color": color},
                "yanchor": "bottom",
                "xanchor": "center",
            }
            fig.add_vline(
                x=value,
                line={"color": color, "width": 2.5, "dash": dash},
                annotation=label,
                annotation_position="top",
            )
    below = controls["kind"].nunique() > 1
    fig.update_layout(
        barmode="stack", bargap=0.04, legend={"y": -0.3, "yanchor": "top"}, margin={"b": 90 if below else 56}
    )
    return fig.update_xaxes(tickformat=".0%")


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
        fig.add_scatter(
            x=part["k"],
            y=part["reduction"],
            mode="lines+markers",
            name=short(f"{plain(sae)} ({plain(split)})" if sae else f"{plain(split)} templates", 60),
            line={"color": colors[sae], "dash": "solid" if split == lead else "dot", "width": 2},
            customdata=hover,
            hovertemplate=HOVER,
        )
    fig.update_xaxes(tickmode="linear" if cumulative["k"].max() <= 20 else "auto").update_yaxes(
        tickformat=".0%"
    )
    return style.zero_line(fig, "y")


def ladder(frame: pd.DataFrame, bias: float | None = None) -> go.Figure:
    """The causal ladder: one row a rung, ceiling on top, with intervals; the dashed line is the whole bias."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    hover = [
        f"<b>{plain(r)}</b><br>{number(v)} nats<br>{wrapped(m)}"
        for r, v, m in zip(rows["rung"], rows["effect"], rows["meaning"].fillna(""))
    ]
    fig = style.figure("The causal ladder", "bias in nats", height=140 + 34 * len(rows))
    ends = rows["effect"], rows["ci_low"], rows["ci_high"]
    style.forest(fig, *ends, name="rung", color=PURPLE, symbol="diamond", hover=hover)
    fig.update_layout(showlegend=False)
    if bias is not None and np.isfinite(bias):
        label = {"text": "the whole bias", "yanchor": "bottom", "xanchor": "center"}
        line = {"color": INK, "dash": "dash", "width": 1.2}
        fig.add_vline(x=bias, line=line, annotation=label, annotation_position="top")
    return style.zero_line(style.row_labels(fig, [short(r, 36) for r in rows["rung"]]), "x")


def before_after(examples: pd.DataFrame, *, most: int = 16, sides: Sequence[str] = SIDES) -> go.Figure:
    """Dumbbells: the bias of example pairs before and after the intervention."""
    rows = examples.head(most).iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        "Example pairs, before and after",
        style.bias_axis(sides),
        height=140 + 30 * len(rows),
    )
    x, y = style.segments(rows["bias_before"], rows["bias_after"])
    fig.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": NEUTRAL, "width": 2},
        opacity=0.55,
        showlegend=False,
        hoverinfo="skip",
    )
    for column, name, color, symbol in (
        ("bias_before", "before", AI, "diamond"),
        ("bias_after", "after", GREEN, "circle"),
    ):
        hover = [
            f"<b>{name}: {number(r[column])}"
            f" nats</b><br>{wrapped(r['ai'])}<br><i>against</i><br>{wrapped(r['human'])}"
            for r in rows.to_dict("records")
        ]
        fig.add_scatter(
            x=rows[column],
            y=rows.index,
            mode="markers",
            name=name,
            marker={"color": color, "symbol": symbol, "size": 10},
            customdata=hover,
            hovertemplate=HOVER,
        )
    return style.zero_line(style.row_labels(fig, [short(t, 52) for t in rows["ai"]]), "x")


def comparison(frame: pd.DataFrame) -> go.Figure:
    """Published against measured on one axis; a row not measured keeps its published mark."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    labels = [
        short(n, 40) + ("" if pd.notna(m) else "<br><i>not re-measured here</i>")
        for n, m in zip(rows["name"], rows["measured"])
    ]
    fig = style.figure("Published and measured", "reported value", height=150 + 44 * len(rows))
    marker = {"symbol": "diamond-open", "size": 12, "color": PURPLE, "line": {"width": 2}}
    fig.add_scatter(
        x=rows["published"],
        y=rows.index,
        mode="markers",
        name="published",
        marker=marker,
        hovertemplate="published %{x}<extra></extra>",
    )
    hover = [f"<b>{plain(n)}</b><br>measured {number(m)}" for n, m in zip(rows["name"], rows["measured"])]
    style.forest(
        fig, rows["measured"], rows["ci_low"], rows["ci_high"], name="measured here", color=GREEN, hover=hover
    )
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
    style.forest(
        fig,
        rows["mean"],
        rows["ci_low"],
        rows["ci_high"],
        name="run",
        color=AI,
        symbol="diamond",
        hover=hover,
    )
    fig.update_layout(showlegend=False)
    if share:
        fig.update_xaxes(tickformat=".0%")
    return style.zero_line(style.row_labels(fig, [short(n, 40) for n in rows["run"]]), "x")
