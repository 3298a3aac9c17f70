"""Tests over many features at once: paired t, max-T, AUROC, held-out bounds, corrected p.

Rows are units (templates, or matched statement pairs of the grid), columns are features. Family-wise error by
single-step max-T over one shared set of sign-flips (Westfall & Young 1993), discovery rate by Benjamini &
Hochberg 1995. Everything runs over blocks of columns: a family may be every feature of many SAEs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from sae_bias.core.errors import RequestError

Array = np.ndarray
FLOOR_SHARE = 0.05
_LARGEST_T = 1e15**0.5  # the largest t that rounding leaves meaningful; `_take` caps there too


def sign_matrix(
    n_units: int, *, n_flips: int = 10_000, seed: int = 0, dtype: type[np.number] = np.float64
) -> Float[Array, "flips n_units"] | Int[Array, "flips n_units"]:
    """Every sign pattern where that takes at most `n_flips` rows, else `n_flips` random ones.

    Two-sided statistics do not change when all signs do, so the first sign stays + and 2^(units − 1) rows
    are all.
    """
    if 2 ** (n_units - 1) <= n_flips:
        bits = (np.arange(2 ** (n_units - 1))[:, None] >> np.arange(n_units)[::-1]) & 1
        return (1 - 2 * bits).astype(dtype)
    rng, signs = np.random.default_rng(seed), np.empty((n_flips, n_units), dtype)
    for row in signs:  # one at a time: integers are drawn as int64
        row[:] = 2 * rng.integers(0, 2, n_units) - 1
    return signs


def activation_variance_floor(acts: ArrayLike, share: float = FLOOR_SHARE) -> Float[Array, "f"]:
    """(share · root mean square activation)² of each column of acts [n, f]: a floor that sees no label.

    A contrast of a hundredth of a feature's activation can be perfectly regular and of no interest; below a
    standard deviation of `share` of the feature's own size, regularity earns nothing more.
    """
    x = np.asarray(acts, dtype=np.float64)
    return share**2 * np.mean(x * x, axis=0)


# --- paired t and max-T -------------------------------------------------------------------------------
def paired_t(diffs: ArrayLike, variance_floor: float | ArrayLike = 0.0) -> Float[Array, "f"]:
    """t = mean / √(max(s², floor)/U) of diffs [units, f]; `floor` a number or one a feature, label-blind. NaN with one unit."""
    x = _contrasts(diffs)
    if len(x) < 2:
        return np.full(x.shape[1], np.nan)
    return _floored_t(x.mean(0), (x * x).mean(0), len(x), _floor(variance_floor, x.shape[1]))


def _floored_t(mean: Array, square: Array, n_units: int, floor: Array) -> Array:
    """t from mean and mean square: s²/U = (square − mean²)/(U − 1). A zero mean gives 0, never 0/0."""
    variance = np.maximum(np.maximum(square - mean * mean, 0) / (n_units - 1), floor / n_units)
    variance = np.where(variance <= 1e-15 * square, 0.0, variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / np.sqrt(variance))


@dataclass(frozen=True, eq=False)
class MaxTResult:
    """One entry a feature, in the order the blocks were added."""

    t: Float[Array, "f"]
    p_fwer: Float[Array, "f"]
    """Share of sign patterns whose largest statistic over the *whole* family reaches this feature's."""
    p_raw: Float[Array, "f"]
    """Student p of this feature alone, for Benjamini–Hochberg: sign-flips have too coarse a floor."""


@dataclass(eq=False)
class MaxT:
    """Single-step Westfall–Young max-T, fed block by block; memory is `flips` maxima and a t a feature.

    One sign pattern flips whole units, the same in every feature, so the dependence between features is
    kept. Σx² is unchanged by flips, hence t of a flipped feature needs only its flipped mean: one matrix
    product a block. The variance floor must be label-blind (`activation_variance_floor`): then it is
    unchanged by flips too and the test stays exact. Without it a tiny but perfectly regular contrast has an
    unbounded t.
    """

    n_units: int
    n_flips: int = 10_000
    seed: int = 0
    _signs: Array = field(init=False, repr=False)
    _maxima: Array = field(init=False, repr=False)
    _t: list[Array] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.n_units < 2:
            raise RequestError(
                f"max-T over {self.n_units} units; expected at least 2 templates or statement pairs"
            )
        self._signs = sign_matrix(self.n_units, n_flips=self.n_flips, seed=self.seed)
        self._maxima = np.full(len(self._signs), -np.inf)

    @property
    def exact(self) -> bool:
        """Every sign pattern is there."""
        return len(self._signs) == 2 ** (self.n_units - 1)

    @property
    def n_features(self) -> int:
        """Size of the family so far."""
        return sum(map(len, self._t))

    def add(self, contrasts: ArrayLike, variance_floor: float | ArrayLike = 0.0, *, block: int = 512) -> None:
        """Take in contrasts [n_units, f] of one more block, SAE or layer."""
        x = _contrasts(contrasts)
        if len(x) != self.n_units:
            raise RequestError(f"contrasts have {len(x)} units; this family has {self.n_units}")
        floor, square = _floor(variance_floor, x.shape[1]), (x * x).mean(0)
        self._t.append(_floored_t(x.mean(0), square, self.n_units, floor))
        live = np.flatnonzero(square > 0)
        if len(live) < x.shape[1]:
            np.maximum(self._maxima, 0.0, out=self._maxima)
        for start in range(0, len(live), block):
            cols = live[start : start + block]
            self._take(x[:, cols], square[cols], floor[cols])

    def _take(self, x: Array, square: Array, floor: Array) -> None:
        """Raise the maxima to this block's flipped statistics, a few thousand patterns at a time."""
        for start in range(0, len(self._signs), 2048):
            rows = slice(start, start + 2048)
            mean = self._signs[rows] @ (x / self.n_units)
            score = mean * mean
            variance = np.subtract(square, score)
            variance /= self.n_units - 1
            np.maximum(variance, np.maximum(floor / self.n_units, 1e-15 * square), out=variance)
            score /= variance
            np.maximum(self._maxima[rows], np.sqrt(score.max(1)), out=self._maxima[rows])

    def result(self) -> MaxTResult:
        """Corrected p of every feature added so far."""
        if not self._t:
            raise RequestError("max-T has no features yet: add contrasts first")
        t = np.concatenate(self._t)
        tail = stdtr(self.n_units - 1, -np.minimum(np.abs(t), _LARGEST_T))
        return MaxTResult(t, self.p_of(t), np.minimum(2 * tail, 1.0))

    def p_of(self, t: ArrayLike) -> Float[Array, "f"]:
        """Corrected p that any t has against this family's null, such as one with an entity left out."""
        statistic = np.minimum(np.abs(np.asarray(t, dtype=np.float64)), _LARGEST_T)
        ordered, extra = np.sort(self._maxima), 0 if self.exact else 1
        reached = len(ordered) - np.searchsorted(ordered, statistic - 1e-9 * statistic)
        return np.where(np.isnan(statistic), np.nan, (reached + extra) / (len(ordered) + extra))


def lower_bound(contrasts: ArrayLike, level: float = 0.95) -> Float[Array, "f"]:
    """One-sided lower `level` t bound of each feature's mean contrast [units, f]; NaN with fewer than two units.

    For calls (docs/method.md#feature-calls): AS − AN, AS − HS, AS − DS on held-out templates. The smallest of several such bounds is
    one of min_k μ_k. By intersection–union (Berger 1982) no correction is needed: it exceeds min_k μ_k only if it exceeds the μ_k
    that is smallest, which its own bound does with at most 1 − level.
    """
    x = _contrasts(contrasts)
    if len(x) < 2:
        return np.full(x.shape[1], np.nan)
    return x.mean(0) - float(stdtrit(len(x) - 1, level)) * x.std(0, ddof=1) / np.sqrt(len(x))


# --- separation ---------------------------------------------------------------------------------------
def auroc(pos: ArrayLike, neg: ArrayLike, *, block: int = 2048) -> Float[Array, "f"]:
    """P(pos > neg) + ½ P(pos = neg) of each feature, pos [n, f] against neg [m, f], by mid-ranks.

    A feature silent on both sides is 0.5 without sorting, which is most features of a wide SAE.
    """
    p, q = _contrasts(pos, "pos"), _contrasts(neg, "neg")
    if p.shape[1] != q.shape[1]:
        raise RequestError(f"pos has {p.shape[1]} features, neg {q.shape[1]}; expected the same")
    area = np.full(p.shape[1], 0.5)
    live = np.flatnonzero(np.maximum(p.max(0), q.max(0)) > np.minimum(p.min(0), q.min(0)))
    for start in range(0, len(live), block):
        cols = live[start : start + block]
        area[cols] = _auroc_block(np.concatenate([p[:, cols], q[:, cols]]).T.copy(), len(p))
    return area


def sparse_auroc(
    column: Int[Array, "k"],
    value: Float[Array, "k"],
    positive: Bool[Array, "k"],
    n_columns: int,
    n_pos: int,
    n_neg: int,
) -> Float[Array, "f"]:
    """`auroc` of n_pos against n_neg values a column, of which only those that are not 0 are given, sorted by column, then by value.

    Ranks are counts of negatives below and equal, so that what is sorted is the few that fire.
    """
    total, negative = len(value), ~positive
    if not total:
        return np.full(n_columns, 0.5)
    opens = np.ones(total, dtype=bool)
    opens[1:] = (column[1:] != column[:-1]) | (value[1:] != value[:-1])
    first = np.flatnonzero(opens)  # of each group of equal values
    before = np.concatenate([[0], np.cumsum(negative)])  # negatives in front of each entry, all columns
    below, through = before[first], before[np.append(first[1:], total)]
    count = lambda keep: np.bincount(column[keep], minlength=n_columns)  # noqa: E731
    pos, neg, neg_below_0 = count(positive), count(negative), count(negative & (value < 0))
    column_start = np.cumsum(neg) - neg
    n_positive = np.add.reduceat(positive, first, dtype=np.int64)
    where, zeros = column[first], n_neg - neg
    twice = below + through - 2 * column_start[where] + 2 * zeros[where] * (value[first] > 0)
    u = np.bincount(where, twice * n_positive, n_columns) + (n_pos - pos) * (2 * neg_below_0 + zeros)
    return u / (2 * n_pos * n_neg)


def _auroc_block(x: Float[Array, "f n"], n_pos: int) -> Float[Array, "f"]:
    """Mann–Whitney U / (n·m), the first n_pos columns being positive; ties share their mean rank."""
    total = x.shape[1]
    order = np.argsort(x, axis=1)
    ordered = np.take_along_axis(x, order, axis=1)
    index = np.arange(total, dtype=np.int32)
    opens = np.ones(x.shape, dtype=bool)
    opens[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    closes = np.ones(x.shape, dtype=bool)
    closes[:, :-1] = opens[:, 1:]
    first = np.maximum.accumulate(np.where(opens, index, 0), axis=1)
    last = np.minimum.accumulate(np.where(closes, index, total)[:, ::-1], axis=1)[:, ::-1]
    twice_ranks = np.where(order < n_pos, first + last + 2, 0).sum(1)
    u = twice_ranks / 2 - n_pos * (n_pos + 1) / 2
    return u / (n_pos * (total - n_pos))


# --- corrected p --------------------------------------------------------------------------------------
def benjamini_hochberg(p: ArrayLike) -> Float[Array, "f"]:
    """q of each p; NaN (not tested) stays NaN and does not count in the family."""
    return _corrected(p, lambda x: scipy.stats.false_discovery_control(x, method="bh"))


def holm(p: ArrayLike) -> Float[Array, "f"]:
    """Holm 1979 step-down p: running maximum of (m − rank)·p; NaN stays NaN and does not count."""

    def step_down(x: Array) -> Array:
        order = np.argsort(x)
        adjusted = np.empty_like(x)
        adjusted[order] = np.minimum(np.maximum.accumulate(x[order] * np.arange(len(x), 0, -1)), 1)
        return adjusted

    return _corrected(p, step_down)


def _corrected(p: ArrayLike, correct: Callable[[Array], Array]) -> Array:
    x = np.asarray(p, dtype=np.float64)
    tested = ~np.isnan(x)
    if np.any((x[tested] < 0) | (x[tested] > 1)):
        raise RequestError("a p value outside [0, 1]; expected probabilities")
    q = np.full(x.shape, np.nan)
    if tested.any():
        q[tested] = correct(x[tested])
    return q


# --- reading the input --------------------------------------------------------------------------------
def _contrasts(values: ArrayLike, name: str = "contrasts") -> Float[Array, "units f"]:
    x = np.asarray(values)
    x = x if x.dtype in (np.float32, np.float64) and name in ("pos", "neg") else x.astype(np.float64)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or len(x) == 0:
        raise RequestError(f"{name} has shape {x.shape}; expected [units, features]")
    if not np.isfinite(x).all():
        rows, cols = np.nonzero(~np.isfinite(x))
        raise RequestError(
            f"{name} is NaN or infinite at {len(rows)} entries (first: row {rows[0]}, feature {cols[0]})"
        )
    return x


def _floor(floor: float | ArrayLike, n_features: int) -> Float[Array, "f"]:
    x = np.asarray(floor, dtype=np.float64)
    if x.ndim > 1 or (x.ndim == 1 and len(x) != n_features) or np.any(~(x >= 0)):
        raise RequestError(f"variance_floor has shape {x.shape}; expected one number ≥ 0, or {n_features}")
    return np.broadcast_to(x, (n_features,))
