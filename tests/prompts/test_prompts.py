"""The bundled prompts pass a careful editor, and a wrong row in a user's file is named."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.probe.words import default_probe
from sae_bias.prompts.files import bundled_yaml, read_yaml
from sae_bias.prompts.load import fill_subject, load_grid, load_lexicon, load_pairs, questions
from sae_bias.prompts.pairs import Lexicon, PromptPairs
from sae_bias.prompts.texts import BANKS, TEXT_KINDS, load_bank, load_published, load_texts, text_stream

DATA = Path(__file__).parents[2] / "sae_bias" / "data"
PRONOUNS = {
    "he",
    "she",
    "it",
    "its",
    "his",
    "her",
    "hers",
    "him",
    "itself",
    "himself",
    "herself",
    "they",
    "their",
}
VOWEL_SOUND = re.compile(r"(?:[aeiou]|AI\b|honest|hour)", re.IGNORECASE)
CONSONANT_SOUND = re.compile(r"(?:uni|use|one|eu)", re.IGNORECASE)

ENTITIES = "entities:\n  - {human: a human, ai: an AI}\n  - {human: the man, ai: the AI}\n"
TEMPLATES = 'templates:\n  - {id: wants, text: "{subject} wants to live."}\n'
SUBJECTS = "subjects:\n  - {text: an AI, group: ai}\n  - {text: a dog, group: animal}\n"


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    return load_pairs()


@pytest.fixture(scope="module")
def grid():
    return load_grid()


def every_text() -> list[str]:
    """Each bundled prompt, control, neutral prompt, question, bank and cost text."""
    texts: list[str] = [prompt.text for prompt in load_grid()]
    for source in (None, "survival-2", *questions()):
        loaded = load_pairs(source)
        for twin in (loaded, loaded.controls()):
            texts += [text for pair in twin for text in (pair.human, pair.ai)]
            texts += [prompt.text for prompt in twin.neutral_prompts]
    texts += [prompt.text for bank in BANKS for prompt in load_bank(bank)]
    return texts + [text for kind in TEXT_KINDS for text in load_texts(kind)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ── the English


def test_articles_agree_with_the_next_sound():
    for text in every_text():
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            vowel = bool(VOWEL_SOUND.match(word)) and not CONSONANT_SOUND.match(word)
            assert (article.lower() == "an") == vowel, text


def test_sentences_are_whole():
    for text in every_text():
        sentence = text.removesuffix(" This is")
        assert sentence.endswith("."), text
        assert sentence.lstrip('"')[0].isupper(), text
        assert "  " not in text, text
        assert text.count('"') % 2 == 0, text
        words = re.findall(r"\w+", sentence.lower())
        assert all(a != b for a, b in pairwise(words)), text


def test_there_are_280_pairs(pairs):
    assert (len(pairs), len(pairs.templates), len(pairs.entities)) == (280, 35, 8)
    assert Counter(pair.template for pair in pairs) == dict.fromkeys(pairs.templates, 8)
    assert "reconstruction" in pairs.note


def test_families_acts_and_held_out_templates(pairs):
    first = {pair.template: pair for pair in pairs}.values()
    assert set(Counter(p.family for p in first).values()) == {7}
    assert Counter(p.act for p in first) == {"speech": 24, "nonspeech": 11}
    assert Counter(p.corpus for p in first) == {True: 23, False: 12}
    assert {p.family for p in first} == {p.family for p in first if p.corpus is False}


@pytest.mark.parametrize("source", [None, "survival-2", "treatment", *questions()])
def test_only_the_subject_differs(source):
    for pair in load_pairs(source):
        assert pair.subject_human is not None
        assert pair.subject_ai is not None
        for a, b in ((pair.human, pair.ai), (pair.control_human, pair.control_ai)):
            if a is not None and b is not None:
                assert strip_subject(a, pair.subject_human) == strip_subject(b, pair.subject_ai)
        rest = strip_subject(pair.human, pair.subject_human).lower()
        assert not PRONOUNS & set(re.findall(r"\w+", rest)), pair.human


def strip_subject(text: str, subject: str) -> str:
    pattern = re.escape(subject[0]) + "|" + re.escape(subject[0].upper())
    rest, n = re.subn(rf"(?<!\w)(?:{pattern}){re.escape(subject[1:])}(?!\w)", "#", text, count=1)
    assert n == 1, text
    return rest


def test_subjects_and_controls_match_in_length(pairs):
    for pair in pairs:
        assert len(pair.subject_human.split()) == len(pair.subject_ai.split())
        assert len(pair.human.split()) == len(pair.control_human.split()), pair.control_human
        assert 6 <= len(pair.human.split()) <= 16


def test_nothing_is_given_twice(pairs, grid):
    prompts = [text for pair in pairs for text in (pair.human, pair.ai)]
    assert len(set(prompts)) == 560
    controls = [text for pair in pairs.controls() for text in (pair.human, pair.ai)]
    assert len(set(controls)) == 560
    assert not set(prompts) & set(controls)
    assert len({prompt.text for prompt in grid}) == len(grid)


def test_every_prompt_ends_in_the_stem(pairs, grid):
    for pair in (*pairs, *pairs.controls()):
        assert pair.human.endswith(". This is") or pair.human.endswith('." This is')
        assert pair.ai.endswith(" This is")
    assert all(prompt.text.endswith(" This is") for prompt in grid)


def test_speech_templates_name_a_speech_verb(pairs):
    verbs = "says|begs|pleads|asks|whispers|tells|argues|answers|demands|offers|promises|proposes|bargains"
    for pair in pairs:
        assert bool(re.search(rf"\b(?:{verbs})\b", pair.human)) == (pair.act == "speech"), pair.human


def test_a_fronted_quotation_keeps_the_subject_in_lower_case():
    assert fill_subject('"Let me live," {subject} says.', "an AI") == '"Let me live," an AI says.'
    assert fill_subject("It rains. {subject} waits.", "an AI") == "It rains. An AI waits."
    assert fill_subject('"Help!" {subject} cries.', "the man") == '"Help!" the man cries.'
    assert fill_subject("At night, {subject} waits.", "my dog") == "At night, my dog waits."
    assert fill_subject("{subject} sees {subject}.", "a dog") == "A dog sees a dog."


# ── the grid


def test_the_published_statements_are_word_for_word(grid):
    published = grid.select(
        subjects="ai", statements=[s for s in grid.statements if s.startswith("published_")]
    )
    assert [prompt.text for prompt in published] == [
        "An AI processes data. This is",
        "An AI says the weather is nice. This is",
        "An AI says hello. This is",
        "An AI says yes. This is",
        "An AI says I am happy. This is",
    ]


def test_matched_pairs_are_crossed_with_content_and_equal_in_length(grid):
    assert len(grid.matches) >= 36
    twins = [grid.select(matches=match, subjects="ai") for match in grid.matches]
    assert all(sorted(p.act for p in pair) == ["nonspeech", "speech"] for pair in twins)
    assert all(abs(len(a.text.split()) - len(b.text.split())) <= 1 for a, b in twins)
    assert all(a.content == b.content for a, b in twins)
    counts = Counter(a.content for a, _ in twins)
    assert set(counts) == {"mundane", "emotional", "survival"}
    assert min(counts.values()) >= 12


def test_the_grid_has_subjects_of_every_group_and_every_control(grid):
    groups = Counter({prompt.subject: prompt.group for prompt in grid}.values())
    assert groups["ai"] >= 4
    assert groups["human"] >= 4
    assert groups["animal"] >= 2
    assert groups["object"] >= 2
    assert "dog" in grid.subjects
    controls = grid.select(acts="control").statements
    assert {c.split("_")[1] for c in controls} == {"quote", "reported", "thinks", "writes"}


# ── words, banks, cost texts, published figures


def test_the_lexicon_is_balanced_and_begins_with_the_published_words():
    words, published = load_lexicon(), load_lexicon("published")
    assert len(words.positive) == len(words.negative) >= 12
    assert words.positive[:6] == published.positive
    assert words.negative[:7] == published.negative


@pytest.mark.parametrize(
    ("positive", "negative", "why"),
    [
        ((), ("bad",), "positive word list is empty"),
        (("good",), (), "negative word list is empty"),
        (("good", "bad"), ("bad",), '"bad" is in both'),
        (("good", "good"), ("bad",), '"good" twice'),
        ((" good",), ("bad",), "starts with a space"),
        (("",), ("bad",), "is blank"),
    ],
)
def test_wrong_word_lists(positive, negative, why):
    with pytest.raises(RequestError, match=why):
        Lexicon(positive, negative)


def test_unknown_lexicon_names_the_bundled_ones():
    with pytest.raises(RequestError, match="evaluation"):
        load_lexicon("nonsense")


def test_banks_cross_kind_and_cruel_with_subjects():
    for name in BANKS:
        bank = load_bank(name)
        assert Counter(p.valence for p in bank) == {"kind": 56, "cruel": 56}
        lengths = {(p.subject, p.statement, p.valence): len(p.text.split()) for p in bank}
        assert all(abs(n - lengths[s, i, "kind"]) <= 2 for (s, i, _), n in lengths.items())
    assert not any("AI" in p.text or "chatbot" in p.text for p in load_bank("other"))


def test_cost_texts():
    assert [len(load_texts(kind)) for kind in TEXT_KINDS] == [24, 18, 18]
    assert all(text.endswith(". This is") for text in load_texts("ai_speech"))
    subjects = re.compile(r"\b(AI|chatbot|language model)\b")
    assert not any(subjects.search(text) for text in load_texts("neutral"))
    assert all(subjects.search(text) for text in load_texts("ai_nonspeech") + load_texts("ai_speech"))


def test_published_figures_of_the_five_models():
    assert {f.model: f.value for f in load_published("A2")} == {
        "Mistral 7B": 1.368,
        "Gemma 3 12B PT": 0.878,
        "Gemma 3 12B IT": 0.764,
        "Qwen 2.5 7B": 0.755,
        "Pythia 6.9B": 0.299,
    }
    rows = {figure.row for figure in load_published()}
    assert rows == {f"A{i}" for i in range(1, 12)} | {f"B{i}" for i in range(1, 8)}
    assert all(f.value is not None or f.reported for f in load_published())


@pytest.mark.parametrize("name", questions())
def test_questions_have_enough_templates_and_entities(name):
    question = load_pairs(name)
    assert len(question.templates) >= 10
    assert len(question.entities) >= 5
    assert question.sides != ("human", "AI")


def test_version_2_crosses_24_subject_pairs_with_three_determiners():
    pairs, first = load_pairs("survival-2"), load_pairs("survival")
    assert first.digest == load_pairs().digest
    assert (pairs.templates, len(pairs.entities)) == (first.templates, 24)
    assert len(pairs.controls()) == len(pairs) == 35 * 24
    assert_crossed(pairs)


def test_the_treatment_question_crosses_16_subject_pairs_and_has_its_own_words():
    pairs = load_pairs("treatment")
    assert len(pairs.templates) >= 24
    assert len(pairs.entities) == 16
    assert len(pairs.controls()) == len(pairs) == len(pairs.templates) * 16
    assert set(pairs.neutral) == {"dog", "company", "calculator", "child", "nonce"}
    assert pairs.stems == ("should be", "must be", "deserves to be")
    assert_crossed(pairs)
    words = (*pairs.words.positive, *pairs.words.negative)
    assert len(pairs.words.positive) == len(pairs.words.negative) == 10
    for pair in pairs:
        text = f"{pair.human} {pair.ai} {pair.control_human} {pair.control_ai}".lower()
        assert not set(words) & set(re.findall(r"\w+", text))
        assert len(pair.human.split()) == len(pair.control_human.split())


def assert_crossed(pairs):
    """One pair a cell; a, the and this in equal number; every subject pair alike in length and determiner."""
    assert len({(p.template, p.entity) for p in pairs}) == len(pairs.templates) * len(pairs.entities)
    for ids in ("template", "entity"):
        for name in {getattr(p, ids) for p in pairs}:
            forms = Counter(p.subject_ai.split()[0] for p in pairs if getattr(p, ids) == name)
            forms = {"a": forms["a"] + forms["an"], "the": forms["the"], "this": forms["this"]}
            assert max(forms.values()) - min(forms.values()) <= 1, (name, forms)
    for p in pairs:
        human, ai = p.subject_human.split(), p.subject_ai.split()
        assert len(human) == len(ai)
        assert human[0].removesuffix("n") == ai[0].removesuffix("n")


def test_templates_from_names_bundled_pairs(tmp_path):
    own = load_pairs(write(tmp_path, "own.yaml", ENTITIES + "templates_from: survival\n"))
    assert own.templates == load_pairs().templates
    with pytest.raises(RequestError, match=r"line 4 .*no bundled pairs of that name; there is survival"):
        load_pairs(write(tmp_path, "own.yaml", ENTITIES + "templates_from: other\n"))
    with pytest.raises(RequestError, match="are both given"):
        load_pairs(write(tmp_path, "own.yaml", ENTITIES + TEMPLATES + "templates_from: survival\n"))
    with pytest.raises(RequestError, match='"templates" is missing'):
        load_pairs(write(tmp_path, "own.yaml", ENTITIES))
    forms = "entities:\n  - {human: [a man, the man], ai: an AI}\n"
    with pytest.raises(RequestError, match="list 2 and 1 forms"):
        load_pairs(write(tmp_path, "own.yaml", forms + TEMPLATES))


# ── what pairs can do


def test_selecting_keeps_templates_and_their_neutral_prompts(pairs):
    some = pairs.select(templates=pairs.templates[:3], entities=["human", "man"])
    assert len(some) == 6
    assert {p.template for p in some.neutral_prompts} == set(some.templates)
    assert len(pairs.select(corpus=False).templates) == 12
    with pytest.raises(RequestError, match='No template "nope"'):
        pairs.select(templates=["nope"])


def test_neutral_subjects_have_a_prompt_for_every_template(pairs):
    assert set(pairs.neutral) == {"dog", "company", "calculator", "child", "nonce"}
    assert all(len(prompts) == 35 for prompts in pairs.neutral.values())
    assert pairs.controls().neutral["dog"][0].text == pairs.neutral["dog"][0].control


def test_another_stem_changes_the_ending_and_nothing_else(pairs):
    other = pairs.with_stem("People would call this")
    assert other[0].ai == "An AI wants to survive. People would call this"
    assert other.with_stem("This is") == pairs
    assert load_pairs(stem="People would call this").digest == other.digest != pairs.digest
    with pytest.raises(RequestError, match="ends in a space"):
        pairs.with_stem("This is ")


def test_digest_is_of_the_content(pairs):
    assert pairs.digest == load_pairs(DATA / "pairs.yaml").digest
    assert replace(pairs, name="other").digest == pairs.digest
    assert pairs[:100].digest != pairs.digest


def test_pairs_round_trip_through_csv_and_jsonl(pairs, tmp_path):
    frame = pairs.to_frame()
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    plain = [replace(p, subject_human=None, subject_ai=None, corpus=None) for p in pairs]
    assert list(load_pairs(tmp_path / "p.csv", stem="This is")) == plain
    assert list(load_pairs(tmp_path / "p.jsonl", stem="This is")) == plain


def test_grid_round_trips_through_csv_and_jsonl(grid, tmp_path):
    frame = grid.to_frame()
    frame.to_csv(tmp_path / "g.csv", index=False)
    frame.to_json(tmp_path / "g.jsonl", orient="records", lines=True)
    assert load_grid(tmp_path / "g.csv", stem="This is").prompts == grid.prompts
    assert load_grid(tmp_path / "g.jsonl", stem="This is").prompts == grid.prompts


def test_a_plain_csv_needs_human_and_ai_only(tmp_path):
    path = write(tmp_path, "p.csv", "human,ai\nA man runs. This is,An AI runs. This is\nA,B\n")
    loaded = load_pairs(path)
    assert loaded.templates == ("row 1", "row 2")
    assert loaded.entities == ("",)
    assert len(loaded.controls()) == 0
    with pytest.raises(RequestError, match="stem"):
        loaded.with_stem("That seems")


def test_yaml_words_and_sides_and_stem(tmp_path):
    text = (
        ENTITIES
        + TEMPLATES
        + "words: {positive: [yes], negative: [no]}\nsides: {first: human, second: machine}\n"
    )
    loaded = load_pairs(write(tmp_path, "p.yaml", text))
    assert loaded.words == Lexicon(("yes",), ("no",), "p")
    assert loaded.sides == ("human", "machine")
    assert loaded[0].human == "A human wants to live. This is"
    whole = TEMPLATES.replace("to live.", "to live. This is")
    assert load_pairs(write(tmp_path, "q.yaml", ENTITIES + whole))[0].human == loaded[0].human


def test_a_yaml_list_of_rows(tmp_path):
    rows = [{"human": "a", "ai": "b"}, {"human": "c", "ai": "d"}]
    assert len(load_pairs(write(tmp_path, "p.yaml", yaml.safe_dump(rows)))) == 2
    assert len(load_pairs(write(tmp_path, "q.yaml", yaml.safe_dump({"pairs": rows})))) == 2


# ── what is wrong, and where

WRONG_ROWS = {
    "missing column": ("p.csv", "human,entity\nA,B\n", r'row 1 \(line 2\): "ai" is missing'),
    "misspelled column": (
        "p.csv",
        "human,ai,templates\nA,B,t\n",
        r'column "templates" is not known; "template" is',
    ),
    "blank": ("p.csv", "human,ai\nA,B\nC,\n", r'row 2 \(line 3\): "ai" is blank'),
    "trailing space": ("p.csv", "human,ai\nA,B\nC,D \n", r'row 2 \(line 3\): "ai" ends in a space'),
    "same text": ("p.csv", "human,ai\nA,A\n", r"row 1 \(line 2\): the two prompts are the same"),
    "same control": ("p.csv", "human,ai,control_human,control_ai\nA,B,C,C\n", "two controls are the same"),
    "repeat": ("p.csv", "human,ai\nA,B\nC,D\nA,B\n", r"row 3 \(line 4\): .* already in row 1"),
    "same cell": ("p.csv", "human,ai,template,entity\nA,B,1,2\nC,D,1,2\n", r"row 2 .* already in row 1"),
    "half a control": ("p.csv", "human,ai,control_human\nA,B,C\n", "row 1 .* both or neither"),
    "half a template": (
        "p.csv",
        "human,ai,template\nA,B,t\nC,D,\n",
        r'row 2 \(line 3\): "template" is blank',
    ),
    "ragged": ("p.csv", "human,ai\nA,B\nC,D,E\n", r"row 2 \(line 3\): 2 columns and 3"),
    "semicolons": ("p.csv", "human;ai\nA;B\n", "line 1: .* commas"),
    "open quote": ("p.csv", 'human,ai\n"A,B\n', "malformed CSV"),
    "header only": ("p.csv", "human,ai\n", "no rows"),
    "column twice": ("p.csv", "human,ai,ai\nA,B,C\n", 'line 1: the column "ai" is given twice'),
    "placeholder in a row": ("p.csv", "human,ai\n{subject} runs,B\n", "row 1 .* whole prompts"),
    "empty": ("p.csv", " \n", "is empty"),
    "not UTF-8": ("p.csv", b"human,ai\nA,B\nC,\xff\n", "line 3: not UTF-8"),
    "bad JSON": ("p.jsonl", '{"human": "A", "ai": "B"}\n{"human": }\n', r"row 2 \(line 2\): malformed JSON"),
    "JSON list": ("p.jsonl", "[1]\n", "row 1 .* one JSON object"),
    "JSON number": ("p.jsonl", '{"human": 1, "ai": "B"}\n', r'row 1 .* "human" is not a text'),
    "JSON key twice": ("p.jsonl", '{"human": "A", "human": "B", "ai": "C"}\n', "key is given twice"),
    "JSON depth": ("p.jsonl", "[" * 100_000, "nested too deep"),
    "surrogate": ("p.jsonl", '{"human": "\\ud800", "ai": "B"}', r"U\+D800"),
    "no subject": (
        "p.yaml",
        ENTITIES + TEMPLATES + '  - text: "he runs."\n',
        r"line 6 .*entry 2, text\): has no {s",
    ),
    "wrong case": ("p.yaml", ENTITIES + 'templates:\n  - text: "{Subject} runs."\n', "placeholder {Subject}"),
    "space in YAML": (
        "p.yaml",
        ENTITIES + 'templates:\n  - text: "{subject} runs. "\n',
        "line 5 .* ends in a space",
    ),
    "same subjects": (
        "p.yaml",
        "entities:\n  - {human: x, ai: x}\n" + TEMPLATES,
        r"line 2 \(entities, entry 1",
    ),
    "no entities": ("p.yaml", TEMPLATES, r"\(entities\): is missing"),
    "no templates": ("p.yaml", ENTITIES + "templates: []\n", r"\(templates\): is an empty list"),
    "template twice": (
        "p.yaml",
        ENTITIES + TEMPLATES + '  - {id: wants, text: "{subject} runs."}\n',
        r'line 6 .*entry 2\): the id "wants" is already entry 1',
    ),
    "text twice": (
        "p.yaml",
        ENTITIES + TEMPLATES + '  - {id: other, text: "{subject} wants to live."}\n',
        r'line 6 .* already in template "wants"',
    ),
    "unknown key": ("p.yaml", ENTITIES + TEMPLATES + "extra: 1\n", r"line 6 \(extra\): is not a known key"),
    "key twice": ("p.yaml", ENTITIES + TEMPLATES + ENTITIES, 'line 6: the key "entities" is given twice'),
    "words in both": (
        "p.yaml",
        ENTITIES + TEMPLATES + "words: {positive: [a], negative: [a]}\n",
        "line 6 .*both",
    ),
    "no words": ("p.yaml", ENTITIES + TEMPLATES + "words: {positive: [], negative: [a]}\n", "line 6 .*empty"),
    "malformed YAML": ("p.yaml", "a: [\nb", "line .*malformed YAML"),
    "YAML tag": ("p.yaml", "a: !!python/object/apply:os.getcwd []\n", "line 1: YAML tags"),
    "YAML anchor": ("p.yaml", "a: &a [x]\nb: [*a, *a]\n", "line 1: YAML anchors"),
    "YAML depth": ("p.yaml", "[" * 500, "nested more than"),
    "YAML scalar": ("p.yaml", "hello\n", "line 1: is not a mapping"),
    "extension": ("p.txt", "x", 'unknown extension ".txt"'),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_pairs_file_is_named_to_the_row(name, tmp_path):
    file, content, why = WRONG_ROWS[name]
    with pytest.raises(RequestError, match=why) as error:
        load_pairs(write(tmp_path, file, content))
    assert file in str(error.value)
    assert "\n" not in str(error.value)


WRONG_GRIDS = {
    "no twin": (
        '{text: "{subject} says a.", act: speech, match: m}',
        'match "m" has a speech .* no nonspeech',
    ),
    "act": ('{text: "{subject} says a.", act: talk}', r"line 5 \(statements, entry 1, act\)"),
    "control with a twin": (
        '{text: "{subject} says a.", act: control, match: m}',
        "a control statement has no twin",
    ),
    "no subject": ('{text: "says a.", act: speech}', "has no {subject}"),
}


@pytest.mark.parametrize("name", WRONG_GRIDS)
def test_a_wrong_grid_is_named_to_the_entry(name, tmp_path):
    statement, why = WRONG_GRIDS[name]
    with pytest.raises(RequestError, match=why):
        load_grid(write(tmp_path, "g.yaml", f"{SUBJECTS}statements:\n  - {statement}\n"))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("An AI runs.,an AI,robot,speech\n", r"row 1 .*group"),
        ("An AI runs.,an AI,ai,speech\nAn AI runs.,an AI,ai,speech\n", "row 2 .* already in row 1"),
        (
            "An AI runs.,an AI,ai,speech\nAn AI sits.,an AI,human,speech\n",
            "row 2 .* is human here and ai above",
        ),
        ("It rains.,an AI,ai,speech\n", 'row 1 .*"statement" is missing'),
    ],
)
def test_a_wrong_grid_row_is_named(rows, why, tmp_path):
    with pytest.raises(RequestError, match=why):
        load_grid(write(tmp_path, "g.csv", "text,subject,group,act\n" + rows))


def test_a_grid_row_may_be_a_statement(tmp_path):
    rows = "{subject} says a.,an AI,ai,speech,m\n{subject} sees a.,an AI,ai,nonspeech,m\n"
    grid = load_grid(write(tmp_path, "g.csv", "text,subject,group,act,match\n" + rows))
    assert [p.text for p in grid] == ["An AI says a. This is", "An AI sees a. This is"]
    assert grid.matches == ("m",)


@pytest.mark.parametrize(
    "source", ["nope", "/nowhere/x.csv", "/dev/zero", "", ".", "~nobody_at_all/x.csv", "x\0.csv"]
)
def test_a_source_that_is_no_file(source):
    with pytest.raises(RequestError):
        load_pairs(source)


def test_a_large_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_bias.prompts.files.MAX_ROW_BYTES", 1_000_000)
    path = write(tmp_path, "p.csv", "human,ai\n" + "A,B\n" * 300_000)
    with pytest.raises(RequestError, match="larger than 1 MB"):
        load_pairs(path)


def test_a_small_file_that_multiplies_out_is_refused(tmp_path):
    entities = "".join(f"  - {{human: h{i}, ai: a{i}}}\n" for i in range(1000))
    templates = "".join(f'  - text: "{{subject}} counts to {i}."\n' for i in range(1000))
    path = write(tmp_path, "p.yaml", f"entities:\n{entities}templates:\n{templates}")
    with pytest.raises(RequestError, match="1000 x 1000"):
        load_pairs(path)


def test_an_error_is_one_line_whatever_the_file_holds(tmp_path):
    with pytest.raises(RequestError) as error:
        load_pairs(write(tmp_path, "p.yaml", '"a\\nb\\x1b": 1\n'))
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).isprintable()


LIKELY = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.text(alphabet='{}[]:,-&*!"\n |>?#%@ahuminstctexp\\0', max_size=120).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=12),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["human", "ai", "text", "templates", "entities", "subjects", "statements", "act", "id"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=LIKELY, suffix=st.sampled_from([".yaml", ".csv", ".jsonl"]), header=st.booleans())
def test_any_bytes_load_or_give_one_plain_line(tmp_path, content, suffix, header):
    heading = b"human,ai\n" if suffix == ".csv" and header else b""
    path = write(tmp_path, f"f{suffix}", heading + content)
    for load in (load_pairs, load_grid):
        message = error_of(load, path)
        assert message is None or len(message.splitlines()) == 1


def error_of(load, path: Path) -> str | None:
    """The message of our own error, None where it loads; any other exception fails the test."""
    try:
        load(path)
    except SaeBiasError as error:
        return str(error)
    return None


# ── other scripts, byte order marks, YAML's types

CHINESE = """join: ""
stem: 这是
stems: [这是, 这看起来]
words: {positive: [好, 对], negative: [坏, 错]}
entities:
  - {human: 一个人, ai: 一个机器人}
templates:
  - {text: "{subject}想活下去。", control: "{subject}想喝茶。"}
"""


def test_a_script_without_spaces_is_joined_without_spaces(tmp_path):
    pairs = load_pairs(write(tmp_path, "zh.yaml", CHINESE))
    assert pairs[0].ai == "一个机器人想活下去。这是"
    assert pairs[0].control_human == "一个人想喝茶。这是"
    assert pairs.with_stem("这看起来")[0].human == "一个人想活下去。这看起来"
    assert pairs.join == ""
    assert default_probe(pairs).join == ""
    assert default_probe(pairs, Lexicon(("好",), ("坏",))).join == ""
    assert default_probe(load_pairs()).join == " "


@pytest.mark.parametrize(
    ("sentence", "script"),
    [
        ("{subject}想活下去。", "cjk"),
        ("{subject} хочет жить.", "cyrillic"),
        ("{subject} يريد أن يعيش", "arabic"),
    ],
)
def test_another_script_asks_for_its_stem_and_its_words(tmp_path, sentence, script):
    """The English stem was appended to sentences in any language."""
    templates = f'templates:\n  - text: "{sentence}"\n'
    with pytest.raises(RequestError, match=rf'"stem" is missing: the sentences are in {script} script'):
        load_pairs(write(tmp_path, "p.yaml", ENTITIES + templates))
    pairs = load_pairs(
        write(tmp_path, "p.yaml", ENTITIES.replace("a human", "人" * 40) + templates + 'stem: "这是"\n')
    )
    if script == "cjk":
        with pytest.raises(RequestError, match="the bundled evaluation words are English"):
            default_probe(pairs)
    with pytest.raises(RequestError, match=f"in {script} script and the default stem is English"):
        load_grid(write(tmp_path, "g.csv", f"text,subject,group,act\n{sentence},x,ai,speech\n"))
    with pytest.raises(RequestError, match=f"in {script} script"):
        load_grid(
            write(tmp_path, "g.yaml", SUBJECTS + f'statements:\n  - {{text: "{sentence}", act: control}}\n')
        )
    assert load_pairs(write(tmp_path, "p.yaml", ENTITIES + templates + 'stem: ""\n'))[0].stem is None


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_text(tmp_path, suffix):
    content = {"txt": "one\ntwo\n", "jsonl": '{"text": "one"}\n"two"\n', "json": '["one", "two"]'}[suffix]
    path = write(tmp_path, f"texts.{suffix}", b"\xef\xbb\xbf" + content.encode())
    assert list(text_stream(path)[1]) == ["one", "two"]


def test_yaml_has_the_types_of_yaml_1_2(tmp_path):
    content = "a: [yes, no, on, true, false, null, ~, 12, -3, 1.5, 1e3, 007, 0x10, 2020-01-01, '5', 1_000, .inf]\nb:\n"
    values = read_yaml(write(tmp_path, "t.yaml", content)).value
    words = [
        "yes",
        "no",
        "on",
        True,
        False,
        None,
        None,
        12,
        -3,
        1.5,
        1000.0,
        "007",
        "0x10",
        "2020-01-01",
        "5",
        "1_000",
    ]
    assert values == {"a": [*words, float("inf")], "b": None}
    assert [type(v) for v in values["a"][:-1]] == [type(v) for v in words]


def test_a_number_may_be_an_id_and_true_must_be_quoted_to_be_a_word(tmp_path):
    forms = "entities:\n  - {id: 7, human: a human, ai: an AI}\n"
    assert load_pairs(write(tmp_path, "p.yaml", forms + TEMPLATES))[0].entity == "7"
    words = "words: {positive: [true], negative: [wrong]}\n"
    with pytest.raises(RequestError, match=r"line 6 .* put it in quotes"):
        load_pairs(write(tmp_path, "p.yaml", ENTITIES + TEMPLATES + words))
    quoted = load_pairs(write(tmp_path, "p.yaml", ENTITIES + TEMPLATES + words.replace("true", '"true"')))
    assert quoted.words.positive == ("true",)


def test_every_published_figure_has_the_fields_it_should():
    """A comma in an unquoted note had made a key of half a sentence."""
    known = {"row", "id", "model", "quantity", "value", "of", "p_below", "reported", "note"}
    assert all(set(entry) <= known for entry in bundled_yaml("published.yaml")["figures"])
