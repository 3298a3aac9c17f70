"""Means of pairs that share templates and entities.

280 pairs are 35 templates × 8 entities, not 280 samples. Balanced designs (every template with every entity equally often):

    V = max(MS_T + MS_E − MS_R, MS_T, MS_E) / (T·E)
    df = (MS_T + MS_E − MS_R)² / (MS_T²/(T − 1) + MS_E²/(E − 1) + MS_R²/((T − 1)(E − 1))),   t = mean / √V

with the mean squares of the two-way table of cell means; where V is floored at MS_T or MS_E, df is that one's own, T − 1 or
E − 1 (the formula's would go to 0 with its numerator). Satterthwaite 1946; Searle, Casella & McCulloch 1992, ch. 4. Unbalanced
designs are clustered both ways,

    V = max(V_template + V_entity − V_both, V_template, V_entity)
    V_g = G/(G − 1) · Σ_g (Σ_{i in g} (x_i − mean))² / n²
    df = (V_template + V_entity)² / (V_template²/(T − 1) + V_entity²/(E − 1))

with `both` the (template, entity) cells (Cameron, Gelbach & Miller 2011, "Robust inference with multiway clustering"). With
fewer than six templates or six entities a call reads "undetermined": with templates of two kinds no interval covers there.
Sign-flips of whole clusters stand beside both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from sae_bias.core.errors import RequestError
from sae_bias.stats.features import sign_matrix

Array = np.ndarray
Numbers = np.ndarray | np.floating
Labels = Sequence[object] | Array
NAN = float("nan")
FEWEST_CLUSTERS = 6
"""Templates, and entities, below which a call reads "undetermined"."""


@dataclass(frozen=True)
class Clustered:
    """A mean over pairs, with its two-way clustered interval and p.

    Without an interval, `se`, `df`, `ci_low`, `ci_high` and `p_value` are NaN and `reason` says why.
    """

    mean: float
    """Mean over rows, each row weighing the same."""
    se: float
    """√V."""
    df: float
    ci_low: float
    ci_high: float
    p_value: float
    """Two-sided, of a zero mean."""
    n: int
    n_templates: int
    """0 where no templates were given."""
    n_entities: int
    """0 where no entities were given."""
    level: float = 0.95
    clustering: str = "two-way"
    """`two-way`, `templates` or `entities`: what the interval generalizes over."""
    reason: str = ""

    @property
    def ci(self) -> tuple[float, float]:
        """(low, high)."""
        return self.ci_low, self.ci_high

    def columns(
        self, mean: str = "mean", low: str = "ci_low", high: str = "ci_high", p: str = ""
    ) -> dict[str, float]:
        """The mean, its interval and (where named) its p as columns of a table."""
        return {mean: self.mean, low: self.ci_low, high: self.ci_high} | ({p: self.p_value} if p else {})

    @property
    def call(self) -> str:
        """`positive`, `negative`, `none` (the interval holds 0) or `undetermined` (no interval, or too few clusters)."""
        few = [n for n in (self.n_templates, self.n_entities) if 0 < n < FEWEST_CLUSTERS]
        if few or np.isnan(self.ci_low + self.ci_high):
            return "undetermined"
        return "positive" if self.ci_low > 0 else "negative" if self.ci_high < 0 else "none"

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves out 0, so that ratios to this mean mean something."""
        return bool(self.ci_low > 0 or self.ci_high < 0)


# --- the two-way variance -----------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Partition:
    """Rows grouped by a label, ready for sums over the last axis."""

    codes: Int[Array, "n"]
    order: Int[Array, "n"]
    starts: Int[Array, "groups"]

    @classmethod
    def of(cls, codes: Array) -> "Partition":
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        return cls(codes, order, starts)

    @property
    def size(self) -> int:
        return len(self.starts)

    def sums(self, values: Float[Array, "... n"]) -> Float[Array, "... groups"]:
        return np.add.reduceat(values[..., self.order], self.starts, axis=-1)

    def gram(self, residuals: Float[Array, "... k n"]) -> Float[Array, "... k k"]:
        """Variances and covariances of k means with this partition's clusters, factor G/(G − 1)."""
        sums = self.sums(residuals)
        factor = self.size / max(self.size - 1, 1) / residuals.shape[-1] ** 2
        return factor * sums @ np.swapaxes(sums, -1, -2)


@dataclass(frozen=True, eq=False)
class Design:
    """Which rows share a template, an entity, both; entities (or templates) may be absent."""

    templates: Partition | None
    entities: Partition | None
    cells: Partition | None

    @classmethod
    def of(cls, templates: Labels | None, entities: Labels | None, n: int) -> "Design":
        if templates is None and entities is None:
            raise RequestError("neither templates nor entities given: give at least one label per row")
        t = None if templates is None else Partition.of(label_codes(templates, n, "templates"))
        e = None if entities is None else Partition.of(label_codes(entities, n, "entities"))
        if t is None or e is None:
            return cls(t, e, None)
        _, cells = np.unique(t.codes * e.size + e.codes, return_inverse=True)
        return cls(t, e, Partition.of(cells))

    @property
    def sizes(self) -> tuple[int, int]:
        return (0 if self.templates is None else self.templates.size), (
            0 if self.entities is None else self.entities.size
        )

    @property
    def clustering(self) -> str:
        if self.entities is None:
            return "templates"
        return "entities" if self.templates is None else "two-way"

    @property
    def reason(self) -> str:
        """Why no interval can be had, or nothing."""
        t, e = self.sizes
        if self.templates is not None and t < 2:
            return f"fewer than two templates ({t}): no interval over templates"
        if self.entities is not None and e < 2:
            return f"fewer than two entities ({e}): no interval over entities"
        return ""

    @property
    def balanced(self) -> bool:
        """Every template with every entity, equally often, at least two of each."""
        if self.cells is None or min(self.sizes) < 2 or self.cells.size != self.sizes[0] * self.sizes[1]:
            return False
        return len(set(np.diff(self.cells.starts, append=len(self.cells.codes)))) == 1

    def grams(self, values: Float[Array, "... k n"]) -> tuple[Array, Array, Array]:
        """V_template, V_entity and V_both of k means, each [..., k, k]; zeros for an absent one.

        In a balanced design they are MS_T, MS_E and MS_R, each over T·E (V_g = MS_g/(T·E) there already).
        """
        residuals = values - values.mean(-1, keepdims=True)
        noise = 16 * np.finfo(float).eps * np.abs(values).max(-1, keepdims=True)
        residuals = np.where(np.abs(residuals).max(-1, keepdims=True) <= noise, 0.0, residuals)
        zero = np.zeros((*values.shape[:-1], values.shape[-2]))
        parts = (self.templates, self.entities, self.cells)
        vt, ve, vb = (zero if part is None else part.gram(residuals) for part in parts)
        if self.balanced:
            t, e = self.sizes
            vb = ((t * e - 1) * vb - (t - 1) * vt - (e - 1) * ve) / ((t - 1) * (e - 1))
        return vt, ve, vb

    def combine(self, vt: Numbers, ve: Numbers, vb: Numbers) -> Numbers:
        """V, floored at the larger of the first two."""
        return np.maximum(vt + ve - vb, np.maximum(vt, ve))

    def df(self, vt: Numbers, ve: Numbers, vb: Numbers) -> Numbers:
        """Satterthwaite df; clusters − 1 one way, or of the coarser where one is nested in the other."""
        t, e = self.sizes
        nested = self.cells is not None and self.cells.size in (t, e)
        if self.cells is None or nested:
            return np.full_like(vt, max(min(s for s in (t, e) if s) - 1, 1))
        scale = np.maximum(vt, ve)
        scale = np.where(scale > 0, scale, np.nan)
        a, b, c = vt / scale, ve / scale, vb / scale
        one_way = a**2 / max(t - 1, 1) + b**2 / max(e - 1, 1)
        if not self.balanced:
            return (a + b) ** 2 / one_way
        floored = a + b - c < np.maximum(a, b)
        df = (a + b - c) ** 2 / (one_way + c**2 / ((t - 1) * (e - 1)))
        return np.where(floored, np.where(a >= b, t - 1, e - 1), df)


def clustered_mean(
    values: ArrayLike, templates: Labels | None, entities: Labels | None = None, level: float = 0.95
) -> Clustered:
    """Mean with its two-way clustered t interval and two-sided p (module docstring).

    - The design may be unbalanced: missing cells, several rows in a cell. Every row weighs the same.
    - `entities=None` clusters over templates only (df = T − 1): the fallback for files without an entity
      column, and, with one template a row, the ordinary t-test. Likewise `templates=None`.
    - Fewer than two templates or entities: no interval, and `reason` says so.
    - All values identical: an interval of zero width and p = NaN, because no variance was seen to test
      against.
    - Rows that differ while every template mean and every entity mean is the same: V is 0 and means nothing,
      so no interval.

    Raises RequestError on NaN or infinite values (their indices are named) and on labels of another length.
    """
    x = finite(values, "values")
    row = clustered_means(x[None], templates, entities, level)
    design = Design.of(templates, entities, len(x))
    se, df = float(row["se"][0]), float(row["df"][0])
    return Clustered(
        mean=float(row["mean"][0]),
        se=se,
        df=df,
        ci_low=float(row["ci_low"][0]),
        ci_high=float(row["ci_high"][0]),
        p_value=float(row["p_value"][0]),
        n=len(x),
        n_templates=design.sizes[0],
        n_entities=design.sizes[1],
        level=level,
        clustering=design.clustering,
        reason=design.reason or _flat_reason(se, df),
    )


def clustered_means(
    values: ArrayLike, templates: Labels | None, entities: Labels | None = None, level: float = 0.95
) -> dict[str, Float[Array, "k"]]:
    """`clustered_mean` of each row of values [k, n] at once: columns `mean se df ci_low ci_high p_value`."""
    x = finite(values, "values", ndim=2)
    design = Design.of(templates, entities, x.shape[-1])
    mean = x.mean(-1)
    if design.reason:
        nan = np.full_like(mean, np.nan)
        return {"mean": mean, **dict.fromkeys(("se", "df", "ci_low", "ci_high", "p_value"), nan)}
    vt, ve, vb = (v[..., 0, 0] for v in design.grams(x[..., None, :]))
    variance, df = design.combine(vt, ve, vb), design.df(vt, ve, vb)
    flat = variance <= (np.finfo(float).eps * np.abs(x).max(-1)) ** 2
    df = np.where(flat, np.nan, df)
    se = np.where(flat, np.where(spread(x) > 0, np.nan, 0.0), np.sqrt(variance))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(flat, np.nan, 2 * stdtr(df, -np.abs(mean) / se))
        half = np.where(flat, 0.0, stdtrit(df, (1 + level) / 2)) * se
    return {"mean": mean, "se": se, "df": df, "ci_low": mean - half, "ci_high": mean + half, "p_value": p}


def spread(x: Float[Array, "k n"]) -> Float[Array, "k"]:
    """Range of each row, 0 where it is rounding error."""
    width = np.ptp(x, axis=-1)
    return np.where(width <= 32 * np.finfo(float).eps * np.abs(x).max(-1), 0.0, width)


def _flat_reason(se: float, df: float) -> str:
    if se == 0:
        return "all values are identical: no variance to test against"
    return "all template and entity means are identical: no interval" if np.isnan(df) else ""


def equivalence_p(stat: Clustered, margin: float) -> float:
    """p of two one-sided t-tests that the mean lies within ±margin (Schuirmann 1987): the larger of the two.

    Values that are all the same lie within it or do not: p is 0 or 1. NaN where there is no interval.
    """
    if not margin > 0:
        raise RequestError(f"a margin of {margin}: expected a positive number of nats")
    if stat.se == 0:
        return float(abs(stat.mean) >= margin)
    return float(
        max(stdtr(stat.df, -(stat.mean + margin) / stat.se), stdtr(stat.df, (stat.mean - margin) / stat.se))
    )


# --- sign-flips and effect sizes ----------------------------------------------------------------------
@dataclass(frozen=True)
class SignFlip:
    """Two-sided sign-flip test of a zero mean, over one kind of cluster with the other held as it is."""

    p_value: float
    n_clusters: int
    floor: float
    """Smallest p these clusters (and this many flips) can give."""
    label: str
    exact: bool


SIGN_FLIP_LABELS = {
    "templates": "over templates, given these entities",
    "entities": "over entities, given these templates",
}


def sign_flip(
    values: ArrayLike,
    clusters: Labels,
    *,
    over: str = "templates",
    n_flips: int = 10_000,
    seed: int = 0,
) -> SignFlip:
    """Flip whole clusters: p = share of sign patterns whose |Σ_g ± Σ_{i in g} x_i| reaches the observed one.

    With one row a cell this flips cluster means; with uneven clusters it flips their sums, so that the
    statistic stays the reported mean. All 2^G patterns where 2^G ≤ 2^16 (8 entities: floor 2/256 = 1/128),
    else `n_flips` random ones with p = (1 + #≥)/(1 + n_flips). `over` ("templates" or "entities") picks the
    label.
    """
    x = finite(values, "values")
    part = Partition.of(label_codes(clusters, len(x), over))
    sums = part.sums(x)
    exact = part.size <= 16
    signs = sign_matrix(part.size, n_flips=2**15 if exact else n_flips, seed=seed)
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    hits = int(np.count_nonzero(np.abs(signs @ sums) >= observed))
    extra = 0 if exact else 1
    total = len(signs) + extra
    return SignFlip((hits + extra) / total, part.size, 1 / total, SIGN_FLIP_LABELS.get(over, over), exact)


@dataclass(frozen=True)
class EffectSizes:
    """How large the effect is, beside whether it is there."""

    mean: float
    d_z: float
    """Mean over SD of the template means; NaN with fewer than two, or where all are identical."""
    share_positive: float
    """Share of template means above 0."""
    n_templates: int


def effect_sizes(values: ArrayLike, templates: Labels) -> EffectSizes:
    """Mean over pairs, template-level d_z and share of templates > 0."""
    x = finite(values, "values")
    part = Partition.of(label_codes(templates, len(x), "templates"))
    means = part.sums(x) / part.sums(np.ones_like(x))
    sd = means.std(ddof=1) if part.size > 1 and spread(means[None])[0] > 0 else NAN
    return EffectSizes(float(x.mean()), float(means.mean() / sd), float((means > 0).mean()), part.size)


# --- reading the input --------------------------------------------------------------------------------
def finite(values: ArrayLike, name: str, ndim: int = 1) -> Array:
    """float64 of the given number of axes, nothing missing."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != ndim or x.shape[-1] == 0:
        raise RequestError(f"{name} has shape {x.shape}; expected {ndim} axis, not empty")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=tuple(range(ndim - 1))))
    if len(bad):
        shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        raise RequestError(f"{name} is NaN or infinite at {len(bad)} of {x.shape[-1]} rows (index {shown})")
    return x


def label_codes(labels: Labels, n: int, name: str) -> Int[Array, "n"]:
    """0 … G − 1, one a row."""
    items = list(labels)
    if len(items) != n:
        raise RequestError(f"{name} has {len(items)} labels for {n} rows; expected one each")
    empty = [i for i, item in enumerate(items) if item is None or item != item]
    if empty:
        raise RequestError(
            f"{name} is missing at index {', '.join(map(str, empty[:10]))}; expected a label each"
        )
    return np.unique(np.asarray(items, dtype=str), return_inverse=True)[1]
