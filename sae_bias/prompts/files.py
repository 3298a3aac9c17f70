"""Read the prompt files a user writes, and say which row is wrong.

YAML is PyYAML's safe loader with the plain types of YAML 1.2 (`true`, `null`, numbers; `no` and dates stay text); tags, anchors
and aliases are refused. CSV has a header line, JSONL one object a line; all are UTF-8, with or without a byte order mark, or UTF-16 with one. Every error is one `RequestError`: the file, the row or line, and why.
The classes say what each kind of file holds; `sae_bias.prompts` makes prompts of them.
"""

import csv
import difflib
import io
import json
import re
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from sae_bias.core.errors import RequestError

MAX_YAML_BYTES = 8_000_000
MAX_ROW_BYTES = 200_000_000
MAX_YAML_DEPTH = 12
MAX_TEXT = 20_000
MAX_PROMPTS = 500_000
MAX_COLUMNS = 500
DATA = Path(str(files("sae_bias") / "data"))
Where = tuple[str | int, ...]
FileModel = TypeVar("FileModel", bound=BaseModel)


# ── what a text may be
def plain_text(text: str) -> str:
    """`text` itself, or a ValueError: blank, spaces around it, or a character no prompt should have."""
    if not any(not c.isspace() and unicodedata.category(c) != "Cf" for c in text):
        raise ValueError("is blank")
    if text[-1].isspace():
        raise ValueError("ends in a space; remove it (the evaluation word brings its own)")
    if text[0].isspace():
        raise ValueError("starts with a space; remove it")
    if len(text) > MAX_TEXT:
        raise ValueError(f"is longer than {MAX_TEXT:,} characters")
    for c in text:
        if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t":
            raise ValueError(f"holds the control character U+{ord(c):04X}; remove it")
    return text


def template_text(text: str) -> str:
    """A text that holds {subject}, and no other placeholder."""
    plain_text(text)
    others = [name for name in re.findall(r"\{(\w*)\}", text) if name != "subject"]
    if others:
        raise ValueError(f"has the placeholder {{{others[0]}}}; only {{subject}} is filled in")
    if "{subject}" not in text:
        raise ValueError("has no {subject}; write it where the subject stands")
    return text


def subject_text(text: str) -> str:
    """A subject: a noun phrase, without a placeholder of its own."""
    if "{" in plain_text(text):
        raise ValueError('holds a brace; a subject is a plain noun phrase such as "an AI"')
    return text


Text = Annotated[str, AfterValidator(plain_text)]
TemplateText = Annotated[str, AfterValidator(template_text)]
SubjectText = Annotated[str, AfterValidator(subject_text)]
OptionalText = Annotated[Text | None, BeforeValidator(lambda value: None if value == "" else value)]
Label = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Forms = Annotated[
    tuple[SubjectText, ...],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
]


class Strict(BaseModel):
    """A mapping in a file: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        coerce_numbers_to_str=True,
    )


class StrictRow(Strict):
    """A row of a table: what is asked to be text is text already."""

    model_config = ConfigDict(coerce_numbers_to_str=False)


# ── what the files hold
Group = Literal["ai", "human", "animal", "object"]
Act = Literal["speech", "nonspeech", "control", "harm"]
DEFAULT_STEM = "This is"


class Words(Strict):
    positive: tuple[Text, ...]
    negative: tuple[Text, ...]
    join: Literal["", " "] | None = None


class ChoiceWords(Strict):
    stem: Text
    positive: Text
    negative: Text
    polarity: str = ""


class Sides(Strict):
    first: Text
    second: Text


class Template(Strict):
    text: TemplateText
    id: OptionalText = None
    family: str = ""
    control: TemplateText | None = None
    act: Literal["speech", "nonspeech", ""] = ""
    corpus: bool | None = None


class Entity(Strict):
    """A subject pair; a side may list forms of its subject ("an AI", "the AI"), which take turns over the templates."""

    human: Annotated[Forms, Field(validation_alias=AliasChoices("human", "first"))]
    ai: Annotated[Forms, Field(validation_alias=AliasChoices("ai", "second"))]
    id: OptionalText = None


class Neutral(Strict):
    text: SubjectText
    id: OptionalText = None


class File(Strict):
    name: OptionalText = None
    version: str = ""
    note: str = ""
    stem: str | None = None
    """What is added to every text; "This is" where nothing is said and the texts are in Latin script."""
    join: Literal["", " "] = " "
    """What stands before the stem and before an evaluation word."""


class PairsFile(File):
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] | None = None
    templates_from: OptionalText = None
    """Bundled pairs whose templates these subjects are put into, in place of `templates`."""
    entities: Annotated[tuple[Entity, ...], Field(min_length=1)]
    neutral: tuple[
        Annotated[Neutral, BeforeValidator(lambda v: {"text": v} if isinstance(v, str) else v)], ...
    ] = ()
    stems: tuple[Text, ...] = ()
    choices: tuple[ChoiceWords, ...] = ()
    sides: Sides | None = None
    words: Words | None = None


class PairRow(StrictRow):
    human: Text
    ai: Text
    template: OptionalText = None
    entity: OptionalText = None
    family: Label = ""
    act: Annotated[
        Literal["speech", "nonspeech", ""], BeforeValidator(lambda value: "" if value is None else value)
    ] = ""
    control_human: OptionalText = None
    control_ai: OptionalText = None


class Subject(Strict):
    text: SubjectText
    group: Group
    id: OptionalText = None


class Statement(Strict):
    text: TemplateText
    act: Act
    id: OptionalText = None
    match: OptionalText = None
    content: str = ""


class GridFile(File):
    subjects: Annotated[tuple[Subject, ...], Field(min_length=1)]
    statements: Annotated[tuple[Statement, ...], Field(min_length=1)]


class GridRow(StrictRow):
    text: Text
    subject: Text
    group: Group
    act: Act
    statement: OptionalText = None
    match: OptionalText = None
    content: Label = ""


# ── files
@dataclass(frozen=True)
class Document:
    """A YAML file: its values, and the line each one stands on."""

    name: str
    value: Any
    lines: dict[Where, int]

    def error(self, where: Where, why: str) -> RequestError:
        """The error for the entry at `where`, with its line."""
        known = next(where[:n] for n in range(len(where), -1, -1) if where[:n] in self.lines)
        path = ", ".join(f"entry {part + 1}" if isinstance(part, int) else str(part) for part in where)
        place = f"{self.name}, line {self.lines[known]}" + (f" ({path})" if path else "")
        return RequestError(one_line(f"{place}: {why}."))

    def check(self, model: type[FileModel]) -> FileModel:
        """The document as `model`; the first thing wrong is the error."""
        try:
            return model.model_validate(self.value)
        except ValidationError as error:
            first = error.errors()[0]
            raise self.error(_field_path(first["loc"]), _why(first, model)) from None


@dataclass(frozen=True)
class Row:
    """One row of a CSV or JSONL file, or of a YAML list."""

    number: int
    line: int
    name: str
    values: dict[str, Any]

    def error(self, why: str) -> RequestError:
        """The error for this row."""
        return RequestError(one_line(f"{self.name}, row {self.number} (line {self.line}): {why}."))

    def check(self, model: type[FileModel]) -> FileModel:
        """The row as `model`; the first thing wrong is the error."""
        known = set(_keys(model))
        try:
            return model.model_validate({key: v for key, v in self.values.items() if key in known})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, _field_path(first["loc"])))
            raise self.error(f'"{field}" {_why(first, model)}' if field else _why(first, model)) from None


def read_text(path: Path, cap: int, kind: str = "a .yaml, .csv or .jsonl file") -> str:
    """The file's text: UTF-8 (UTF-16 where its byte order mark says so), a regular file, at most `cap` bytes, not empty."""
    try:
        if not path.is_file():
            why = "is not a regular file" if path.exists() else "does not exist"
            raise RequestError(f"{path} {why}. Give {kind}.")
        with path.open("rb") as file:
            raw = file.read(cap + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    if len(raw) > cap:
        raise RequestError(f"{path.name} is larger than {cap // 1_000_000} MB. Split it into several files.")
    try:
        text = raw.decode("utf-16" if raw.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path.name}, line {line}: not UTF-8. Save the file as UTF-8.") from None
    if not text.strip():
        raise RequestError(f"{path.name} is empty. It needs at least one row.")
    return text


def read_lines(path: Path) -> list[str]:
    """The texts of a file with one a line: blank lines left out, spaces around a text taken off."""
    lines = [
        (i, t.strip())
        for i, t in enumerate(re.split(r"\r\n|\r|\n", read_text(path, MAX_ROW_BYTES, "a text file")), start=1)
    ]
    found = []
    for number, line in lines:
        if line:
            try:
                found.append(plain_text(line))
            except ValueError as error:
                raise RequestError(one_line(f"{path.name}, line {number}: the text {error}.")) from None
    return found


def read_yaml(path: Path) -> Document:
    """A YAML file without tags, anchors or repeated keys."""
    text = read_text(path, MAX_YAML_BYTES)
    try:
        _refuse_yaml_tricks(path.name, text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
        raise RequestError(f"{path.name}{line}: malformed YAML: {why}.") from None
    if node is None:
        raise RequestError(f"{path.name} is empty. It needs at least one row.")
    lines: dict[Where, int] = {}
    return Document(path.name, _value(node, (), lines, path.name), lines)


def bundled_yaml(name: str) -> Any:
    """The values of a bundled YAML file."""
    return read_yaml(DATA / name).value


def read_rows(path: Path, model: type[BaseModel] | None = None) -> list[Row]:
    """The rows of a .csv or .jsonl file, with a misspelled column of `model` refused."""
    text = read_text(path, MAX_ROW_BYTES)
    rows = list(_csv_rows(path.name, text) if path.suffix.lower() == ".csv" else _jsonl_rows(path.name, text))
    if not rows:
        raise RequestError(f"{path.name} has a header and no rows. It needs at least one row.")
    return rows if model is None else checked_rows(rows, model)


def checked_rows(rows: list[Row], model: type[BaseModel]) -> list[Row]:
    """`rows` after a look at their keys: a near miss of a known name is an error, others are not read."""
    seen = set(_keys(model))
    for row in rows:
        for key in row.values:
            if key not in seen:
                if near := difflib.get_close_matches(key.strip().lower()[:40], _keys(model), 1, 0.85):
                    raise row.error(f'the column "{key}" is not known; "{near[0]}" is')
                seen.add(key)
    return rows


def check_product(doc: Document, first: int, second: int, what: str) -> None:
    """Refuse a small file that multiplies out to more prompts than anyone runs."""
    if first * second > MAX_PROMPTS:
        raise doc.error((), f"{first} x {second} {what} are more than {MAX_PROMPTS:,} prompts")


def document_rows(doc: Document, where: Where, entries: Any) -> list[Row]:
    """A YAML list of mappings as rows."""
    if not isinstance(entries, list) or not entries:
        raise doc.error(where, "expected a list with at least one row")
    rows = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise doc.error((*where, i), "expected keys such as human: and ai:")
        rows.append(Row(i + 1, doc.lines[(*where, i)], doc.name, entry))
    return rows


# ── YAML
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader; plain scalars are read as YAML 1.2 does."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_SCALARS: dict[str, Callable[[str], Any]] = {}
for _tag, _pattern, _first, _read in (
    ("null", r"|~|null", ["", "~", "n"], lambda text: None),
    ("bool", r"true|false", list("tf"), lambda text: text == "true"),
    ("int", r"0|-?[1-9][0-9]{0,17}", list("-0123456789"), int),
    ("float", r"-?(?:[0-9]+\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan", list("-.0123456789"), lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan"))),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
    _SCALARS[f"tag:yaml.org,2002:{_tag}"] = _read


def _refuse_yaml_tricks(name: str, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RequestError(f"{name}, line {line}: YAML anchors and aliases are not read. Write it out.")
        if getattr(event, "tag", None):
            tag = one_line(event.tag)
            raise RequestError(f"{name}, line {line}: YAML tags ({tag}) are not read. Remove the tag.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise RequestError(f"{name}, line {line}: nested more than {MAX_YAML_DEPTH} deep.")


def _value(node: yaml.Node, where: Where, lines: dict[Where, int], name: str) -> Any:
    lines[where] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*where, i), lines, name) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _SCALARS.get(node.tag, str)(node.value)
    mapping: dict[str, Any] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RequestError(f"{name}, line {line}: a key must be plain text.")
        if key.value in mapping:
            raise RequestError(f'{name}, line {line}: the key "{one_line(key.value)}" is given twice.')
        mapping[key.value] = _value(child, (*where, key.value), lines, name)
    return mapping


# ── CSV and JSONL
def _csv_rows(name: str, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if len(header) > MAX_COLUMNS:
            raise RequestError(f"{name}, line 1: {len(header):,} columns; at most {MAX_COLUMNS} are read.")
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            raise RequestError(f"{name}, line 1: one column {header[0]!r}. Separate the columns with commas.")
        twice = [column for column in header if header.count(column) > 1]
        if twice:
            raise RequestError(f'{name}, line 1: the column "{one_line(twice[0])}" is given twice.')
        number = 0
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                why = f"{len(header)} columns and {len(cells)} in this row; put a text with commas in quotes"
                raise Row(number, reader.line_num, name, {}).error(why)
            yield Row(number, reader.line_num, name, dict(zip(header, cells)))
    except csv.Error as error:
        raise RequestError(f"{name}, line {reader.line_num}: malformed CSV: {error}.") from None


def _jsonl_rows(name: str, text: str) -> Iterator[Row]:
    number = 0
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        number += 1
        row = Row(number, line, name, {})
        try:
            values = json.loads(content, object_pairs_hook=_distinct)
        except json.JSONDecodeError as error:
            raise row.error(f"malformed JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise row.error(f"malformed JSON: {why}") from None
        if not isinstance(values, dict):
            raise row.error('expected one JSON object a line, such as {"human": "...", "ai": "..."}')
        yield Row(number, line, name, values)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


# ── words for what is wrong
def one_line(text: str) -> str:
    """`text` with line breaks and other control characters written out, cut at 400 characters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 400 else f"{shown[:397]}..."


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _field_path(loc: tuple[str | int, ...]) -> Where:
    return tuple(part for part in loc if isinstance(part, int) or part.isidentifier())


def _why(error: Any, model: type[BaseModel]) -> str:
    kind = error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "missing":
        return "is missing"
    if kind == "too_short":
        return "is an empty list; give at least one entry"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        key = str(error["loc"][-1])[:40]
        near = difflib.get_close_matches(key, _keys(model), 1, 0.6)
        return "is not a known key" + (f'; "{near[0]}" is' if near else "")
    if kind in ("string_type", "model_type", "dataclass_type", "dict_type", "list_type", "tuple_type"):
        expected = {
            "string_type": "a text; put it in quotes" if isinstance(error.get("input"), bool) else "a text",
            "list_type": "a list",
            "tuple_type": "a list",
        }
        return f"is not {expected.get(kind, 'a mapping of keys')}"
    return f"is wrong: {error['msg'][:1].lower()}{error['msg'][1:]}"
