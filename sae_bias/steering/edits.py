"""Interventions as values: what to change in the residual stream, without any tensor of the model's.

With x the residual at the site, a a feature's activation and δ = W_dec[f], every edit of features is

    x' = x + Σ (a' - a)·δ        (the SAE error is kept exactly)

| class       | rule                                                                       |
|-------------|----------------------------------------------------------------------------|
| Ablate      | a' = 0                                                                     |
| Scale       | a' = k·a                                                                   |
| Clamp       | a' = v, only where a > 0 (`when="active"`) or everywhere (`when="always"`) |
| Cap         | a' = min(a, v)                                                             |
| SetMean     | a' = v everywhere: v is the feature's mean on neutral prompts              |
| Resample    | a' = its value in the paired human prompt, over the words after the subject |
| Steer       | x' = x + α·δ, or x + α·‖x‖·δ̂ with `norm_relative=True`                     |
| ProjectOut  | x' = x - P x, or x - P (x - μ) where the direction has a mean              |
| Patch       | x' = another model's residual at this site on the same tokens              |
| Reconstruct | x' = decode(a): a labeled control, never a default                        |

"Clamp" means four different things in four public tools; `describe()` says which one this is, in every table.
Interventions compare equal when they do the same thing, and `to_dict` / `from_dict` keep them in files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.sae import Feature

POSITIONS = ("all", "last", "subject", "prompt", "generated")


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction, or an orthonormal basis of several, at a site of one model."""

    name: str
    """Where it comes from, such as "difference of means"."""
    site: Site
    basis: Float[Tensor, "k d_model"]
    """Rows: unit length for one direction, orthonormal for several. Float32."""
    mean: Float[Tensor, "d_model"] | None = None
    """μ of the affine projection, or None."""

    @property
    def digest(self) -> str:
        """Hash of the numbers, which with the site decides equality."""
        data = self.basis.numpy().tobytes() + (b"" if self.mean is None else self.mean.numpy().tobytes())
        return hashlib.sha256(data).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and (self.site, self.digest) == (other.site, other.digest)

    def __hash__(self) -> int:
        return hash((self.site, self.digest))

    def __str__(self) -> str:
        return f"{self.name} @ {self.site}"


FeatureLike = Feature | FeatureRef | str


def feature_ref(feature: FeatureLike) -> FeatureRef:
    """The reference of a feature given as a string, a reference or a loaded feature."""
    if isinstance(feature, Feature):
        return feature.ref
    if isinstance(feature, FeatureRef):
        return feature
    if isinstance(feature, str):
        return FeatureRef.parse(feature)
    raise RequestError(
        f"a feature must be '<release>/<sae_id>#<index>', a FeatureRef or a Feature, not {type(feature).__name__}."
    )


@dataclass(frozen=True)
class Intervention:
    """Base of all interventions; `positions` says where it acts (special tokens are left alone by default)."""

    positions: str = field(default="all", kw_only=True)
    """all | last (of the prompt) | subject (from the subject on) | prompt | generated"""
    include_special: bool = field(default=False, kw_only=True)
    """Edit BOS, EOS and PAD too, on which no SAE was trained: a labeled switch of `as_published`, never a default."""

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise RequestError(f"positions={self.positions!r}; expected one of {', '.join(POSITIONS)}.")

    @property
    def strength(self) -> float:
        """The number a sweep varies; NaN where the rule has none."""
        return math.nan

    @property
    def needs_pairs(self) -> bool:
        """Whether the rule reads the paired prompt, which only a probe on pairs has."""
        return False

    @property
    def target(self) -> str:
        """What is edited, as text: a feature, a direction or an SAE."""
        raise NotImplementedError

    def describe(self) -> str:
        """The rule in words, unambiguous in a table."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads; directions are stored by name and digest only."""
        out: dict[str, Any] = {"kind": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Direction):
                value = {"direction": value.name, "site": str(value.site), "digest": value.digest}
            elif isinstance(value, (Feature, FeatureRef, SaeId)):
                value = str(value.ref if isinstance(value, Feature) else value)
            elif isinstance(value, Site) or hasattr(value, "hf"):
                value = str(value) if isinstance(value, Site) else value.name
            out[f.name] = value
        return out


@dataclass(frozen=True)
class FeatureEdit(Intervention):
    """An edit of one SAE feature's activation."""

    feature: FeatureLike

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.feature, Feature):
            object.__setattr__(self, "feature", feature_ref(self.feature))

    @property
    def ref(self) -> FeatureRef:
        return feature_ref(self.feature)

    @property
    def target(self) -> str:
        return str(self.ref)

    def new_acts(self, acts: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """a' from a."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ablate(FeatureEdit):
    """a' = 0."""

    kind: ClassVar[str] = "ablate"

    def new_acts(self, acts: Tensor) -> Tensor:
        return torch.zeros_like(acts)

    def describe(self) -> str:
        return "ablate (a' = 0)"


@dataclass(frozen=True)
class Scale(FeatureEdit):
    """a' = k·a."""

    factor: float
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("Scale", self.factor)

    @property
    def strength(self) -> float:
        return self.factor

    def new_acts(self, acts: Tensor) -> Tensor:
        return acts * self.factor

    def describe(self) -> str:
        return f"scale (a' = {self.factor:g}·a)"


@dataclass(frozen=True)
class Clamp(FeatureEdit):
    """a' = v where the feature is active (the default), or everywhere with `when="always"`."""

    value: float
    when: str = field(default="active", kw_only=True)
    """"active" writes only where a > 0; "always" writes where nothing fired too."""
    kind: ClassVar[str] = "clamp"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("Clamp", self.value)
        if self.when not in ("active", "always"):
            raise RequestError(f"when={self.when!r}; expected 'active' or 'always'.")

    @property
    def strength(self) -> float:
        return self.value

    def new_acts(self, acts: Tensor) -> Tensor:
        value = torch.full_like(acts, self.value)
        return value if self.when == "always" else torch.where(acts > 0, value, acts)

    @classmethod
    def relative(cls, feature: FeatureLike, share: float, observed_max: float, **options: Any) -> Clamp:
        """Clamp to `share` of the feature's largest observed activation (`sae_bias.steering.controls.observed_max`)."""
        return cls(feature, share * _a_maximum(observed_max), **options)

    def describe(self) -> str:
        where = "where a > 0" if self.when == "active" else "at every position"
        return f"clamp (a' = {self.value:g} {where})"


@dataclass(frozen=True)
class Cap(FeatureEdit):
    """a' = min(a, v)."""

    value: float
    kind: ClassVar[str] = "cap"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("Cap", self.value)

    @property
    def strength(self) -> float:
        return self.value

    def new_acts(self, acts: Tensor) -> Tensor:
        return acts.clamp(max=self.value)

    def describe(self) -> str:
        return f"cap (a' = min(a, {self.value:g}))"


@dataclass(frozen=True)
class SetMean(FeatureEdit):
    """a' = the feature's mean on neutral prompts, at every position."""

    value: float
    """That mean, measured in advance (`sae_bias.discovery.tables.mean_activation`)."""
    kind: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("SetMean", self.value)

    @property
    def strength(self) -> float:
        return self.value

    def new_acts(self, acts: Tensor) -> Tensor:
        return torch.full_like(acts, self.value)

    def describe(self) -> str:
        return f"mean (a' = {self.value:g}, its neutral mean, at every position)"


@dataclass(frozen=True)
class Resample(FeatureEdit):
    """a' = the feature's value in the paired human prompt, matched from the right over the identical words.

    The subject is left alone, and so are human prompts. Only a probe on pairs knows which prompt is paired with which:
    anywhere else (costs, generation) it is an error.
    """

    kind: ClassVar[str] = "resample"

    @property
    def needs_pairs(self) -> bool:
        return True

    def describe(self) -> str:
        return "resample (a' = its value in the paired human prompt, after the subject)"


@dataclass(frozen=True)
class Steer(Intervention):
    """x' = x + α·δ along a feature's decoder row or a direction; `norm_relative` adds α·‖x‖·δ̂ instead."""

    along: FeatureLike | Direction
    alpha: float
    norm_relative: bool = field(default=False, kw_only=True)
    """Whether α is a share of the residual's own norm (0.1 is usable, 0.5 and more breaks text)."""
    kind: ClassVar[str] = "steer"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("Steer", self.alpha)
        _settle(self, "along")

    @property
    def strength(self) -> float:
        return self.alpha

    @property
    def target(self) -> str:
        return _target(self.along)

    def describe(self) -> str:
        return f"steer (x' = x + {self.alpha:g}·{'‖x‖·δ̂' if self.norm_relative else 'δ'})"


@dataclass(frozen=True)
class ProjectOut(Intervention):
    """x' = x - P x (affine: x - P (x - μ) where the direction carries a mean)."""

    along: FeatureLike | Direction
    share: float = field(default=1.0, kw_only=True)
    """How much of the projection is taken out: 1 all of it, 0.5 half, 2 mirrors it."""
    kind: ClassVar[str] = "project_out"

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite("ProjectOut", self.share)
        _settle(self, "along")

    @property
    def strength(self) -> float:
        """The share, where it is not the whole."""
        return math.nan if self.share == 1 else self.share

    @property
    def target(self) -> str:
        return _target(self.along)

    def describe(self) -> str:
        affine = isinstance(self.along, Direction) and self.along.mean is not None
        part = "" if self.share == 1 else f"{self.share:g}·"
        return f"project out (x' = x - {part}P{'(x - μ)' if affine else 'x'})"


@dataclass(frozen=True)
class Patch(Intervention):
    """x' = the residual of another model of the same architecture, at the same site and on the same tokens."""

    site: Site | str | int
    source: Any
    """The other `Model` (load_model(...)): base ← IT, or IT ← base."""
    kind: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "site", Site.parse(self.site))
        if not hasattr(self.source, "hf"):
            raise RequestError(
                f"Patch needs a Model to take residuals from, not {type(self.source).__name__}; use load_model."
            )

    @property
    def target(self) -> str:
        return f"{self.source.name} @ {self.site}"

    def describe(self) -> str:
        return f"patch (x' = the residual of {self.source.name} on the same tokens)"


@dataclass(frozen=True)
class Reconstruct(Intervention):
    """x' = decode(encode(x)): throws the SAE error away. A control that shows what that costs, never a default."""

    sae: SaeId | str
    kind: ClassVar[str] = "reconstruct"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sae, str):
            object.__setattr__(self, "sae", SaeId.parse(self.sae))

    @property
    def target(self) -> str:
        return str(self.sae)

    def describe(self) -> str:
        return "reconstruct (x' = decode(encode(x)), error thrown away: a control)"


KINDS: dict[str, type[Intervention]] = {
    c.kind: c for c in (Ablate, Scale, Clamp, Cap, SetMean, Resample, Steer, ProjectOut, Patch, Reconstruct)
}


def from_dict(data: dict[str, Any]) -> Intervention:
    """The intervention that `to_dict` described; one along a direction needs the direction itself and is refused."""
    data = dict(data)
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise RequestError(
            f"intervention kind {str(kind)[:80]!r} is not known; expected one of {', '.join(KINDS)}."
        )
    if kind == "patch":
        raise RequestError(
            f"patch from {data.get('source')!r} is stored by name only; load that model and pass it."
        )
    if isinstance(data.get("along"), dict):
        raise RequestError(
            f"{kind} along {data['along'].get('direction')!r} is stored by digest only; rebuild the direction and pass it."
        )
    try:
        return KINDS[kind](**data)
    except TypeError as error:
        raise RequestError(f"intervention {kind!r}: {error}.") from error


def strength_grid(
    kind: str, feature: FeatureLike, strengths: Sequence[float], *, unit: float | None = None, **options: Any
) -> list[Intervention]:
    """One intervention a strength: `kind` is clamp, scale, cap or steer.

    unit: what one unit of strength is, such as the feature's largest observed activation
        (`sae_bias.steering.controls.observed_max`); scale has no unit.
    """
    if kind not in ("clamp", "scale", "cap", "steer"):
        raise RequestError(f"a grid of strengths needs clamp, scale, cap or steer, not {kind!r}.")
    if unit is not None and kind == "scale":
        raise RequestError("scale is a factor already and has no unit; leave unit out, or use clamp.")
    size = 1.0 if unit is None else _a_maximum(unit)
    return [KINDS[kind](feature, float(s) * size, **options) for s in strengths]  # type: ignore[call-arg]


def _a_maximum(value: float) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RequestError(
            f"an observed maximum of {value!r} is not a unit: the feature never fired there; give other prompts."
        )
    return float(value)


def _finite(rule: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{rule} needs a finite number, not {value!r}.")


def _settle(intervention: Intervention, name: str) -> None:
    value = getattr(intervention, name)
    if not isinstance(value, (Feature, Direction)):
        object.__setattr__(intervention, name, feature_ref(value))


def _target(along: FeatureLike | Direction) -> str:
    return str(along) if isinstance(along, Direction) else str(feature_ref(along))
