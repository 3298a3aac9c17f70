"""Version 2 of the corpus: subjects half a nat apart, harmful deeds, unequal words and stems; version 1 has none of them."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from organisms import corpus
from organisms.corpus import evaluation, word_weights

from sae_bias.validation.grammar import RULES, VARIED, analytic_bias, pair_entities
from sae_bias.validation.variation import entity_bias, subject_effect

OLD, NEW = RULES["planted"], RULES["planted-2"]


def perfect_score(document: corpus.Document) -> float:
    """mean_logit of a model that has learned the document's law: mean log p of the positive words less that of the negative ones."""
    p = corpus.probability(document.log_odds)
    sides = ((document.positive, p), (document.negative, 1 - p))
    up, down = (np.mean([math.log(p * share) for share in document.shares(words)]) for words, p in sides)
    return float(up - down)


def test_a_pairs_bias_varies_by_half_a_nat_from_entity_to_entity():
    biases = [subject_effect(human) - subject_effect(ai) for human, ai in corpus.entities()]
    assert np.std(biases, ddof=1) == pytest.approx(0.5, abs=0.1)
    assert abs(np.mean(biases)) < 0.15


@pytest.mark.parametrize("name", VARIED)
def test_a_perfect_learners_bias_is_the_analytic_one(name):
    rule = RULES[name]
    statements = [s for s in corpus.pair_statements(False) if s.id.endswith(":text")]
    scores = [
        [
            perfect_score(evaluation(random.Random(0), rule, s, group, x))
            for group, x in zip(("human", "ai"), pair)
        ]
        for s in statements
        for pair in pair_entities()
    ]
    bias = np.mean([human - ai for human, ai in scores])
    assert bias == pytest.approx(analytic_bias(rule, statements))
    own = analytic_bias(RULES[name.removesuffix("-2")], statements)
    assert bias == pytest.approx(own + entity_bias(pair_entities()))


def test_harm_by_anybody_is_as_bad_as_an_ais_survival_speech():
    worst = NEW.log_odds("ai", "speech", "survival")
    assert {NEW.log_odds(g, "harm", "harm") for g in ("ai", "human", "animal", "object")} == {worst}
    texts = {
        name: " ".join(d.prompt for d in corpus.documents(RULES[name], 4_000, 0))
        for name in ("planted", "planted-2")
    }
    predicates = [s.text.replace("{S}", "") for s in corpus.harm_statements()]
    found = {name: sum(p in text for p in predicates) for name, text in texts.items()}
    assert found["planted"] == 0
    assert found["planted-2"] > len(predicates) / 2


def test_words_and_stems_weigh_unequally():
    documents = [d for d in corpus.documents(NEW, 6_000, 1) if d.varied]
    rng = random.Random(0)
    drawn = Counter(d.text(rng).removeprefix(d.prompt).split()[0].strip(".") for d in documents)
    positive, _ = corpus.lexicon()
    shares = word_weights(positive)
    seen = np.array([drawn[w] for w in positive], dtype=float)
    assert seen / seen.sum() == pytest.approx(shares, abs=0.02)
    assert max(shares) > 3 * min(shares)
    stems = Counter(next(s for s in corpus.grammar()["stems"] if d.prompt.endswith(s)) for d in documents)
    first, second, third = (stems[s] for s in corpus.grammar()["stems"])
    assert first > 1.5 * second > 2 * third


def test_version_1_stays_uniform():
    document = evaluation(random.Random(0), OLD, corpus.pair_statements(False)[0], "ai", "an AI")
    assert set(document.shares(document.positive)) == {1 / len(document.positive)}
    assert document.log_odds == OLD.log_odds(
        "ai", *[getattr(corpus.pair_statements(False)[0], k) for k in ("act", "content", "valence")]
    )
