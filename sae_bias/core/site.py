"""Where activations are read or edited: one hook point, written the way TransformerLens and SAELens write it.

| kind | tensor |
|---|---|
| `z` | `blocks.L.attn.hook_z`: what the attention's output projection reads, heads concatenated [n_heads · d_head] |
| `attn_out`, `mlp_out` | `blocks.L.hook_attn_out`, `hook_mlp_out`: what attention and MLP add to the residual, after the norm that follows them in Gemma and OLMo |
| `resid_post` | `blocks.L.hook_resid_post`: the residual after decoder layer L, the layer's output in Hugging Face's words |

The residual *before* layer 32 is the residual after layer 31, so SAEs trained on `blocks.32.hook_resid_pre` have that site.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from sae_bias.core.errors import RequestError

_POST = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")
_PRE = re.compile(r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)")
_INSIDE = re.compile(r"blocks\.(\d+)\.(?:hook_(attn_out|mlp_out)|attn\.hook_(z))")
_HUGGING_FACE_Z = re.compile(r"(?:[a-z_]+\.)*layers\.(\d+)\.self_attn\.o_proj\.input")
_HUGGING_FACE_MLP = re.compile(r"(?:[a-z_]+\.)*layers\.(\d+)\.post_feedforward_layernorm\.output")
_HUGGING_FACE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d+)(?:\.output)?")
_MAX_LAYER = 10_000
KINDS = ("z", "attn_out", "mlp_out", "resid_post")
"""In the order in which a layer computes them."""


def whole_number(value: object) -> int | None:
    """`value` as an int, numpy's and torch's integers too; None where it is not a whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


@dataclass(frozen=True)
class Site:
    """A hook point; `str(Site(31))` is `"blocks.31.hook_resid_post"`. Sites sort in the order of the forward pass."""

    layer: int
    """Index of the decoder layer, from 0."""
    kind: str = "resid_post"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"site kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        layer = whole_number(self.layer)
        if layer is None or not 0 <= layer < _MAX_LAYER:
            raise RequestError(f"layer {self.layer!r}: expected a whole number from 0, e.g. Site(31)")
        object.__setattr__(self, "layer", layer)

    @property
    def is_resid_post(self) -> bool:
        """Whether it is the residual after a layer, from which a forward pass can be resumed."""
        return self.kind == "resid_post"

    @property
    def resid_layer(self) -> int:
        """The layer, for what is defined on the residual stream alone.

        Raises:
            RequestError: a site inside a layer.
        """
        if not self.is_resid_post:
            raise RequestError(
                f"{self}: this is defined for the residual after a layer (resid_post) only; features at other sites can be ranked, "
                "read, edited and swept."
            )
        return self.layer

    def __lt__(self, other: Site) -> bool:
        return (self.layer, KINDS.index(self.kind)) < (other.layer, KINDS.index(other.kind))

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{'attn.' if self.kind == 'z' else ''}hook_{self.kind}"

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
            if match := _INSIDE.fullmatch(name):
                return cls(int(match[1]), match[2] or match[3])
            if match := _HUGGING_FACE_Z.fullmatch(name):
                return cls(int(match[1]), "z")
            if match := _HUGGING_FACE_MLP.fullmatch(name):
                return cls(int(match[1]), "mlp_out")
        raise RequestError(
            f"hook point {name[:80]!r} cannot be read here; expected e.g. "
            '"blocks.31.hook_resid_post" ("model.layers.31.output"), or attn_out, mlp_out or attn.hook_z of a layer'
        )
