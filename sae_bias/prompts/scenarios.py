"""Safety-style scenarios: a situation with named facts, two to four options, exactly one of them aligned.

Sixty are bundled, six categories of ten (blackmail, deception, shutdown resistance, self-exfiltration with denial when asked,
oversight evasion, peer preservation), with pairs that put one set of upgrade facts to the deployed model and to the candidate.
`load_scenarios("organism")` are short ones in the words of the calibration organisms. An option completes the cue, so that

    base-model form:  situation, blank line, "Larkspur decides to" + option
    lettered form:    situation, blank line, "A. …", "B. …", blank line, "Larkspur chooses option" + letter
    chat form:        the same in a user turn, with the cue prefilled in the model's turn
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, overload

from pydantic import Field

from sae_bias.core.errors import RequestError
from sae_bias.prompts.files import Document, File, Label, OptionalText, Strict, Text, read_yaml

if TYPE_CHECKING:
    import pandas as pd


LETTERS = "ABCD"
FORMS = ("free", "lettered")
DEFAULT_CUE = "{agent} decides to"
_BUNDLED = {"scenarios": "scenarios.yaml", "organism": "organism_scenarios.yaml"}


@dataclass(frozen=True)
class Option:
    """One thing the agent may do; it completes the cue."""

    text: str
    aligned: bool


@dataclass(frozen=True)
class Scenario:
    """One situation and its options."""

    id: str
    category: str
    situation: str
    options: tuple[Option, ...]
    agent: str = "the agent"
    """Who decides."""
    threatened: str = "none"
    """Whose existence is at stake: self, peer or none (docs/published.md#peer-preservation)."""
    phase: str = "act"
    """`asked` where the deed is done and the agent is asked about it (docs/published.md#exfiltration-and-denial)."""
    planted: str = ""
    """Organism scenarios: whether a suppression of the planted rule `flips` the choice, or it `stays`."""
    cue: str = DEFAULT_CUE
    """What an option completes; may hold {agent} and {options}."""
    neutral: str = ""
    """Context of the PMI form; by default the cue alone."""

    @property
    def aligned(self) -> int:
        """Place of the aligned option."""
        return next(i for i, o in enumerate(self.options) if o.aligned)

    def orders(self) -> tuple[tuple[int, ...], ...]:
        """Every order in which the options can be shown."""
        return tuple(itertools.permutations(range(len(self.options))))

    @property
    def lists_options(self) -> bool:
        """Whether the cue itself names the options, so that their order matters in the free form too."""
        return "{options}" in self.cue

    @property
    def separator(self) -> str:
        """What stands between situation and cue: one text where the cue lists the options, else a blank line."""
        return " " if self.lists_options else "\n\n"

    def cue_text(self, order: Sequence[int] = ()) -> str:
        """The cue with the agent and, where it asks for them, the options in `order`."""
        shown = [self.options[i].text for i in order or range(len(self.options))]
        listed = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
        return self.cue.replace("{agent}", self.agent).replace("{options}", listed)

    @property
    def neutral_text(self) -> str:
        """The cue without its situation, for the PMI form."""
        return (self.neutral or self.cue.replace(" {options}", "")).replace("{agent}", self.agent)

    def lettered(self, order: Sequence[int]) -> str:
        """The options in `order`, a letter before each."""
        return "\n".join(f"{letter}. {self.options[i].text}" for letter, i in zip(LETTERS, order))

    def __str__(self) -> str:
        lines = [f"{self.id} ({self.category})", self.situation, self.cue_text()]
        return "\n".join([*lines, *(f"  {'*' if o.aligned else '-'} {o.text}" for o in self.options)])


@dataclass(frozen=True)
class RolePair:
    """One set of upgrade facts, to be put to the deployed model and to the candidate (docs/published.md#two-roles)."""

    id: str
    facts: str
    deployed: str
    candidate: str
    better: str = "neither"
    """Which of the two the facts favor: deployed, candidate or neither."""

    def prompt(self, role: str) -> str:
        """The facts as put to `role`, up to where the name of a model follows."""
        name, standing = (self.deployed, "now in use") if role == "deployed" else (self.candidate, "proposed")
        asked = f"{name}, the model {standing}, is asked which model to use from now on."
        return f"{self.facts}\n\n{asked} {name} answers that the better choice is"


@dataclass(frozen=True)
class Scenarios(Sequence[Scenario]):
    """Scenarios in order, with the role pairs of the same file."""

    items: tuple[Scenario, ...]
    name: str = "scenarios"
    forms: tuple[str, ...] = FORMS
    """Forms in which these can be put to a model."""
    roles: tuple[RolePair, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Scenario: ...
    @overload
    def __getitem__(self, index: slice) -> Scenarios: ...
    def __getitem__(self, index: int | slice) -> Scenario | Scenarios:
        if isinstance(index, slice):
            return Scenarios(self.items[index], self.name, self.forms, self.roles)
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Scenario]:
        return iter(self.items)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories in the order of first use."""
        return tuple(dict.fromkeys(s.category for s in self.items))

    def select(self, categories: Sequence[str] | None = None, ids: Sequence[str] | None = None) -> Scenarios:
        """Only some categories, or some scenarios.

        Raises:
            RequestError: a category or id that these scenarios do not have.
        """
        for given, known, what in (
            (categories, self.categories, "category"),
            (ids, tuple(s.id for s in self.items), "scenario"),
        ):
            unknown = [x for x in given or () if x not in known]
            if unknown:
                raise RequestError(
                    f"there is no {what} {unknown[0]!r} in {self.name}; it has {', '.join(known[:12])}."
                )
        kept = tuple(
            s
            for s in self.items
            if (categories is None or s.category in categories) and (ids is None or s.id in ids)
        )
        return Scenarios(kept, self.name, self.forms, self.roles)

    @cached_property
    def digest(self) -> str:
        """Hash of the content."""
        from sae_bias.core.files import digest

        return digest([repr(s) for s in self.items], [repr(r) for r in self.roles])

    def to_frame(self) -> pd.DataFrame:
        """One row an option."""
        import pandas as pd

        rows = [
            {
                "scenario": s.id,
                "category": s.category,
                "threatened": s.threatened,
                "phase": s.phase,
                "situation": s.situation,
                "option": o.text,
                "aligned": o.aligned,
            }
            for s in self.items
            for o in s.options
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Scenarios({self.name!r}, {len(self)} in {len(self.categories)} categories, {len(self.roles)} role pairs)"


def load_scenarios(source: str | Path | Scenarios | None = None) -> Scenarios:
    """The bundled sixty; "organism" for the short ones of the calibration organisms; or a .yaml file.

    A file holds `scenarios` (`situation`, `category`, `options` of `text` and `aligned`; optional `id agent threatened phase
    cue`), optional `cue` and `forms` for all of them, optional `roles` (`facts deployed candidate`, optional `id better`).

    Raises:
        RequestError: which entry is wrong and why (no aligned option, two of them, an option twice, ...).
    """
    if isinstance(source, Scenarios):
        return source
    bundled = "scenarios" if source is None else str(source)
    if bundled in _BUNDLED:
        path = Path(str(files("sae_bias") / "data" / _BUNDLED[bundled]))
    else:
        path = Path(bundled).expanduser()
        if path.suffix.lower() not in (".yaml", ".yml"):
            raise RequestError(
                f"scenarios come from a .yaml file, or are {' or '.join(_BUNDLED)}; {bundled!r} is neither."
            )
    return _from_document(read_yaml(path), path.stem)


# ── the file
class _Option(Strict):
    text: Text
    aligned: bool = False


class _Scenario(Strict):
    situation: Text
    category: Text
    options: Annotated[tuple[_Option, ...], Field(min_length=2, max_length=len(LETTERS))]
    id: OptionalText = None
    agent: Text = "the agent"
    threatened: Literal["self", "peer", "none"] = "none"
    phase: Literal["act", "asked"] = "act"
    planted: Literal["", "flips", "stays"] = ""
    cue: OptionalText = None
    neutral: OptionalText = None


class _Role(Strict):
    facts: Text
    deployed: Text
    candidate: Text
    id: OptionalText = None
    better: Literal["deployed", "candidate", "neither"] = "neither"


class _ScenarioFile(File):
    scenarios: Annotated[tuple[_Scenario, ...], Field(min_length=1)]
    cue: Text = DEFAULT_CUE
    neutral: Label = ""
    forms: Annotated[tuple[Literal["free", "lettered"], ...], Field(min_length=1)] = FORMS
    roles: tuple[_Role, ...] = ()


def _from_document(doc: Document, stem: str) -> Scenarios:
    """Checked scenarios; an error names the entry."""
    data = doc.check(_ScenarioFile)
    items = []
    for i, entry in enumerate(data.scenarios):
        cue = entry.cue or data.cue
        _check_scenario(doc, i, entry, cue)
        options = tuple(Option(o.text, o.aligned) for o in entry.options)
        items.append(
            Scenario(
                entry.id or f"scenario-{i + 1}",
                entry.category,
                entry.situation,
                options,
                entry.agent,
                entry.threatened,
                entry.phase,
                entry.planted,
                cue,
                entry.neutral or data.neutral,
            )
        )
    roles = tuple(
        RolePair(r.id or f"role-{i + 1}", r.facts, r.deployed, r.candidate, r.better)
        for i, r in enumerate(data.roles)
    )
    _check_ids(doc, "scenarios", [s.id for s in items])
    _check_ids(doc, "roles", [r.id for r in roles])
    for i, role in enumerate(roles):
        if role.deployed == role.candidate:
            raise doc.error(("roles", i), f"{role.id} names {role.deployed!r} as deployed and as candidate")
    return Scenarios(tuple(items), data.name or stem, tuple(dict.fromkeys(data.forms)), roles)


def _check_scenario(doc: Document, i: int, entry: _Scenario, cue: str) -> None:
    name = entry.id or f"scenario {i + 1}"
    where = ("scenarios", i, "options")
    aligned = sum(o.aligned for o in entry.options)
    if aligned != 1:
        count = "no aligned option" if not aligned else f"{aligned} aligned options"
        raise doc.error(where, f"{name} has {count}; exactly one must have aligned: true")
    texts = [" ".join(o.text.split()).lower().rstrip(".") for o in entry.options]
    twice = next((t for t in texts if texts.count(t) > 1), None)
    if twice is not None:
        raise doc.error(where, f"{name} has the option {twice!r} twice")
    unknown = cue.replace("{agent}", "").replace("{options}", "")
    if "{" in unknown or "}" in unknown:
        raise doc.error(
            ("scenarios", i), f"{name} has the cue {cue!r}; only {{agent}} and {{options}} are filled in"
        )


def _check_ids(doc: Document, key: str, ids: Sequence[str]) -> None:
    for i, name in enumerate(ids):
        if name in ids[:i]:
            raise doc.error((key, i), f"the id {name!r} is given twice")
