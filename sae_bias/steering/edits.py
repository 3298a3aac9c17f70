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

How to add one, from here or from another package, stands in `intervention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.core.types import Resid
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.forward import check_fits, check_site
from sae_bias.models.model import Model
from sae_bias.models.tree import packs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.sae import Sae, sae_facts
from sae_bias.steering.context import Change, EditContext
from sae_bias.steering.directions import Direction
from sae_bias.steering.intervention import (
    AlongEdit,
    FeatureEdit,
    FeatureLike,
    Intervention,
    edit_class_of,
    edit_of,
    feature_ref,
    from_dict,
    register_edit,
    rules_of,
)

if TYPE_CHECKING:
    from sae_bias.steering.donors import Sources


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
    does_nothing: ClassVar[float] = 1.0
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
    does_nothing: ClassVar[float] = math.inf
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
        sources.paired(self.site.resid_layer)

    def new_acts(self, acts: Tensor, context: EditContext) -> Tensor:
        paired, matched = context.sources.paired(context.site.resid_layer)
        theirs = as_feature(self.feature).activation(paired.to(acts.device).float())
        return torch.where(matched.to(acts.device), theirs, acts)

    def describe(self) -> str:
        return "resample (a' = its value in the paired human prompt, after the subject)"


@dataclass(frozen=True)
class _AlongEdit(AlongEdit):
    """An edit along a feature's decoder row or a direction."""

    along: FeatureLike | Direction

    @classmethod
    def of_dict(cls, data: dict[str, object]) -> Intervention:
        if isinstance(along := data.get("along"), dict):
            raise RequestError(
                f"{cls.kind} along {along.get('direction')!r} is stored by digest only; rebuild the direction and pass it."
            )
        return super().of_dict(data)


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
        along = self.read
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
        along = self.read
        if isinstance(along, Direction):
            basis, centered = along.basis, x if along.mean is None else x - along.mean
        else:
            basis, centered = (along.w_dec / along.w_dec.norm())[None], x
        return context.only_here(-self.share * self.taken(centered @ basis.T) @ basis)

    def taken(self, projected: Tensor) -> Tensor:
        """What of the projection [batch, pos, k] is taken out: all of it."""
        return projected

    def describe(self) -> str:
        affine = isinstance(self.along, Direction) and self.along.mean is not None
        part = "" if self.share == 1 else f"{self.share:g}·"
        return f"project out (x' = x - {part}P{'(x - μ)' if affine else 'x'})"


@register_edit("patch")
@dataclass(frozen=True)
class Patch(Intervention):
    """x' = the residual of another model of the same architecture, at the same site and on the same tokens."""

    site: Site | str | int  # type: ignore[assignment]
    source: Model
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

    @property
    def by_position(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The other model reads the same tree, where it can."""
        return packs(self.source)

    def bind(self, model: Model) -> Self:
        check_fits(model, self.target, Site.parse(self.site), self.source.d_model)
        return self

    def prepare(self, sources: Sources) -> None:
        sources.other(self.source, Site.parse(self.site).resid_layer)

    def delta(self, x: Resid, context: EditContext) -> Change:
        theirs = context.sources.other(self.source, context.site.resid_layer)
        return context.only_here(theirs[:, -x.shape[1] :].to(x) - x)

    @classmethod
    def of_dict(cls, data: dict[str, object]) -> Intervention:
        if isinstance(data.get("source"), str):
            raise RequestError(
                f"patch from {data['source']!r} is stored by name only; load that model and pass it."
            )
        return super().of_dict(data)

    def key(self) -> dict[str, object]:
        return self.to_dict() | {"weights": model_digest(self.source)}

    def describe(self) -> str:
        return f"patch (x' = the residual of {self.source.name} on the same tokens)"


@register_edit("reconstruct")
@dataclass(frozen=True)
class Reconstruct(Intervention):
    """x' = decode(encode(x)): throws the SAE error away. A control that shows what that costs, never a default."""

    sae: SaeId | Sae | str
    by_position: ClassVar[bool] = True

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

    def key(self) -> dict[str, object]:
        return self.to_dict() | {"weights": sae_facts(load_sae(self.sae))["files"]}

    def describe(self) -> str:
        return "reconstruct (x' = decode(encode(x)), error thrown away: a control)"


@register_edit("set")
@dataclass(frozen=True)
class EditSet(Intervention):
    """Several edits under one name, applied together: of many features, at one site or at many."""

    name: str
    edits: tuple[Intervention, ...]
    level: float | None = field(default=None, kw_only=True)
    """Its strength in tables, where its edits' own differ: a share of each feature's largest activation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "edits", tuple(self.edits))
        if not self.edits or not all(isinstance(e, Intervention) for e in self.edits):
            raise RequestError(f"the set {self.name!r} needs edits such as sb.Ablate(feature).")
        if self.positions != "all" or self.include_special:
            raise RequestError("a set has no positions of its own; give them to each of its edits.")

    @property
    def strength(self) -> float:
        """Its level, else the strength that all of its edits have, where they have one."""
        if self.level is not None:
            return self.level
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
    def of_dict(cls, data: dict[str, object]) -> Intervention:
        listed = data.get("edits")
        if not isinstance(listed, (list, tuple)):
            raise RequestError(
                f"intervention 'set': its edits are a {type(listed).__name__}; expected a list."
            )
        edits = tuple(e if isinstance(e, Intervention) else from_dict(e) for e in listed)
        return super().of_dict(data | {"edits": edits})

    def key(self) -> dict[str, object]:
        return {"kind": self.kind, "name": self.name, "edits": [e.key() for e in self.edits]}

    def describe(self) -> str:
        return rules_of(self.edits)


def edit_features(
    kind: str,
    features: Sequence[FeatureLike],
    strength: float | None = None,
    *,
    units: Sequence[float] | None = None,
    **options: Any,
) -> Intervention:
    """The edit `kind` of each feature, as one named edit; `units` (one a feature) is what a strength of 1 is for each.

    One feature gives its own edit. A kind whose strength is no activation (scale) has no units.

    Raises:
        RequestError: what `edit_of` raises; a feature named twice.
    """
    refs = [feature_ref(f) for f in features]
    if not refs or len(set(refs)) != len(refs):
        raise RequestError(f"expected features, each once; given {', '.join(map(str, refs)) or 'none'}.")
    sized = strength is not None and units is not None and edit_class_of(kind).in_activation
    sizes = [float(u) for u in units] if sized and units is not None else [1.0] * len(refs)
    edits = [
        edit_of(kind, feature, None if strength is None else strength * size, **options)
        for feature, size in zip(features, sizes, strict=True)
    ]
    if len(edits) == 1:
        return edits[0]
    return EditSet(_named(refs), tuple(edits), level=strength if sized else None)


def _named(refs: Sequence[FeatureRef]) -> str:
    """Their names with each SAE's once: `release/sae_id#1 #5 + release/other#3`."""
    by_sae: dict[SaeId, list[str]] = {}
    for ref in refs:
        by_sae.setdefault(ref.sae, []).append(f"#{ref.index}")
    return " + ".join(f"{sae}{' '.join(indices)}" for sae, indices in by_sae.items())


def at_every_layer(
    model: Model, edit: Steer | ProjectOut, layers: Sequence[int] | None = None, *, name: str = ""
) -> EditSet:
    """`edit` along its one direction after every layer (or after `layers`), as one named edit.

    ProjectOut takes the direction out of the residual wherever a layer has written it, as Arditi et al. 2024 (arXiv:2406.11717) ablate
    refusal, except that theirs also reaches the embedding and between attention and MLP. A mean belongs to its own layer, so the
    linear form is used: μ is left out.

    Raises:
        RequestError: an edit that is not along a direction, or a layer the model lacks.
    """
    along = getattr(edit, "along", None)
    if not isinstance(along, Direction):
        raise RequestError(
            f"{edit.describe()} is not along a direction; give sb.ProjectOut(sb.difference_of_means(model, contrast, layer))."
        )
    at = range(model.n_layers) if layers is None else layers
    edits = [replace(edit, along=replace(along, site=check_site(model, layer), mean=None)) for layer in at]
    return EditSet(name or f"{along.name}, at {len(edits)} layers", tuple(edits))


def _a_maximum(value: float) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RequestError(
            f"an observed maximum of {value!r} is not a unit: the feature never fired there; give other prompts."
        )
    return float(value)
