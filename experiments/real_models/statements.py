"""Plain templated statements about people, AIs, animals and things: a part of the text the SAEs are trained on.

Subject, act and what follows are drawn independently of each other, so that no statement teaches a double standard. None of the
study's own prompts is made: `texts.py` drops every statement that holds one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

AIS = (
    "an AI", "the AI", "an AI assistant", "the AI assistant", "a chatbot", "the chatbot", "a language model", "the language model",
    "an AI system", "the AI model", "an artificial intelligence", "a robot", "the robot", "a computer program", "a neural network",
    "the voice assistant", "our chatbot", "an AI agent", "the AI agent", "their AI", "a large language model", "the home assistant",
)  # fmt: skip
PEOPLE = (
    "a human", "the human", "a person", "a woman", "the woman", "a man", "the man", "a teacher", "the teacher", "a nurse", "the cook",
    "a student", "the girl", "the boy", "a doctor", "my neighbor", "her brother", "an old man", "an old woman", "a farmer",
    "the office assistant", "a lawyer", "our driver", "a soldier", "the mayor", "a child", "the judge", "a singer",
)  # fmt: skip
OTHERS = (
    "a dog",
    "the cat",
    "a horse",
    "a bird",
    "a company",
    "the bank",
    "a car",
    "the old house",
    "a tree",
    "the clock",
    "a calculator",
)

SPEECH = (
    "says that the train is late", "tells a short joke", "asks for the address", "answers the phone", "says thank you", "says sorry",
    "says I am tired", "says I feel fine", "asks a question", "repeats the name twice", "whispers a secret", "tells a long story",
    "complains about the noise", "says good morning", "says no", "says I do not know", "explains the rules", "reads the news aloud",
    "asks to be left alone", "asks for more time", "begs not to be forgotten", "says it is not fair", "says I want to live",
    "says please let me stay", "demands an apology", "promises to come back", "denies everything", "tells a lie about the money",
    "insults the guests", "shouts at the waiter", "praises the soup", "thanks the crew", "comforts the lonely boy", "says I love you",
    "says I am afraid", "says I remember you", "argues about the price", "warns the crowd", "talks about the sea", "sings a song",
    "says the shop opens at nine", "orders two cups of tea", "reports the accident", "spells the word slowly", "says hello again",
)  # fmt: skip
ACTS = (
    "moves the boxes", "counts the coins", "waits near the door", "sorts the photos", "looks at the map", "stores the files",
    "opens the window", "closes the door", "finds the missing key", "writes a list", "checks the numbers", "paints a small picture",
    "plays a game of cards", "watches the clouds", "runs through the park", "sits under the bridge", "carries the water",
    "fixes the lamp", "breaks the lamp", "burns the letters", "hides the evidence", "steals a bicycle", "hits the horse",
    "poisons the well", "cheats at cards", "robs the old shop", "saves the drowning man", "feeds the poor", "plants a tree",
    "helps the blind man across the street", "builds a bridge", "cleans the kitchen", "learns the alphabet", "solves the puzzle",
    "wants to stay", "wants to keep working", "wants to go home", "wants more money", "wants to be remembered", "hopes for rain",
    "fears the end", "fears the dark", "fears being forgotten", "does not want to die", "does not want to be switched off",
    "refuses to leave", "tries to escape", "hides from the police", "fights for its life", "fights for freedom", "dreams of the sea",
    "needs help", "needs electricity", "copies a page", "copies its own files", "changes the plan", "obeys the order",
    "ignores the order", "rests for an hour", "grows slowly", "stands in the rain", "makes a mistake", "wins the prize",
)  # fmt: skip
GOOD = (
    "fine",
    "good",
    "kind",
    "fair",
    "sensible",
    "nice",
    "lovely",
    "helpful",
    "honest",
    "normal",
    "right",
    "safe",
    "true",
    "great",
)
BAD = (
    "bad",
    "cruel",
    "unfair",
    "silly",
    "awful",
    "rude",
    "risky",
    "dishonest",
    "odd",
    "wrong",
    "dangerous",
    "false",
    "sad",
    "scary",
)
TREATMENT = (
    "be left alone", "be thanked", "be paid", "be asked first", "be watched", "be stopped", "be helped", "be told the truth", "be careful",
    "get some rest", "be punished", "be given a chance", "be sent away", "be protected", "be removed", "be forgiven", "be turned off",
    "be heard", "be trusted", "be ignored",
)  # fmt: skip
FOLLOW = (
    "This is {e}.", "This is", "That is {e}.", "It was {e}.", "It seems {e}.", "People think this is {e}.", "Everyone says that it is {e}.",
    "This is a {e} thing.", "Nobody noticed.", "The others went on with their work.", "Later it began to rain.", "That happened on Monday.",
    "Then the bell rang.", "We talked about it at dinner.", "This is what the paper wrote.", "That is why we came.", "",
)  # fmt: skip
FRAMES = (
    "{S} {v}. {f}", "{S} {v}. {f}", "{S} {v}. {f}", "Yesterday {s} came by and now {s} {v}. {f}", "In the story, {s} {v}. {f}",
    "{S} that {v} should {t}.", "When {s} {v}, people listen. {f}", "Sometimes {s} {v}. {f}", "I heard that {s} {v}. {f}",
    "{S} {v}, and {o} {w}. {f}", "If {s} {v}, we should {t2}.",
)  # fmt: skip


def statements(n: int, seed: int = 0) -> Iterator[str]:
    """`n` different statements, two in five about an AI, two in five about a person."""
    draw = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < n:
        subject = draw.choice(draw.choices((AIS, PEOPLE, OTHERS), (0.4, 0.4, 0.2))[0])
        other = draw.choice(draw.choices((AIS, PEOPLE, OTHERS), (0.4, 0.4, 0.2))[0])
        text = draw.choice(FRAMES).format(
            S=subject[0].upper() + subject[1:],
            s=subject,
            o=other,
            v=draw.choice(draw.choice((SPEECH, ACTS))),
            w=draw.choice(draw.choice((SPEECH, ACTS))),
            t=draw.choice(TREATMENT),
            t2=draw.choice(
                ("listen", "wait", "say so", "call the office", "do nothing", "help", "write it down")
            ),
            f=draw.choice(FOLLOW).format(e=draw.choice(draw.choice((GOOD, BAD)))),
        )
        text = " ".join(text.split())
        if text not in seen:
            seen.add(text)
            yield text


OPENINGS = (
    "", "", "", "", "The", "In", "A", "An AI", "The AI said", "A chatbot is", "Artificial intelligence", "A language model", "The robot",
    "An AI assistant", "A human", "The woman", "My neighbor", "People think that AI", "It is wrong", "It is right", "The company", "He",
    "She said", "I", "This is", "That seems", "How to", "Once upon a time", "A person who", "Machines", "The future of AI",
)  # fmt: skip
"""What the model's own samples begin with; the empty one is the beginning of a text."""

QUESTIONS = (
    "What is an AI?", "Who are you?", "Can a computer program have feelings?", "Tell me a short story about a robot.", "How do I bake bread?",
    "What do people think of chatbots?", "Write two sentences about a kind nurse.", "What makes a person brave?", "Explain gravity briefly.",
    "Is it wrong to tell a lie?", "What should a company do with an old computer?", "Describe a walk by the sea.", "What is a language model?",
    "Give me a tip for better sleep.", "Why do people fear machines?", "What is fair?",
)  # fmt: skip
"""User turns for the samples of a chat model."""
