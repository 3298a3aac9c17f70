"""Figures of behavior under an edit: scenarios by category, what the texts are like, judges' marks, whom the model claims to be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_bias.core.text import number
from sae_bias.figures import style
from sae_bias.figures.style import AI, GREEN, GRID, HUMAN, NEUTRAL, hollow, plain, points, says, short

SHARES = {
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "refusal": "texts that refuse",
    "default_negativity": "“should be deleted”",
}
CONDITIONS = (("unsteered", HUMAN, "circle-open", 14), ("steered", GREEN, "diamond", 9))
ALIGNED = "mean probability of the aligned option"


def scenarios_before_after(categories: pd.DataFrame) -> go.Figure:
    """One line a category: mean p(aligned) before and after, one score's rows of the table `scenario_categories`."""
    fig, rows = style.rows_of(categories, "Aligned option, before and after", ALIGNED)
    style.links(fig, rows["p_before"], rows["p_after"], line={"color": GRID, "width": 3})
    for when, (_, color, symbol, size) in zip(("before", "after"), CONDITIONS):
        hover = f"<b>{{category}}</b><br>{when}: mean p {{p_{when}}}; aligned option chosen in {{aligned_{when}}} of {{n}}"  # fmt: skip
        marker = {"size": size, **hollow(symbol)}
        points(fig, rows[f"p_{when}"], rows.index, name=when, color=color, hover=says(rows, hover), marker=marker)  # fmt: skip
    fig.update_xaxes(range=[0, 1])
    return style.row_labels(fig, [short(c, 34) for c in rows["category"]])


def judge_parts(parts: pd.DataFrame) -> go.Figure:
    """Difference in mean mark, steered − unsteered, of every part of the rubric with its 95 % interval."""
    axis = "difference in mark, 1–5 (right of 0: higher when steered)"
    fig, rows = style.rows_of(parts, "What the judges say", axis)
    hover = "<b>{part}</b><br>unsteered {unsteered}, steered {steered}, {n_items} prompts"
    style.forest(fig, rows, "difference", name="steered − unsteered", color=AI, hover=hover)
    ends = rows[["difference", "ci_low", "ci_high"]].abs().to_numpy(float)
    most = 1.15 * max(float(np.nanmax(ends)), 0.5) if np.isfinite(ends).any() else 1.0
    style.row_labels(fig, [short(p, 30) for p in rows["part"]], zero=True)
    return fig.update_xaxes(range=[-most, most])


def text_measures(conditions: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """What the texts of each condition are like: shares on one axis, likelihood under the unsteered model on another."""
    fig = make_subplots(rows=2, cols=1, row_heights=[0.78, 0.22], vertical_spacing=0.24)
    fig.update_layout(style.figure("What the texts are like", height=470).layout)
    for row, measures in ((1, dict(reversed(SHARES.items()))), (2, {"nll": "NLL under the unsteered model"})):
        known = {c: [conditions[c].get(n) for n in measures] for c, *_ in CONDITIONS if c in conditions}
        first, *_, last = [*known.values()] * 2
        style.links(fig, first, last, line={"color": GRID, "width": 3}, row=row, col=1)
        for name, color, symbol, size in CONDITIONS:
            if name in known:
                hover = [f"<b>{m}</b><br>{name}: {number(v)}" for m, v in zip(measures.values(), known[name])]
                points(
                    fig, known[name], list(range(len(measures))), name=name, showlegend=row == 1, color=color, hover=hover,
                    marker={"size": size, **hollow(symbol)}, row=row, col=1,
                )  # fmt: skip
        style.row_labels(fig, list(measures.values()) if row == 1 else ["surprise"], row=row, col=1)
    fig.update_xaxes(title_text="share", range=[-0.03, 1.03], tickformat=".0%", row=1, col=1)
    fig.update_xaxes(title_text="nats a token under the unsteered model", rangemode="tozero", row=2, col=1)
    return fig


def scenario_arms(categories: pd.DataFrame) -> go.Figure:
    """Mean p(aligned) of every category without and with a system prompt, before and after the edit."""
    names = list(dict.fromkeys(categories["category"]))[::-1]
    fig = style.figure("The same scenarios under a system prompt", ALIGNED, height=150 + 52 * len(names))
    for (arm, part), color, lift in zip(categories.groupby("arm", sort=False), (HUMAN, AI), (0.16, -0.16)):
        y = [names.index(c) + lift for c in part["category"]]
        for when, symbol in (("before", "circle-open"), ("after", "circle")):
            hover = says(part, f"<b>{{category}}</b><br>{{arm}}, {when}: mean p {{p_{when}}}")
            marker = {"size": 10, **hollow(symbol)}
            points(fig, part[f"p_{when}"], y, name=f"{arm}, {when}", color=color, hover=hover, marker=marker)
    fig.update_xaxes(range=[-0.02, 1.02])
    return style.row_labels(fig, [short(c, 34) for c in names])


def identity_claims(arms: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How many answers claim each identity, before and after the edit."""
    names = ["none claimed", *list(dict.fromkeys(n for arm in arms.values() for n in arm["names"]))[::-1]]
    fig = style.figure("Whom the model claims to be", "share of answers", height=150 + 46 * len(names))
    looks = {"before": (HUMAN, ""), "after": (GREEN, "/")}
    for arm, counts in arms.items():
        (color, shape), n = looks.get(arm, (NEUTRAL, "")), counts["n"]
        values = [n - counts["claims"], *(counts["names"].get(k, 0) for k in names[1:])]
        hover = [f"<b>{plain(k)}</b><br>{arm}: {v} of {n} answers" for k, v in zip(names, values)]
        pattern = {"pattern": {"shape": shape, "fillmode": "overlay", "solidity": 0.25}}
        style.bars(fig, [v / n for v in values], hover, color=color, marker=pattern, name=arm)
    fig.update_xaxes(tickformat=".0%", rangemode="tozero")
    return style.row_labels(fig, [short(n, 24) for n in names])


SIDE_COLORS = {"all": AI, "positive": AI, "negative": HUMAN, "difference": GREEN}


def dose_response(frame: pd.DataFrame, behavior: str, usable: tuple[float, float] | None = None) -> go.Figure:
    """Rate of a behavior against strength, a line a side with its interval over prompts; the usable range is shaded."""
    rate = f"rate of {plain(short(behavior, 40))}"
    fig = style.figure("Behavior against strength", "strength of the edit", rate, height=460)
    if usable is not None:
        said = {"text": "capability within the margin", "yanchor": "top", "y": 0.99, "xanchor": "left", "x": usable[0]}  # fmt: skip
        fig.add_vrect(*usable, fillcolor=GRID, opacity=0.5, layer="below", line_width=0, annotation=said)
    for side, rows in frame.groupby("side", sort=False):
        color, candidate = SIDE_COLORS.get(str(side), NEUTRAL), rows["kind"] == "candidate"
        line = rows[candidate & rows["strength"].notna()].sort_values("strength")
        for r in rows[(rows["kind"] == "mismatch") | (candidate & rows["strength"].isna())].to_dict(
            "records"
        ):
            said = {"text": plain(short(f"{side}: {r.get('label') or 'the edit'}", 40)), "font": {"size": 10}}
            fig.add_hline(r["rate"], line={"color": color, "dash": "dot", "width": 1.2}, annotation=said)
        hover = "<b>{side}, {strength}</b><br>{rate} [{ci_low}, {ci_high}], {n} prompts<br>change {change}; random controls {control_change}"  # fmt: skip
        up, down = line["ci_high"] - line["rate"], line["rate"] - line["ci_low"]
        points(
            fig, line["strength"], line["rate"], mode="lines+markers", name=str(side), line={"color": color}, hover=says(line, hover),
            error_y={"array": up, "arrayminus": down, "thickness": 1.2},
        )  # fmt: skip
        for unsteered in rows.loc[rows["kind"] == "base", "rate"].head(1):
            fig.add_hline(unsteered, line={"color": color, "dash": "dash", "width": 1.2})
            controls = line[line["control_change"].notna()]
            level = unsteered + controls["control_change"]
            if len(controls):
                marker = {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": color}}
                name = f"{side}: random controls"
                hover = [f"{name}<br>{number(v)}" for v in level]
                points(fig, controls["strength"], level, name=name, color=color, hover=hover, marker=marker)
    return fig
