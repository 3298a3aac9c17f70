"""The sections of a report: each is registered where it is defined, and made where the run has its table.

    @section("The feature", table="ranking")
    def ranking_section(run: Run) -> Section: ...

Groups stand in the order of `GROUPS`, a plugin's own group after them; within a group sections stand in the order in which they were
registered. A plugin registers its sections in the same way (`core.registry`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry
from sae_bias.report.parts import Section
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
        SECTIONS.register(f"{build.__module__}.{build.__qualname__} of {table}")(
            SectionOf(group, table, build)
        )
        return build

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
