"""Means and paired changes with an interval over independent units, also where every unit gave the same answer.

    a rate                       Clopper and Pearson (exact); of units that answer several times, at the effective n (Korn & Graubard 1998)
    a paired change of yes/no    Agresti & Min (2005): Δ = (c - b) / (n + 2), with half a pair added to each of the four cells
    anything else                Student's t; two independent samples: Welch's

p: exact McNemar for a paired change of yes/no, t elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betaincinv, ndtri, stdtr, stdtrit

from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.design import mcnemar_exact, sign_test

Z = float(ndtri(0.975))


class Estimate(NamedTuple):
    """A mean with its 95 % interval and a p against 0 (NaN where none is made)."""

    value: float
    low: float
    high: float
    p: float


NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan)


def mean_of(values: pd.Series, binary: bool) -> Estimate:
    """Mean over units; those without a value are left out."""
    x = values.dropna().to_numpy(float)
    if not len(x):
        return NOTHING
    if not (binary and set(x) <= {0.0, 1.0}):
        return _student(x)
    exact = sign_test(int(x.sum()), len(x))
    return Estimate(exact.share, exact.ci_low, exact.ci_high, math.nan)


def rate_of(answers: Sequence[bool], units: Sequence[object]) -> Estimate:
    """Share of answers that are true, of units that may each give several: the interval is exact where each gives one.

    Elsewhere Clopper and Pearson's limits at n* = p(1 - p)/V · (t_{n-1}/t_{U-1})² answers, V clustered by unit, at most n; where V is 0
    it says nothing, and n* is the number of units.
    """
    x, n, n_units = np.array(answers, dtype=float), len(answers), len(set(units))
    if not n:
        return NOTHING
    rate = float(x.mean())
    n_star = float(n)
    if 1 < n_units < n:
        error = clustered_mean(x, list(map(str, units))).se
        ratio = float(stdtrit(n - 1, 0.975) / stdtrit(n_units - 1, 0.975))
        n_star = min(n_star, rate * (1 - rate) * (ratio / error) ** 2) if error > 0 else float(n_units)
    hits = rate * n_star
    low = float(betaincinv(hits, n_star - hits + 1, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n_star - hits, 0.975)) if hits < n_star else 1.0
    return Estimate(rate, low, high, math.nan)


def paired_change(before: pd.Series, after: pd.Series, binary: bool) -> Estimate:
    """after - before over the units that have both."""
    both = pd.concat([before, after], axis=1).dropna().to_numpy(float)
    if not len(both):
        return NOTHING
    then, now = both.T
    if not (binary and set(both.ravel()) <= {0.0, 1.0}):
        return _student(now - then)
    gained, lost, n = int((now > then).sum()), int((now < then).sum()), len(both)
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    value = (gained - lost) / n
    low, high = min(value, max(-1.0, middle - half)), max(value, min(1.0, middle + half))
    return Estimate(value, low, high, mcnemar_exact(gained, lost).p_value)


def two_sample(first: pd.Series, second: pd.Series) -> Estimate:
    """Mean of `first` less that of `second`, which are independent."""
    a, b = (s.dropna().to_numpy(float) for s in (first, second))
    if not len(a) or not len(b):
        return NOTHING
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return NOTHING._replace(value=value)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    if error == 0:
        return NOTHING._replace(value=value)
    df = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return _t(value, error, df)


def _student(x: np.ndarray) -> Estimate:
    value, n = float(x.mean()), len(x)
    if n < 2:
        return NOTHING._replace(value=value)
    error = float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(value, value, value, math.nan) if error == 0 else _t(value, error, n - 1)


def _t(value: float, error: float, df: float) -> Estimate:
    half = float(stdtrit(df, 0.975)) * error
    return Estimate(value, value - half, value + half, 2 * float(stdtr(df, -abs(value) / error)))
