"""What results have in common: a table to take away, and a look in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure
else:
    Figure = Any  # plotly is imported by what draws


class Framed:
    """A result whose figures are one table."""

    frame_field: ClassVar[str] = "frame"
    """The field that holds it."""

    def to_frame(self) -> pd.DataFrame:
        """The table, as a copy."""
        return getattr(self, self.frame_field).copy()

    def _repr_html_(self) -> str:
        table = self.to_frame().round(4).to_html(escape=True, index=False)
        return f"<p>{escape(repr(self).splitlines()[0])}</p>{table}"
