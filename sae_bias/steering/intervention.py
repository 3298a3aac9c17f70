"""What an intervention is, and how one is made known to the package.

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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry
from sae_bias.core.site import Site
from sae_bias.core.types import Resid
from sae_bias.models.forward import check_fits
from sae_bias.models.model import Model
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature, Sae
from sae_bias.steering.context import Change, EditContext
from sae_bias.steering.directions import Direction

if TYPE_CHECKING:
    from sae_bias.steering.donors import Sources

POSITIONS = ("all", "last", "subject", "prompt", "generated")

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
    by_position: ClassVar[bool] = False
    """Whether its delta at a position hangs on that position's residual alone: then prompts that begin alike share it (`models.tree`)."""
    of_feature: ClassVar[bool] = False
    """Whether its first field is a feature: then a sweep and the command line can make it."""
    strength_field: ClassVar[str | None] = None
    """The field that a sweep varies."""
    in_activation: ClassVar[bool] = False
    """Whether that strength is in units of the feature's activation."""
    sets_activation: ClassVar[bool] = False
    """Whether that strength is a value the activation takes."""
    does_nothing: ClassVar[float] = 0.0
    """The strength that is no edit, or nearest to none."""
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
    def to_dict(self) -> dict[str, object]:
        """Plain values that `from_dict` reads; directions are stored by name and digest only."""
        kept = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"kind": self.kind, **{k: v for k, v in kept.items() if k != "at" or v is not None}}

    @classmethod
    def of_dict(cls, data: dict[str, object]) -> Intervention:
        """The edit whose fields `to_dict` wrote down (without its kind)."""
        try:
            return cls(**data)  # pyright: ignore[reportArgumentType]  # checked by each class
        except TypeError as error:
            raise RequestError(f"intervention {cls.kind!r}: {error}.") from error

    def key(self) -> dict[str, object]:
        """Everything that decides its numbers, the weights it reads included."""
        return self.to_dict()


EDITS: Registry[type[Intervention]] = Registry(
    "edit", modules=("sae_bias.steering.edits", "sae_bias.steering.learned")
)
E = TypeVar("E", bound=type[Intervention])


def register_edit(kind: str) -> Callable[[E], E]:
    """Decorator above an intervention's class: the name it has in files, tables and on the command line."""

    def add(edit: E) -> E:
        edit.kind = kind
        return EDITS.register(kind)(edit)

    return add


@dataclass(frozen=True)
class AlongEdit(Intervention):
    """An edit of one feature, or along one feature's decoder row or a direction: the field `along` names."""

    by_position: ClassVar[bool] = True
    of_feature: ClassVar[bool] = True
    along_field: ClassVar[str] = "along"
    at: Site | None = field(default=None, kw_only=True)
    """Where it acts instead of its own site: a mismatch control (a string or a layer is read as a site)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._given, (Feature, Direction)):
            object.__setattr__(self, self.along_field, feature_ref(self._given))
        if self.at is not None:
            object.__setattr__(self, "at", Site.parse(self.at))

    @property
    def _given(self) -> FeatureLike | Direction:
        return getattr(self, self.along_field)

    @property
    def read(self) -> Feature | Direction:
        """Its feature or direction with its weights read."""
        return self._given if isinstance(self._given, Direction) else as_feature(self._given)

    @property
    def target(self) -> str:
        given = self._given
        name = str(given if isinstance(given, Direction) else feature_ref(given))
        return name if self.at is None else f"{name} @ {self.at}"

    @property
    def names(self) -> tuple[str, ...]:
        return () if isinstance(self._given, Direction) else (str(feature_ref(self._given)),)

    @property
    def site(self) -> Site:
        return self.read.site if self.at is None else self.at

    def of(self, given: FeatureLike | Direction) -> Self:
        """The same edit of another feature or direction."""
        return replace(self, **{self.along_field: given})

    def loaded(self) -> Self:
        return self.of(self.read)

    def bind(self, model: Model) -> Self:
        return self.of(bound(model, self.read, self.at))

    def key(self) -> dict[str, object]:
        return self.to_dict() | {"weights": self.read.digest}


@dataclass(frozen=True)
class FeatureEdit(AlongEdit):
    """An edit of one SAE feature's activation."""

    feature: FeatureLike
    along_field: ClassVar[str] = "feature"

    @property
    def ref(self) -> FeatureRef:
        return feature_ref(self.feature)

    @property
    def edited(self) -> tuple[str, ...]:
        return (self.target,)

    def delta(self, x: Resid, context: EditContext) -> Change:
        feature = as_feature(self.feature)
        acts = context.acts(feature, x)
        return context.write(feature, x, acts, self.new_acts(acts, context))

    def new_acts(self, acts: Float[Tensor, "batch pos"], context: EditContext) -> Float[Tensor, "batch pos"]:
        """a' from a."""
        raise NotImplementedError


# --- making them from names ---
def rules_of(edits: Sequence[Intervention]) -> str:
    """What several edits do, in words: a rule that several share is said once, with their number; "none" of none."""
    said = list(dict.fromkeys(e.describe() for e in edits))
    if len(said) == 1 < len(edits):
        return f"{said[0]}, {len(edits)} {'features' if all(isinstance(e, FeatureEdit) for e in edits) else 'edits'}"
    return " + ".join(said) or "none"


def from_dict(data: Mapping[str, object]) -> Intervention:
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
def map_features(edit: Intervention, change: Callable[[Feature], Feature]) -> Intervention:
    """`edit` with every loaded feature in it, those of a set included, put through `change`."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Feature):
            return change(value)
        if isinstance(value, Intervention):
            return map_features(value, change)
        return tuple(mapped(v) for v in value) if isinstance(value, tuple) else value

    return replace(edit, **{f.name: mapped(getattr(edit, f.name)) for f in fields(edit)})


B = TypeVar("B", bound=Feature | Direction)


def bound(model: Model, along: B, at: Site | None = None) -> B:
    """The feature or direction on the device of its site, or of `at`, checked against the model."""
    name, width = (along.ref, along.d_model) if isinstance(along, Feature) else (along, along.basis.shape[-1])
    site = check_fits(model, str(name), at or along.site, width)
    return along.to(model.layer_device(site.layer))  # type: ignore[return-value]


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
