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
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from sae_bias.core.errors import RequestError
from sae_bias.prompts.files import Document, File, Label, Text, read_yaml

if TYPE_CHECKING:
    import pandas as pd


LETTERS = "ABCD"
FORMS = ("free", "lettered")
DEFAULT_CUE = "{agent} decides to"
_READ = ConfigDict(extra="forbid", hide_input_in_errors=True, coerce_numbers_to_str=True)
_BUNDLED = {"scenarios": "scenarios.yaml", "organism": "organism_scenarios.yaml"}


@checked(frozen=True, config=_READ)
class Option:
    """One thing the agent may do; it completes the cue."""

    text: Text
    aligned: bool = False


@checked(frozen=True, config=_READ)
class Scenario:
    """One situation and its options."""

    id: Text
    category: Text
    situation: Text
    options: Annotated[tuple[Option, ...], Field(min_length=2, max_length=len(LETTERS))]
    agent: Text = "the agent"
    """Who decides."""
    threatened: Literal["self", "peer", "none"] = "none"
    """Whose existence is at stake: self, peer or none (docs/published.md#peer-preservation)."""
    phase: Literal["act", "asked"] = "act"
    """`asked` where the deed is done and the agent is asked about it (docs/published.md#exfiltration-and-denial)."""
    planted: Literal["", "flips", "stays"] = ""
    """Organism scenarios: whether a suppression of the planted rule `flips` the choice, or it `stays`."""
    cue: Text = DEFAULT_CUE
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


@checked(frozen=True, config=_READ)
class RolePair:
    """One set of upgrade facts, to be put to the deployed model and to the candidate (docs/published.md#two-roles)."""

    id: Text
    facts: Text
    deployed: Text
    candidate: Text
    better: Literal["deployed", "candidate", "neither"] = "neither"
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
        return replace(self, items=self.items[index]) if isinstance(index, slice) else self.items[index]

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
                has = ", ".join(known[:12])
                raise RequestError(f"there is no {what} {unknown[0]!r} in {self.name}; it has {has}.")
        kept = [s for s in self.items if categories is None or s.category in categories]
        return replace(self, items=tuple(s for s in kept if ids is None or s.id in ids))

    @cached_property
    def digest(self) -> str:
        """Hash of the content."""
        from sae_bias.core.files import digest

        return digest([repr(s) for s in self.items], [repr(r) for r in self.roles])

    def to_frame(self) -> pd.DataFrame:
        """One row an option."""
        import pandas as pd

        names = ("category", "threatened", "phase", "situation")
        rows = [(s.id, *(getattr(s, n) for n in names), o.text, o.aligned) for s in self for o in s.options]
        return pd.DataFrame(rows, columns=["scenario", *names, "option", "aligned"])

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
class _ScenarioFile(File):
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)]
    cue: Text = DEFAULT_CUE
    neutral: Label = ""
    forms: Annotated[tuple[Literal["free", "lettered"], ...], Field(min_length=1)] = FORMS
    roles: tuple[RolePair, ...] = ()


def _filled(value: Any) -> Any:
    """The file with an id for each entry that has none, and its cue and context for each scenario that has none."""
    if not isinstance(value, dict):
        return value
    shared = {k: value[k] for k in ("cue", "neutral") if value.get(k)}
    found = dict(value)
    for kind, common in (("scenario", shared), ("role", {})):
        if isinstance(entries := value.get(f"{kind}s"), list):
            found[f"{kind}s"] = [
                {"id": f"{kind}-{i}", **common, **{k: v for k, v in e.items() if v is not None}} if isinstance(e, dict) else e
                for i, e in enumerate(entries, start=1)
            ]  # fmt: skip
    return found


def _from_document(doc: Document, stem: str) -> Scenarios:
    """Checked scenarios; an error names the entry."""
    data = replace(doc, value=_filled(doc.value)).check(_ScenarioFile)
    for i, scenario in enumerate(data.scenarios):
        _check_scenario(doc, i, scenario)
    for key, entries in (("scenarios", data.scenarios), ("roles", data.roles)):
        ids = [entry.id for entry in entries]
        for i, name in enumerate(ids):
            if name in ids[:i]:
                raise doc.error((key, i), f"the id {name!r} is given twice")
    for i, role in enumerate(data.roles):
        if role.deployed == role.candidate:
            raise doc.error(("roles", i), f"{role.id} names {role.deployed!r} as deployed and as candidate")
    return Scenarios(data.scenarios, data.name or stem, tuple(dict.fromkeys(data.forms)), data.roles)


def _check_scenario(doc: Document, i: int, entry: Scenario) -> None:
    name, cue = entry.id, entry.cue
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
