"""Figures of behavior under an edit: scenarios by category before and after, and judges' marks."""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import pandas as pd
import plotly.graph_objects as go

from sae_bias import plot_style as style
from sae_bias.plot_style import AI, GREEN, GRID, HUMAN, number, plain, short


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
    for column, name, color, counted in (
        ("p_before", "before", HUMAN, "aligned_before"),
        ("p_after", "after", GREEN, "aligned_after"),
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
            marker={"color": color, "size": 11},
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
    return style.zero_line(style.row_labels(fig, list(rows["part"])), "x")
