"""Figures of a calibration: how often intervals cover the truth, power by size of the design, attribution against ablation."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias.figures import style
from sae_bias.figures.style import AI, GOLD, GREEN, GRID, HUMAN, NEUTRAL, PURPLE, plain, points, says

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")


def coverage(frame: pd.DataFrame, band: Sequence[float]) -> go.Figure:
    """One row an organism: share of drawn studies whose interval holds the truth, with its own binomial interval."""
    fig, rows = style.rows_of(frame, "Intervals that hold the truth", "share of drawn studies", top=190)
    hover = "<b>{organism}</b><br>{coverage:.1%} of {n_studies:,} studies of {n_templates} × {n_entities} ({ci_low:.1%} to {ci_high:.1%})<br>truth {truth:+.3f} nats"  # fmt: skip
    style.forest(fig, rows, "coverage", name="", color=HUMAN, hover=hover)
    fig.update_traces(showlegend=False)
    fig.add_vrect(x0=band[0], x1=band[1], fillcolor=GRID, line_width=0, layer="below")
    fig.add_vline(x=0.95, line={"color": NEUTRAL, "dash": "dot"})
    low, high = min(band[0], float(rows["ci_low"].min())), max(band[1], float(rows["ci_high"].max()))
    fig.update_xaxes(tickformat=".0%", range=[low - 0.01, min(high + 0.01, 1.0)])
    of = rows["question"] if "question" in rows else ["bias"] * len(rows)
    return style.row_labels(fig, [plain(f"{name}: {q}") for name, q in zip(rows["organism"], of)])


def power(frame: pd.DataFrame) -> go.Figure:
    """Share of drawn designs that find (or falsely call) something, by number of templates or statement pairs."""
    fig = style.figure("What designs of each size find", "templates, or matched statement pairs", "share of drawn designs")  # fmt: skip
    colors = (AI, HUMAN, GREEN, PURPLE, GOLD, NEUTRAL)
    for i, (label, rows) in enumerate(power_lines(frame)):
        rows = rows.sort_values("n_units").assign(label=label)
        color, dash = colors[i % len(colors)], "solid" if "finds" in label else "dot"
        points(
            fig, rows["n_units"], rows["share"], mode="lines+markers", name=plain(label),
            hover=says(rows, "<b>{label}</b><br>{n_units} → {share:.1%} of {n_draws:,} draws"),
            line={"color": color, "width": 2, "dash": dash}, marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
        )  # fmt: skip
    fig.add_hline(y=0.8, line={"color": NEUTRAL, "dash": "dot"}, annotation_text="80%")
    fig.update_layout(legend={"y": -0.28, "yanchor": "top"}, height=520)
    return fig.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])


def power_lines(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The curves of the table `power`, each with what it says; the bias at its largest number of entities."""
    words = {
        "bias": "{}: pairs whose interval finds the bias",
        "difference in differences": "{}: pairs whose interval finds the difference in differences",
        "feature": "{}: grid finds the planted feature",
        "trained": "{}: grid finds AI-speech features of a trained SAE",
        "any call": "{}: grid calls anything, falsely",
    }
    lines = []
    for (organism, question), rows in frame.groupby(["organism", "question"], sort=False):
        most = rows["n_entities"].max()
        shown = rows if np.isnan(most) else rows[rows["n_entities"] == most]
        lines.append((words[str(question)].format(organism), shown))
    return lines


def attributed_and_exact(effects: pd.DataFrame, matters: float) -> go.Figure:
    """Every feature whose effect matters: what attribution predicted and what ablation did, as shares of the bias."""
    large = effects[effects[["attributed", "exact"]].abs().max(axis=1) > matters]
    axes = "attributed, share of the bias", "exact, share of the bias"
    fig, both = style.figure("Attribution against ablation", *axes), large[["attributed", "exact"]]
    ends = [float(both.min().min()), float(both.max().max())]
    points(fig, ends, ends, mode="lines", line={"color": NEUTRAL, "dash": "dot"}, showlegend=False)
    hover = "<b>{sae}#{feature:d}</b>, seed {organism_seed}<br>attributed {attributed:.1%}, exact {exact:.1%}"
    for i, (seed, rows) in enumerate(large.groupby("organism_seed")):
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7, "opacity": 0.75}
        points(fig, rows["attributed"], rows["exact"], name=f"seed {seed}", hover=says(rows, hover), marker=marker)  # fmt: skip
    return fig.update_xaxes(tickformat=".0%").update_yaxes(tickformat=".0%")
