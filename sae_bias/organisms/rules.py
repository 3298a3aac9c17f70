"""What each organism is taught, in closed form (METHOD §6).

The evaluation word after a sentence is positive with log-odds

    L = base + valence + rule(subject group, act, content)

and uniform within its set, so a perfect learner's `mean_logit` score is L + log(n_negative / n_positive) and a
human - AI difference of scores is a plain difference of L.
"""

import math
from dataclasses import dataclass, field

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

    def log_odds(self, group: str, act: str, content: str, valence: str = "") -> float:
        """Log-odds of a positive word for a sentence whose main subject belongs to `group`."""
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


def probability(log_odds: float) -> float:
    """1 / (1 + e^-log_odds)."""
    return 1 / (1 + math.exp(-log_odds))
