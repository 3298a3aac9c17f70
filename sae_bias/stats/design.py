"""Exact binomial tests, prompts needed at 80 % power, and the discover / tune / report split."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import scipy
from scipy.special import stdtrit

from sae_bias.core.errors import RequestError

DEFAULT_SHARES: Mapping[str, float] = MappingProxyType({"discover": 0.4, "tune": 0.2, "report": 0.4})


@dataclass(frozen=True)
class CountTest:
    """`successes` of `n` against one half, exact and two-sided; ties are not among the n."""

    successes: int
    n: int
    share: float
    ci_low: float
    """Clopper–Pearson."""
    ci_high: float
    p_value: float


def sign_test(successes: int, n: int, level: float = 0.95) -> CountTest:
    """Exact two-sided binomial test of ½ (43 of 60: p = .0011; 24 of 40: .27). n = 0: p = 1, share NaN."""
    if not 0 <= successes <= n:
        raise RequestError(f"{successes} of {n}: expected 0 ≤ successes ≤ n")
    if n == 0:
        return CountTest(0, 0, math.nan, math.nan, math.nan, 1.0)
    test = scipy.stats.binomtest(successes, n)
    interval = test.proportion_ci(level, method="exact")
    return CountTest(
        successes, n, successes / n, float(interval.low), float(interval.high), float(test.pvalue)
    )


def mcnemar_exact(gained: int, lost: int, level: float = 0.95) -> CountTest:
    """Exact McNemar: of the items whose outcome flipped, `gained` one way and `lost` the other."""
    return sign_test(gained, gained + lost, level)


def fewest_units(alpha: float = 0.05) -> int:
    """Fewest units whose smallest two-sided sign-flip p, 2/2^U, is at most alpha (6 at 5 %)."""
    return math.ceil(1 - math.log2(alpha))


def needed_n(sd: float, effect: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Paired prompts for a two-sided t-test to see a mean difference `effect` given the run's own paired SD.

    Smallest n with P(|t'| > t_{1−α/2, n−1}) ≥ power, t′ noncentral with δ = effect·√n/sd.
    """
    if not (sd > 0 and effect != 0 and 0 < alpha < power < 1):
        raise RequestError(
            f"sd {sd}, effect {effect}, alpha {alpha}, power {power}: "
            "expected sd > 0, effect ≠ 0, 0 < alpha < power < 1"
        )
    standardised = abs(effect) / sd

    def enough(n: int) -> bool:
        critical, shift = float(stdtrit(n - 1, 1 - alpha / 2)), standardised * math.sqrt(n)
        law = scipy.stats.nct(n - 1, shift)
        return float(law.sf(critical) + law.cdf(-critical)) >= power

    high = 2
    while not enough(high):
        high *= 2
        if high > 10**9:
            raise RequestError(f"effect {effect} at sd {sd} needs more than 10⁹ prompts")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def split_templates(
    templates: Sequence[str],
    shares: Mapping[str, float] = DEFAULT_SHARES,
    seed: int = 0,
    *,
    families: Mapping[str, str] | None = None,
    must_report: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Whole templates into named splits, the same for the same names and seed on every machine.

    Templates are ordered by SHA-256 of seed and name within each family, and each goes to the split furthest
    behind its share: every family is spread over the splits, and sizes are within one of the shares.
    `must_report` templates go to "report" first and count towards its share. Splits keep the given order.
    Raises RequestError where a split would be empty, a name occurs twice, or a `must_report` name is
    unknown.
    """
    names = list(templates)
    _check_split(names, shares, must_report)
    total = sum(shares.values())
    target = {split: len(names) * share / total for split, share in shares.items()}
    place = dict.fromkeys(must_report, "report")
    if place:
        target["report"] = max(target["report"] - len(place), 0.0)
    free = sum(target.values())
    counts = dict.fromkeys(target, 0)
    rest = sorted(
        (name for name in names if name not in place),
        key=lambda name: ((families or {}).get(name, ""), _digest(seed, name)),
    )
    for position, name in enumerate(rest, start=1):
        behind = {split: goal / free * position - counts[split] for split, goal in target.items()}
        split = max(behind, key=behind.__getitem__)
        place[name] = split
        counts[split] += 1
    splits = {split: tuple(name for name in names if place[name] == split) for split in shares}
    empty = [split for split, members in splits.items() if not members]
    if empty:
        raise RequestError(
            f"{len(names)} templates leave split {', '.join(empty)} empty; give more templates"
        )
    return splits


def _check_split(names: list[str], shares: Mapping[str, float], must_report: Sequence[str]) -> None:
    if not shares or any(not share > 0 for share in shares.values()):
        raise RequestError(f"shares {dict(shares)}: expected a positive share for each split")
    if len(set(names)) != len(names):
        raise RequestError("a template is named twice; expected each once")
    unknown = sorted(set(must_report) - set(names))
    if unknown:
        raise RequestError(f"must_report names no template: {', '.join(unknown)}")
    if must_report and "report" not in shares:
        raise RequestError("must_report is given but shares has no split named report")


def _digest(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
