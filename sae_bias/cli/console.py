"""What a command prints: plain lines and rich tables, or one JSON object.

Inside `with Console(...)` standard output belongs to the command alone: whatever a library prints goes to standard error.
"""

import contextlib
import json as json_module
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from sae_bias.core.threads import SAY_THREADS

if TYPE_CHECKING:
    import pandas as pd


UNDEFINED = "–"
_PIPED_WIDTH = 160


class Console:
    """Standard output of one command."""

    def __init__(self, json: bool, quiet: bool):
        self.json, self.quiet = json, quiet
        self.stdout = sys.stdout
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._stack.enter_context(_threads_said(self.talks))
        if not self.talks:
            self._stack.enter_context(_no_hub_bars())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def talks(self) -> bool:
        """Whether more than the headline is wanted."""
        return not (self.json or self.quiet)

    @property
    def progress(self) -> bool:
        """Whether progress bars (with the time left) may be drawn, on standard error."""
        return self.talks and sys.stderr.isatty()

    def say(self, line: str) -> None:
        """A line of the headline."""
        if not self.json:
            print(line, file=self.stdout)

    def note(self, line: str) -> None:
        """A remark, left out under --quiet."""
        if self.talks:
            print(line, file=self.stdout)

    def warn(self, line: str) -> None:
        """A warning, always, on standard error."""
        print(f"sae-bias: warning: {line}", file=sys.stderr)

    def table(self, title: str, frame: "pd.DataFrame", columns: Mapping[str, str]) -> None:
        """Rows of `frame` under the labels of `columns` (those it has), left out under --quiet."""
        if not self.talks:
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        names = [c for c in columns if c in frame]
        for name in names:
            numeric = frame[name].dtype.kind in "fiu"
            table.add_column(Text(columns[name]), justify="right" if numeric else "left", overflow="fold")
        for row in frame[names].itertuples(index=False):
            table.add_row(*(Text(number(v)) for v in row))
        screen = RichConsole(file=self.stdout, highlight=False)
        if not screen.is_terminal:
            screen.width = max(screen.width, _PIPED_WIDTH)
        screen.print(table)

    def finish(self, data: Mapping[str, Any]) -> None:
        """The JSON object, where it was asked for."""
        if self.json:
            from sae_bias.core.files import plain

            print(json_module.dumps(plain(dict(data)), allow_nan=False), file=self.stdout)


def number(value: Any) -> str:
    """A value as a table shows it."""
    from sae_bias.core import text

    if value is None or not (isinstance(value, str | bool) or hasattr(value, "__float__")):
        return UNDEFINED if value is None else str(value)
    return text.number(value, missing=UNDEFINED)


@contextlib.contextmanager
def _no_hub_bars() -> Any:
    """No download bars of the hub meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    yield
    if not before:
        enable_progress_bars()


@contextlib.contextmanager
def _threads_said(talks: bool) -> Any:
    """The number of threads follows the model's size meanwhile; it is said on standard error."""
    before = SAY_THREADS[0]
    SAY_THREADS[0] = (
        (lambda line: print(f"sae-bias: {line}", file=sys.stderr)) if talks else lambda line: None
    )
    try:
        yield
    finally:
        SAY_THREADS[0] = before
