"""Where a residual stream is read or edited: one hook point, written the way TransformerLens writes it.

`blocks.31.hook_resid_post` is the residual after decoder layer 31: the layer's output in Hugging Face's
words. The residual *before* layer 32 is the same tensor, so SAEs trained on `blocks.32.hook_resid_pre` have
the same site.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from sae_bias.core.errors import RequestError

_POST = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")
_PRE = re.compile(r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)")
_HUGGING_FACE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.output)?")
_MAX_LAYER = 10_000


def whole_number(value: object) -> int | None:
    """`value` as an int, numpy's and torch's integers too; None where it is not a whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass(frozen=True, order=True)
class Site:
    """A residual hook point; `str(Site(31))` is `"blocks.31.hook_resid_post"`."""

    layer: int
    """Index of the decoder layer whose output this is, from 0."""
    kind: str = "resid_post"

    def __post_init__(self) -> None:
        if self.kind != "resid_post":
            raise RequestError(f'site kind {self.kind!r}: only "resid_post" can be edited here')
        layer = whole_number(self.layer)
        if layer is None or not 0 <= layer < _MAX_LAYER:
            raise RequestError(f"layer {self.layer!r}: expected a whole number from 0, e.g. Site(31)")
        object.__setattr__(self, "layer", layer)

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.kind}"

    @classmethod
    def parse(cls, text: str | int | Site) -> Site:
        """The site that a hook name, a Hugging Face module path or a layer number means."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            return cls(text)
        name = text.strip()
        if len(name) < 200:
            if (
                match := _POST.fullmatch(name)
                or _HUGGING_FACE.fullmatch(name)
                or re.fullmatch(r"(\d+)", name)
            ):
                return cls(int(match[1]))
            if (match := _PRE.fullmatch(name)) and int(match[1]) > 0:
                return cls(int(match[1]) - 1)
        raise RequestError(
            f"hook point {name[:80]!r} is not a residual stream after a layer; "
            'expected e.g. "blocks.31.hook_resid_post" or "model.layers.31.output"'
        )
