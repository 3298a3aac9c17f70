"""Edits whose numbers are fitted, frozen values like every other edit (docs/method.md#learned-edits).

    FeatureSet           a'_f = k_f · a_f over several features of one site, k fitted
    GatedCounterfactual  only where a logistic gate on the features' activations is on: a' = max(0, W a + c), what their activations
                         would be in the human twin
    a share s of either  a + s · (a' - a): taken after a' is rectified, because half of the way to max(0, p) is not max(0, half of the way to p)
    RectifiedProjectOut  x' = x - s·ReLU((x - μ)·r) r: one vector detects and writes, the latent of ReFT-r1 (arXiv:2501.17148)

`fit_feature_set` fits the first two, `fit_direction` the third; they can also be written down by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.types import Resid
from sae_bias.models.model import Model
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature
from sae_bias.steering.context import Change, EditContext
from sae_bias.steering.edits import ProjectOut
from sae_bias.steering.intervention import (
    FeatureLike,
    Intervention,
    bound,
    feature_ref,
    register_edit,
)


@dataclass(frozen=True)
class _ManyFeatures(Intervention):
    """Several features of one site, changed together from one encoding."""

    name: str
    features: tuple[FeatureLike, ...]
    share: float = field(default=1.0, kw_only=True)
    """How far of the way from the activations to a': 0 changes nothing, 1 writes a'."""
    by_position: ClassVar[bool] = True
    strength_field: ClassVar[str | None] = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = tuple(f if isinstance(f, Feature) else feature_ref(f) for f in self.features)
        object.__setattr__(self, "features", found)
        names = self.names
        if not names or len(set(names)) != len(names):
            raise RequestError(
                f"{self.name!r} needs features, each once; it has {len(names)}, {len(set(names))} of them different."
            )

    @property
    def strength(self) -> float:
        """The share, where it is not the whole."""
        return math.nan if self.share == 1 else self.share

    @property
    def target(self) -> str:
        return f"{self.name} ({len(self.features)} features)"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(feature_ref(f)) for f in self.features)

    @property
    def edited(self) -> tuple[str, ...]:
        return self.names

    @property
    def site(self) -> Site:
        sites = {as_feature(f).site for f in self.features}
        if len(sites) > 1:
            raise RequestError(
                f"the features of {self.name!r} are at {len(sites)} sites; make one edit a site, and an EditSet of them."
            )
        return sites.pop()

    def loaded(self) -> Self:
        return replace(self, features=tuple(as_feature(f) for f in self.features))

    def bind(self, model: Model) -> Self:
        _ = self.site
        return replace(self, features=tuple(bound(model, as_feature(f)) for f in self.features))

    @classmethod
    def of_dict(cls, data: dict[str, object]) -> Intervention:
        return super().of_dict({k: _tuples(v) for k, v in data.items()})

    def to_dict(self) -> dict[str, object]:
        """A whole edit has no share in files: its cells keep the names that they had before there were shares."""
        return {k: v for k, v in super().to_dict().items() if k != "share" or v != 1}

    def key(self) -> dict[str, object]:
        return self.to_dict() | {"weights": [as_feature(f).digest for f in self.features]}

    def delta(self, x: Resid, context: EditContext) -> Change:
        features = [as_feature(f) for f in self.features]
        acts = torch.stack([context.acts(f, x) for f in features], dim=-1)
        change = self.share * (self.new_acts(acts) - acts)
        change = torch.where(context.mask[..., None], change, torch.zeros_like(acts))
        delta = torch.zeros_like(x, dtype=torch.float32)
        for f, step in zip(features, change.unbind(-1)):
            delta = delta + f.write(x, step)
        return Change(delta, (change != 0).any(-1), acts.sum(-1), (acts + change).sum(-1))

    def new_acts(self, acts: Tensor) -> Tensor:
        """a' [batch, pos, features] from a, all of the way."""
        raise NotImplementedError

    def rule(self) -> str:
        """The whole edit in words."""
        raise NotImplementedError

    def describe(self) -> str:
        return self.rule() if self.share == 1 else f"{self.share:g} of the way to {self.rule()}"


@register_edit("feature_set")
@dataclass(frozen=True)
class FeatureSet(_ManyFeatures):
    """a'_f = k_f · a_f: learned scales; 1 leaves a feature alone, 0 ablates it."""

    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(float(k) for k in self.scales))
        if len(self.scales) != len(self.features):
            raise RequestError(
                f"{len(self.scales)} scales for {len(self.features)} features of {self.name!r}."
            )

    def new_acts(self, acts: Tensor) -> Tensor:
        return acts * torch.tensor(self.scales, dtype=acts.dtype, device=acts.device)

    def rule(self) -> str:
        return f"learned scales (a' = k·a over {len(self.features)} features)"


@register_edit("gated_counterfactual")
@dataclass(frozen=True)
class GatedCounterfactual(_ManyFeatures):
    """Where gate · a + bias > 0: a' = max(0, W a + c), the activations predicted for the human twin; elsewhere nothing."""

    gate: tuple[float, ...]
    bias: float
    weights: tuple[tuple[float, ...], ...]
    """W, a row a feature."""
    intercepts: tuple[float, ...]
    """c."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.features)
        for name in ("gate", "intercepts"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        object.__setattr__(self, "weights", tuple(tuple(float(v) for v in row) for row in self.weights))
        if not len(self.gate) == len(self.intercepts) == len(self.weights) == n or any(
            len(row) != n for row in self.weights
        ):
            raise RequestError(
                f"{self.name!r} has {n} features and needs {n} gate weights, {n} intercepts and {n} × {n} weights."
            )

    def new_acts(self, acts: Tensor) -> Tensor:
        gate, weights, c = (
            torch.tensor(v, dtype=acts.dtype, device=acts.device)
            for v in (self.gate, self.weights, self.intercepts)
        )
        on = (acts @ gate + self.bias) > 0
        return torch.where(on[..., None], (acts @ weights.T + c).clamp(min=0), acts)

    def rule(self) -> str:
        return f"gated counterfactual (where the gate is on, the human twin's activations of {len(self.features)} features)"


@register_edit("rectified_project_out")
@dataclass(frozen=True)
class RectifiedProjectOut(ProjectOut):
    """x' = x - s·ReLU((x - μ)·r) r: acts only where the residual lies on the direction's own side of its mean."""

    of_feature: ClassVar[bool] = False

    def taken(self, projected: Tensor) -> Tensor:
        return projected.clamp(min=0)

    def describe(self) -> str:
        return super().describe().replace("project out", "project out where positive", 1)


def _tuples(value: Any) -> Any:
    """Lists of a file as the tuples of a frozen value."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
