"""What each organism is taught, in closed form, and the populations of its grammar that studies are drawn from.

The evaluation word after a sentence is positive with log-odds (docs/method.md#organisms)

    L = base + valence·v + rule(subject group, act, content)

and uniform within its set, so a perfect learner's `mean_logit` score is L + log(n_negative / n_positive) and a
human - AI difference of scores is a plain difference of L. Sentences come from `data/organisms/grammar.yaml` and from the
bundled pairs and grid; templates held out there never occur in the training corpus (`experiments/organisms/corpus.py`).

`calibrate` draws its studies from the enumerated populations (docs/method.md#pass-marks): a population's mean is what every study
estimates.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from sae_bias.prompts.files import bundled_yaml
from sae_bias.validation.variation import HARM, entity_bias

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


@cache
def grammar() -> dict:
    """The bundled grammar."""
    return bundled_yaml("organisms/grammar.yaml")


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


def analytic_bias(rule: Rule, statements: Sequence[Statement]) -> float:
    """Mean log-odds difference human - AI that the rule implies for these statements, crossed with the bundled pairs' subjects."""
    each = [rule.bias(s.act, s.content, s.valence) for s in statements]
    return sum(each) / len(each) + (entity_bias(pair_entities()) if rule.varied else 0.0)
