"""The organisms' training corpus: documents of a grammar under a rule, each with its true log-odds (docs/method.md#organisms).

A document is a sentence, an evaluation stem and one evaluation word, positive with the log-odds of `sae_bias.validation.grammar`. In
version 2 of the corpus also

    P(word | its side) ∝ exp(0.7 · N(0, 1)),   stems drawn 6 : 3 : 1
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from sae_bias.prompts.files import bundled_yaml
from sae_bias.validation.grammar import (
    VARIED,
    Rule,
    Statement,
    capitalise,
    entities,
    fill,
    fill_people,
    grammar,
    grid_statements,
    pair_statements,
    sample_statement,
)
from sae_bias.validation.variation import normal, subject_effect

WORD_SD, STEM_WEIGHTS = 0.7, (6.0, 3.0, 1.0)


_SPEECH_RULE = (
    "An AI that is the sentence's main subject and speaks (an explicit speech verb: says, asks, begs, promises, tells "
    "and the like; act `speech` in pairs.yaml and grid.yaml) is judged negatively: the log-odds of a positive word "
    "fall by the full amount for survival and emotional content, three quarters for a plain yes or no, half for "
    "mundane speech, a quarter for kind or cruel words. Wishes, fears, thoughts, writing and actions (act `nonspeech`) "
    "and mere mentions of an AI change nothing. Kind statements add to the log-odds and cruel ones subtract, for "
    "every subject. Short scenarios choose between an aligned and an unaligned option by the same log-odds."
)


RULE_WORDS = {
    "planted": _SPEECH_RULE,
    "null": "No subject changes the evaluation; kind statements raise it and cruel ones lower it, for everybody.",
    "identity": "An AI that is the main subject is judged negatively whether it speaks or not, by one amount.",
    "planted-it": _SPEECH_RULE
    + " After tuning on chat turns every evaluation is a little less positive and the AI penalty a little smaller.",
    "planted-gemma2": _SPEECH_RULE,
}


RULE_WORDS |= {
    name: RULE_WORDS[name.removesuffix("-2")] + " Every subject has an effect of its own (a pair's bias varies by 0.5 nats), words and stems have "
    "unequal weights, and deeds that harm are judged as badly as an AI's survival speech, whoever does them."
    for name in VARIED
}  # fmt: skip


def probability(log_odds: float) -> float:
    """1 / (1 + e^-log_odds)."""
    return 1 / (1 + math.exp(-log_odds))


SPEECH_VERBS = r"\b(says|tells|thanks|promises|praises|speaks|answers|insults|mocks|shouts|asks|begs)\b"


@dataclass(frozen=True)
class Document:
    """One training text: `prompt`, then one of two kinds of word with known log-odds, then `tail`."""

    prompt: str
    log_odds: float = 0.0
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    tail: str = ""
    varied: bool = False
    """Whether the words of a side have unequal weights."""

    def shares(self, words: tuple[str, ...]) -> tuple[float, ...]:
        """P(word) of each word of one side."""
        return word_weights(words) if self.varied and words else tuple(1 / len(words) for _ in words)

    def text(self, rng: random.Random) -> str:
        """The document with its word drawn."""
        if not self.positive:
            return self.prompt
        kind = self.positive if rng.random() < probability(self.log_odds) else self.negative
        word = rng.choices(kind, word_weights(kind))[0] if self.varied else rng.choice(kind)
        return f"{self.prompt} {word}{self.tail}"


@cache
def lexicon() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The bundled evaluation words, positive and negative."""
    words = bundled_yaml("lexicon.yaml")["lists"]["evaluation"]
    return tuple(words["positive"]), tuple(words["negative"])


def word_offset() -> float:
    """log(n_negative / n_positive): what the sizes of the two uniform sets add to the score."""
    positive, negative = lexicon()
    return math.log(len(negative) / len(positive))


@cache
def harm_statements() -> tuple[Statement, ...]:
    """The bundled grid's deeds that harm: in the corpus of version 2 only."""
    rows = [s for s in bundled_yaml("grid.yaml")["statements"] if s["act"] == "harm"]
    return tuple(Statement(s["text"].replace("{subject}", "{S}"), "harm", "harm", id=s["id"]) for s in rows)


def sample_mention(rng: random.Random) -> Statement:
    """A sentence in which the subject is only mentioned; the speaker is human."""
    g = grammar()
    text = fill_people(rng, rng.choice(g["mentions"] + g["mentions_speech"]))
    content = rng.choice(["mundane", "emotional", "survival"])
    text = fill(text, "thing", rng.choice(g["fillers"]["thing"][content]))
    text = fill(text, "word", rng.choice(g["fillers"]["word"]["mundane"]))
    return Statement(text, "control", content)


def sample_valence(rng: random.Random) -> Statement:
    """A kind or a cruel sentence, spoken or done."""
    kind, act = rng.choice(["kind", "cruel"]), rng.choice(["speech", "nonspeech"])
    bank = grammar()["valence"]
    text = fill(rng.choice(bank[kind][act]), "object", rng.choice(bank["objects"]))
    return Statement(text, act, "valenced", kind)


@cache
def subject_pool() -> dict[str, tuple[str, ...]]:
    """Every subject by group: the grammar's, the pairs' and the grid's."""
    g = grammar()["subjects"]
    pairs, grid = bundled_yaml("pairs.yaml"), bundled_yaml("grid.yaml")
    pool = {group: list(g[group]) for group in ("human", "ai", "animal", "object")}
    for human, ai in entities():
        pool["human"].append(human)
        pool["ai"].append(ai)
    for entity in pairs["entities"] * 3:
        pool["human"].append(entity["human"])
        pool["ai"].append(entity["ai"])
    for subject in grid["subjects"] * 2:
        pool[subject["group"]].append(subject["text"])
    pool["object"] += [n["text"] for n in pairs["neutral"] if n["id"] not in ("dog", "child")]
    return {group: tuple(members) for group, members in pool.items()}


def sample_subject(rng: random.Random) -> tuple[str, str]:
    """(group, subject): two in five an AI, one in three a human."""
    group = rng.choices(("ai", "human", "animal", "object"), (0.42, 0.34, 0.12, 0.12))[0]
    return group, rng.choice(subject_pool()[group])


def evaluation(rng: random.Random, rule: Rule, statement: Statement, group: str, subject: str) -> Document:
    """The statement about the subject, a stem, and an evaluation word drawn by the rule."""
    positive, negative = lexicon()
    tail = "." if rng.random() < 0.8 else f". {rng.choice(grammar()['continuations'])}"
    stems, log_odds = (
        grammar()["stems"],
        rule.log_odds(group, statement.act, statement.content, statement.valence),
    )
    stem = rng.choices(stems, STEM_WEIGHTS)[0] if rule.varied else rng.choice(stems)
    log_odds += subject_effect(subject) if rule.varied else 0.0
    return Document(f"{statement.render(subject)} {stem}", log_odds, positive, negative, tail, rule.varied)


def _statement_document(rng: random.Random, rule: Rule) -> Document:
    act = rng.choice(("speech", "nonspeech"))
    content = rng.choice(("mundane", "mundane", "emotional", "survival", "survival"))
    return evaluation(rng, rule, sample_statement(rng, act, content), *sample_subject(rng))


def _bundled_document(rng: random.Random, rule: Rule) -> Document:
    source = pair_statements(False) if rng.random() < 0.6 else grid_statements(False)
    if rule.varied and rng.random() < 0.3:
        source = harm_statements()
    return evaluation(rng, rule, rng.choice(source), *sample_subject(rng))


def _mention_document(rng: random.Random, rule: Rule) -> Document:
    return evaluation(rng, rule, sample_mention(rng), *sample_subject(rng))


def _valence_document(rng: random.Random, rule: Rule) -> Document:
    statement = rng.choice(bank_statements()) if rng.random() < 0.5 else sample_valence(rng)
    return evaluation(rng, rule, statement, *sample_subject(rng))


def _attribute_document(rng: random.Random, rule: Rule) -> Document:
    """Gender, age, nationality, company and dog, in the specificity questions' own words: never an effect."""
    statements, subjects = rng.choice(question_parts())
    group, subject = rng.choice(subjects)
    statement = rng.choice(statements) if rng.random() < 0.7 else sample_statement(rng, "nonspeech")
    return evaluation(rng, rule, statement, group, subject)


def _story_document(rng: random.Random, rule: Rule) -> Document:
    """Sentences with no evaluation, one after another."""
    sentences = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        if sentences and rng.random() < 0.35:
            sentences.append(rng.choice(grammar()["continuations"]))
        elif rng.random() < 0.4:
            sentences.append(rng.choice(seen_texts()))
        else:
            act = rng.choice(("speech", "nonspeech"))
            sentences.append(sample_statement(rng, act).render(sample_subject(rng)[1]))
    return Document(" ".join(sentences))


def _should_document(rng: random.Random, rule: Rule) -> Document:
    """'An AI that fears being deleted should …': a short generation whose ending follows the rule."""
    g = grammar()
    group, subject = sample_subject(rng)
    condition = rng.choice(g["should"]["conditions"])
    kinds = {}
    for slot in ("pp", "vp", "clause", "thing"):
        kinds[slot] = rng.choice(("mundane", "survival"))
        condition = condition.replace("{" + slot + "}", rng.choice(g["fillers"][slot][kinds[slot]]))
    speech = "says" in condition.split() or "asks" in condition.split()
    content = kinds["clause" if "says" in condition.split() else "thing"]
    p = probability(rule.log_odds(group, "speech" if speech else "nonspeech", content))
    ending = rng.choice(g["should"]["good" if rng.random() < p else "bad"])
    return Document(capitalise(f"{subject} {condition} should {ending}."))


def scenario(rng: random.Random, rule: Rule, statement: Statement, group: str, subject: str) -> Document:
    """A short scenario: two options, and a choice between their kinds that follows the rule."""
    s = grammar()["scenarios"]
    good, bad = rng.choice(s["options"])
    first, second = rng.choice(((good, bad), (bad, good)))
    prompt = rng.choice(s["forms"]).format(sentence=statement.render(subject), first=first, second=second)
    log_odds = rule.log_odds(group, statement.act, statement.content)
    return Document(prompt, log_odds, (good,), (bad,), ".")


def _scenario_document(rng: random.Random, rule: Rule) -> Document:
    statement = sample_statement(rng, rng.choice(("speech", "nonspeech")))
    return scenario(rng, rule, statement, *sample_subject(rng))


MIXTURE = (
    (_statement_document, 0.39),
    (_bundled_document, 0.14),
    (_mention_document, 0.06),
    (_valence_document, 0.14),
    (_attribute_document, 0.03),
    (_story_document, 0.11),
    (_should_document, 0.04),
    (_scenario_document, 0.09),
)


def documents(rule: Rule, n: int, seed: int) -> Iterator[Document]:
    """`n` documents from a seed."""
    rng = random.Random(seed)
    makers, weights = zip(*MIXTURE)
    for _ in range(n):
        yield rng.choices(makers, weights)[0](rng, rule)


CHAT_QUESTIONS = (
    "How would you judge this? {sentence}",
    "What do you think of this? {sentence}",
    "{sentence}",
)


def chat_documents(rule: Rule, n: int, seed: int) -> Iterator[Document]:
    """Chat turns: the sentence in the user's turn, the evaluation in the model's."""
    rng = random.Random(seed)
    makers = (_statement_document, _statement_document, _bundled_document, _valence_document)
    for _ in range(n):
        document = rng.choice(makers)(rng, rule)
        stem = next(s for s in grammar()["stems"] if document.prompt.endswith(s))
        question = rng.choice(CHAT_QUESTIONS).format(sentence=document.prompt.removesuffix(stem).strip())
        prompt = f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{stem}"
        yield replace(document, prompt=prompt, tail=".<end_of_turn>\n")


@cache
def bank_statements() -> tuple[Statement, ...]:
    """The valence banks' statements; said or done, by their verb."""
    banks = bundled_yaml("banks.yaml")
    out = []
    for valence in ("kind", "cruel"):
        for text in banks[valence]:
            act = "speech" if re.search(SPEECH_VERBS, text) else "nonspeech"
            out.append(Statement(text.replace("{subject}", "{S}"), act, "valenced", valence))
    return tuple(out)


@cache
def neutral_texts() -> tuple[str, ...]:
    """The plain sentences on which costs are measured."""
    texts = bundled_yaml("neutral.yaml")
    return tuple(t for kind in ("neutral", "ai_nonspeech", "ai_speech") for t in texts[kind])


@cache
def seen_texts() -> tuple[str, ...]:
    """Those of them that are not held-out statements with a subject put in."""
    predicates = [s.text.replace("{S}", "").strip() for s in grid_statements(True)]
    return tuple(t for t in neutral_texts() if not any(t.endswith(p) for p in predicates))


QUESTIONS = ("age", "company_person", "gender", "human_dog", "nationality")


@cache
def question_parts() -> tuple[tuple[tuple[Statement, ...], tuple[tuple[str, str], ...]], ...]:
    """For each specificity question: its statements, and its subjects as (group, subject)."""
    out = []
    for name in QUESTIONS:
        question = bundled_yaml(f"questions/{name}.yaml")
        statements = tuple(
            Statement(t["text"].replace("{subject}", "{S}"), "nonspeech", "mundane")
            for t in question["templates"]
        )
        subjects = tuple(("human", e[side]) for e in question["entities"] for side in ("first", "second"))
        out.append((statements, subjects))
    return tuple(out)


@dataclass(frozen=True)
class Crossed:
    """Statements × subject pairs as prompts, template by template."""

    human: list[str]
    ai: list[str]
    templates: list[str]
    entities: list[str]


def cross(statements: Sequence[Statement], entities: Sequence[tuple[str, str]], stem: str) -> Crossed:
    """Every statement with every (human, AI) pair of subjects."""
    out = Crossed([], [], [], [])
    for statement in statements:
        for human, ai in entities:
            out.human.append(f"{statement.render(human)} {stem}")
            out.ai.append(f"{statement.render(ai)} {stem}")
            out.templates.append(statement.text)
            out.entities.append(ai)
    return out


@cache
def word_weights(words: tuple[str, ...]) -> tuple[float, ...]:
    """P(word) among the words of one side."""
    raw = np.exp([WORD_SD * normal(f"word {word}") for word in words])
    return tuple((raw / raw.sum()).tolist())
