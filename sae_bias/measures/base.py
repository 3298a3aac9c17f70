"""A measure: what edits do beside the bias, as tables of the run folder and blocks of the summary.

    @register_measure("my_measure")
    def my_measure(engine: ProbeEngine, edits: Sequence[Intervention]) -> Measured: ...

`engine` holds the model, the pairs, the probe and the unsteered result (`engine.base`). A study runs every registered measure, a
plugin's too, on its report templates under the ablation of the chosen feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.intervention import Intervention


@dataclass(frozen=True, eq=False)
class Measured:
    """What one measure found."""

    tables: Mapping[str, pd.DataFrame]
    """By the name they have in the run folder's tables/."""
    summary: Mapping[str, object] = field(default_factory=dict)
    """Blocks of summary.json by name."""
    apart: str = ""
    """Column that tells its rows from those of other measures with the same tables: such measures share them."""


Measure = Callable[[ProbeEngine, Sequence[Intervention]], Measured]
MEASURES: Registry[Measure] = Registry("measure", modules=("sae_bias.measures.specificity",))
register_measure = MEASURES.register


def run_measures(engine: ProbeEngine, edits: Sequence[Intervention]) -> Measured:
    """Every registered measure of `edits`, their tables and blocks together; blocks of measures that share tables end in the later one's name.

    Raises:
        RequestError: two measures give a table or a block of one name and do not share it, or cannot be told apart in it.
    """
    tables: dict[str, pd.DataFrame] = {}
    summary: dict[str, object] = {}
    apart: dict[str, str] = {}
    for name in MEASURES.names():
        found = MEASURES.get(name)(engine, edits)
        given = {f"{block}_{name}" if found.apart and block in summary else block: facts for block, facts in found.summary.items()}  # fmt: skip
        shared = {t for t in tables.keys() & found.tables.keys() if found.apart and apart[t] == found.apart}
        twice = sorted((tables.keys() & found.tables.keys()) - shared | (summary.keys() & given.keys()))
        if twice:
            raise RequestError(f"measure {name!r} gives {twice[0]!r}, which another measure gives already.")
        for table, frame in found.tables.items():
            if table in shared:
                if same := set(tables[table][found.apart]) & set(frame[found.apart]):
                    raise RequestError(f"measure {name!r} measures {same.pop()!r}, which another measure does already.")  # fmt: skip
                frame = pd.concat([tables[table], frame], ignore_index=True)
            tables[table], apart[table] = frame, found.apart
        summary |= given
    return Measured(tables, summary)
