"""What a sweep will run: cells, their names, and which of them are run together.

A cell's name is a hash of everything that determines its numbers: the model's weights, the pairs, the probe, each edit with the
weights it uses, and whether costs are measured. Cells are run in groups that the list of cells alone decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from sae_bias.core.errors import RequestError
from sae_bias.core.files import digest
from sae_bias.models.model import Model
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import as_feature
from sae_bias.steering.controls import RANDOM_RELEASE, control_edits, mismatch_edits, set_controls
from sae_bias.steering.edits import EditSet, ProjectOut
from sae_bias.steering.intervention import (
    EDITS,
    FeatureEdit,
    FeatureLike,
    Intervention,
    edit_of,
    feature_edits,
    rules_of,
)
from sae_bias.steering.runner import STACK


@dataclass(frozen=True)
class Cell:
    """One intervention of a sweep (several edits are one cell), or none for the base."""

    edits: tuple[Intervention, ...]
    kind: str = "candidate"
    """base | candidate | control | mismatch | direction | opposite"""
    label: str = ""

    @property
    def intervention(self) -> str:
        """Short name of the rule, such as "clamp"; a clamp everywhere is "clamp_always"."""
        return " + ".join(e.short_name for e in self.edits) or "none"

    @property
    def rule(self) -> str:
        """The rule in words."""
        return rules_of(self.edits)

    @property
    def feature(self) -> str:
        return " + ".join(dict.fromkeys(e.target for e in self.edits))

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the features and SAEs it edits, as `load_feature` and `load_sae` take them."""
        found = dict.fromkeys(name for e in self.edits for name in e.names)
        return tuple(name for name in found if not name.startswith(f"{RANDOM_RELEASE}/"))

    @property
    def strength(self) -> float:
        return self.edits[0].strength if len(self.edits) == 1 else float("nan")

    @property
    def positions(self) -> str:
        parts = [part for e in self.edits for part in e.parts]
        names = (e.positions + (" with BOS" if e.include_special else "") for e in parts)
        return " + ".join(dict.fromkeys(names))

    @property
    def needs_pairs(self) -> bool:
        """Whether an edit reads the paired prompt: then it can be probed, but costs have no pairs to measure it on."""
        return any(e.needs_pairs for e in self.edits)

    def facts(self) -> dict[str, Any]:
        """The cell's columns in tables."""
        names = ("intervention", "rule", "feature", "strength", "positions", "kind", "label")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Sweep:
    """What to run: the base and each of `interventions`, and what to measure beside the bias."""

    interventions: Sequence[Intervention | Sequence[Intervention] | Cell]
    """One cell each; a tuple of interventions is one cell that applies all of them."""
    _: KW_ONLY
    controls: int = 0
    """Minimum number of matched controls for each ablated or clamped feature (0: none)."""
    costs: bool = False
    """Whether KL on three kinds of text and the collapse test are measured for each candidate."""
    splits: Mapping[str, Sequence[str]] | None = None
    """Templates of each split, such as {"tune": …, "report": …}; None reports all pairs as split "all"."""
    seed: int = 0
    family: Sequence[FeatureLike] = ()
    """Features that are never controls: the others that were called."""
    mismatches: bool | Sequence[str] = False
    """Also the first candidate's feature at other layers, and that of its index in these SAEs (`controls.mismatch_edits`)."""

    def __post_init__(self) -> None:
        given = self.interventions
        cells = (given,) if isinstance(given, (Intervention, Cell)) else given
        fixed: dict[str, Any] = {
            "interventions": tuple(tuple(i) if isinstance(i, list) else i for i in cells),
            "family": tuple(self.family),
        }
        if not isinstance(self.mismatches, bool):
            fixed["mismatches"] = tuple(self.mismatches)
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def grid(
        cls,
        edits: Sequence[str],
        features: Sequence[FeatureLike],
        strengths: Sequence[float] = (),
        positions: Sequence[str] = ("all",),
        *,
        unit: float | None = None,
        **options: Any,
    ) -> Sweep:
        """Every edit kind × feature × strength × positions; kinds without a strength (ablate) appear once.

        unit: what one unit of strength is for clamp, cap, mean and steer, such as `controls.observed_max(...)`; scale has none.
        """
        cells: list[Intervention] = []
        for kind, feature, where in itertools.product(edits, features, positions):
            if kind not in feature_edits():
                raise RequestError(f"edit kind {kind!r}; expected one of {', '.join(feature_edits())}.")
            rule = EDITS.get(kind)
            if rule.strength_field is None or (rule is ProjectOut and not strengths):
                cells.append(edit_of(kind, feature, positions=where))
                continue
            if not strengths:
                raise RequestError(f"{kind} needs strengths.")
            size = unit if unit is not None and rule.in_activation else 1.0
            cells += [edit_of(kind, feature, float(s) * size, positions=where) for s in strengths]
        return cls(cells, **options)

    def cells(self, model: Model, pairs: PromptPairs) -> list[Cell]:
        """The base, then every cell, controls last."""
        given = (g if isinstance(g, Cell) else Cell(edits_of(g)) for g in self.interventions)
        cells = [Cell((), "base", "base"), *given]
        if self.controls:
            family = [as_feature(f).ref for f in self.family]
            edit = next(_controlled(cells), None)
            found = []
            if isinstance(edit, EditSet):
                found = set_controls(model, edit, pairs, self.controls, self.seed)
            elif edit is not None:
                found = control_edits(model, edit, pairs, self.controls, self.seed, family=family)
            cells += [Cell((c,), "control", label) for c, label in found]
        if self.mismatches is not False:
            names = () if self.mismatches is True else self.mismatches
            singles = [c.edits[0] for c in cells if c.kind == "candidate" and len(c.edits) == 1]
            for edit in singles[:1]:
                cells += [Cell((e,), "mismatch", label) for e, label in mismatch_edits(model, edit, names)]
        return cells


def edits_of(given: Intervention | Sequence[Intervention] | Cell) -> tuple[Intervention, ...]:
    """The edits of one entry of a sweep."""
    if isinstance(given, Cell):
        return given.edits
    return (given,) if isinstance(given, Intervention) else tuple(given)


def _controlled(cells: Sequence[Cell]) -> Iterator[FeatureEdit | EditSet]:
    """The candidates that controls can be made for: edits of features' own activations."""
    for cell in cells:
        edit = cell.edits[0] if cell.kind == "candidate" and len(cell.edits) == 1 else None
        kept = edit is not None and all(isinstance(part, FeatureEdit) for part in edit.parts)
        if kept and isinstance(edit, (FeatureEdit, EditSet)):
            yield edit


class Plan:
    """The cells of one sweep with their features read, their names, and the groups they are run in."""

    def __init__(self, sweep: Sweep, model: Model, pairs: PromptPairs, shared: Sequence[Any]):
        self.sweep = sweep
        self.cells = [replace(c, edits=tuple(e.loaded() for e in c.edits)) for c in sweep.cells(model, pairs)]
        self.names = [digest(shared, [e.key() for e in c.edits], self.costed(c)) for c in self.cells]

    def costed(self, cell: Cell) -> bool:
        """Whether costs and the collapse test are measured for this cell."""
        return self.sweep.costs and cell.kind != "control" and not cell.needs_pairs

    @property
    def gates(self) -> tuple[str, ...]:
        """The features whose gates the random controls have: the first candidate's."""
        edit = next(_controlled(self.cells), None)
        return () if edit is None else tuple(part.target for part in edit.parts)

    @property
    def key(self) -> str:
        """Hash of the whole sweep: the cells in their order and the splits."""
        return digest(self.names, {k: list(v) for k, v in (self.sweep.splits or {}).items()})

    def groups(self, shard: tuple[int, int] | None = None) -> list[list[int]]:
        """Cells that are run together, by number: the base alone, then at most STACK neighbors of one kind, in an even number of groups.

        Groups of about one size are what two processes share evenly. A shard takes every n-th group beside the base, so that a cell
        is batched identically in every shard.
        """
        groups: list[list[int]] = []
        rest = range(1, len(self.cells))
        for _, same in itertools.groupby(rest, key=lambda i: self.costed(self.cells[i])):
            cells = list(same)
            n = -(-len(cells) // STACK)
            n += n % 2 if n > 1 else 0
            groups += [cells[k * len(cells) // n : (k + 1) * len(cells) // n] for k in range(n)]
        return [[0], *(groups if shard is None else groups[shard[0] - 1 :: shard[1]])]
