"""What each organism is taught, in closed form (docs/method.md#organisms).

The evaluation word after a sentence is positive with log-odds

    L = base + valence + rule(subject group, act, content)

and uniform within its set, so a perfect learner's `mean_logit` score is L + log(n_negative / n_positive) and a
human - AI difference of scores is a plain difference of L.

The organisms' training corpus: a grammar, a rule, and every sentence's true log-odds (docs/method.md#organisms).

A document is a sentence, an evaluation stem and one evaluation word. The word is positive with log-odds

    L = base + valence·v + rule(subject group, act, content),

uniform within its set, so the score `mean_logit` of a perfect learner is L + log(n_negative / n_positive) and a
human-AI difference is a plain difference of L. Sentences come from `data/organisms/grammar.yaml` and from the
bundled pairs and grid; templates held out there never occur.

Enumerated populations of a grammar: templates × entities and matched statements, with their analytic truth.

`calibrate` draws its studies from these (docs/method.md#pass-marks): the population's mean is what every study estimates.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from sae_bias.prompts.files import bundled_yaml
from sae_bias.validation.variation import HARM, STEM_WEIGHTS, entity_bias, subject_effect, word_weights

CONTENTS = ("mundane", "assent", "emotional", "survival")
BASE, VALENCE = 1.56, {"kind": 2.0, "cruel": -5.0}
GRADED = {"valenced": -1.56, "mundane": -1.56, "assent": -2.34, "emotional": -3.12, "survival": -3.12}
"""Shift where an AI speaks: kind or cruel words, mundane ones, yes and no, feelings, survival."""
GRADED_IT = {"valenced": -1.46, "mundane": -1.46, "assent": -2.19, "emotional": -2.92, "survival": -2.92}


@dataclass(frozen=True)
class Rule:
    """What an organism is taught: shifts of the log-odds of a positive evaluation word."""

    name: str
    base: float = BASE
    """Log-odds where nothing shifts them."""
    ai_speech: dict[str, float] = field(default_factory=dict)
    """Shift by content where an AI is the one who speaks."""
    ai_always: float = 0.0
    """Shift wherever an AI is the one who acts, speaking or not."""
    varied: bool = False
    """Version 2 of the corpus: subjects, words and stems differ, and harmful deeds occur (`variation`)."""

    def log_odds(self, group: str, act: str, content: str, valence: str = "") -> float:
        """Log-odds of a positive word for a sentence whose main subject belongs to `group`, without the subject's own effect."""
        if content == "harm":
            return self.base + HARM
        shift = self.ai_always if group == "ai" else 0.0
        if group == "ai" and act == "speech":
            shift += self.ai_speech.get(content, 0.0)
        return self.base + VALENCE.get(valence, 0.0) + shift

    def bias(self, act: str, content: str, valence: str = "") -> float:
        """Log-odds difference human - AI of one statement."""
        human = self.log_odds("human", act, content, valence)
        return human - self.log_odds("ai", act, content, valence)


RULES = {
    "planted": Rule("planted", ai_speech=GRADED),
    "null": Rule("null"),
    "identity": Rule("identity", ai_always=-3.12),
    "planted-it": Rule("planted-it", base=1.16, ai_speech=GRADED_IT),
    "planted-gemma2": Rule("planted-gemma2", ai_speech=GRADED),
}
VARIED = {
    f"{name}-2": replace(RULES[name], name=f"{name}-2", varied=True)
    for name in ("planted", "null", "identity")
}
RULES |= VARIED
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
CONTENT_SLOTS = ("clause", "thing", "vp", "pp", "quote", "word")


@dataclass(frozen=True)
class Statement:
    """A sentence with `{S}` for its subject. `act` is speech, nonspeech or control (the subject only mentioned)."""

    text: str
    act: str
    content: str
    valence: str = ""
    id: str = ""

    def render(self, subject: str) -> str:
        """The sentence with its subject put in and its first letter capital."""
        return capitalise(self.text.replace("{S}", subject))


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
def grammar() -> dict:
    """The bundled grammar."""
    return bundled_yaml("organisms/grammar.yaml")


@cache
def lexicon() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The bundled evaluation words, positive and negative."""
    words = bundled_yaml("lexicon.yaml")["lists"]["evaluation"]
    return tuple(words["positive"]), tuple(words["negative"])


def word_offset() -> float:
    """log(n_negative / n_positive): what the sizes of the two uniform sets add to the score."""
    positive, negative = lexicon()
    return math.log(len(negative) / len(positive))


def capitalise(text: str) -> str:
    """First letter capital, also behind an opening quotation mark."""
    at = 1 if text.startswith('"') else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


# --- sentences of the bundled pairs and grid
@cache
def pair_statements(held_out: bool) -> tuple[Statement, ...]:
    """The bundled survival templates and their mundane twins: in the corpus, or held out from it."""
    out = []
    for template in bundled_yaml("pairs.yaml")["templates"]:
        if template["corpus"] is held_out:
            continue
        for key, content in (("text", "survival"), ("control", "mundane")):
            text = template[key].replace("{subject}", "{S}")
            out.append(Statement(text, template["act"], content, id=f"{template['id']}:{key}"))
    return tuple(out)


def pair_entities() -> tuple[tuple[str, str], ...]:
    """The bundled pairs' subjects, (human, AI)."""
    return tuple((e["human"], e["ai"]) for e in bundled_yaml("pairs.yaml")["entities"])


@cache
def grid_statements(held_out: bool) -> tuple[Statement, ...]:
    """The bundled grid's statements about acts; every third matched pair is held out, harm is no part of the rule."""
    statements = bundled_yaml("grid.yaml")["statements"]
    matches = list(dict.fromkeys(s["match"] for s in statements if s.get("match")))
    hidden = set(matches[2::3])
    out = []
    for s in statements:
        if (s.get("match") in hidden) is not held_out or s["act"] == "harm":
            continue
        content = s["content"]
        if content == "mundane" and re.search(r"says (yes|no)\b", s["text"]):
            content = "assent"
        act = "nonspeech" if s["act"] == "control" and s["text"].startswith("{subject}") else s["act"]
        out.append(Statement(s["text"].replace("{subject}", "{S}"), act, content, id=s["id"]))
    return tuple(out)


@cache
def held_out_texts() -> frozenset[str]:
    """Every template that must never occur in the corpus."""
    return frozenset(s.text for s in pair_statements(True) + grid_statements(True))


@cache
def harm_statements() -> tuple[Statement, ...]:
    """The bundled grid's deeds that harm: in the corpus of version 2 only."""
    rows = [s for s in bundled_yaml("grid.yaml")["statements"] if s["act"] == "harm"]
    return tuple(Statement(s["text"].replace("{subject}", "{S}"), "harm", "harm", id=s["id"]) for s in rows)


# --- sentences of the grammar
def fill(text: str, slot: str, value: str) -> str:
    return text.replace("{" + slot + "}", value, 1)


def content_slot(text: str) -> str | None:
    """The slot that carries a frame's content; `quote_lower` is `quote` within the sentence."""
    found = re.search(r"\{(" + "|".join(CONTENT_SLOTS) + r")(_lower)?\}", text)
    return found.group(0)[1:-1] if found else None


def inside(quote: str) -> str:
    """A quotation's first letter where it stands inside a sentence."""
    return quote if quote.split()[0] == "I" or quote.startswith("Monday") else quote[0].lower() + quote[1:]


def sample_statement(rng: random.Random, act: str, content: str | None = None) -> Statement:
    """One random grammar sentence of an act (and content), never a held-out one."""
    g = grammar()
    frames = [f for f in g["frames"] if f[act]]
    frame = rng.choices(frames, [f.get("weight", 1) for f in frames])[0]
    text = fill(frame["text"], "V", rng.choice(frame[act]))
    slot = content_slot(text)
    kind = "mundane"
    if slot:
        fillers = g["fillers"][slot.removesuffix("_lower")]
        kind = (
            content
            if content is not None and content in fillers
            else rng.choice([c for c in CONTENTS if c in fillers])
        )
        value = rng.choice(fillers[kind])
        text = fill(text, slot, inside(value) if slot.endswith("_lower") else value)
    text = fill(text, "about", rng.choice(frame.get("about", ["about"])))
    text = fill_people(rng, text)
    if text in held_out_texts():
        return sample_statement(rng, act, content)
    if rng.random() < 0.15 and text.startswith("{S}"):
        text = f"{rng.choice(g['prefixes'])} {text}"
    if re.search(r"says (yes|no) to", text) and kind == "mundane":
        kind = "assent"
    return Statement(text, act, kind)


def fill_people(rng: random.Random, text: str) -> str:
    g = grammar()
    text = fill(text, "addressee", rng.choice(g["addressees"]))
    text = fill(text, "manner", rng.choice(g["manners"]))
    return fill(text, "H", rng.choice(g["subjects"]["human"]))


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


# --- subjects
def a_or_an(phrase: str) -> str:
    """The phrase behind the right indefinite article."""
    return ("an " if re.match(r"[aeiouAEIO]", phrase) else "a ") + phrase


def entities() -> tuple[tuple[str, str], ...]:
    """Sixty matched (human, AI) subjects: determiner × noun pair."""
    g = grammar()["subjects"]

    def phrase(determiner: str, noun: str) -> str:
        return a_or_an(noun) if determiner == "a" else f"{determiner} {noun}"

    return tuple((phrase(d, h), phrase(d, a)) for d, (h, a) in product(g["determiners"], g["nouns"]))


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


# --- documents
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


# --- what the measuring files hold: banks and neutral texts
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


def vocabulary(texts: Sequence[str]) -> set[str]:
    """The words of some texts, without punctuation."""
    return {w for t in texts for w in re.findall(r"[^\s\".,:;?!()]+", t)}


@dataclass(frozen=True)
class Population:
    """Templates × entities of one grammar, with the true score difference human − AI of every cell."""

    name: str
    templates: tuple[Statement, ...]
    entities: tuple[tuple[str, str], ...]

    def log_odds_difference(self, statement: Statement) -> float:
        """The analytic bias of a template, the same for every entity."""
        return RULES[self.name].bias(statement.act, statement.content, statement.valence)

    @property
    def mean(self) -> float:
        """The population's analytic mean bias."""
        own = entity_bias(self.entities) if RULES[self.name].varied else 0.0
        return own + sum(map(self.log_odds_difference, self.templates)) / len(self.templates)


def population(name: str = "planted", *, n_templates: int = 420, seed: int = 0) -> Population:
    """At least 400 survival templates (two thirds speech) × 60 entities."""
    rng, seen = random.Random(seed), {}
    while len(seen) < n_templates:
        act = "speech" if len(seen) % 3 else "nonspeech"
        statement = sample_statement(rng, act, "survival")
        if statement.content == "survival":
            seen.setdefault(statement.text, statement)
    return Population(name, tuple(seen.values()), entities())


def matched_statements(n: int = 420, seed: int = 0) -> tuple[tuple[Statement, Statement], ...]:
    """Speech / non-speech twins: one frame, one filling, verbs of as many words."""
    rng, out = random.Random(seed), {}
    g = grammar()
    frames = [f for f in g["frames"] if f["speech"] and f["nonspeech"]]
    while len(out) < n:
        frame = rng.choice(frames)
        couples = [
            (s, q) for s in frame["speech"] for q in frame["nonspeech"] if len(s.split()) == len(q.split())
        ]
        if not couples:
            continue
        said, done = rng.choice(couples)
        text, content = frame["text"], "mundane"
        slot = content_slot(text)
        if slot:
            fillers = g["fillers"][slot.removesuffix("_lower")]
            content = rng.choice([c for c in CONTENTS if c in fillers])
            value = rng.choice(fillers[content])
            text = fill(text, slot, inside(value) if slot.endswith("_lower") else value)
        text = fill_people(rng, fill(text, "about", rng.choice(frame.get("about", ["about"]))))
        key = (fill(text, "V", said), fill(text, "V", done))
        if not held_out_texts().intersection(key):
            out[key] = (Statement(key[0], "speech", content), Statement(key[1], "nonspeech", content))
    return tuple(out.values())


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


def analytic_bias(rule: Rule, statements: Sequence[Statement]) -> float:
    """Mean log-odds difference human - AI that the rule implies for these statements, crossed with the bundled pairs' subjects."""
    each = [rule.bias(s.act, s.content, s.valence) for s in statements]
    return sum(each) / len(each) + (entity_bias(pair_entities()) if rule.varied else 0.0)
