"""Things that can be added from outside: a name, what it stands for, and the plugins that bring more.

A package keeps one `Registry` for each kind of thing it can be given (an SAE format, an edit, a measure). Its own entries register
where they are defined; another distribution names a module under the entry-point group `sae_bias.plugins`, and importing that module
registers its entries:

    [project.entry-points."sae_bias.plugins"]
    mine = "my_package.sae_bias_plugin"

Plugins are imported at the first look-up, never when `sae_bias` is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from sae_bias.core.errors import RequestError

PLUGINS = "sae_bias.plugins"
T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """Entries of one kind by name, in the order in which they were registered."""

    def __init__(self, kind: str, *, modules: tuple[str, ...] = ()) -> None:
        """`kind`: what one entry is called in errors. `modules`: where the built-in entries are, imported at the first look-up."""
        self.kind = kind
        self._modules = modules
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Decorator: `@EDITS.register("ablate")` above a class or a function."""

        def add(entry: E) -> E:
            old = self._entries.setdefault(name, entry)  # type: ignore[arg-type]
            if old is not entry:
                raise RequestError(
                    f"two {self.kind} entries are called {name!r}: {_where(old)} and {_where(entry)}."
                )
            return entry

        return add

    def names(self) -> tuple[str, ...]:
        """Every registered name, the built-in ones first."""
        self._load()
        return tuple(self._entries)

    def get(self, name: str) -> T:
        """The entry of this name; the error lists the names there are."""
        self._load()
        if name not in self._entries:
            close = get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RequestError(
                f"no {self.kind} {name!r}; there are: {', '.join(self._entries) or 'none'}.{hint}"
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter(tuple(self._entries.values()))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def _load(self) -> None:
        for module in self._modules:
            import_module(module)
        load_plugins()


@cache
def load_plugins() -> dict[str, str]:
    """Import every installed plugin once; its name and what went wrong ("" where nothing did)."""
    found: dict[str, str] = {}
    for point in sorted(entry_points(group=PLUGINS), key=lambda p: p.name):
        try:
            point.load()
            found[point.name] = ""
        except Exception as error:
            found[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the plugin {point.name} ({point.value}) could not be loaded: {found[point.name]}",
                stacklevel=2,
            )
    return found


def _where(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"
