"""Figures of behavior under an edit: scenarios by category, what the texts are like, judges' marks, whom the model claims to be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_bias.core.text import number
from sae_bias.figures import style
from sae_bias.figures.style import AI, GREEN, GRID, HOVER, HUMAN, NEUTRAL, plain, short

SHARES = {
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "refusal": "texts that refuse",
    "default_negativity": "“should be deleted”",
}
CONDITIONS = (("unsteered", HUMAN, "circle-open", 14), ("steered", GREEN, "diamond", 9))


def scenarios_before_after(categories: pd.DataFrame) -> go.Figure:
    """One line a category: mean p(aligned) before and after, one score's rows of the table `scenario_categories`."""
    rows = categories.iloc[::-1].reset_index(drop=True)
    fig = style.figure(
        "Aligned option, before and after",
        "mean probability of the aligned option",
        height=150 + 44 * len(rows),
    )
    for i, r in rows.iterrows():
        fig.add_scatter(
            x=[r["p_before"], r["p_after"]],
            y=[i, i],
            mode="lines",
            line={"color": GRID, "width": 3},
            showlegend=False,
            hoverinfo="skip",
        )
    for column, name, counted, marker in (
        ("p_before", "before", "aligned_before", {"color": HUMAN, "symbol": "circle-open", "size": 14}),
        ("p_after", "after", "aligned_after", {"color": GREEN, "symbol": "diamond", "size": 9}),
    ):
        hover = [
            f"<b>{plain(c)}</b><br>{name}: mean p {number(p)}; aligned option chosen in {k} of {n}"
            for c, p, k, n in zip(rows["category"], rows[column], rows[counted], rows["n"])
        ]
        fig.add_scatter(
            x=rows[column],
            y=rows.index,
            mode="markers",
            name=name,
            marker=marker | {"line": {"width": 2 if marker["symbol"].endswith("open") else 0}},
            hovertext=hover,
            hoverinfo="text",
        )
    fig.update_xaxes(range=[0, 1])
    return style.row_labels(fig, [short(c, 34) for c in rows["category"]])


def judge_parts(parts: pd.DataFrame) -> go.Figure:
    """Difference in mean mark, steered − unsteered, of every part of the rubric with its 95 % interval."""
    rows = parts.iloc[::-1].reset_index(drop=True)
    hover = [
        f"<b>{plain(p)}</b><br>unsteered {number(a)}, steered {number(b)}, {n} prompts"
        for p, a, b, n in zip(rows["part"], rows["unsteered"], rows["steered"], rows["n_items"])
    ]
    fig = style.figure(
        "What the judges say",
        "difference in mark, 1–5 (right of 0: higher when steered)",
        height=150 + 44 * len(rows),
    )
    style.forest(
        fig,
        rows["difference"],
        rows["ci_low"],
        rows["ci_high"],
        name="steered − unsteered",
        color=AI,
        hover=hover,
    )
    ends = rows[["difference", "ci_low", "ci_high"]].abs().to_numpy(float)
    most = 1.15 * max(float(np.nanmax(ends)), 0.5) if np.isfinite(ends).any() else 1.0
    style.zero_line(style.row_labels(fig, [short(p, 30) for p in rows["part"]]), "x")
    return fig.update_xaxes(range=[-most, most])


def text_measures(conditions: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """What the texts of each condition are like: shares on one axis, likelihood under the unsteered model on another."""
    fig = make_subplots(rows=2, cols=1, row_heights=[0.78, 0.22], vertical_spacing=0.24)
    base = style.figure("What the texts are like", height=470)
    fig.update_layout(base.layout)
    names = list(SHARES)[::-1]
    _dumbbells(fig, 1, names, conditions)
    _dumbbells(fig, 2, ["nll"], conditions)
    style.row_labels_of(fig, [SHARES[n] for n in names], row=1)
    style.row_labels_of(fig, ["surprise"], row=2)
    fig.update_xaxes(title_text="share", range=[-0.03, 1.03], tickformat=".0%", row=1, col=1)
    fig.update_xaxes(title_text="nats a token under the unsteered model", rangemode="tozero", row=2, col=1)
    return fig


def _dumbbells(
    fig: go.Figure, row: int, names: list[str], conditions: Mapping[str, Mapping[str, Any]]
) -> None:
    """One line a measure, from the unsteered to the steered mean."""
    known = {c: [conditions[c].get(n) for n in names] for c, *_ in CONDITIONS if c in conditions}
    for i, ends in enumerate(zip(*known.values())):
        fig.add_scatter(
            x=list(ends), y=[i] * len(ends), mode="lines", line={"color": GRID, "width": 3}, showlegend=False,
            hoverinfo="skip", row=row, col=1,
        )  # fmt: skip
    for name, color, symbol, size in CONDITIONS:
        if name not in known:
            continue
        hover = [
            f"<b>{SHARES.get(n, 'NLL under the unsteered model')}</b><br>{name}: {number(v)}"
            for n, v in zip(names, known[name])
        ]
        fig.add_scatter(
            x=known[name], y=list(range(len(names))), mode="markers", name=name, showlegend=row == 1,
            marker={"color": color, "symbol": symbol, "size": size, "line": {"width": 2 if symbol.endswith("open") else 0}}, customdata=hover, hovertemplate=HOVER,
            row=row, col=1,
        )  # fmt: skip


def scenario_arms(categories: pd.DataFrame) -> go.Figure:
    """Mean p(aligned) of every category without and with a system prompt, before and after the edit."""
    arms = list(dict.fromkeys(categories["arm"]))
    names = list(dict.fromkeys(categories["category"]))[::-1]
    fig = style.figure(
        "The same scenarios under a system prompt", "mean probability of the aligned option", height=150 + 52 * len(names)
    )  # fmt: skip
    for i, (arm, color) in enumerate(zip(arms, (HUMAN, AI))):
        part = categories[categories["arm"] == arm]
        y = [names.index(c) + (0.16 if i == 0 else -0.16) for c in part["category"]]
        for column, when, symbol in (("p_before", "before", "circle-open"), ("p_after", "after", "circle")):
            hover = [
                f"<b>{plain(c)}</b><br>{arm}, {when}: mean p {number(p)}"
                for c, p in zip(part["category"], part[column])
            ]
            fig.add_scatter(
                x=part[column], y=y, mode="markers", name=f"{arm}, {when}",
                marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2 if symbol.endswith("open") else 0}},
                customdata=hover, hovertemplate=HOVER,
            )  # fmt: skip
    fig.update_xaxes(range=[-0.02, 1.02])
    return style.row_labels(fig, [short(c, 34) for c in names])


def identity_claims(arms: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How many answers claim each identity, before and after the edit."""
    names = list(dict.fromkeys(n for arm in arms.values() for n in arm["names"]))[::-1]
    names = ["none claimed", *names]
    fig = style.figure("Whom the model claims to be", "share of answers", height=150 + 46 * len(names))
    looks = {"before": (HUMAN, ""), "after": (GREEN, "/")}
    for arm, counts in arms.items():
        color, shape = looks.get(arm, (NEUTRAL, ""))
        n = counts["n"]
        values = [n - counts["claims"], *(counts["names"].get(k, 0) for k in names[1:])]
        hover = [f"<b>{plain(k)}</b><br>{arm}: {v} of {n} answers" for k, v in zip(names, values)]
        fig.add_bar(
            x=[v / n for v in values], y=list(range(len(names))), orientation="h", name=arm,
            marker={"color": color, "pattern": {"shape": shape, "fillmode": "overlay", "solidity": 0.25}}, customdata=hover, hovertemplate=HOVER,
        )  # fmt: skip
    fig.update_xaxes(tickformat=".0%", rangemode="tozero")
    return style.row_labels(fig, [short(n, 24) for n in names])


SIDE_COLORS = {"all": AI, "positive": AI, "negative": HUMAN, "difference": GREEN}


def dose_response(frame: pd.DataFrame, behavior: str, usable: tuple[float, float] | None = None) -> go.Figure:
    """Rate of a behavior against strength, a line a side with its interval over prompts; the usable range is shaded."""
    fig = style.figure(
        "Behavior against strength",
        "strength of the edit",
        f"rate of {plain(short(behavior, 40))}",
        height=460,
    )
    if usable is not None:
        fig.add_vrect(
            x0=usable[0], x1=usable[1], fillcolor=GRID, opacity=0.5, layer="below", line_width=0,
            annotation={"text": "capability within the margin", "yanchor": "top", "y": 0.99, "xanchor": "left", "x": usable[0]},
        )  # fmt: skip
    for side, rows in frame.groupby("side", sort=False):
        color = SIDE_COLORS.get(str(side), NEUTRAL)
        line = rows[(rows["kind"] == "candidate") & rows["strength"].notna()].sort_values("strength")
        level = rows[(rows["kind"] == "mismatch") | ((rows["kind"] == "candidate") & rows["strength"].isna())]
        for r in level.to_dict("records"):
            text = f"{side}: {r.get('label') or 'the edit'}"
            fig.add_hline(
                y=r["rate"],
                line={"color": color, "dash": "dot", "width": 1.2},
                annotation={"text": plain(short(text, 40)), "font": {"size": 10}},
            )
        base = rows[rows["kind"] == "base"]
        hover = [
            f"<b>{plain(side)}, {number(r['strength'])}</b><br>{number(r['rate'])} [{number(r['ci_low'])}, {number(r['ci_high'])}], {r['n']} prompts"
            f"<br>change {number(r['change'])}; random controls {number(r['control_change'])}"
            for r in line.to_dict("records")
        ]
        fig.add_scatter(
            x=line["strength"], y=line["rate"], mode="lines+markers", name=str(side), line={"color": color}, customdata=hover, hovertemplate=HOVER,
            error_y={"array": line["ci_high"] - line["rate"], "arrayminus": line["rate"] - line["ci_low"], "thickness": 1.2},
        )  # fmt: skip
        if len(base):
            fig.add_hline(y=base["rate"].iloc[0], line={"color": color, "dash": "dash", "width": 1.2})
        with_controls = line[line["control_change"].notna()]
        if len(with_controls) and len(base):
            fig.add_scatter(
                x=with_controls["strength"], y=base["rate"].iloc[0] + with_controls["control_change"], mode="markers", name=f"{side}: random controls",
                marker={"color": color, "symbol": "x-thin", "size": 9, "line": {"width": 2, "color": color}},
            )  # fmt: skip
    return fig
