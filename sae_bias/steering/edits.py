"""Interventions as values: what to change in the residual stream, without any tensor of the model's.

With x the residual at the site, a the feature's activation and δ = W_dec[f], every edit of features is

    x' = x + Σ (a' - a)·δ        (the SAE error is kept exactly)

(an SAE that normalizes its input multiplies δ by the size it divided x by: `Sae.decoder_scale`).

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
| Reconstruct | x' = decode(a): a labeled control, never a default                         |
| EditSet     | several edits, at one site or at many, under one name                      |

"Clamp" means four different things in four public tools; `describe()` says which one this is, in every table.
Interventions compare equal when they do the same thing, and `to_dict` / `from_dict` keep them in files.

A new intervention is one class: everything the package needs to know stands in it, and `@register_edit` makes it known to `from_dict`,
sweeps, run folders, Inspect and the command line. A rule for one feature's activation is the shortest:

    @register_edit("halve")
    @dataclass(frozen=True)
    class Halve(FeatureEdit):
        def new_acts(self, acts, context):
            return acts / 2

        def describe(self):
            return "halve (a' = a / 2)"

Any other rule derives from `Intervention`: `site`, `loaded()` (weights read), `bind(model)` (checked against the model, on the site's device)
and `delta(x, context)`, which gives back a `Change`. An edit of many features at one site (learned scales, a gated counterfactual)
holds them in one field, reads each with `context.acts(feature, x)`, and adds up `feature.write(x, change)`; its fitted numbers are
fields too, so that `to_dict` keeps them. An edit at several sites is an `EditSet` of one edit a site.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry
from sae_bias.core.site import Site
from sae_bias.core.types import Resid
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.forward import check_fits
from sae_bias.models.model import Model
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.sae import Feature, Sae, sae_facts
from sae_bias.steering.context import Change, EditContext

if TYPE_CHECKING:
    from sae_bias.steering.donors import Sources

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
        parts = [self.basis] if self.mean is None else [self.basis, self.mean]
        data = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return hashlib.sha256(data).hexdigest()[:16]

    def to(self, device: torch.device) -> Direction:
        """The same direction on a device."""
        mean = None if self.mean is None else self.mean.to(device)
        return replace(self, basis=self.basis.to(device), mean=mean)

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
    """Its name in files, tables and on the command line; `register_edit` sets it."""
    of_feature: ClassVar[bool] = False
    """Whether its first field is a feature: then a sweep and the command line can make it."""
    strength_field: ClassVar[str | None] = None
    """The field that a sweep varies."""
    in_activation: ClassVar[bool] = False
    """Whether that strength is in units of the feature's activation."""
    sets_activation: ClassVar[bool] = False
    """Whether that strength is a value the activation takes."""
    usual_strengths: ClassVar[tuple[float, ...]] = ()
    """What a sweep tries where no strengths are given."""
    usual_shares: ClassVar[tuple[float, ...]] = ()
    """Likewise in units of the feature's largest observed activation."""

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise RequestError(f"positions={self.positions!r}; expected one of {', '.join(POSITIONS)}.")
        if self.strength_field is not None:
            value = _finite(type(self).__name__, getattr(self, self.strength_field))
            object.__setattr__(self, self.strength_field, value)

    # --- what it is ---
    @property
    def strength(self) -> float:
        """The number a sweep varies; NaN where the rule has none."""
        return math.nan if self.strength_field is None else getattr(self, self.strength_field)

    @property
    def short_name(self) -> str:
        """Name of the rule in tables: its kind, and a switch that makes it another rule."""
        return self.kind

    @property
    def target(self) -> str:
        """What is edited, as text: a feature, a direction or an SAE."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features and SAEs it reads, as `load_feature` and `load_sae` take them."""
        return ()

    @property
    def edited(self) -> tuple[str, ...]:
        """Features whose activation it changes: in one block each takes one edit."""
        return ()

    @property
    def parts(self) -> tuple[Intervention, ...]:
        """The edits that are applied: itself, or those of a set."""
        return (self,)

    def describe(self) -> str:
        """The rule in words, unambiguous in a table."""
        raise NotImplementedError

    # --- where and how it acts ---
    if TYPE_CHECKING:  # a subclass may have it as a field

        @property
        def site(self) -> Site:
            """Where it acts."""
            ...

    def loaded(self) -> Self:
        """Itself with its weights read, so that they are not read again."""
        return self

    def bind(self, model: Model) -> Self:
        """Itself with its weights on the device of its site in `model`.

        Raises:
            RequestError: it does not fit the model.
        """
        raise NotImplementedError

    def delta(self, x: Resid, context: EditContext) -> Change:
        """What the bound edit adds to the unedited residual x, float32 [batch, pos, d_model]; 0 where `context.mask` is false."""
        raise NotImplementedError

    # --- what it reads beside its own residual ---
    @property
    def needs_pairs(self) -> bool:
        """Whether the rule reads the paired prompt, which only a probe on pairs has."""
        return False

    @property
    def looks_elsewhere(self) -> bool:
        """Whether it reads another residual than its own: of the paired prompt, of another model."""
        return self.needs_pairs

    def prepare(self, sources: Sources) -> None:
        """Compute that residual before the edited pass."""

    # --- in files ---
    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads; directions are stored by name and digest only."""
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> Intervention:
        """The edit whose fields `to_dict` wrote down (without its kind)."""
        try:
            return cls(**data)
        except TypeError as error:
            raise RequestError(f"intervention {cls.kind!r}: {error}.") from error

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Everything that decides its numbers, the weights it reads included; `digest_of` may keep the digest of a feature."""
        return self.to_dict()


EDITS: Registry[type[Intervention]] = Registry("edit")
E = TypeVar("E", bound=type[Intervention])


def register_edit(kind: str) -> Callable[[E], E]:
    """Decorator above an intervention's class: the name it has in files, tables and on the command line."""

    def add(edit: E) -> E:
        edit.kind = kind
        return EDITS.register(kind)(edit)

    return add


@dataclass(frozen=True)
class FeatureEdit(Intervention):
    """An edit of one SAE feature's activation."""

    feature: FeatureLike
    of_feature: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle(self, "feature")

    @property
    def ref(self) -> FeatureRef:
        return feature_ref(self.feature)

    @property
    def target(self) -> str:
        return str(self.ref)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def edited(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def site(self) -> Site:
        return as_feature(self.feature).site

    def loaded(self) -> Self:
        return replace(self, feature=as_feature(self.feature))

    def bind(self, model: Model) -> Self:
        return replace(self, feature=_bound(model, self.feature))

    def delta(self, x: Resid, context: EditContext) -> Change:
        feature = as_feature(self.feature)
        acts = context.acts(feature, x)
        return context.write(feature, x, acts, self.new_acts(acts, context))

    def new_acts(self, acts: Float[Tensor, "batch pos"], context: EditContext) -> Float[Tensor, "batch pos"]:
        """a' from a."""
        raise NotImplementedError

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        feature = as_feature(self.feature)
        return self.to_dict() | {"weights": (digest_of or feature_digest)(feature)}


@register_edit("ablate")
@dataclass(frozen=True)
class Ablate(FeatureEdit):
    """a' = 0."""

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        return torch.zeros_like(acts)

    def describe(self) -> str:
        return "ablate (a' = 0)"


@register_edit("scale")
@dataclass(frozen=True)
class Scale(FeatureEdit):
    """a' = k·a."""

    factor: float
    strength_field: ClassVar[str | None] = "factor"
    usual_strengths: ClassVar[tuple[float, ...]] = (0, 0.25, 0.5, 0.75)

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        return acts * self.factor

    def describe(self) -> str:
        return f"scale (a' = {self.factor:g}·a)"


@register_edit("clamp")
@dataclass(frozen=True)
class Clamp(FeatureEdit):
    """a' = v where the feature is active (the default), or everywhere with `when="always"`."""

    value: float
    when: str = field(default="active", kw_only=True)
    """"active" writes only where a > 0; "always" writes where nothing fired too."""
    strength_field: ClassVar[str | None] = "value"
    in_activation: ClassVar[bool] = True
    sets_activation: ClassVar[bool] = True
    usual_strengths: ClassVar[tuple[float, ...]] = (0, -5, -10, -20, -40)
    usual_shares: ClassVar[tuple[float, ...]] = (0, -0.5, -1, -2, -4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when not in ("active", "always"):
            raise RequestError(f"when={self.when!r}; expected 'active' or 'always'.")

    @property
    def short_name(self) -> str:
        return "clamp_always" if self.when == "always" else "clamp"

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        value = torch.full_like(acts, self.value)
        return value if self.when == "always" else torch.where(acts > 0, value, acts)

    @classmethod
    def relative(cls, feature: FeatureLike, share: float, observed_max: float, **options: Any) -> Clamp:
        """Clamp to `share` of the feature's largest observed activation (`sae_bias.steering.controls.observed_max`)."""
        return cls(feature, share * _a_maximum(observed_max), **options)

    def describe(self) -> str:
        where = "where a > 0" if self.when == "active" else "at every position"
        return f"clamp (a' = {self.value:g} {where})"


@register_edit("cap")
@dataclass(frozen=True)
class Cap(FeatureEdit):
    """a' = min(a, v)."""

    value: float
    strength_field: ClassVar[str | None] = "value"
    in_activation: ClassVar[bool] = True
    sets_activation: ClassVar[bool] = True
    usual_strengths: ClassVar[tuple[float, ...]] = (0, 1, 2, 4)
    usual_shares: ClassVar[tuple[float, ...]] = (0, 0.25, 0.5, 0.75)

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        return acts.clamp(max=self.value)

    def describe(self) -> str:
        return f"cap (a' = min(a, {self.value:g}))"


@register_edit("mean")
@dataclass(frozen=True)
class SetMean(FeatureEdit):
    """a' = the feature's mean on neutral prompts, at every position."""

    value: float
    """That mean, measured beforehand (`sae_bias.discovery.tables.mean_activation`)."""
    strength_field: ClassVar[str | None] = "value"
    in_activation: ClassVar[bool] = True
    sets_activation: ClassVar[bool] = True

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        return torch.full_like(acts, self.value)

    def describe(self) -> str:
        return f"mean (a' = {self.value:g}, its neutral mean, at every position)"


@register_edit("resample")
@dataclass(frozen=True)
class Resample(FeatureEdit):
    """a' = the feature's value in the paired human prompt, matched from the right over the identical words.

    The subject is left alone, and so are human prompts. Only a probe on pairs knows which prompt is paired with which:
    anywhere else (costs, generation) it is an error.
    """

    @property
    def needs_pairs(self) -> bool:
        return True

    def prepare(self, sources: Sources) -> None:
        sources.paired(self.site.layer)

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        paired, matched = context.sources.paired(context.site.layer)
        theirs = as_feature(self.feature).activation(paired.to(acts.device).float())
        return torch.where(matched.to(acts.device), theirs, acts)

    def describe(self) -> str:
        return "resample (a' = its value in the paired human prompt, after the subject)"


@dataclass(frozen=True)
class _AlongEdit(Intervention):
    """An edit along a feature's decoder row or a direction."""

    along: FeatureLike | Direction
    of_feature: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle(self, "along")

    @property
    def target(self) -> str:
        return str(self.along) if isinstance(self.along, Direction) else str(feature_ref(self.along))

    @property
    def names(self) -> tuple[str, ...]:
        return () if isinstance(self.along, Direction) else (self.target,)

    @property
    def site(self) -> Site:
        return self._along.site

    @property
    def _along(self) -> Feature | Direction:
        return self.along if isinstance(self.along, Direction) else as_feature(self.along)

    def loaded(self) -> Self:
        return replace(self, along=self._along)

    def bind(self, model: Model) -> Self:
        if not isinstance(self.along, Direction):
            return replace(self, along=_bound(model, self.along))
        check_fits(model, str(self.along), self.along.site, self.along.basis.shape[-1])
        return replace(self, along=self.along.to(model.layer_device(self.along.site.layer)))

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> Intervention:
        if isinstance(data.get("along"), dict):
            raise RequestError(
                f"{cls.kind} along {data['along'].get('direction')!r} is stored by digest only; rebuild the direction and pass it."
            )
        return super().of_dict(data)

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        along = self._along
        weights = along.digest if isinstance(along, Direction) else (digest_of or feature_digest)(along)
        return self.to_dict() | {"weights": weights}


@register_edit("steer")
@dataclass(frozen=True)
class Steer(_AlongEdit):
    """x' = x + α·δ along a feature's decoder row or a direction; `norm_relative` adds α·‖x‖·δ̂ instead."""

    alpha: float
    norm_relative: bool = field(default=False, kw_only=True)
    """Whether α is a share of the residual's own norm (0.1 is usable, 0.5 and more breaks text)."""
    strength_field: ClassVar[str | None] = "alpha"
    in_activation: ClassVar[bool] = True
    usual_strengths: ClassVar[tuple[float, ...]] = (-1, -2, -5, -10)
    usual_shares: ClassVar[tuple[float, ...]] = (-0.5, -1, -2, -4)

    @property
    def short_name(self) -> str:
        return "steer_relative" if self.norm_relative else "steer"

    def bind(self, model: Model) -> Self:
        if isinstance(self.along, Direction) and len(self.along.basis) != 1:
            raise RequestError(f"Steer needs one direction; {self.along} has {len(self.along.basis)}.")
        return super().bind(model)

    def delta(self, x: Resid, context: EditContext) -> Change:
        along = self._along
        row = along.basis[0] if isinstance(along, Direction) else along.w_dec
        if self.norm_relative:
            delta = self.alpha * x.norm(dim=-1, keepdim=True) * (row / row.norm())
        elif isinstance(along, Direction):
            delta = (self.alpha * row).expand_as(x)
        else:
            delta = along.write(x, x.new_full(x.shape[:-1], self.alpha))
        return context.only_here(delta)

    def describe(self) -> str:
        return f"steer (x' = x + {self.alpha:g}·{'‖x‖·δ̂' if self.norm_relative else 'δ'})"


@register_edit("project_out")
@dataclass(frozen=True)
class ProjectOut(_AlongEdit):
    """x' = x - P x (affine: x - P (x - μ) where the direction carries a mean)."""

    share: float = field(default=1.0, kw_only=True)
    """How much of the projection is taken out: 1 all of it, 0.5 half, 2 mirrors it."""
    strength_field: ClassVar[str | None] = "share"

    @property
    def strength(self) -> float:
        """The share, where it is not the whole."""
        return math.nan if self.share == 1 else self.share

    def delta(self, x: Resid, context: EditContext) -> Change:
        along = self._along
        if isinstance(along, Direction):
            basis, centered = along.basis, x if along.mean is None else x - along.mean
        else:
            basis, centered = (along.w_dec / along.w_dec.norm())[None], x
        return context.only_here(-self.share * (centered @ basis.T) @ basis)

    def describe(self) -> str:
        affine = isinstance(self.along, Direction) and self.along.mean is not None
        part = "" if self.share == 1 else f"{self.share:g}·"
        return f"project out (x' = x - {part}P{'(x - μ)' if affine else 'x'})"


@register_edit("patch")
@dataclass(frozen=True)
class Patch(Intervention):
    """x' = the residual of another model of the same architecture, at the same site and on the same tokens."""

    site: Site | str | int  # type: ignore[assignment]
    source: Any
    """The other `Model` (load_model(...)): base ← IT, or IT ← base."""

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

    @property
    def looks_elsewhere(self) -> bool:
        return True

    def bind(self, model: Model) -> Self:
        check_fits(model, self.target, self.site, self.source.d_model)
        return self

    def prepare(self, sources: Sources) -> None:
        sources.other(self.source, Site.parse(self.site).layer)

    def delta(self, x: Resid, context: EditContext) -> Change:
        theirs = context.sources.other(self.source, context.site.layer)
        return context.only_here(theirs[:, -x.shape[1] :].to(x) - x)

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> Intervention:
        if isinstance(data.get("source"), str):
            raise RequestError(
                f"patch from {data['source']!r} is stored by name only; load that model and pass it."
            )
        return super().of_dict(data)

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        return self.to_dict() | {"weights": model_digest(self.source)}

    def describe(self) -> str:
        return f"patch (x' = the residual of {self.source.name} on the same tokens)"


@register_edit("reconstruct")
@dataclass(frozen=True)
class Reconstruct(Intervention):
    """x' = decode(encode(x)): throws the SAE error away. A control that shows what that costs, never a default."""

    sae: SaeId | Sae | str

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sae, str):
            object.__setattr__(self, "sae", SaeId.parse(self.sae))

    @property
    def target(self) -> str:
        return str(self.sae)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.target,)

    @property
    def site(self) -> Site:
        return load_sae(self.sae).site

    def loaded(self) -> Self:
        return replace(self, sae=load_sae(self.sae))

    def bind(self, model: Model) -> Self:
        sae = load_sae(self.sae)
        check_fits(model, str(sae), sae.site, sae.d_in)
        return replace(self, sae=sae)

    def delta(self, x: Resid, context: EditContext) -> Change:
        sae = load_sae(self.sae)
        return context.only_here(sae.decode(sae.encode(x), x).to(x.device) - x)

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        return self.to_dict() | {"weights": sae_facts(load_sae(self.sae))["files"]}

    def describe(self) -> str:
        return "reconstruct (x' = decode(encode(x)), error thrown away: a control)"


@register_edit("set")
@dataclass(frozen=True)
class EditSet(Intervention):
    """Several edits under one name, applied together: of many features, at one site or at many."""

    name: str
    edits: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "edits", tuple(self.edits))
        if not self.edits or not all(isinstance(e, Intervention) for e in self.edits):
            raise RequestError(f"the set {self.name!r} needs edits such as sb.Ablate(feature).")
        if self.positions != "all" or self.include_special:
            raise RequestError("a set has no positions of its own; give them to each of its edits.")

    @property
    def strength(self) -> float:
        """The strength that all of its edits have, where they have one."""
        found = {e.strength for e in self.edits}
        return found.pop() if len(found) == 1 else math.nan

    @property
    def target(self) -> str:
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for e in self.edits for name in e.names))

    @property
    def parts(self) -> tuple[Intervention, ...]:
        return tuple(part for e in self.edits for part in e.parts)

    @property
    def needs_pairs(self) -> bool:
        return any(e.needs_pairs for e in self.edits)

    def loaded(self) -> Self:
        return replace(self, edits=tuple(e.loaded() for e in self.edits))

    def bind(self, model: Model) -> Self:
        return replace(self, edits=tuple(e.bind(model) for e in self.edits))

    @classmethod
    def of_dict(cls, data: dict[str, Any]) -> Intervention:
        edits = tuple(e if isinstance(e, Intervention) else from_dict(e) for e in data["edits"])
        return super().of_dict(data | {"edits": edits})

    def key(self, digest_of: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "edits": [e.key(digest_of) for e in self.edits]}

    def describe(self) -> str:
        return f"{self.name}: " + " + ".join(e.describe() for e in self.edits)


# --- making them from names ---
def from_dict(data: dict[str, Any]) -> Intervention:
    """The intervention that `to_dict` described; one along a direction needs the direction itself and is refused."""
    data = dict(data)
    return EDITS.get(str(data.pop("kind", None))[:80]).of_dict(data)


def edit_of(
    kind: str, feature: FeatureLike, strength: float | None = None, *, positions: str = "all", **options: Any
) -> Intervention:
    """The edit of one feature that a command line, a sweep or a model argument names.

    options: further fields of the edit; one that is None is left at its default.

    Raises:
        RequestError: no such kind, a strength missing or too much, an option it has not.
    """
    edit = edit_class_of(kind)
    field_of = {f.name: f for f in fields(edit)}
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if name not in field_of]:
        raise RequestError(
            f"{unknown[0]!r} is not an option of {kind}; only {_with_field(unknown[0])} has it."
        )
    name = edit.strength_field
    if strength is not None and name is None:
        raise RequestError(f"{kind} has no strength; leave it out, or use clamp.")
    if strength is not None:
        given[str(name)] = strength
    elif name is not None and field_of[name].default is MISSING:
        raise RequestError(f"{kind} needs a strength.")
    first = next(f.name for f in fields(edit) if not f.kw_only)
    return edit(**{first: feature}, positions=positions, **given)


def edit_class_of(kind: str) -> type[Intervention]:
    """The class of a kind that `edit_of` can make."""
    if kind not in feature_edits():
        raise RequestError(f"edit {kind!r}: expected one of {', '.join(feature_edits())}.")
    return EDITS.get(kind)


def feature_edits() -> tuple[str, ...]:
    """Kinds that `edit_of` can make."""
    return tuple(edit.kind for edit in EDITS if edit.of_feature)


def edit_class(short_name: str) -> type[Intervention] | None:
    """The class of an edit by the name it has in tables, such as `clamp_always`."""
    found = [e for e in EDITS if short_name == e.kind or short_name.startswith(e.kind + "_")]
    return max(found, key=lambda e: len(e.kind), default=None)


def _with_field(name: str) -> str:
    return ", ".join(e.kind for e in EDITS if name in {f.name for f in fields(e)}) or "no edit"


# --- small parts ---
def feature_digest(feature: Feature) -> str:
    """Hash of a feature's weights."""
    sha = hashlib.sha256()
    for tensor in (feature.w_enc, feature.w_dec, feature.b_enc, feature.threshold):
        sha.update(tensor.detach().cpu().numpy().tobytes())
    if feature.whole is not None:
        sha.update(repr(sae_facts(feature.whole)["files"]).encode())
    return sha.hexdigest()[:16]


def map_features(edit: Intervention, change: Callable[[Feature], Feature]) -> Intervention:
    """`edit` with every loaded feature in it, those of a set included, put through `change`."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Feature):
            return change(value)
        if isinstance(value, Intervention):
            return map_features(value, change)
        return tuple(mapped(v) for v in value) if isinstance(value, tuple) else value

    return replace(edit, **{f.name: mapped(getattr(edit, f.name)) for f in fields(edit)})


def _bound(model: Model, feature: FeatureLike) -> Feature:
    loaded = as_feature(feature)
    check_fits(model, str(loaded.ref), loaded.site, loaded.d_model)
    return loaded.to(model.layer_device(loaded.site.layer))


def _plain(value: Any) -> Any:
    """A field as JSON knows it."""
    if isinstance(value, Direction):
        return {"direction": value.name, "site": str(value.site), "digest": value.digest}
    if isinstance(value, Intervention):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Feature):
        return str(value.ref)
    if isinstance(value, (FeatureRef, SaeId, Site, Sae)):
        return str(value)
    return value.name if isinstance(value, Model) else value


def _a_maximum(value: float) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RequestError(
            f"an observed maximum of {value!r} is not a unit: the feature never fired there; give other prompts."
        )
    return float(value)


def _finite(rule: str, value: Any) -> float:
    """A strength as a Python number: numpy's and torch's scalars are numbers too."""
    if (
        hasattr(value, "item")
        and getattr(value, "ndim", 0) == 0
        and not isinstance(value, (bool, int, float))
    ):
        value = value.item()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{rule} needs a finite number, not {value!r}.")
    return value


def _settle(intervention: Intervention, name: str) -> None:
    value = getattr(intervention, name)
    if not isinstance(value, (Feature, Direction)):
        object.__setattr__(intervention, name, feature_ref(value))
