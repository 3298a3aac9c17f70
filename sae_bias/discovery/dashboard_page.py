"""A feature dashboard as HTML: no scripts, nothing fetched, every text escaped, tokens colored by activation."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from sae_bias.discovery.dashboards import Activity, FeatureCard, Passage


_AI = "217,98,43"


def card_page(card: FeatureCard) -> str:
    """The whole page."""
    return _environment().get_template("card.html.j2").render(card=card, body=Markup(card_body(card)))


def card_body(card: FeatureCard) -> str:
    """The dashboard alone, for a notebook or another page."""
    table = card.two_by_two
    acts = [a for a in ("speech", "nonspeech", "harm", "control") if a in table]
    groups = [g for g in ("ai", "human", "animal", "object") if g in table.index]
    shown = [float(v) for v in [*table.to_numpy().ravel(), card.activity.largest] if v == v]
    top = max(shown, default=0.0)  # as in the passages: what is faint there is faint here
    cells = [
        (g, [(f"{v:.2f}" if v == v else "–", _shade(v, top)) for v in (_cell(table, g, a) for a in acts)])
        for g in groups
    ]
    return _environment().get_template("card_body.html.j2").render(
        card=card,
        activity=card.activity,
        acts=acts,
        cells=cells,
        passages=[(p, Markup(_colored(p, card.activity.largest))) for p in card.activity.passages],
        histogram=Markup(histogram_svg(card.activity)),
        css=Markup(_css()),
    )  # fmt: skip


def _colored(passage: Passage, largest: float) -> str:
    """The passage with each token's background as strong as its activation; the number on hovering."""
    parts = []
    for place, (token, value) in enumerate(zip(passage.tokens, passage.acts)):
        shown = escape(visible(token, newline="↵\n") or ("·" if value > 0 else ""))
        if not value > 0:
            parts.append(f"<span>{shown}</span>")
            continue
        mark = ' class="peak"' if place == passage.peak else ""
        parts.append(
            f'<span{mark} style="background:{_shade(value, largest)}" title="{value:.3g}">{shown}</span>'
        )
    return "".join(parts)


def visible(token: str, newline: str = "↵") -> str:
    """A token with its control characters spelled out, which no page may hold."""
    return "".join(
        newline if c == "\n" else c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in token
    )


def _shade(value: float, top: float) -> str:
    share = value / top if value == value and top > 0 else 0.0
    return f"rgba({_AI},{0.8 * max(0.0, min(1.0, share)):.2f})"


def histogram_svg(activity: Activity, width: int = 460, height: int = 130) -> str:
    """Active values on a log axis, tokens a bin; text in the page's own color."""
    if not activity.histogram:
        return '<p class="quiet">It never fired.</p>'
    first, last = math.log2(activity.histogram[0][0]), math.log2(activity.histogram[-1][1])
    most = max(n for _, _, n in activity.histogram)
    base, left, room = height - 22, 44, width - 52

    def x(value: float) -> float:
        return left + room * (math.log2(value) - first) / max(last - first, 1e-9)

    bars = [
        f'<rect x="{x(a):.1f}" width="{max(x(b) - x(a) - 1, 1):.1f}" y="{base - (base - 8) * n / most:.1f}" '
        f'height="{(base - 8) * n / most:.1f}" fill="rgb({_AI})"><title>{a:.3g} to {b:.3g}: {n} tokens</title></rect>'
        for a, b, n in activity.histogram
    ]
    ends = [(activity.histogram[0][0], "start"), (activity.histogram[-1][1], "end")]
    labels = [
        f'<text x="{x(v):.1f}" y="{height - 6}" text-anchor="{anchor}">{v:.3g}</text>' for v, anchor in ends
    ]
    labels += [
        f'<text x="{left - 6}" y="16" text-anchor="end">{most}</text>',
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{left + room / 2:.0f}" y="{height - 6}" text-anchor="middle">activation (log scale)</text>',
    ]
    return (
        f'<svg role="img" aria-label="histogram of active values" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">{"".join(bars)}<line x1="{left}" x2="{left + room}" y1="{base}" y2="{base}" class="axis"/>'
        f"{''.join(labels)}</svg>"
    )


@cache
def _css() -> str:
    return (files("sae_bias") / "data" / "card.css").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(str(files("sae_bias") / "data")), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda v: (
        "undefined" if v is None or v != v else f"{v:.3g}".replace("-", "−")
    )
    environment.filters["token"] = visible
    return environment


def _cell(table: Any, group: str, act: str) -> float:
    value: Any = table.at[group, act]
    return float(value)
