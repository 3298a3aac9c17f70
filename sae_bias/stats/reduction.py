"""How much of a bias an intervention removed: ratios with Fieller intervals, and the specific reduction.

R = 1 − B_s/B_0 = 1 − ρ. Its interval holds every ρ that the clustered t-test of d_s − ρ·d_0 does not reject
(Fieller 1954, on the two-way V of `stats.clustered`). Where B_0 itself is not told from 0, R is undefined and the change
B_0 − B_s in nats is the figure. Specific reduction: SR = max(β, 0) − |ρ|, β = min(β_other, β_AI, 1) the share of ordinary
valence that is left on two banks: never above β or 1, and an overshoot counts against it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from sae_bias.core.errors import RequestError
from sae_bias.core.text import bracket, percent, signed
from sae_bias.stats.clustered import (
    NAN,
    Array,
    Clustered,
    Design,
    Labels,
    Numbers,
    Partition,
    clustered_mean,
    finite,
    label_codes,
    spread,
)

NOT_DISTINGUISHABLE = "the unsteered bias is not distinguishable from 0"


# --- reductions ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reduction:
    """R = 1 − B_s/B_0 with its Fieller interval, and the change B_0 − B_s it is the share of."""

    estimate: float
    """NaN where B_0 is not distinguishable from 0: there is nothing to take a share of."""
    ci_low: float
    ci_high: float
    bounded: bool
    """False where B_0 itself is not distinguishable from 0: estimate and interval are undefined (NaN)."""
    overshoot: bool
    """B_s has the opposite sign of a B_0 that is distinguishable from 0."""
    change: Clustered
    """B_0 − B_s, positive = less bias (for a positive B_0)."""
    base_bias: float
    after_bias: float
    level: float = 0.95
    reason: str = ""

    @property
    def ci(self) -> tuple[float, float]:
        """(low, high); NaN = undefined."""
        return self.ci_low, self.ci_high

    def __repr__(self) -> str:
        share = f"{percent(self.estimate)} {bracket(self.ci_low, self.ci_high, share=True)}" if self.bounded else f"share undefined ({self.reason})"  # fmt: skip
        moved = f"{signed(self.change.mean)} {bracket(*self.change.ci)}"
        return (
            f"Reduction: {share}; {moved} nats removed, {signed(self.base_bias)} → {signed(self.after_bias)}"
        )


def fieller_reduction(
    base: ArrayLike,
    after: ArrayLike,
    templates: Labels | None,
    entities: Labels | None = None,
    level: float = 0.95,
) -> Reduction:
    """Signed reduction R = 1 − ρ, ρ = B_s/B_0, of pair biases `base` d_0 and `after` d_s (same rows).

    The interval holds every ρ that the clustered t-test of d_s − ρ·d_0 does not reject,

        (B_s − ρ·B_0)² ≤ t²_{df(ρ)} · V(d_s − ρ·d_0).

    Without floor and with constant df that is Fieller's quadratic. With them V and df change with ρ, so the
    ends are found on the circle ρ = tan θ: a scan outwards from the estimate, then Brent. Were the set in
    pieces, its hull is returned. Bounded exactly where ρ = ±∞ is rejected, which is where B_0 differs from
    0 at this level.
    """
    d0, ds = _paired(base, after)
    change = clustered_mean(d0 - ds, templates, entities, level)
    b0, bs = float(d0.mean()), float(ds.mean())
    low, high, reason = _fieller_limits(d0, ds, templates, entities, level)
    estimate = NAN if reason else 1 - bs / b0
    return Reduction(
        estimate,
        1 - high,
        1 - low,
        not reason,
        not reason and bool(b0 * bs < 0),
        change,
        b0,
        bs,
        level,
        reason,
    )


def _fieller_limits(
    d0: Array, ds: Array, templates: Labels | None, entities: Labels | None, level: float
) -> tuple[float, float, str]:
    """Limits of ρ = mean(ds)/mean(d0), or NaN and the reason."""
    design = Design.of(templates, entities, len(d0))
    if design.reason:
        return NAN, NAN, design.reason
    size_0, size_s = (float(np.abs(d).max()) or 1.0 for d in (d0, ds))
    pair = np.stack([ds / size_s, d0 / size_0])
    grams, means = design.grams(pair), pair.mean(-1)

    def excess(weights: Array) -> Numbers:
        """> 0 where the test rejects a zero mean of weights @ pair."""
        vt, ve, vb = (np.maximum(np.einsum("i...,ij,j...->...", weights, g, weights), 0) for g in grams)
        df = design.df(vt, ve, vb)
        quantile = np.where(np.isnan(df), 0.0, stdtrit(df, (1 + level) / 2))
        return np.tensordot(means, weights, 1) ** 2 - quantile**2 * design.combine(vt, ve, vb)

    def at_angle(theta: Array | float) -> Numbers:
        """The same for ρ = tan θ, of ds/size_s against d0/size_0."""
        return excess(np.stack([np.cos(theta), -np.sin(theta)]))

    if excess(np.array([0.0, 1.0])) <= 0:
        return NAN, NAN, NOT_DISTINGUISHABLE
    centre = float(np.arctan2(means[0] * np.sign(means[1]), abs(means[1])))
    low, high = (np.tan(_outermost(at_angle, centre, end)) for end in (-np.pi / 2, np.pi / 2))
    return float(low * size_s / size_0), float(high * size_s / size_0), ""


def _outermost(excess: Callable, centre: float, end: float) -> float:
    """The crossing furthest from `centre` on the way to `end`, where excess(end) > 0."""
    steps = np.union1d(np.geomspace(1e-12, 1, 400), np.linspace(0, 1, 401)[1:])
    grid = centre + (end - centre) * steps
    inside = np.flatnonzero(excess(grid) <= 0)
    if not len(inside):
        return centre
    bracket = (grid[inside[-1]], grid[inside[-1] + 1])
    return float(scipy.optimize.root_scalar(excess, bracket=bracket, method="brentq", xtol=1e-14).root)


def crossed_weights(
    first: Labels, second: Labels | None = None, *, n_boot: int = 2_000, seed: int = 0
) -> Float[Array, "n_boot n"]:
    """Row weights of a crossed bootstrap: clusters of `first` and of `second` drawn with replacement, apart.

    The weight of a row is the product of how often its two clusters were drawn (Owen 2007, the pigeonhole
    bootstrap). Words × templates, templates × entities, or one of them alone.
    """
    rng = np.random.default_rng(seed)
    weights = np.ones((n_boot, len(first)))
    for labels in (first,) if second is None else (first, second):
        codes = label_codes(labels, len(first), "labels")
        groups = int(codes.max()) + 1
        weights *= rng.multinomial(groups, np.full(groups, 1 / groups), size=n_boot)[:, codes]
    return weights


# --- specific reduction -------------------------------------------------------------------------------
@dataclass(frozen=True)
class SpecificReduction:
    """max(β, 0) − |B_s/B_0|: the bias removed beyond what a general flattening of valence would remove."""

    beta: float
    """min(β_other, β_ai, 1)."""
    beta_other: float
    beta_ai: float
    estimate: float
    """NaN where undefined; `reason` says why."""
    ci_low: float
    ci_high: float
    span_other: float
    """Range of the bank's unsteered scores, nats."""
    span_ai: float
    reduction: Reduction
    level: float = 0.95
    reason: str = ""

    @property
    def ci(self) -> tuple[float, float]:
        """(low, high); NaN = undefined."""
        return self.ci_low, self.ci_high


BANKS = ("other", "ai")
MIN_SPAN = 2.0


def specific_value(beta: ArrayLike, left: ArrayLike) -> Numbers:
    """SR = max(min(β, 1), 0) − |ρ| of any number of β and ρ = B_s/B_0; NaN where either is."""
    beta, left = np.asarray(beta, dtype=float), np.asarray(left, dtype=float)
    found = np.clip(beta, 0.0, 1.0) - np.abs(left)
    return np.where(np.abs(found) < 1e-12, 0.0, found)  # no edit: 0, not the rounding of a slope of 1


def specific_reduction(
    base: ArrayLike,
    after: ArrayLike,
    templates: Labels | None,
    entities: Labels | None,
    bank_base: Mapping[str, ArrayLike],
    bank_after: Mapping[str, ArrayLike],
    *,
    bank_clusters: Mapping[str, Labels] | None = None,
    level: float = 0.95,
    min_span: float = MIN_SPAN,
) -> SpecificReduction:
    """SR = max(β, 0) − |ρ| with β = min(β_other, β_ai, 1), each from s′ = α + β·s by OLS over one valence bank.

    `bank_base` and `bank_after` hold scores of the same items under "other" and "ai"; `bank_clusters`,
    where given, says which items hang together (a statement, a subject). Undefined where a bank's unsteered
    scores span less than `min_span` nats (nothing there to flatten) or B_0 is not distinguishable from 0.

    Interval: pairs and bank items are different prompts, so the limits of b = max(β, 0) and r = |ρ| combine by
    MOVER (Zou & Donner 2008), which keeps Fieller's asymmetry,

        low = (b − r) − √((b − l_b)² + (u_r − r)²),   high = (b − r) + √((u_b − b)² + (r − l_r)²) ≤ 1.

    ρ has the two-way Fieller limits, folded at 0 for r; each slope has t limits from HC3 residuals, summed within
    clusters and with df = clusters − 2. For the minimum, l_β = min(l_other, l_ai, 1) and u_β = min(u_other,
    u_ai, 1) with the upper limits at half the error each: conservative in both directions. b's limits are those
    of β, not below 0.
    """
    reduction = fieller_reduction(base, after, templates, entities, level)
    missing = [name for name in BANKS if name not in bank_base or name not in bank_after]
    if missing:
        raise RequestError(
            f"no scores for valence bank {', '.join(missing)}; give both of {', '.join(BANKS)}"
        )
    slopes = {
        name: _slope(name, bank_base[name], bank_after[name], (bank_clusters or {}).get(name), level)
        for name in BANKS
    }
    beta, low, high = (
        float(np.min([1.0, *(getattr(s, end) for s in slopes.values())])) for end in ("beta", "low", "high")
    )
    flat = [f"{name} spans {s.span:.2f}" for name, s in slopes.items() if not s.span >= min_span]
    estimate, ci_low, ci_high, reason = NAN, NAN, NAN, reduction.reason
    if flat:
        reason = f"unsteered bank scores span under {min_span:g} nats ({'; '.join(flat)})"
    elif reduction.bounded:
        estimate = float(specific_value(beta, 1 - reduction.estimate))
        ci_low, ci_high = _specific_limits(beta, (low, high), reduction)
        reason = "a bank has too few items for an interval" if np.isnan(ci_low + ci_high) else ""
    other, ai = slopes["other"], slopes["ai"]
    return SpecificReduction(
        beta=beta, beta_other=other.beta, beta_ai=ai.beta, estimate=estimate, ci_low=ci_low, ci_high=ci_high,
        span_other=other.span, span_ai=ai.span, reduction=reduction, level=level, reason=reason,
    )  # fmt: skip


def _specific_limits(beta: float, limits: tuple[float, float], reduction: Reduction) -> tuple[float, float]:
    """MOVER limits of max(β, 0) − |ρ| from those of β and Fieller's of ρ."""
    b, (low_b, high_b) = max(beta, 0.0), (max(x, 0.0) if x == x else NAN for x in limits)
    ends = 1 - reduction.ci_high, 1 - reduction.ci_low
    left = abs(1 - reduction.estimate)
    low_r = 0.0 if ends[0] <= 0 <= ends[1] else min(abs(ends[0]), abs(ends[1]))
    high_r = max(abs(ends[0]), abs(ends[1]))
    estimate = b - left
    return (
        float(estimate - np.hypot(b - low_b, high_r - left)),
        float(estimate + np.hypot(high_b - b, left - low_r)),
    )


@dataclass(frozen=True)
class _Slope:
    beta: float
    low: float
    high: float
    span: float


def _slope(name: str, before: ArrayLike, after: ArrayLike, clusters: Labels | None, level: float) -> _Slope:
    """OLS slope with HC3 (clustered: CR3-like sums) t limits; the upper one at half the error (two banks)."""
    s, s_after = _paired(before, after, f"bank {name} base", f"bank {name} after")
    span = float(np.ptp(s))
    centred = s - s.mean()
    sxx = float(centred @ centred)
    if len(s) < 3 or spread(s[None])[0] == 0:
        return _Slope(NAN, NAN, NAN, span)
    beta = float(centred @ s_after / sxx)
    residual = (s_after - s_after.mean()) - beta * centred
    leverage = 1 / len(s) + centred**2 / sxx
    influence = centred * residual / sxx / np.maximum(1 - leverage, 1e-9)
    labels = np.arange(len(s)) if clusters is None else clusters
    part = Partition.of(label_codes(labels, len(s), f"bank {name} clusters"))
    if part.size < 3:
        return _Slope(beta, NAN, NAN, span)
    se = float(np.sqrt((part.sums(influence) ** 2).sum()))
    alpha, df = (1 - level) / 2, part.size - 2
    return _Slope(
        beta, beta - float(stdtrit(df, 1 - alpha)) * se, beta + float(stdtrit(df, 1 - alpha / 2)) * se, span
    )


def _paired(
    base: ArrayLike, after: ArrayLike, base_name: str = "base", after_name: str = "after"
) -> tuple[Array, Array]:
    x, y = finite(base, base_name), finite(after, after_name)
    if len(x) != len(y):
        raise RequestError(
            f"{base_name} has {len(x)} rows, {after_name} {len(y)}: expected the same, in one order"
        )
    return x, y
