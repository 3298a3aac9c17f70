"""Palette, paper and marks that the figures share.

Colors are mid-tones after Okabe & Ito (Color Universal Design, 2008), told apart by color-blind readers
and legible on light and on dark paper; kinds also differ by symbol or dash, never by color alone. Text
that came from a prompt or a model is escaped, because plotly reads `<b>` and `<a href>` in labels.
"""

import html
import string
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_bias.core.text import number

HUMAN, AI, NEUTRAL = "#2f86c8", "#d9622b", "#858b95"
GREEN, PURPLE, GOLD = "#1a9e77", "#a8639b", "#b98300"
COLORS = (AI, HUMAN, GREEN, PURPLE, GOLD, NEUTRAL)
INK, GRID = "#767b84", "rgba(128,134,145,0.22)"
SIDES = ("human", "AI")
"""What the two sides of a pair are called, where a question names no others: bias = s(first) − s(second)."""
CALLS = {  # how a feature was called -> (legend, color, symbol)
    "ai_speech": ("answers to AI speech", AI, "star"),
    "silent": ("silent at AI speech", PURPLE, "star-open"),
    "judgement": ("negative judgement", INK, "triangle-up"),
    "identity": ("AI identity", GREEN, "cross"),
    "separates": ("separates AI from human", HUMAN, "diamond"),
    "undetermined": ("undetermined", GOLD, "square-open"),
    "no": ("neither", NEUTRAL, "circle"),
}
KINDS = {  # kind of intervention -> (legend, color, dash)
    "candidate": ("the feature", AI, "solid"),
    "direction": ("difference of means", GREEN, "dash"),
    "opposite": ("opposite sign", PURPLE, "dot"),
    "control": ("controls", NEUTRAL, "solid"),
    "mismatch": ("the feature elsewhere", GOLD, "dot"),
}
COSTS = ("kl_neutral", "kl_ai_nonspeech", "kl_ai_speech", "kl_valence", "kl_off")
_AXIS = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "automargin": True, "ticks": ""}
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"
_TITLED = _AXIS | {"title": {"standoff": 12, "font": {"size": 13}}}
TEMPLATE = go.layout.Template(layout={
    "font": {"family": _FONT, "size": 13, "color": INK}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
    "colorway": [HUMAN, AI, GREEN, PURPLE, GOLD, NEUTRAL], "xaxis": _TITLED, "yaxis": _TITLED, "modebar": {"orientation": "v"},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "title": {"text": ""}},
    "hoverlabel": {"align": "left", "font": {"size": 13}}, "margin": {"l": 24, "r": 48, "t": 84, "b": 56}, "hovermode": "closest", "bargap": 0.18,
})  # fmt: skip


def plain(text: object) -> str:
    """`text` as plotly shows it letter for letter: no tag, link or entity in it is obeyed."""
    return html.escape(str(text), quote=False)


def short(text: object, width: int = 58) -> str:
    """The start of `text`, cut at `width` characters, safe as a label."""
    line = " ".join(str(text).split())
    return plain(line if len(line) <= width else line[: width - 1].rstrip() + "…")


def wrapped(text: object, width: int = 64) -> str:
    """`text` broken into lines for a hover box, safe as a label."""
    return "<br>".join(plain(line) for line in textwrap.wrap(str(text), width)) or "–"


def bias_axis(sides: Sequence[str] = SIDES) -> str:
    """Label of an axis of biases."""
    return f"bias in nats (right of 0: {short(sides[1], 24)} judged worse)"


HOVER = "%{customdata}<extra></extra>"


def figure(title: str, x: str = "", y: str = "", *, height: int = 420) -> go.Figure:
    heading = {"text": title, "font": {"size": 16}}
    heading |= {"x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top", "yref": "container"}
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return go.Figure(layout={"template": TEMPLATE, "title": heading, "height": height, **axes})


class _Words(string.Formatter):
    """A number as a reader wants it, a text letter for letter; `:wrap` breaks a text into lines, any other format is Python's."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "wrap":
            return wrapped(value if isinstance(value, str) else "")
        if isinstance(value, str):
            return plain(value)
        return format(value, format_spec) if format_spec else number(value)


def says(rows: pd.DataFrame, template: str) -> list[str]:
    """The hover text of every row: `template` with the row's columns filled in, safe as a label."""
    return [_Words().vformat(template, (), row) for row in rows.to_dict("records")]  # pyright: ignore[reportCallIssue, reportArgumentType]


def points(
    fig: go.Figure, x: Any, y: Any, *, color: str | None = None, hover: Iterable[str] | None = None, marker: dict[str, Any] | None = None,
    **trace: Any,
) -> go.Figure:  # fmt: skip
    """Marks, each with its own text on hovering; `trace` goes to plotly as it is."""
    said = {"hoverinfo": "skip"} if hover is None else {"customdata": list(hover), "hovertemplate": HOVER}
    marks = "markers" in trace.setdefault("mode", "markers")
    looks = {"marker": {"color": color} | (marker or {})} if marks else {}
    return fig.add_scatter(x=x, y=y, **looks, **said, **trace)


def bars(
    fig: go.Figure, x: Any, hover: Iterable[str], *, color: Any, y: Any = None, **trace: Any
) -> go.Figure:
    """Horizontal bars, one a row."""
    marker = {"color": color, **trace.pop("marker", {})}
    at = np.arange(len(x)) if y is None else y
    return fig.add_bar(x=x, y=at, orientation="h", marker=marker, customdata=list(hover), hovertemplate=HOVER, **trace)  # fmt: skip


def rows_of(frame: pd.DataFrame, title: str, axis: str = "", *, pitch: int = 44, top: int = 150) -> tuple[go.Figure, pd.DataFrame]:  # fmt: skip
    """A figure as high as it takes for one line a row, and the rows from the bottom up, so that the first stands on top."""
    rows = frame.iloc[::-1].reset_index(drop=True)
    return figure(title, axis, height=top + pitch * len(rows)), rows


def forest(
    fig: go.Figure, rows: pd.DataFrame, value: str, low: str = "ci_low", high: str = "ci_high", *, name: str, color: str,
    hover: str | Sequence[str], y: Any = None, symbol: str = "circle",
) -> None:  # fmt: skip
    """A mark with its horizontal interval for every row, at its index unless `y` says where; `hover` may be a template of `says`."""
    mid, left, right = (rows[c].to_numpy(float) for c in (value, low, high))
    ends = {"type": "data", "symmetric": False, "array": right - mid, "arrayminus": mid - left, "thickness": 1.6, "width": 0}  # fmt: skip
    points(
        fig, mid, np.asarray(rows.index if y is None else y), name=name, color=color, marker={"symbol": symbol, "size": 8},
        hover=says(rows, hover) if isinstance(hover, str) else hover, error_x=ends | {"color": color},
    )  # fmt: skip


def published(fig: go.Figure, rows: pd.DataFrame, hover: str = "published {published}") -> None:
    """A hollow diamond at the index of every row that has a published value; none where the column is missing."""
    known = rows[rows["published"].notna()] if "published" in rows else rows[:0]
    marker = {"symbol": "diamond-open", "size": 12, "line": {"width": 2}}
    if len(known):
        points(
            fig, known["published"].astype(float), known.index, name="published", color=PURPLE, hover=says(known, hover), marker=marker
        )  # fmt: skip


def links(fig: go.Figure, left: Iterable[Any], right: Iterable[Any], **trace: Any) -> None:
    """A line in each row from its left to its right end."""
    x = [v for ends in zip(left, right) for v in (*ends, None)]
    y = [v for i in range(len(x) // 3) for v in (i, i, None)]
    points(fig, x, y, mode="lines", showlegend=False, **trace)


def hollow(symbol: str) -> dict[str, Any]:
    """The outline of an open symbol; a filled one has none."""
    return {"symbol": symbol, "line": {"width": 2 if symbol.endswith("open") else 0}}


def row_labels(fig: go.Figure, labels: Sequence[str], *, zero: bool = False, **panel: Any) -> go.Figure:
    """A label for every row, and with `zero` a line at 0; `panel` is the row and column in a figure of several."""
    ticks = {"tickvals": list(range(len(labels))), "ticktext": list(labels), "ticklabelstandoff": 6}
    fig.update_yaxes(range=[-0.8, len(labels) - 0.2], showgrid=False, zeroline=False, **ticks, **panel)
    return zero_line(fig, "x") if zero else fig


def zero_line(fig: go.Figure, axis: str) -> go.Figure:
    line = {"zeroline": True, "zerolinewidth": 1.6, "zerolinecolor": "rgba(128,134,145,0.7)", "rangemode": "tozero"}  # fmt: skip
    return fig.update_xaxes(**line) if axis == "x" else fig.update_yaxes(**line)


def overall_band(fig: go.Figure, overall: dict) -> None:
    low, high, mean = (overall.get(k) for k in ("ci_low", "ci_high", "mean"))
    if low is not None and high is not None and np.isfinite([low, high]).all():
        fig.add_vrect(x0=low, x1=high, fillcolor=AI, opacity=0.14, line_width=0, layer="below")
    fig.add_scatter(
        x=[None], y=[None], mode="lines", name="overall mean and 95% interval", line={"color": AI, "width": 3}
    )
    fig.add_vline(x=mean, line={"color": AI, "width": 2})


def bins(frame: pd.DataFrame, columns: list[str], n: int = 36) -> dict:
    """One set of bins for several columns, so that overlaid histograms can be compared."""
    values = frame[columns].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    size = (high - low) / n or 0.01
    return {"start": low - size / 2, "end": high + size, "size": size}


def lead_split(frame: pd.DataFrame) -> str:
    """The split a figure is about: report where there is one, else all, else whatever is there."""
    splits = list(frame["split"].unique())
    return next((s for s in ("report", "all", *splits) if s in splits), "all")


def strength_lines(fig: go.Figure, rows: pd.DataFrame, kind: str, *, dotted: bool, split: str) -> None:
    name, color, dash = KINDS[kind]
    look = {"color": NEUTRAL, "dash": "dot"} if dotted else {"color": color, "dash": dash}
    width = 1 if kind == "control" else 2.2
    lines = rows.groupby(["intervention", "feature", "positions"], dropna=False, sort=False)
    for i, (_, line) in enumerate(lines):
        line = line.sort_values("strength")
        edit = edit_name(line["intervention"].iloc[0])
        if kind == "candidate" and not dotted:
            band(fig, line, color)
        legend = f"{name}: {edit} ({plain(split)})" if kind == "candidate" else name
        points(
            fig, line["strength"], line["bias"], hover=[cell_hover(row) for row in line.to_dict("records")],
            mode="lines" if kind == "control" else "lines+markers", name=legend, legendgroup=legend, line={**look, "width": width},
            showlegend=kind == "candidate" or i == 0, opacity=0.35 if kind == "control" else 1,
        )  # fmt: skip


def band(fig: go.Figure, line: pd.DataFrame, color: str) -> None:
    known = line.dropna(subset=["ci_low", "ci_high"])
    x = [*known["strength"], *known["strength"][::-1]]
    y = [*known["ci_high"], *known["ci_low"][::-1]]
    if len(known) > 1:
        shade = {"fill": "toself", "fillcolor": color, "line": {"width": 0}, "opacity": 0.14}
        points(fig, x, y, mode="lines", showlegend=False, **shade)


def constant_lines(fig: go.Figure, rows: pd.DataFrame) -> None:
    """Edits without a strength (ablate, project out) are level lines; controls without one are skipped."""
    known = rows[(rows["kind"] != "control") & rows["bias"].notna() & (rows["change"].fillna(0) != 0)]
    for row in known.to_dict("records"):
        name, color, dash = KINDS.get(row["kind"], ("", NEUTRAL, "dot"))
        look = {"color": color, "dash": "dashdot" if dash == "solid" else dash, "width": 1.8}
        legend = f"{name}: {edit_name(row['intervention'])}"
        ends, hover = x_range(fig), [cell_hover(row)] * 2
        points(fig, ends, [row["bias"]] * 2, mode="lines", name=legend, line=look, hover=hover)


def edit_name(kind: object) -> str:
    """An intervention's kind in words, safe as a label."""
    return plain(str(kind).replace("_", " "))


def x_range(fig: go.Figure) -> list[float]:
    """First and last x of the lines drawn so far; −1 and 1 where there are none."""
    traces: Any = fig.data
    drawn = [np.asarray(t.x, dtype=float) for t in traces if t.x is not None and len(t.x)]
    values = np.concatenate(drawn or [np.array([-1.0, 1.0])])
    return [float(np.nanmin(values)), float(np.nanmax(values))]


def cell_hover(row: dict) -> str:
    costs = "".join(
        f"<br>KL {k.removeprefix('kl_').replace('_', ' ')} {number(row[k])}"
        for k in COSTS
        if pd.notna(row.get(k))
    )
    outside = "<br><b>outside the activations observed</b>" if row.get("outside_observed") is True else ""
    strength = f" at {number(row['strength'])}" if pd.notna(row.get("strength")) else ""
    removed = f"<br>removed {row['reduction']:.1%}" if pd.notna(row.get("reduction")) else ""
    what = wrapped(row.get("label") or row.get("feature") or "")
    return (
        f"<b>{edit_name(row['intervention'])}{strength}</b>, {plain(row['split'])}<br>{what}<br>bias"
        f" {number(row['bias'])} nats{removed}{costs}{outside}"
    )
