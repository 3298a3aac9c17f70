"""The layouts in which SAEs are published, one module each.

A format is a class that says which folders are its own and opens them. Another package adds one by registering it from a module named
under the entry-point group `sae_bias.plugins`:

    @register_format("mine")
    class Mine:
        weights = ("mine.safetensors",)

        @staticmethod
        def matches(folder):
            return (folder / "mine.safetensors").is_file()

        @staticmethod
        def open(folder, sae_id):
            return Sae(sae_id, encoder, SaeInfo(Site(12)), folder / "mine.safetensors")

`encoder` gives its numbers in slices (`saes.sae.Encoder`). An SAE whose activation needs all features at once is built as a SAELens
object and opened with `saelens.lens_sae`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from sae_bias.core.registry import Registry

if TYPE_CHECKING:
    from sae_bias.saes.ids import SaeId
    from sae_bias.saes.sae import Sae


class SaeFormat(Protocol):
    """A layout of SAE files."""

    weights: ClassVar[tuple[str, ...]]
    """Names of its weights files, * for any letters: a folder below a given one that holds such a file is looked at."""

    @staticmethod
    def matches(folder: Path) -> bool:
        """Whether the folder holds an SAE in this layout."""
        ...

    @staticmethod
    def open(folder: Path, sae_id: SaeId) -> Sae:
        """The SAE; its weights may stay on disk until a slice is asked for."""
        ...


FORMATS: Registry[type[SaeFormat]] = Registry(
    "SAE format",
    modules=tuple(
        f"sae_bias.saes.formats.{name}"
        for name in ("gemma_scope", "saelens", "dictionary_learning", "sparsify", "llama_scope", "qwen_scope")
    ),
)


F = TypeVar("F", bound=type)


def register_format(name: str) -> Callable[[F], F]:
    """Decorator above a format's class."""
    return FORMATS.register(name)


def format_of(folder: Path) -> type[SaeFormat] | None:
    """The format whose files a folder holds."""
    return next((found for found in FORMATS if found.matches(folder)), None)


def weights_files() -> tuple[str, ...]:
    """Names of the weights files of every format."""
    return tuple(name for found in FORMATS for name in found.weights)
