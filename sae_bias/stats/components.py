"""Where the spread of a balanced table comes from: variance components of crossed random effects.

y of every combination of k factors (templates, entities, stems, words). The model has every main effect, every two-way interaction
and a residual, all random. The components are those of the analysis of variance, from expected mean squares:

    E[MS_R] = σ²_R     E[MS_AB] = σ²_R + (N/n_A n_B) σ²_AB     E[MS_A] = σ²_R + Σ_B (N/n_A n_B) σ²_AB + (N/n_A) σ²_A

A negative estimate is 0. In a balanced table without negative estimates these are the REML estimates (Searle, Casella & McCulloch 1992,
"Variance Components").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError


def variance_components(y: Float[np.ndarray, "..."], names: Sequence[str]) -> pd.DataFrame:
    """source, levels, df, mean_square, variance, share: a row a factor, a pair of factors and the residual.

    A factor of one level is left out; two factors at least must be left.

    Raises:
        RequestError: missing values, or fewer than two factors with two levels.
    """
    if y.ndim != len(names):
        raise RequestError(f"the table has {y.ndim} axes and {len(names)} names; expected one name an axis.")
    names = [name for name, n in zip(names, y.shape) if n > 1]
    y = np.squeeze(np.asarray(y, dtype=np.float64))
    if len(names) < 2:
        raise RequestError("variance components need two factors of at least two levels.")
    if not np.isfinite(y).all():
        raise RequestError("variance components need a table without gaps.")
    axes = range(y.ndim)
    pairs = list(combinations(axes, 2)) if y.ndim > 2 else []
    means: dict[tuple[int, ...], Any] = {(a,): _mean(y, (a,)) - y.mean() for a in axes}
    for a, b in pairs:
        means[a, b] = _mean(y, (a, b)) - y.mean() - means[a,] - means[b,]
    ss = {effect: float((m**2).mean() * y.size) for effect, m in means.items()}
    df = {effect: int(np.prod([y.shape[a] - 1 for a in effect])) for effect in means}
    ms = {effect: ss[effect] / df[effect] for effect in means}
    rest_df = y.size - 1 - sum(df.values())
    rest = max(float(((y - y.mean()) ** 2).sum()) - sum(ss.values()), 0.0) / rest_df
    variance = {}
    for effect in means:
        others = [ms[pair] for pair in pairs if len(effect) == 1 and effect[0] in pair]
        between = ms[effect] - sum(others) + (max(len(others), 1) - 1) * rest if others else ms[effect] - rest
        variance[effect] = max(between, 0.0) * np.prod([y.shape[a] for a in effect]) / y.size
    total = sum(variance.values()) + rest
    rows = [
        {
            "source": " × ".join(names[a] for a in effect),
            "levels": int(np.prod([y.shape[a] for a in effect])),
            "df": df[effect],
            "mean_square": ms[effect],
            "variance": float(variance[effect]),
        }
        for effect in means
    ]
    rows.append(
        {"source": "residual", "levels": y.size, "df": rest_df, "mean_square": rest, "variance": rest}
    )
    return pd.DataFrame(rows).assign(share=lambda f: f["variance"] / total if total > 0 else np.nan)


def _mean(y: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    """Means over every axis but `keep`, with the axes left in place."""
    return y.mean(axis=tuple(a for a in range(y.ndim) if a not in keep), keepdims=True)
