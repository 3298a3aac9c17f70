"""Long-run behavior of the intervals: type-I error and coverage over many simulated studies."""

import numpy as np
import pytest
from families import max_t
from scipy import stats as scipy_stats

from sae_bias.stats import clustered, features, reduction

N_STUDIES = 10_000
SEED = 20_260

EFFECTS = [
    (1, 1, 1),
    (1, 1, 0),
    (1, 0.3, 1),
    (0.3, 1, 1),
    (0.3, 0.3, 1),
    (1, 0, 1),
    (0, 1, 1),
    (0, 0, 1),
    (1, 0, 0),
    (0, 1, 0),
]
"""Standard deviations of template, entity and noise effects: every combination of there and not there."""


def labels(n_templates: int, n_entities: int):
    return np.repeat(np.arange(n_templates), n_entities), np.tile(np.arange(n_entities), n_templates)


def studies(rng, shape, effects, n=N_STUDIES, mean=0.0):
    """[n, templates·entities]"""
    t, e = shape
    x = mean + effects[0] * rng.normal(size=(n, t, 1)) + effects[1] * rng.normal(size=(n, 1, e))
    return (x + effects[2] * rng.normal(size=(n, t, e))).reshape(n, -1)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["normal", "skewed"])
def test_type_one_error_and_coverage_of_the_primary_interval(law):
    """35 × 8: 3–7 % and 93–97 % where both effects exist, at most 7 % elsewhere."""
    rng = np.random.default_rng(SEED)
    templates, entities = labels(35, 8)
    print(f"\n35 templates × 8 entities, {law} noise, {N_STUDIES} studies a setting, true mean 1.7")
    print("template entity noise | two-way reject  cover | plain t  clustered over templates only")
    failures = []
    for effects in EFFECTS:
        noise = studies(rng, (35, 8), effects)
        if law == "skewed":
            noise += effects[2] * (rng.exponential(size=noise.shape) - 1)
        null = clustered.clustered_means(noise, templates, entities)
        shifted = clustered.clustered_means(noise + 1.7, templates, entities)
        reject = (null["p_value"] < 0.05).mean()
        cover = ((shifted["ci_low"] <= 1.7) & (shifted["ci_high"] >= 1.7)).mean()
        plain = (scipy_stats.ttest_1samp(noise, 0, axis=1).pvalue < 0.05).mean()
        one_way = (clustered.clustered_means(noise, templates)["p_value"] < 0.05).mean()
        t, e, s = effects
        print(f"{t:8.1f} {e:6.1f} {s:5.1f} | {reject:14.3f} {cover:6.3f} | {plain:7.3f}  {one_way:.3f}")
        both = effects[0] > 0 and effects[1] > 0
        fine = (0.03 <= reject <= 0.07 and 0.93 <= cover <= 0.97) if both else reject <= 0.07
        if not fine:
            failures.append((effects, reject, cover))
    assert not failures


@pytest.mark.slow
@pytest.mark.parametrize("n_templates", [3, 4, 6, 12, 20, 35])
def test_coverage_at_few_templates(n_templates):
    """8 entities, normal effects: at least 94 % at 3 to 12 templates, 93–98 % above; wider only without any effects."""
    rng = np.random.default_rng(SEED + 5 + n_templates)
    templates, entities = labels(n_templates, 8)
    covers = {}
    for effects in EFFECTS:
        x = studies(rng, (n_templates, 8), effects, n=20_000)
        result = clustered.clustered_means(x, templates, entities)
        covers[effects] = ((result["ci_low"] <= 0) & (result["ci_high"] >= 0)).mean()
    print(f"\n{n_templates} × 8:", {k: round(float(v), 4) for k, v in covers.items()})
    assert min(covers.values()) >= (0.94 if n_templates <= 12 else 0.93)
    assert max(v for (t, e, _), v in covers.items() if max(t, e) >= 1) <= 0.98


@pytest.mark.slow
def test_missing_cells_and_small_splits():
    """A report split of 14 × 8, and 35 × 8 with a third of the cells gone, keep the error near 5 %."""
    rng = np.random.default_rng(SEED + 1)
    print("\ndesign               reject  cover")
    for name, shape, keep in (
        ("14 x 8", (14, 8), 1.0),
        ("7 x 8", (7, 8), 1.0),
        ("35 x 8, 2/3", (35, 8), 0.67),
    ):
        templates, entities = labels(*shape)
        cells = np.flatnonzero(rng.random(len(templates)) <= keep)
        x = studies(rng, shape, (1, 1, 1))[:, cells]
        result = clustered.clustered_means(x, templates[cells], entities[cells])
        reject = (result["p_value"] < 0.05).mean()
        print(f"{name:20s} {reject:6.3f} {((result['ci_low'] <= 0) & (result['ci_high'] >= 0)).mean():6.3f}")
        assert 0.03 <= reject <= 0.08


@pytest.mark.slow
def test_fieller_and_specific_reduction_cover():
    """True ρ = 0.35, β = 0.9: Fieller 93–97 %, the conservative specific interval at least 93 %.

    A Fieller interval misses ρ exactly where the clustered test of d_s − ρ·d_0 rejects: checked study by
    study on the first thousand, then counted by that test over all of them.
    """
    rng = np.random.default_rng(SEED + 2)
    templates, entities = labels(35, 8)
    base = studies(rng, (35, 8), (1, 1, 1), mean=3.0)
    after = 0.35 * base + studies(rng, (35, 8), (0.4, 0.4, 0.4))
    accepted = clustered.clustered_means(after - 0.35 * base, templates, entities)["p_value"] >= 0.05
    scores = {"other": np.linspace(-3, 3, 24), "ai": np.linspace(-2, 2, 24)}
    n, specific, bootstrap = 1_000, 0, 0
    for i, (d0, ds) in enumerate(zip(base[:n], after[:n])):
        bank = {"other": 1.0 * scores["other"], "ai": 0.9 * scores["ai"]}
        bank = {k: v + 0.3 * rng.normal(size=24) for k, v in bank.items()}
        result = reduction.specific_reduction(d0, ds, templates, entities, scores, bank)
        assert result.reduction.bounded
        assert (result.reduction.ci_low <= 0.65 <= result.reduction.ci_high) == accepted[i]
        specific += result.ci_low <= 0.55 <= result.ci_high
        weights = reduction.crossed_weights(templates, entities, n_boot=300, seed=i)
        low, high = np.quantile(1 - (weights @ ds) / (weights @ d0), [0.025, 0.975])
        bootstrap += low <= 0.65 <= high
    print(f"\ncoverage at nominal 95 %: Fieller {accepted.mean():.3f} of {N_STUDIES},", end=" ")
    print(f"specific {specific / n:.3f}, joint bootstrap {bootstrap / n:.3f} of {n}")
    assert 0.93 <= accepted.mean() <= 0.97
    assert specific / n >= 0.93


@pytest.mark.slow
def test_max_t_keeps_the_family_rate_on_sparse_features():
    """Correlated, sparse, skewed contrasts of 20 units × 2,000 features with a floor: ≤ 7 % any-call."""
    rng = np.random.default_rng(SEED + 3)
    n, calls = 400, 0
    for seed in range(n):
        fires = rng.random((20, 2000)) < rng.uniform(0.02, 0.9, 2000)
        shared = rng.normal(size=(20, 1))
        x = fires * (rng.normal(size=(20, 2000)) * rng.lognormal(size=(20, 2000)) + 0.5 * shared)
        floor = features.activation_variance_floor(np.abs(x))
        calls += max_t(x, n_flips=500, seed=seed, variance_floor=floor).p_fwer.min() <= 0.05
    print(f"\nany call on null: {calls / n:.3f} of {n} families")
    assert calls / n <= 0.07
