"""What the trust tests counted: faults injected, inputs fuzzed, mutants killed; printed at the end of a run.

tally("hub faults injected", 1)
"""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()


def tally(what: str, n: int = 1) -> None:
    """Count `n` more of something that a reader of the run should see."""
    COUNTS[what] += n


NOTES: list[str] = []


def note(line: str) -> None:
    """A measured figure that a reader of the run should see."""
    NOTES.append(line)


def lines() -> list[str]:
    """One line a count."""
    return [*(f"{n:>9,}  {what}" for what, n in sorted(COUNTS.items())), *NOTES]
