"""What a report is made of: a run folder as read, and sections of sentence, picture, table and text.

Long tables are cut at `MOST_ROWS`, and the page says how many rows stayed in the run folder.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sae_bias.core import text as fmt
from sae_bias.core.files import plain
from sae_bias.runs.folder import Run

MOST_ROWS = 1000
SHARES = {
    "reduction", "red_low", "red_high", "specific_reduction", "spec_low", "spec_high", "fire_human", "fire_ai", "wrong_way_share", "moved_share", "share_templates_positive",
    "in_sample_reduction", "in_sample_low", "in_sample_high", "held_out_reduction", "held_out_low", "held_out_high",
    "written_inactive", "refusal", "default_negativity", "other_share", "removed", "removed_low", "removed_high", "specific", "fired", "share_of_bias", "share_of_ceiling", "share_low", "share_high",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and what it sorts by (None sorts last)."""

    text: str
    sort: float | str | None


@dataclass(frozen=True)
class Table:
    """Rows as text, with the number of rows that were left in the run folder."""

    columns: list[tuple[str, str]]  # (label, "num" | "text")
    rows: list[list[Cell]]
    left_out: int = 0
    source: str = ""


@dataclass(frozen=True)
class Piece:
    """A word or token of a text: whether it changed, how deep its background is (0 to 1), and what hovering says."""

    text: str
    changed: bool = False
    shade: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Sides:
    """Two texts to be read beside each other."""

    head: str
    left: list[Piece]
    right: list[Piece]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence in plain words, a picture, and the table behind it."""

    anchor: str
    title: str
    takeaway: str
    figure: go.Figure | None = None
    table: Table | None = None
    sides: list[Sides] = field(default_factory=list)
    side_names: tuple[str, str] = ("unsteered", "steered")
    open_table: bool = False
    how_to_read: str = ""
    group: str = ""

    @cached_property
    def figure_json(self) -> str:
        figure = go.Figure(self.figure).update_layout(title=None)
        drawn = figure.to_dict()
        named = [t for t in drawn["data"] if t.get("showlegend") is not False and t.get("name")]
        legend = (
            len(named) > 1 and drawn["layout"].get("showlegend") is not False
        )  # plotly draws none for one trace
        top = 56 if legend or drawn["layout"].get("annotations") else 24
        return script_json(json.loads(figure.update_layout(margin_t=top).to_json() or "{}"))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame by column name."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def run_table(
    run: Run,
    name: str,
    columns: dict[str, str],
    frame: pd.DataFrame | None = None,
    *,
    missing: str = fmt.UNDEFINED,
) -> Table:
    """`table_of` a table of a run folder, or of `frame`, which was made from it."""
    source = f"{run.folder.name}/tables/{name}.parquet"
    return table_of(run.tables[name] if frame is None else frame, columns, source=source, missing=missing)


def table_of(
    frame: pd.DataFrame, columns: dict[str, str], *, source: str = "", missing: str = fmt.UNDEFINED
) -> Table:
    """The named columns of a frame as text, SAEs by the shortest names that tell them apart; columns that it does not have are left out."""
    shown = {c: label for c, label in columns.items() if c in frame}
    head = frame.head(MOST_ROWS)
    for c in {"sae", "feature", "control"} & set(shown):
        head = head.assign(**{c: _short(head[c])})
    cells = [[_cell(value, c, missing) for value in head[c].tolist()] for c in shown]
    numeric = [pd.api.types.is_numeric_dtype(frame[c]) and not pd.api.types.is_bool_dtype(frame[c]) for c in shown]  # fmt: skip
    labels = [(label, "num" if n else "text") for label, n in zip(shown.values(), numeric)]
    return Table(labels, [list(row) for row in zip(*cells)], len(frame) - len(head), source)


def _short(column: pd.Series) -> list[Any]:
    """SAEs, and features of SAEs, by the shortest names of the SAEs."""
    names = short_names(v.partition("#")[0] for v in column if isinstance(v, str))
    return [v if not isinstance(v, str) else names[v.partition("#")[0]] + "".join(v.partition("#")[1:]) for v in column]  # fmt: skip


def short_names(ids: Iterable[object]) -> dict[str, str]:
    """Each SAE id by its shortest ending, between slashes, that tells it from the others."""
    full = list(dict.fromkeys(map(str, ids)))
    endings = {i: ["/".join(i.split("/")[-n:]) for n in range(1, i.count("/") + 2)] for i in full}
    taken = Counter(e for of_one in endings.values() for e in of_one)
    return {i: next((e for e in of_one if taken[e] == 1), i) for i, of_one in endings.items()}


def _cell(value: Any, column: str, missing: str) -> Cell:
    if column.startswith("kl"):
        missing = fmt.NOT_MEASURED
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell(missing, None)
    text = fmt.percent(value) if column in SHARES else fmt.number(value)
    return Cell(text, float(value) if isinstance(value, int | float) else str(value))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&` is left in it, and no NaN."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
