"""Westfall–Young max-T of one array, as the tests of its properties ask for it."""

from sae_bias.stats.features import MaxT, MaxTResult


def max_t(x, *, n_flips=10_000, seed=0, variance_floor=0.0, block=512, alternative="two-sided") -> MaxTResult:
    """`MaxT` of one array [n_units, f]."""
    family = MaxT(len(x), n_flips, seed, alternative)
    family.add(x, variance_floor, block=block)
    return family.result()
