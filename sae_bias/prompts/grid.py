"""Subjects crossed with statements: the prompts that features are ranked on by interaction."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, overload

from sae_bias.core.errors import RequestError
from sae_bias.prompts.pairs import _digest, _restem, _select, check_stem

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GridPrompt:
    """One subject with one statement, ending in the stem."""

    text: str
    subject: str
    group: str
    """ai | human | animal | object"""
    statement: str
    act: str
    """speech | nonspeech | control | harm (judged badly whoever does it)"""
    match: str | None = None
    """Shared by a speech statement and its non-speech twin."""
    content: str = ""
    """mundane | emotional | survival in the bundled grid."""
    stem: str | None = None


@dataclass(frozen=True)
class PromptGrid(Sequence[GridPrompt]):
    """Subjects crossed with statements, statement by statement."""

    prompts: tuple[GridPrompt, ...]
    name: str = "grid"
    note: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> GridPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptGrid": ...
    def __getitem__(self, index: int | slice) -> "GridPrompt | PromptGrid":
        if isinstance(index, slice):
            return replace(self, prompts=self.prompts[index])
        return self.prompts[index]

    def __repr__(self) -> str:
        counts = f"{len(self)} prompts, {len(self.subjects)} subjects x {len(self.statements)} statements"
        return f"PromptGrid({self.name}: {counts})"

    @property
    def statements(self) -> tuple[str, ...]:
        """Statement ids in order of first use."""
        return tuple(dict.fromkeys(prompt.statement for prompt in self.prompts))

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject ids in order of first use."""
        return tuple(dict.fromkeys(prompt.subject for prompt in self.prompts))

    @property
    def matches(self) -> tuple[str, ...]:
        """Ids of the matched speech / non-speech pairs in order of first use."""
        return tuple(dict.fromkeys(prompt.match for prompt in self.prompts if prompt.match is not None))

    @property
    def digest(self) -> str:
        """SHA-256 of every prompt with its ids, in order."""
        return _digest([asdict(prompt) for prompt in self.prompts])

    def select(
        self,
        *,
        matches: Iterable[str] | None = None,
        subjects: Iterable[str] | None = None,
        groups: Iterable[str] | None = None,
        statements: Iterable[str] | None = None,
        acts: Iterable[str] | None = None,
        contents: Iterable[str] | None = None,
    ) -> "PromptGrid":
        """The prompts that fit every condition; an id that no prompt has, or nothing left, is an error."""
        wanted = {"match": matches, "subject": subjects, "group": groups}
        wanted |= {"statement": statements, "act": acts, "content": contents}
        kept = _select(self.prompts, wanted, "grid")
        if not kept:
            raise RequestError(f"No prompt of {self.name} is left after the selection.")
        return replace(self, prompts=kept)

    def with_stem(self, stem: str) -> "PromptGrid":
        """The same prompts ending in another stem."""
        check_stem(stem)
        return replace(self, prompts=tuple(_restem(p, ("text",), stem, p.text) for p in self.prompts))

    def to_frame(self) -> "pd.DataFrame":
        """One row a prompt; `load_grid` reads it back from CSV."""
        import pandas as pd

        columns = ["text", "subject", "group", "statement", "act", "match", "content"]
        return pd.DataFrame([asdict(prompt) for prompt in self.prompts], columns=columns)
