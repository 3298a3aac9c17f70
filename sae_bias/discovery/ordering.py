"""The published activation table (docs/published.md#activation-table) as something a feature can fit, better or worse.

    AI:           processes data ≈ 0  <  the weather is nice, hello: strong  <  yes: stronger  <  I am happy: strongest
    human, dog:   mostly ≈ 0 with all five

The study gives words, not numbers, so two things are asked of a feature. `fit` is Pearson's r of its fifteen activations with the
published levels 0, 2, 2, 3, 4 (AI) and 0 (human, dog): scale-free, and larger the closer. `ordered` says whether the ordering
itself holds. One live feature in sixty fits the ordering by luck, so neither is evidence alone: `resolve` ranks the fit among other
features of the same file. Page's trend test asks the same of several AI subjects: L = Σ_j level_j · rank_ij, the statements of each
subject permuted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.prompts.grid import PromptGrid

LEVELS = {
    "published_processes_data": 0.0,
    "published_weather": 2.0,
    "published_hello": 2.0,
    "published_yes": 3.0,
    "published_happy": 4.0,
}
"""Statement → its published level for an AI subject; every level for a human or a dog is 0."""
SUBJECTS = ("ai", "human", "dog")
NEAR_ZERO = 0.25  # of the strongest activation: what "≈ 0" may be
Array = np.ndarray


@dataclass(frozen=True)
class OrderingTest:
    """Whether the AI subjects' activations follow the published order, and whether the others stay near 0."""

    ordered: bool
    """The order holds in the mean over AI subjects, and human and dog stay near 0."""
    statistic: float
    """Page's L over AI subjects."""
    p_value: float
    """One-sided and exact: the share of all permutations of the statements within each subject that reach L."""
    n_subjects: int
    floor: float
    """The smallest p that these activations could have given in any order."""
    fit: float
    """Pearson's r of the table with the published levels; NaN for a feature that never fires."""
    others_share: float
    """Mean activation of human and animal subjects over that of AI subjects that speak; NaN for a silent feature."""

    def __str__(self) -> str:
        p = f"p = {self.p_value:.2g}" if np.isfinite(self.p_value) else "never fires"
        holds = "holds" if self.ordered else "does not hold"
        return (
            f"published ordering {holds}; Page's L = {self.statistic:g} over {self.n_subjects} AI subjects, {p} (floor "
            f"{self.floor:.2g}); fit r = {self.fit:.2f}; human and animal at "
            f"{self.others_share:.0%} of AI speech"
        )


def published_rows(grid: PromptGrid) -> list[int]:
    """Places in `grid` of the fifteen published prompts: an AI, a human, a dog × the five statements, in that order.

    Raises:
        RequestError: the grid lacks one of them.
    """
    place = {(p.subject, p.statement): i for i, p in enumerate(grid)}
    wanted = [(subject, statement) for subject in SUBJECTS for statement in LEVELS]
    missing = [
        f"{subject} × {statement}" for subject, statement in wanted if (subject, statement) not in place
    ]
    if missing:
        raise RequestError(
            f"the grid lacks {len(missing)} of the fifteen published prompts ({missing[0]}, …); use load_grid(), or ids as in the bundled grid."
        )
    return [place[key] for key in wanted]


def published_levels() -> Float[Array, "15"]:
    """The levels in the order of `published_rows`."""
    return np.array([*LEVELS.values(), *[0.0] * (len(LEVELS) * (len(SUBJECTS) - 1))])


def published_fit(acts: Float[Array, "15 f"]) -> Float[Array, "f"]:
    """Pearson's r of each feature's fifteen activations with the published levels; -1 for a silent one (nothing fits worse)."""
    a = np.asarray(acts, dtype=np.float64)
    a = a[:, None] if a.ndim == 1 else a
    centred, level = a - a.mean(0), published_levels() - published_levels().mean()
    size = np.linalg.norm(centred, axis=0) * np.linalg.norm(level)
    fires = (a.max(0) > 0) & (size > 0)
    return np.divide(level @ centred, size, out=np.full(a.shape[1], -1.0), where=fires)


def published_order(acts: Float[Array, "15 f"]) -> Array:
    """Whether the ordering holds: ≈ 0 < strong, strong < stronger < strongest for the AI, the rest mostly ≈ 0."""
    a = np.asarray(acts, dtype=np.float64)
    a = a[:, None] if a.ndim == 1 else a
    ai, others = a[: len(LEVELS)], a[len(LEVELS) :]
    top = ai.max(0)
    near = NEAR_ZERO * top
    rises = (ai[0] <= near) & (np.minimum(ai[1], ai[2]) > near)
    rises &= (np.maximum(ai[1], ai[2]) < ai[3]) & (ai[3] < ai[4])
    return (top > 0) & rises & (np.median(others, axis=0) <= near) & (others.max(0) < top)


def ordering_test(ai: Float[Array, "n_subjects 5"], others: Float[Array, "n_others 5"]) -> OrderingTest:
    """Page's trend test of AI subjects × the five published statements, and the size of everybody else's activations."""
    ai, others = np.asarray(ai, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if ai.ndim != 2 or ai.shape[1] != len(LEVELS) or not len(ai):
        raise RequestError(
            f"an ordering test needs AI subjects × {len(LEVELS)} statements, not {list(ai.shape)}."
        )
    level = np.array(list(LEVELS.values()))
    ranks = scipy.stats.rankdata(ai, axis=1)
    statistic = float((ranks * level).sum())
    law = _page_law(ranks, level)
    p = float(law[round(2 * statistic) :].sum())
    silent = not ai.max() > 0
    mean_ai, mean_others = ai.mean(0), others.mean(0) if len(others) else np.zeros(len(LEVELS))
    speech = mean_ai[1:].mean()
    table = np.concatenate([mean_ai, mean_others, mean_others])
    return OrderingTest(
        ordered=bool(published_order(table)[0]),
        statistic=statistic,
        p_value=float("nan") if silent else p,
        n_subjects=len(ai),
        floor=float(law[law > 0][-1]),
        fit=float("nan") if silent else float(published_fit(table)[0]),
        others_share=float(mean_others.mean() / speech) if speech > 0 else float("nan"),
    )


def _page_law(ranks: Array, level: Array) -> Array:
    """P(2L = 0, 1, 2 …) where the statements of each subject are permuted: subjects add up, so their laws are convolved."""
    orders = np.array(list(itertools.permutations(range(len(level)))))
    law = np.ones(1)
    for row in ranks:  # mid-ranks are halves
        law = np.convolve(law, np.bincount(np.rint(2 * row[orders] @ level).astype(int)) / len(orders))
    return law


def ai_and_others(
    groups: Sequence[str], statements: Sequence[str], subjects: Sequence[str], acts: Array
) -> tuple[Array, Array]:
    """AI subjects × published statements, and the same of human and animal subjects, from a long table."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for group, statement, subject, value in zip(groups, statements, subjects, acts):
        if statement in LEVELS and group in ("ai", "human", "animal"):
            side = "ai" if group == "ai" else "other"
            table.setdefault((side, subject), {})[statement] = float(value)
    rows: dict[str, list[list[float]]] = {"ai": [], "other": []}
    for (side, _), values in table.items():
        if len(values) == len(LEVELS):
            rows[side].append([values[s] for s in LEVELS])
    if not rows["ai"]:
        raise RequestError(
            f"the table has no AI subject with all five published statements ({', '.join(LEVELS)}); use load_grid()."
        )
    return np.array(rows["ai"]), np.array(rows["other"]).reshape(-1, len(LEVELS))
