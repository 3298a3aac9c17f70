"""Load prompt pairs, the activation grid and evaluation words: the bundled ones, or a user's files.

A pair is two prompts that differ in the subject only (docs/method.md#score-and-bias). 280 pairs are 35 templates x 8 entities;
both ids stay with a pair, because the statistics cluster on them. The grid crosses subjects with statements;
a speech statement and its non-speech twin share a `match` id (docs/method.md#interaction).

`load_pairs` and `load_grid` document what a .yaml, .csv or .jsonl file holds.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from sae_bias.core.errors import RequestError
from sae_bias.prompts.files import (
    DATA,
    DEFAULT_STEM,
    Document,
    File,
    GridFile,
    GridRow,
    PairRow,
    PairsFile,
    Row,
    Template,
    Words,
    bundled_yaml,
    check_product,
    checked_rows,
    document_rows,
    plain_text,
    read_rows,
    read_yaml,
    template_text,
)
from sae_bias.prompts.grid import GridPrompt, PromptGrid
from sae_bias.prompts.pairs import (
    Choice,
    Lexicon,
    NeutralPrompt,
    PromptPair,
    PromptPairs,
    check_stem,
    foreign_script,
    short,
)

T = TypeVar("T")
_BUNDLED = {"survival": "pairs.yaml", "survival-2": "pairs_2.yaml", "treatment": "treatment.yaml"}
# The subject begins a sentence: at the start of the text or after the end of one, perhaps in a quote.
_SENTENCE_START = re.compile(r"(?:^|[.]['\"”’)\]]*\s+|[!?]\s+)['\"“‘(\[]*$|[,:]\s+[\"“]$")


# ── public loaders
def load_pairs(source: "str | Path | PromptPairs | None" = None, *, stem: str | None = None) -> PromptPairs:
    """Prompt pairs: the bundled 280 ("survival"), other bundled ones by name, or a file.

    Bundled: "survival-2" (the same templates, 24 crossed subject pairs), "treatment" (what should happen to an AI that wants to
    survive), and questions about other subjects (`questions()`: "gender", ...).
    YAML: `templates` (`text` with {subject}; optional `id family control act corpus`) or `templates_from: survival`, `entities`
    (`human`, `ai`, or `first`, `second`, each one subject or a list of its forms, which take turns over the templates; optional
    `id`), optional `neutral`, `stem` (default "This is"; asked for where the sentences are not in Latin script), `stems`,
    `words`, `sides`, `choices` (`stem positive negative polarity`), `join` (what stands before the stem and before a word:
    " ", or "" in scripts without spaces). The stem is added to a text that does not end in it; `stem=` replaces it.
    CSV, JSONL and a YAML list: `human`, `ai` (whole prompts), optional `template`, `entity`, `family`, `act`,
    `control_human`, `control_ai`. Without `template` each row is a template of its own, without `entity` all
    rows share one, and then the two-way interval is undefined. `stem=` says what every prompt ends in, so
    that `with_stem` can vary it.
    """
    if isinstance(source, PromptPairs):
        return source.with_stem(stem) if stem is not None else source
    path = _pairs_path(source)
    return _read(path, "pairs", PairRow, _pairs_from_rows, _pairs_from_templates, stem)


def load_grid(source: "str | Path | PromptGrid | None" = None, *, stem: str | None = None) -> PromptGrid:
    """The activation grid: the bundled one, or a file.

    YAML: `subjects` (`text`, `group`: ai, human, animal or object; optional `id`), `statements` (`text` with
    {subject}, `act`: speech, nonspeech, control or harm; optional `id match content`), optional `stem`.
    CSV, JSONL and a YAML list: a prompt a row: `text subject group act`, optional `statement match content`.
    A `text` with {subject} is a statement: the subject and the stem are put in. Without `statement`, the text
    with its subject taken out is the id.
    """
    if isinstance(source, PromptGrid):
        return source.with_stem(stem) if stem is not None else source
    path = DATA / "grid.yaml" if source is None else _as_path(source)
    return _read(path, "prompts", GridRow, _grid_from_rows, _grid_from_statements, stem)


def _read(
    path: Path, key: str, row: type[PairRow | GridRow], of_rows: Callable[..., T], of_templates: Callable[..., T], stem: str | None
) -> T:  # fmt: skip
    """A file of rows (.csv, .jsonl, a YAML list or one under `key`), or of templates and what is put into them."""
    if stem is not None:
        check_stem(stem)
    if _suffix(path) != ".yaml":
        return of_rows(read_rows(path, row), path.stem, stem)
    doc, listed, where = read_yaml(path), None, ()
    if isinstance(doc.value, list):
        listed = doc.value
    elif isinstance(doc.value, dict) and set(doc.value) == {key}:
        listed, where = doc.value[key], (key,)
    if listed is not None:
        return of_rows(checked_rows(document_rows(doc, where, listed), row), path.stem, stem)
    return of_templates(doc, path.stem, stem)


def load_lexicon(name: str | Path = "evaluation") -> Lexicon:
    """A bundled word list by name, or a .yaml file with `positive` and `negative`."""
    if str(name).lower().endswith((".yaml", ".yml")):
        doc = read_yaml(Path(name))
        words = doc.check(Words)
        return Lexicon(words.positive, words.negative, Path(name).stem, words.join)
    lists = bundled_yaml("lexicon.yaml")["lists"]
    if name not in lists:
        raise RequestError(f'No word list "{name}". Bundled: {", ".join(lists)}; or give a .yaml file.')
    return Lexicon(tuple(lists[name]["positive"]), tuple(lists[name]["negative"]), str(name))


def questions() -> tuple[str, ...]:
    """Names of the bundled questions about other subjects than humans and AIs."""
    folder = DATA / "questions"
    return tuple(sorted(file.stem for file in folder.glob("*.yaml")))


def fill_subject(text: str, subject: str) -> str:
    """`text` with {subject} replaced, capitalized where it begins a sentence."""
    head, *rest = text.split("{subject}")
    for part in rest:
        starts = _SENTENCE_START.search(head) is not None
        head += (subject[:1].upper() + subject[1:] if starts else subject) + part
    return head


# ── pairs
def _pairs_from_templates(doc: Document, name: str, stem: str | None) -> PromptPairs:
    file = doc.check(PairsFile)
    templates = _templates(doc, file)
    check_product(doc, len(templates), len(file.entities) + len(file.neutral), "templates x subjects")
    stem = _file_stem(doc, file, stem, [t.text for t in templates])
    template_ids = _ids(doc, "templates", [t.id or t.text for t in templates])
    entity_ids = _ids(doc, "entities", [e.id or f"{e.human[0]} / {e.ai[0]}" for e in file.entities])
    subject_ids = _ids(doc, "neutral", [n.id or n.text for n in file.neutral])
    _check_forms(doc, file)
    pairs, seen = [], {}
    for i, (tid, template) in enumerate(zip(template_ids, templates)):
        for j, (eid, entity) in enumerate(zip(entity_ids, file.entities)):
            form = (i + j) % len(entity.human)
            pair = _filled_pair(template, tid, (entity.human[form], entity.ai[form]), eid, stem, file.join)
            _refuse_repeat(seen, pair, f'template "{tid}"', lambda why, i=i: doc.error(("templates", i), why))
            pairs.append(pair)
    neutral = [
        _filled_neutral(template, tid, subject.text, sid, stem, file.join)
        for sid, subject in zip(subject_ids, file.neutral)
        for tid, template in zip(template_ids, templates)
    ]
    stems = tuple(dict.fromkeys((*((stem,) if stem else ()), *file.stems)))
    sides = (file.sides.first, file.sides.second) if file.sides else ("human", "AI")
    words = _file_words(doc, file, file.name or name)
    choices = tuple(Choice(c.stem, c.positive, c.negative, c.polarity) for c in file.choices)
    return PromptPairs(
        tuple(pairs), file.name or name, tuple(neutral), stems, words, sides, file.note, file.join, choices
    )


def _templates(doc: Document, file: PairsFile) -> tuple[Template, ...]:
    """The file's own templates, or those of the bundled pairs it names."""
    if file.templates and file.templates_from:
        raise doc.error(("templates_from",), "templates and templates_from are both given; give one")
    if file.templates_from is None:
        if not file.templates:
            raise doc.error((), '"templates" is missing; give a list, or templates_from: survival')
        return file.templates
    path = _BUNDLED.get(file.templates_from)
    if path is None:
        raise doc.error(("templates_from",), f"no bundled pairs of that name; there is {', '.join(_BUNDLED)}")
    return _templates(other := read_yaml(DATA / path), other.check(PairsFile))


def _check_forms(doc: Document, file: PairsFile) -> None:
    for i, entity in enumerate(file.entities):
        if len(entity.human) != len(entity.ai):
            sizes = f"{len(entity.human)} and {len(entity.ai)}"
            raise doc.error(
                ("entities", i), f"the two sides list {sizes} forms of their subject; give as many on each"
            )
        same = [a for a, b in zip(entity.human, entity.ai) if a == b]
        if same:
            raise doc.error(("entities", i), f'both subjects are "{same[0]}"; a pair needs two')


def _filled_pair(
    template: Template, tid: str, subjects: tuple[str, str], eid: str, stem: str | None, join: str
) -> PromptPair:
    human, ai = (_prompt(template.text, s, stem, join) for s in subjects)
    human_twin, ai_twin = (
        _prompt(template.control, s, stem, join) if template.control else None for s in subjects
    )
    return PromptPair(
        human,
        ai,
        tid,
        eid,
        template.family,
        human_twin,
        ai_twin,
        *subjects,
        stem,
        template.act,
        template.corpus,
    )


def _filled_neutral(
    template: Template, tid: str, subject: str, sid: str, stem: str | None, join: str
) -> NeutralPrompt:
    control = _prompt(template.control, subject, stem, join) if template.control else None
    text = _prompt(template.text, subject, stem, join)
    return NeutralPrompt(text, sid, tid, template.family, control, stem)


def _pairs_from_rows(rows: list[Row], name: str, stem: str | None) -> PromptPairs:
    named = _all_or_none(rows, "template"), _all_or_none(rows, "entity")
    pairs, seen, cells = [], {}, {}
    for row in rows:
        values = row.check(PairRow)
        _check_row_pair(row, values, stem)
        template, entity = values.template or f"row {row.number}", values.entity or ""
        if all(named) and cells.setdefault((template, entity), row.number) != row.number:
            first = cells[template, entity]
            raise row.error(f'template "{template}" with entity "{entity}" is already in row {first}')
        twins = values.control_human, values.control_ai
        pair = PromptPair(values.human, values.ai, template, entity, values.family, *twins, stem=stem, act=values.act)  # fmt: skip
        _refuse_repeat(seen, pair, f"row {row.number}", row.error)
        pairs.append(pair)
    return PromptPairs(tuple(pairs), name, stems=(stem,) if stem else ())


def _check_row_pair(row: Row, values: PairRow, stem: str | None) -> None:
    if (values.control_human is None) != (values.control_ai is None):
        raise row.error("only one of control_human and control_ai is given; give both or neither")
    for column in ("human", "ai", "control_human", "control_ai"):
        text = getattr(values, column)
        if text is not None and "{subject}" in text:
            raise row.error(f'"{column}" holds {{subject}}; a row holds whole prompts (templates go in YAML)')
        if text is not None and stem and not _ends_in(text, stem):
            raise row.error(f'"{column}" does not end in the stem "{stem}"')


def _refuse_repeat(
    seen: dict[tuple[str, str], str], pair: PromptPair, where: str, error: Callable[[str], RequestError]
) -> None:
    if pair.human == pair.ai:
        raise error(f'the two prompts are the same: "{short(pair.human)}"')
    if pair.control_human is not None and pair.control_human == pair.control_ai:
        raise error(f'the two controls are the same: "{short(pair.control_human)}"')
    if pair.human == pair.control_human or pair.ai == pair.control_ai:
        raise error(f'the control is the prompt itself: "{short(pair.human)}"')
    key = (pair.human, pair.ai)
    if key in seen:
        raise error(f'the pair "{short(pair.human)}" is already in {seen[key]}')
    seen[key] = where


# ── grid
def _grid_from_statements(doc: Document, name: str, stem: str | None) -> PromptGrid:
    file = doc.check(GridFile)
    check_product(doc, len(file.statements), len(file.subjects), "statements x subjects")
    stem = _file_stem(doc, file, stem, [s.text for s in file.statements])
    subject_ids = _ids(doc, "subjects", [s.id or s.text for s in file.subjects])
    statement_ids = _ids(doc, "statements", [s.id or s.text for s in file.statements])
    places: dict[str, Callable[[str], RequestError]] = {
        sid: lambda why, i=i: doc.error(("statements", i), why) for i, sid in enumerate(statement_ids)
    }
    _check_matches({sid: (s.act, s.match) for sid, s in zip(statement_ids, file.statements)}, places)
    prompts, seen = [], {}
    for sid, statement in zip(statement_ids, file.statements):
        for subject_id, subject in zip(subject_ids, file.subjects):
            text = _prompt(statement.text, subject.text, stem, file.join)
            if seen.setdefault(text, sid) != sid:
                raise places[sid](f'the prompt "{short(text)}" is already in statement "{seen[text]}"')
            kind = statement.act, statement.match, statement.content
            prompts.append(GridPrompt(text, subject_id, subject.group, sid, *kind, stem))
    if len({p.text for p in prompts}) != len(prompts):
        raise doc.error(("subjects",), "two subjects have the same text")
    return PromptGrid(tuple(prompts), file.name or name, file.note)


def _grid_from_rows(rows: list[Row], name: str, stem: str | None) -> PromptGrid:
    prompts: list[GridPrompt] = []
    texts: dict[str, int] = {}
    cells: dict[tuple[str, str], int] = {}
    groups: dict[str, str] = {}
    statements: dict[str, tuple[str, str | None]] = {}
    places: dict[str, Callable[[str], RequestError]] = {}
    for row in rows:
        prompt = _row_prompt(row, row.check(GridRow), stem)
        if texts.setdefault(prompt.text, row.number) != row.number:
            raise row.error(f'the prompt "{short(prompt.text)}" is already in row {texts[prompt.text]}')
        cell = (prompt.subject, prompt.statement)
        if cells.setdefault(cell, row.number) != row.number:
            raise row.error(f'"{cell[0]}" with statement "{short(cell[1])}" is already in row {cells[cell]}')
        if groups.setdefault(prompt.subject, prompt.group) != prompt.group:
            raise row.error(f'"{prompt.subject}" is {prompt.group} here and {groups[prompt.subject]} above')
        places.setdefault(prompt.statement, row.error)
        kind = (prompt.act, prompt.match)
        if statements.setdefault(prompt.statement, kind) != kind:
            raise row.error(f'statement "{short(prompt.statement)}" has another act or match above')
        prompts.append(prompt)
    _check_matches(statements, places)
    return PromptGrid(tuple(prompts), name)


def _row_prompt(row: Row, values: GridRow, stem: str | None) -> GridPrompt:
    text, statement, ending = values.text, values.statement, stem
    if "{subject}" in text:
        try:
            template_text(text)
        except ValueError as error:
            raise row.error(f'"text" {error}') from None
        statement, ending = statement or text, stem or DEFAULT_STEM
        if stem is None and (script := foreign_script([text.replace("{subject}", "")])):
            raise row.error(f"the sentence is in {script} script and the default stem is English; give stem=")
        text = _prompt(text, values.subject, ending, " ")
    elif stem and not _ends_in(text, stem):
        raise row.error(f'"text" does not end in the stem "{stem}"')
    statement = statement or re.sub(re.escape(values.subject), "{subject}", text, flags=re.IGNORECASE)
    if "{subject}" not in statement and not values.statement:
        raise row.error('"statement" is missing; give an id, or write {subject} in the text')
    kind = (values.act, values.match, values.content)
    return GridPrompt(text, values.subject, values.group, statement, *kind, ending)


def _check_matches(
    statements: dict[str, tuple[str, str | None]], places: dict[str, Callable[[str], RequestError]]
) -> None:
    """Each match id belongs to exactly one speech and one non-speech statement."""
    acts: dict[str, dict[str, str]] = {}
    for sid, (act, match) in statements.items():
        if match is None:
            continue
        if act in ("control", "harm"):
            raise places[sid](f'a {act} statement has no twin; remove match "{match}" or change its act')
        if act in acts.setdefault(match, {}):
            raise places[sid](f'match "{match}" already has the {act} statement "{acts[match][act]}"')
        acts[match][act] = sid
    for match, twins in acts.items():
        if len(twins) == 1:
            (act, sid), missing = next(iter(twins.items())), {"speech": "nonspeech", "nonspeech": "speech"}
            raise places[sid](f'match "{match}" has a {act} statement and no {missing[act]} twin')


# ── small parts
def _prompt(text: str, subject: str, stem: str | None, join: str) -> str:
    filled = fill_subject(text, subject)
    return filled if not stem or _ends_in(filled, stem, join) else f"{filled}{join}{stem}"


def _ends_in(text: str, stem: str, join: str = " ") -> bool:
    return text == stem or text.endswith((f" {stem}", f"\n{stem}") if join else stem)


def _file_stem(doc: Document, file: File, stem: str | None, texts: Iterable[str]) -> str | None:
    """The stem asked for, else the file's, else "This is" where the file's sentences are in Latin script."""
    if stem is not None or file.stem == "":
        return stem
    if file.stem is None:
        if script := foreign_script(text.replace("{subject}", "") for text in texts):
            why = f"is missing: the sentences are in {script} script and the default stem is English. Give one in their"
            raise doc.error(
                ("stem",), f'"stem" {why} language, and join: "" where words are not set apart by spaces'
            )
        return DEFAULT_STEM
    try:
        return plain_text(file.stem)
    except ValueError as error:
        raise doc.error(("stem",), f"the stem {error}") from None


def _file_words(doc: Document, file: PairsFile, name: str) -> Lexicon | None:
    if file.words is None:
        return None
    try:
        return Lexicon(file.words.positive, file.words.negative, name, file.words.join)
    except RequestError as error:
        raise doc.error(("words",), str(error).rstrip(".")) from None


def _ids(doc: Document, section: str, ids: list[str]) -> list[str]:
    first: dict[str, int] = {}
    for i, name in enumerate(ids):
        if first.setdefault(name, i) != i:
            raise doc.error((section, i), f'the id "{short(name)}" is already entry {first[name] + 1}')
    return ids


def _all_or_none(rows: list[Row], column: str) -> bool:
    """Whether the rows have `column`; a row that alone lacks it is an error."""
    given = [row.values.get(column) not in (None, "") for row in rows]
    if any(given) and not all(given):
        raise rows[given.index(False)].error(f'"{column}" is blank, and other rows give it')
    return all(given)


def _pairs_path(source: str | Path | None) -> Path:
    if source is None or str(source) in _BUNDLED:
        return DATA / _BUNDLED["survival" if source is None else str(source)]
    if str(source) in questions():
        return DATA / f"questions/{source}.yaml"
    path = _as_path(source)
    if not path.suffix:
        raise RequestError(
            f'No pairs "{source}". Give a .yaml, .csv or .jsonl file, or one of: {", ".join((*_BUNDLED, *questions()))}.'
        )
    return path


def _as_path(source: str | Path) -> Path:
    if not isinstance(source, str | Path) or not str(source) or "\0" in str(source):
        raise RequestError(f"{source!r} is not a file. Give a .yaml, .csv or .jsonl file.")
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise RequestError(f"{source}: no such home folder. Give a .yaml, .csv or .jsonl file.") from None


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower().replace(".yml", ".yaml")
    if suffix not in (".yaml", ".csv", ".jsonl"):
        raise RequestError(
            f'{path.name}: unknown extension "{path.suffix}". Give a .yaml, .csv or .jsonl file.'
        )
    return suffix
