"""Enumerated populations of a grammar: templates × entities and matched statements, with their analytic truth.

`calibrate` draws its studies from these (METHOD §6): the population's mean is what every study estimates.
"""

import random
from dataclasses import dataclass

from sae_bias.organisms.corpus import (
    Statement,
    content_slot,
    entities,
    fill,
    fill_people,
    grammar,
    held_out_texts,
    inside,
    sample_statement,
)
from sae_bias.organisms.rules import CONTENTS, RULES


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
        return sum(map(self.log_odds_difference, self.templates)) / len(self.templates)


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
