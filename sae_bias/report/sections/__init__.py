"""The sections of a report: each is registered where it is defined, and made where the run has its table.

    @section("The feature", table="rivers")                      a plugin's, whole
    def rivers(run: Run) -> Section: ...

    @drawn(FEATURE, "ladder", "ladder", "How the feature causes it", "rung: effect of; effect: nats")
    def ladder(run: Run, frame: pd.DataFrame) -> Drawn: ...      table, anchor, title and columns are told beforehand

Groups stand in the order of `GROUPS`, a plugin's own group after them; within a group sections stand in the order in which they were
registered. A plugin registers its sections in the same way (`core.registry`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pandas as pd
import plotly.graph_objects as go

from sae_bias.core import text as fmt
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of
from sae_bias.core.registry import Registry
from sae_bias.report.parts import Section, Sides, run_table
from sae_bias.runs.folder import Run

CALIBRATION = "Calibration"
BIAS, FEATURE, SUPPRESSED, TEXT, PUBLISHED = (
    "The bias",
    "The feature",
    "Turning it down",
    "What it writes and chooses",
    "The published study",
)
GROUPS = (CALIBRATION, BIAS, FEATURE, SUPPRESSED, TEXT, PUBLISHED)
Build = Callable[[Run], Section]


@dataclass(frozen=True)
class SectionOf:
    """A section's place, the table it is made of, and what makes it."""

    group: str
    table: str
    build: Build

    @property
    def place(self) -> int:
        return GROUPS.index(self.group) if self.group in GROUPS else len(GROUPS)


SECTIONS: Registry[SectionOf] = Registry(
    "report section",
    modules=tuple(
        f"{__name__}.{name}"
        for name in ("calibration", "probe", "features", "suppression", "behavior", "published")
    ),
)


def section(group: str, *, table: str) -> Callable[[Build], Build]:
    """Register a section, made of a run that has `table`; a section of two tables is registered twice."""

    def add(build: Build) -> Build:
        name = f"{build.__module__}.{build.__qualname__} of {table}"
        SECTIONS.register(name)(SectionOf(group, table, build))
        return build

    return add


@dataclass(frozen=True)
class Drawn:
    """What a section finds in its table."""

    takeaway: str
    figure: go.Figure | None = None
    rows: pd.DataFrame | None = None
    """What the table shows instead of the run's own; empty shows none."""
    columns: dict[str, str] = field(default_factory=dict)
    """Further columns, which depend on the run."""
    how_to_read: str = ""
    sides: list[Sides] = field(default_factory=list)


Draw = Callable[[Run, pd.DataFrame], Drawn]


def drawn(
    group: str, table: str, anchor: str, title: str, columns: str = "", *, how: str = "", opened: bool = False, missing: str = fmt.UNDEFINED
) -> Callable[[Draw], Draw]:  # fmt: skip
    """Register a section over one table of the run; in `how` and in labels of `columns` {0} and {1} are what the run's two sides are called."""

    def add(draw: Draw) -> Draw:
        def build(run: Run) -> Section:
            frame = run.tables[table]
            found = draw(run, frame)
            labels = {c: label.format(*run.sides) for c, label in columns_of(columns).items()} | found.columns
            rows = frame if found.rows is None else found.rows
            shown = run_table(run, table, labels, rows, missing=missing) if len(rows) else None
            how_to_read = found.how_to_read or how.format(*run.sides)
            return Section(anchor, title, found.takeaway, found.figure, shown, found.sides, open_table=opened, how_to_read=how_to_read)  # fmt: skip

        build.__qualname__, build.__module__ = draw.__qualname__, draw.__module__
        section(group, table=table)(build)
        return draw

    return add


def sections(run: Run) -> list[Section]:
    """Every section whose table the run has, in reading order."""
    built = []
    for entry in sorted(SECTIONS, key=lambda s: s.place):
        if entry.table not in run.tables or (entry.table == "comparison" and run.organism):
            continue
        try:
            built.append(replace(entry.build(run), group=entry.group))
        except KeyError as error:
            have = ", ".join(map(str, run.tables[entry.table].columns))
            raise RequestError(
                f"{run.folder / 'tables' / entry.table}.parquet has no column {error}; it has {have}. Run the"
                " command that wrote it again."
            ) from error
    return built
