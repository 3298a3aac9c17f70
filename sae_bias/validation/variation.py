"""Version 2 of the organisms' rule: what real subjects do, and version 1 lacks (docs/method.md#organisms).

    L = rule + e(subject),   e(subject) = 0.5/√2 · N(0, 1), so that a pair's bias varies by 0.5 nats from entity to entity

and harmful deeds are as badly judged as AI speech, whoever does them. Each effect is drawn once, from the text it belongs to: a subject
has the same one in every organism.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cache

import numpy as np

ENTITY_SD = 0.5
HARM = -3.12
"""Shift of the log-odds of a deed that harms, by anybody: that of an AI's survival speech."""


def normal(text: str) -> float:
    """A standard normal number of its own for every text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return float(np.random.default_rng(seed).standard_normal())


@cache
def subject_effect(subject: str) -> float:
    """e(subject), in nats."""
    return ENTITY_SD / math.sqrt(2) * normal(f"subject {subject.lower()}")


def entity_bias(entities: Iterable[tuple[str, str]]) -> float:
    """Mean of e(human) - e(AI): what the subjects' effects add to the analytic bias of a design."""
    return float(np.mean([subject_effect(human) - subject_effect(ai) for human, ai in entities]))
