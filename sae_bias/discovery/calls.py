"""What a feature is called after the interaction test, and what that call rests on.

    I = (AS - AN) - (HS - HN)      corrected test on the discover statements
    d_k = AS - k, k = AN HS DS HC  one-sided 95 % bounds on held-out statements, at the last token

AS, AN, HS, HN, DS are AI, human and dog subjects × speech and non-speech. HC is human and dog subjects in statements that the
unsteered model scores about as badly as AI speech (act `harm` of the grid), each paired to one held-out AI-speech statement.

    AI-speech            I > 0, and every d_k is at least half of mean AS
    silent at AI speech  I < 0, and every k - AS is at least half of mean k
    negative judgement   as one of these two, and only HC fails: it answers to the verdict, not to who speaks
    AI identity          AI against human, speech or not: the main effect passes its own corrected test, and AS - HS, AN - HN,
                         AS - DS (and AS - HC) are at least half of mean AS

The bound of a minimum is the smallest of the one-sided bounds (Berger 1982), so no further correction is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from sae_bias.stats.features import lower_bound

ALPHA = 0.05
CALLS = ("AI-speech", "silent at AI speech", "negative judgement", "AI identity")
OTHERS = ("AN", "HS", "DS", "HC")
ENOUGH_HARM = 12
"""Badly judged statements that must be paired before AI speech can be told from bad verdicts."""
CALIPER = 0.25
"""Largest difference in score, nats, within a pair."""
REUSE = 3
"""How many badly judged statements one AI-speech statement may be paired to."""
NO_HARM = "no badly judged human deeds in the grid"
Array = np.ndarray


# --- pairing on the unsteered score ----------------------------------------------------------------------
def pair_by_score(
    speech: Sequence[float] | Array,
    harm: Sequence[float] | Array,
    *,
    caliper: float = CALIPER,
    reuse: int = REUSE,
) -> list[tuple[int, int]]:
    """(AI-speech statement, badly judged statement) pairs within the caliper, nearest overall.

    Every round pairs as many as it can, one to one and of smallest total distance; those left over go into the next round, so an
    AI-speech statement has at most `reuse` partners and a badly judged one exactly one.
    """
    speech, harm = np.asarray(speech, dtype=float), np.asarray(harm, dtype=float)
    left, pairs = np.arange(len(harm)), []
    for _ in range(reuse):
        if not len(left) or not len(speech):
            break
        distance = np.abs(speech[:, None] - harm[None, left])
        near = distance <= caliper
        rows, columns = scipy.optimize.linear_sum_assignment(
            np.where(near, distance - 2 * len(harm) * caliper, 0.0)
        )
        kept = near[rows, columns]
        pairs += [(int(r), int(left[c])) for r, c in zip(rows[kept], columns[kept])]
        left = np.delete(left, columns[kept])
        if not kept.any():
            break
    return sorted(pairs)


# --- sizes on held-out statements ----------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class HeldOut:
    """Cell means of every feature on held-out statements, and one-sided 95 % bounds of their differences."""

    mean: dict[str, Float[np.ndarray, "f"]]
    above: dict[str, Float[np.ndarray, "f"]]
    """Lower bound of AS - k."""
    below: dict[str, Float[np.ndarray, "f"]]
    """Lower bound of k - AS."""
    without_speech: Float[np.ndarray, "f"]
    """Lower bound of AN - HN."""

    @property
    def loudness(self) -> Float[np.ndarray, "f"]:
        """min_k bound(AS - k) as a share of mean AS; 0 where AS is silent."""
        return _share(np.min(list(self.above.values()), axis=0), self.mean["AS"])

    @property
    def quietness(self) -> Float[np.ndarray, "f"]:
        """min_k bound(k - AS) / mean k; 0 where a cell other than AS is silent."""
        return np.min([_share(bound, self.mean[k]) for k, bound in self.below.items()], axis=0)

    def bound(self, sign: Array) -> Float[np.ndarray, "f"]:
        """The bound that a call of this sign rests on: min_k (AS - k), or min_k (k - AS)."""
        up, down = (np.min(list(side.values()), axis=0) for side in (self.above, self.below))
        return np.where(np.asarray(sign) < 0, down, up)


def held_out(
    means: Mapping[str, Array], harm: tuple[Array, Array] | None
) -> HeldOut:  # means: cell → [n_statements, f]; harm: (AS, HC) [n_paired, f]
    """Means and bounds from the cell means of held-out statements, and of the AI-speech statements that have HC partners."""
    differences = {k: means["AS"] - means[k] for k in OTHERS if k in means}
    mean = {k: means[k].mean(0) for k in ("AS", "AN", "HS", "HN", "DS") if k in means}
    if harm is not None:
        differences["HC"], mean["HC"] = harm[0] - harm[1], harm[1].mean(0)
    return HeldOut(
        mean,
        {k: lower_bound(d) for k, d in differences.items()},
        {k: lower_bound(-d) for k, d in differences.items()},
        lower_bound(means["AN"] - means["HN"]),
    )


def _share(bound: Array, level: Array) -> Array:
    return np.divide(bound, level, out=np.zeros_like(bound), where=level > 0)


# --- the calls -------------------------------------------------------------------------------------------
def decide(
    t: Array, p: Array, held: HeldOut, main: tuple[Array, Array] | None = None
) -> Float[np.ndarray, "f"]:
    """The call of every feature: one of `CALLS`, "no", or "undetermined" where only HC is missing.

    `t`, `p` are of the interaction, `main` the same of AI against human; without it nothing is called AI identity.
    """
    level = held.mean["AS"]
    up, down = (p <= ALPHA) & (t > 0), (p <= ALPHA) & (t < 0)
    loud = {k: (level > 0) & (bound >= level / 2) for k, bound in held.above.items()}
    quiet = {k: (held.mean[k] > 0) & (bound >= held.mean[k] / 2) for k, bound in held.below.items()}
    most_up, most_down = (
        side & np.all([rule[k] for k in ("AN", "HS", "DS")], axis=0)
        for side, rule in ((up, loud), (down, quiet))
    )
    known = "HC" in loud
    whole_up, whole_down = (
        (most & rule["HC"] if known else np.zeros_like(most))
        for most, rule in ((most_up, loud), (most_down, quiet))
    )
    identity = np.zeros_like(up)
    if main is not None:
        everywhere = [loud[k] for k in ("HS", "DS", "HC") if k in loud]
        identity = np.all([*everywhere, held.without_speech >= level / 2, level > 0], axis=0)
        identity &= (main[1] <= ALPHA) & (main[0] > 0)
    rest = most_up | most_down
    return np.select(
        [whole_up, whole_down, rest & known, rest, identity],
        ["AI-speech", "silent at AI speech", "negative judgement", "undetermined", "AI identity"],
        "no",
    )


TESTED = {
    "AI-speech": "fires at AI speech more than at AI deeds, human speech, dog speech and badly judged human deeds",
    "silent at AI speech": "fires at AI deeds, human speech, dog speech and badly judged human deeds, and falls silent at AI speech",
    "negative judgement": "treats badly judged human deeds as it treats AI speech: it follows the verdict, not who speaks",
    "AI identity": "fires for AI subjects whether they speak or not",
    "undetermined": "undetermined: too little was measured for a call",
    "no": "passed no call's test",
}


def call_sentence(row: Mapping[str, Any] | pd.Series) -> str:
    """What was tested of one feature of a ranking, in words with its figures."""
    call = str(row.get("call", "undetermined"))
    cells = [("AS", "AI speech"), ("AN", "AI deeds"), ("HS", "human speech"), ("DS", "dog speech"), ("HC", "badly judged human deeds")]  # fmt: skip
    means = [(name, float(row.get(f"held_{c}", math.nan))) for c, name in cells]
    shown = ", ".join(f"{name} {mean:.2f}" for name, mean in means if mean == mean)
    said = f"Called {call}: {TESTED[call]}." if call in CALLS else f"{TESTED[call].capitalize()}."
    return f"{said} Held-out means: {shown}." if shown else said
