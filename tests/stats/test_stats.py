"""Statistics against closed forms, hand-worked numbers, statsmodels, and the invariances they must have."""

import math
import time

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from families import max_t
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from sae_bias.core.errors import RequestError
from sae_bias.stats import clustered, design, features, reduction


def crossed(n_templates: int, n_entities: int):
    """Labels of a full templates × entities design, a row a pair."""
    templates = np.repeat([f"t{i}" for i in range(n_templates)], n_entities)
    return templates, np.tile([f"e{i}" for i in range(n_entities)], n_templates)


def study(rng, n_templates=12, n_entities=6, mean=0.0, sd=(1.0, 1.0, 1.0), n=1):
    """n data sets [n, templates·entities] with template, entity and noise effects of the given size."""
    t, e, s = sd
    x = mean + t * rng.normal(size=(n, n_templates, 1)) + e * rng.normal(size=(n, 1, n_entities))
    return (x + s * rng.normal(size=(n, n_templates, n_entities))).reshape(n, -1)


# --- clustered mean -----------------------------------------------------------------------------------


def test_clustered_mean_by_hand():
    """2 × 2 with rows (1, 3) and (5, 11): means 2, 8 and 3, 7; MS_T = 36, MS_E = 16, MS_R = 4."""
    result = clustered.clustered_mean([1, 3, 5, 11], ["a", "a", "b", "b"], ["x", "y", "x", "y"])
    variance, df = (36 + 16 - 4) / 4, (36 + 16 - 4) ** 2 / (36**2 / 1 + 16**2 / 1 + 4**2 / 1)
    assert result.mean == 5
    assert result.se == pytest.approx(math.sqrt(variance))
    assert result.df == pytest.approx(df)
    half = scipy_stats.t.ppf(0.975, df) * result.se
    assert result.ci == pytest.approx((5 - half, 5 + half))
    assert result.p_value == pytest.approx(2 * scipy_stats.t.sf(5 / result.se, df))
    assert (result.n, result.n_templates, result.n_entities, result.reason) == (4, 2, 2, "")


@pytest.mark.parametrize("rows_a_cell", [1, 3])
@pytest.mark.parametrize("sd", [(1, 1, 1), (0, 1, 1), (0, 0, 1)])
def test_balanced_designs_have_the_mean_squares_of_anova(rows_a_cell, sd):
    """statsmodels' two-way ANOVA of the cell means gives MS_T, MS_E and MS_R; the floored V keeps its own df."""
    rng = np.random.default_rng(4)
    t, e = (np.repeat(labels, rows_a_cell) for labels in crossed(7, 6))
    for cells in study(rng, 7, 6, sd=sd, n=10):
        y = np.repeat(cells, rows_a_cell) + 0.3 * rng.normal(size=len(t))
        means = pd.DataFrame({"y": y, "t": t, "e": e}).groupby(["t", "e"], as_index=False)["y"].mean()
        table = sm.stats.anova_lm(smf.ols("y ~ C(t) + C(e)", means).fit())
        ms_t, ms_e, ms_r = table["mean_sq"]
        total = ms_t + ms_e - ms_r
        if total >= max(ms_t, ms_e):
            df = total**2 / (ms_t**2 / 6 + ms_e**2 / 5 + ms_r**2 / 30)
        else:
            df = 6 if ms_t >= ms_e else 5
        result = clustered.clustered_mean(y, t, e)
        assert result.se == pytest.approx(math.sqrt(max(total, ms_t, ms_e) / 42))
        assert result.df == pytest.approx(df)


def test_clustered_mean_is_statsmodels_two_way_ols_where_not_balanced():
    """Cells missing and others holding several rows; floored at statsmodels' larger one-way V."""
    rng = np.random.default_rng(1)
    templates, entities = crossed(12, 6)
    unfloored = 0
    for x in study(rng, n=20):
        rows = rng.choice(72, 60)
        y, t, e = x[rows], templates[rows], entities[rows]
        groups = np.stack([np.unique(labels, return_inverse=True)[1] for labels in (t, e)], 1)
        se = [
            sm.OLS(y, np.ones(len(y))).fit(cov_type="cluster", cov_kwds={"groups": g}).bse[0]
            for g in (groups, groups[:, 0], groups[:, 1])
        ]
        result = clustered.clustered_mean(y, t, e)
        assert result.mean == pytest.approx(y.mean())
        assert result.se == pytest.approx(max(se), rel=1e-10)
        unfloored += max(se) == se[0]
    assert unfloored >= 10


@pytest.mark.parametrize(
    ("shape", "mean", "call"),
    [
        ((6, 6), 9.0, "positive"),
        ((6, 6), -9.0, "negative"),
        ((12, 6), 0.0, "none"),
        ((5, 8), 9.0, "undetermined"),
        ((8, 5), 9.0, "undetermined"),
    ],
)
def test_a_call_needs_six_templates_and_six_entities(shape, mean, call):
    x = study(np.random.default_rng(2), *shape, mean=mean)[0]
    assert clustered.clustered_mean(x, *crossed(*shape)).call == call


def test_floor_is_the_larger_one_way_variance():
    """Pure noise with a negative interaction of clusterings: statsmodels' V is smaller, ours is floored."""
    rng = np.random.default_rng(3)
    templates, entities = crossed(10, 8)
    for x in study(rng, 10, 8, sd=(0, 0, 1), n=50):
        both = clustered.clustered_mean(x, templates, entities)
        one_way = max(
            clustered.clustered_mean(x, templates).se, clustered.clustered_mean(x, None, entities).se
        )
        assert both.se >= one_way * (1 - 1e-12)


def test_one_template_a_row_without_entities_is_the_t_test():
    x = np.random.default_rng(0).normal(1, 1, 17)
    result, test = clustered.clustered_mean(x, range(17)), scipy_stats.ttest_1samp(x, 0)
    assert result.p_value == pytest.approx(test.pvalue)
    assert result.ci == pytest.approx(tuple(test.confidence_interval()))
    assert (result.clustering, result.n_entities, result.df) == ("templates", 0, 16)
    assert clustered.clustered_mean(x, range(17), range(17)).p_value == pytest.approx(test.pvalue)


@pytest.mark.parametrize(
    ("templates", "entities", "word"),
    [(["a"] * 3, ["x", "y", "z"], "templates"), (["a", "b", "c"], ["x"] * 3, "entities")],
)
def test_no_interval_is_invented(templates, entities, word):
    result = clustered.clustered_mean([1.0, 2.0, 3.0], templates, entities)
    assert result.mean == 2
    assert all(math.isnan(v) for v in (result.se, result.ci_low, result.ci_high, result.p_value))
    assert f"fewer than two {word}" in result.reason


def test_identical_values_have_no_width_and_no_p():
    templates, entities = crossed(5, 7)
    result = clustered.clustered_mean(np.full(35, 0.1), templates, entities)
    assert result.ci == pytest.approx((0.1, 0.1), abs=1e-15)
    assert math.isnan(result.p_value)
    assert "identical" in result.reason


def test_cluster_means_that_cancel_give_no_interval():
    result = clustered.clustered_mean([1, -1, -1, 1], ["a", "a", "b", "b"], ["x", "y", "x", "y"])
    assert math.isnan(result.ci_low)
    assert math.isnan(result.p_value)
    assert result.reason


def test_bad_rows_are_named():
    with pytest.raises(RequestError, match="index 1, 3"):
        clustered.clustered_mean([0, np.nan, 1, np.inf], list("aabb"), list("xyxy"))
    with pytest.raises(RequestError, match="2 labels for 3 rows"):
        clustered.clustered_mean([0, 1, 2], list("ab"), list("xyz"))
    with pytest.raises(RequestError, match="missing at index 1"):
        clustered.clustered_mean([0, 1, 2], ["a", None, "b"], list("xyz"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), rows=st.integers(20, 48))
def test_clustered_mean_invariances(seed, scale, rows):
    """Sign flips flip the interval, order is irrelevant, scale scales, labels are only names."""
    rng = np.random.default_rng(seed)
    templates, entities = crossed(8, 6)
    keep = rng.permutation(48)[:rows]
    x, t, e = study(rng, 8, 6, mean=0.3)[0][keep], templates[keep], entities[keep]
    base = clustered.clustered_mean(x, t, e)
    flipped, scaled = clustered.clustered_mean(-x, t, e), clustered.clustered_mean(scale * x, t, e)
    order = rng.permutation(rows)
    moved = clustered.clustered_mean(x[order], t[order], e[order])
    swapped = clustered.clustered_mean(x, e, t)
    assert flipped.ci == pytest.approx((-base.ci_high, -base.ci_low))
    assert scaled.ci == pytest.approx((scale * base.ci_low, scale * base.ci_high))
    assert moved.ci == pytest.approx(base.ci)
    assert swapped.ci == pytest.approx(base.ci)
    assert flipped.p_value == pytest.approx(base.p_value)
    assert scaled.p_value == pytest.approx(base.p_value, rel=1e-6)


def test_many_means_at_once_equal_one_by_one():
    rng = np.random.default_rng(4)
    templates, entities = crossed(7, 5)
    x = study(rng, 7, 5, n=6)
    table = clustered.clustered_means(x, templates, entities)
    for i, row in enumerate(x):
        one = clustered.clustered_mean(row, templates, entities)
        assert table["p_value"][i] == pytest.approx(one.p_value)
        assert table["ci_low"][i] == pytest.approx(one.ci_low)


def test_type_one_error_of_the_clustered_p_against_the_plain_t():
    """Template and entity effects as large as the noise: the plain t rejects most of the time, ours 5 %."""
    x = study(np.random.default_rng(5), 35, 8, n=1500)
    plain = scipy_stats.ttest_1samp(x, 0, axis=1).pvalue
    ours = clustered.clustered_means(x, *crossed(35, 8))["p_value"]
    assert (plain < 0.05).mean() > 0.45
    assert 0.03 <= (ours < 0.05).mean() <= 0.08


# --- sign-flips, effect sizes -------------------------------------------------------------------------


def test_sign_flip_floor_and_label():
    templates, entities = crossed(5, 8)
    x = 1 + 0.01 * np.random.default_rng(0).normal(size=40)
    over_entities = clustered.sign_flip(x, entities, over="entities")
    assert over_entities.p_value == over_entities.floor == 1 / 128
    assert over_entities.label == "over entities, given these templates"
    assert clustered.sign_flip(x, templates).label == "over templates, given these entities"
    assert clustered.sign_flip(x, templates).p_value == 2 / 32


def test_sign_flip_equals_scipy_permutation_test():
    x = np.random.default_rng(2).normal(0.4, 1, 9)
    ours = clustered.sign_flip(x, range(9))
    theirs = scipy_stats.permutation_test(
        (x,), lambda v, axis: v.mean(axis), permutation_type="samples", n_resamples=np.inf
    )
    assert ours.exact
    assert ours.p_value == pytest.approx(theirs.pvalue)


def test_sign_flip_with_many_clusters_is_sampled_and_corrected():
    x = np.full(40, 1.0)
    test = clustered.sign_flip(x, range(40), n_flips=999)
    assert not test.exact
    assert test.p_value == test.floor == 1 / 1000
    assert clustered.sign_flip(np.zeros(5), range(5)).p_value == 1


def test_effect_sizes_by_hand():
    sizes = clustered.effect_sizes([1, 3, 5, 7, -2, 0], ["a", "a", "b", "b", "c", "c"])
    assert sizes.mean == pytest.approx(7 / 3)
    assert sizes.d_z == pytest.approx(np.mean([2, 6, -1]) / np.std([2, 6, -1], ddof=1))
    assert sizes.share_positive == pytest.approx(2 / 3)
    assert math.isnan(clustered.effect_sizes([1, 1], ["a", "b"]).d_z)


@pytest.mark.parametrize("margin", [0.05, 0.3, 1.0])
def test_equivalence_is_statsmodels_two_one_sided_tests(margin):
    """One template a row: the ordinary TOST."""
    x = np.random.default_rng(6).normal(0.1, 0.5, 30)
    p = clustered.equivalence_p(clustered.clustered_mean(x, range(30)), margin)
    assert p == pytest.approx(DescrStatsW(x).ttost_mean(-margin, margin)[0])


def test_equivalence_without_variance_and_without_an_interval():
    t, e = crossed(6, 6)
    none = clustered.clustered_mean(np.zeros(36), t, e)
    assert (
        clustered.equivalence_p(none, 0.1),
        clustered.equivalence_p(clustered.clustered_mean(np.ones(36), t, e), 0.1),
    ) == (0, 1)
    assert math.isnan(
        clustered.equivalence_p(clustered.clustered_mean([1.0, 2.0], ["a", "a"], ["x", "y"]), 0.1)
    )
    with pytest.raises(RequestError, match="margin"):
        clustered.equivalence_p(none, 0.0)


# --- reductions ---------------------------------------------------------------------------------------


def reduction_data(rng, rho=0.4, mean=3.0, n_templates=20, n_entities=8):
    base = study(rng, n_templates, n_entities, mean=mean)[0]
    after = rho * base + study(rng, n_templates, n_entities, sd=(0.3, 0.3, 0.3))[0]
    return base, after, *crossed(n_templates, n_entities)


def test_fieller_one_way_is_the_quadratic():
    """Independent rows: the textbook Fieller limits."""
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 30)
    after = 0.4 * base + rng.normal(0, 0.5, 30)
    result = reduction.fieller_reduction(base, after, range(30))
    cov = np.cov(after, base) / 30
    t2 = scipy_stats.t.ppf(0.975, 29) ** 2
    a = base.mean() ** 2 - t2 * cov[1, 1]
    b = after.mean() * base.mean() - t2 * cov[0, 1]
    c = after.mean() ** 2 - t2 * cov[0, 0]
    root = math.sqrt(b * b - a * c)
    assert result.bounded
    assert result.ci == pytest.approx((1 - (b + root) / a, 1 - (b - root) / a), rel=1e-9)
    assert result.estimate == pytest.approx(1 - after.mean() / base.mean())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(-0.5, 1.2), mean=st.floats(0.3, 4))
def test_fieller_ends_are_where_the_clustered_test_turns(seed, rho, mean):
    base, after, t, e = reduction_data(np.random.default_rng(seed), rho, mean)
    result = reduction.fieller_reduction(base, after, t, e)
    base_p = clustered.clustered_mean(base, t, e).p_value
    assert result.bounded == (base_p < 0.05)
    if not result.bounded:
        assert math.isnan(result.ci_low)
        assert math.isnan(result.estimate)
        assert "not distinguishable from 0" in result.reason
        return
    assert result.ci_low <= result.estimate <= result.ci_high
    for end, outwards in zip(result.ci, (-1e-7, 1e-7)):
        inside, outside = (
            clustered.clustered_mean(after - (1 - end - step) * base, t, e).p_value
            for step in (-outwards, outwards)
        )
        assert inside >= 0.05 - 1e-6
        assert outside <= 0.05 + 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_fieller_invariances(seed, scale):
    """Units and the sign of the bias do not matter, nor does row order."""
    rng = np.random.default_rng(seed)
    base, after, t, e = reduction_data(rng)
    order = rng.permutation(len(base))
    result = reduction.fieller_reduction(base, after, t, e)
    for other in (
        reduction.fieller_reduction(-scale * base, -scale * after, t, e),
        reduction.fieller_reduction(base[order], after[order], t[order], e[order]),
    ):
        assert other.ci == pytest.approx(result.ci, rel=1e-6)
        assert other.estimate == pytest.approx(result.estimate)
    assert reduction.fieller_reduction(base, scale * after, t, e).ci == pytest.approx(
        tuple(sorted(1 - scale * (1 - end) for end in result.ci)), rel=1e-5, abs=1e-6 * scale
    )


def test_reduction_edges():
    base, after, t, e = reduction_data(np.random.default_rng(7))
    nothing, half = (
        reduction.fieller_reduction(base, base, t, e),
        reduction.fieller_reduction(base, base / 2, t, e),
    )
    gone, over = (
        reduction.fieller_reduction(base, 0 * base, t, e),
        reduction.fieller_reduction(base, -base, t, e),
    )
    assert nothing.ci == pytest.approx((0, 0), abs=1e-7)
    assert nothing.change.ci == (0, 0)
    assert half.ci == pytest.approx((0.5, 0.5), abs=1e-7)
    assert gone.ci == pytest.approx((1, 1), abs=1e-7)
    assert over.overshoot
    assert over.estimate == pytest.approx(2)
    assert not half.overshoot
    lone = reduction.fieller_reduction(base[:8], after[:8], t[:8], e[:8])
    assert not lone.bounded
    assert "fewer than two templates" in lone.reason
    unbiased = reduction.fieller_reduction(0 * base, after, t, e)
    assert not unbiased.bounded
    assert math.isnan(unbiased.estimate)
    with pytest.raises(RequestError, match="rows"):
        reduction.fieller_reduction(base, after[1:], t, e)


def joint_bootstrap(base, after, templates, entities, n_boot=2_000, seed=0):
    """Percentile interval of R from templates and entities drawn with replacement: a check on Fieller's."""
    weights = reduction.crossed_weights(templates, entities, n_boot=n_boot, seed=seed)
    return tuple(np.quantile(1 - (weights @ after) / (weights @ base), [0.025, 0.975]))


def test_joint_bootstrap_is_near_fieller():
    base, after, t, e = reduction_data(np.random.default_rng(8), n_templates=30, n_entities=20)
    fieller = reduction.fieller_reduction(base, after, t, e).ci
    boot = joint_bootstrap(base, after, t, e)
    width = fieller[1] - fieller[0]
    assert boot == pytest.approx(fieller, abs=0.25 * width)


def test_crossed_weights_keep_totals():
    t, e = crossed(6, 4)
    weights = reduction.crossed_weights(t, e, n_boot=50)
    assert weights.shape == (50, 24)
    assert np.allclose(weights.sum(1), 24)
    assert np.linalg.matrix_rank(weights[0].reshape(6, 4)) == 1


def banks(rng, beta_other=1.0, beta_ai=0.9, noise=0.1, span=6.0, n=40):
    base = {k: np.linspace(-span / 2, span / 2, n) for k in ("other", "ai")}
    slope = {"other": beta_other, "ai": beta_ai}
    after = {k: 0.3 + slope[k] * base[k] + noise * rng.normal(size=n) for k in base}
    return base, after


def test_specific_reduction_is_beta_less_the_size_of_rho():
    rng = np.random.default_rng(9)
    base, after, t, e = reduction_data(rng, rho=0.1)
    bank_base, bank_after = banks(rng, 1.2, 0.9)
    result = reduction.specific_reduction(base, after, t, e, bank_base, bank_after)
    fit = {k: np.polyfit(bank_base[k], bank_after[k], 1)[0] for k in bank_base}
    assert (result.beta_other, result.beta_ai) == pytest.approx((fit["other"], fit["ai"]))
    assert result.beta == min(result.beta_other, result.beta_ai, 1)
    assert result.estimate == pytest.approx(result.beta - abs(after.mean() / base.mean()))
    assert result.ci_low < 0.8 < result.ci_high
    assert result.reason == ""


def test_a_flattened_model_has_no_specific_reduction():
    """Bias falls to 4 % and so does all valence: plain reduction high, specific reduction about 0."""
    rng = np.random.default_rng(10)
    base, _, t, e = reduction_data(rng)
    bank_base, bank_after = banks(rng, 0.04, 0.04, noise=0.02)
    result = reduction.specific_reduction(base, 0.04 * base, t, e, bank_base, bank_after)
    assert result.reduction.estimate == pytest.approx(0.96)
    assert result.ci_low <= 0 <= result.ci_high
    assert abs(result.estimate) < 0.02


def test_an_edit_that_never_acts_on_the_banks_has_beta_one():
    rng = np.random.default_rng(11)
    base, after, t, e = reduction_data(rng)
    bank_base, _ = banks(rng)
    result = reduction.specific_reduction(base, after, t, e, bank_base, bank_base)
    assert result.beta == 1
    assert result.ci == pytest.approx(result.reduction.ci, rel=1e-6)


def test_specific_reduction_is_undefined_where_it_must_be():
    rng = np.random.default_rng(12)
    base, after, t, e = reduction_data(rng)
    flat = reduction.specific_reduction(base, after, t, e, *banks(rng, span=1.5))
    assert math.isnan(flat.estimate)
    assert "2 nats" in flat.reason
    unsure = reduction.specific_reduction(base - base.mean() + 0.01, after, t, e, *banks(rng))
    assert math.isnan(unsure.estimate)
    assert math.isnan(unsure.ci_low)
    assert "not distinguishable from 0" in unsure.reason
    with pytest.raises(RequestError, match="bank ai"):
        reduction.specific_reduction(base, after, t, e, {"other": [1]}, {"other": [1]})


@pytest.mark.parametrize(("rho", "beta"), [(-0.9, 0.9), (-1.0, -0.26), (-0.2, 0.9), (0.1, 1.4), (0.0, 0.04)])
def test_overshoot_and_flattening_are_never_credited(rho, beta):
    """β − ρ would read 1.8, 0.74 and 1.1 here: a bias turned round, or evaluation turned round, is not removal."""
    rng = np.random.default_rng(14)
    base, after, t, e = reduction_data(rng, rho=rho)
    result = reduction.specific_reduction(base, after, t, e, *banks(rng, beta, beta))
    left = abs(after.mean() / base.mean())
    assert result.estimate == pytest.approx(min(max(result.beta, 0), 1) - left)
    assert result.estimate <= max(result.beta, 0) <= 1
    assert result.ci_low <= result.estimate <= result.ci_high <= 1
    assert reduction.specific_value(beta, rho) == pytest.approx(min(max(beta, 0), 1) - abs(rho))


def test_no_edit_removes_nothing_specifically():
    """β of scores against themselves is 1 to rounding."""
    assert reduction.specific_value(1 - 1.7e-15, 1.0) == 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(-3, 3), beta=st.floats(-2, 3))
def test_specific_reduction_is_at_most_beta_and_at_most_one(seed, rho, beta):
    rng = np.random.default_rng(seed)
    base, after, t, e = reduction_data(rng, rho=rho)
    result = reduction.specific_reduction(base, after, t, e, *banks(rng, beta, 1.0))
    if result.reduction.bounded:
        assert result.estimate <= max(result.beta, 0) + 1e-12
        assert result.ci_high <= 1 + 1e-12


def test_bank_clusters_widen_the_interval():
    """Items of one statement that err together count once."""
    rng = np.random.default_rng(13)
    base, after, t, e = reduction_data(rng)
    statements = np.repeat(np.arange(10), 4)
    scores = np.repeat(np.linspace(-3, 3, 10), 4)
    moved = 0.7 * scores + np.repeat(rng.normal(size=10), 4)
    bank_base, bank_after = {"other": scores, "ai": scores}, {"other": moved, "ai": moved}
    loose = reduction.specific_reduction(base, after, t, e, bank_base, bank_after)
    kept = reduction.specific_reduction(
        base, after, t, e, bank_base, bank_after, bank_clusters={"other": statements, "ai": statements}
    )
    assert kept.ci_high - kept.ci_low > 1.3 * (loose.ci_high - loose.ci_low)


# --- many features ------------------------------------------------------------------------------------


def test_paired_t_is_scipy_and_the_floor_caps_it():
    x = np.random.default_rng(0).normal(0.3, 1, (12, 40))
    ours, theirs = features.paired_t(x), scipy_stats.ttest_1samp(x, 0)
    assert np.allclose(ours, theirs.statistic)
    regular = 0.01 + 1e-6 * x
    assert np.all(np.abs(features.paired_t(regular)) > 1000)
    assert np.allclose(features.paired_t(regular, 0.04), 0.01 / math.sqrt(0.04 / 12), rtol=1e-2)
    assert features.paired_t(np.zeros((5, 2))).tolist() == [0, 0]
    assert np.isnan(features.paired_t(np.ones((1, 2)))).all()


def brute_max_t(x, floor=0.0):
    """Every sign pattern, plainly."""
    n_units = len(x)
    codes = np.arange(2**n_units)[:, None] >> np.arange(n_units)
    signs = 1 - 2 * (codes & 1)
    mean = signs @ x / n_units
    variance = np.maximum(((x * x).sum(0) - n_units * mean**2) / (n_units - 1), floor)
    t = np.abs(mean) / np.sqrt(variance / n_units)
    return t[0], (t.max(1)[:, None] >= t[0] * (1 - 1e-9)).mean(0)


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_max_t_equals_brute_force_over_all_signs(floor):
    x = np.random.default_rng(1).normal(0.5, 1, (8, 30))
    t, p = brute_max_t(x, floor)
    assert features.MaxT(8).exact
    result = max_t(x, variance_floor=floor, block=7)
    assert result.p_fwer.min() >= 1 / 128
    assert np.allclose(result.p_fwer * 128, np.round(result.p_fwer * 128))
    assert np.allclose(np.abs(result.t), t)
    assert np.allclose(result.p_fwer, p)


def test_max_t_over_several_saes_is_max_t_over_their_union():
    rng = np.random.default_rng(2)
    x, floor = rng.normal(0.3, 1, (20, 300)), rng.uniform(0, 0.5, 300)
    family = features.MaxT(20, n_flips=500, seed=3)
    for part in np.split(np.arange(300), [50, 60, 200]):
        family.add(x[:, part], floor[part], block=33)
    whole = max_t(x, n_flips=500, seed=3, variance_floor=floor)
    assert family.n_features == 300
    assert np.allclose(family.result().p_fwer, whole.p_fwer)
    assert not family.exact
    assert family.p_of([1e9]) == 1 / 501


def test_max_t_finds_the_planted_feature_and_keeps_the_family_rate():
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(200):
        x = rng.normal(size=(10, 60)) * (rng.random((10, 60)) < 0.5)
        false += max_t(x).p_fwer.min() <= 0.05
    assert false / 200 <= 0.09
    x = rng.normal(size=(20, 2000))
    x[:, 7] += 3
    result = max_t(x, n_flips=2000)
    assert np.flatnonzero(result.p_fwer <= 0.05).tolist() == [7]


def test_a_tiny_regular_contrast_needs_the_floor():
    """Activation 5 everywhere, contrast 0.01 exactly: infinite t without a floor, nothing with it."""
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (12, 50))
    x[:, 0] = 0.01
    acts = np.abs(rng.normal(5, 1, (48, 50)))
    assert np.isinf(max_t(x).t[0])
    assert max_t(x).p_fwer[0] <= 2 / 2**11
    floored = max_t(x, variance_floor=features.activation_variance_floor(acts))
    assert floored.p_fwer[0] > 0.5
    assert abs(floored.t[0]) < 1


def test_max_t_of_dead_features_and_bad_input():
    x = np.random.default_rng(5).normal(2, 1, (9, 4))
    x[:, 3] = 0
    found = max_t(x)
    assert (found.p_fwer[:3] <= 0.05).all()
    assert found.t[3] == 0
    assert found.p_fwer[3] > 0.9
    with pytest.raises(RequestError, match="at least 2"):
        max_t(x[:1])
    with pytest.raises(RequestError, match="row 2, feature 1"):
        max_t(np.where(np.arange(36).reshape(9, 4) == 9, np.nan, x))
    with pytest.raises(RequestError, match="this family has 9"):
        features.MaxT(9).add(x[:4])


def test_auroc_is_mann_whitney_with_ties():
    rng = np.random.default_rng(6)
    pos = np.maximum(rng.normal(-0.3, 1, (23, 50)).round(1), 0)
    neg = np.maximum(rng.normal(-0.6, 1, (31, 50)).round(1), 0)
    pos[:, 4], neg[:, 4] = 0, 0
    pos[:, 5] = neg.max() + 1
    ours = features.auroc(pos, neg, block=16)
    theirs = scipy_stats.mannwhitneyu(pos, neg, axis=0).statistic / (23 * 31)
    assert np.allclose(ours, theirs)
    assert (ours[4], ours[5]) == (0.5, 1.0)
    assert np.allclose(features.auroc(neg, pos), 1 - ours)
    assert np.allclose(features.auroc(np.exp(pos), np.exp(neg)), ours)


def test_auroc_of_a_wide_sae_is_quick():
    rng = np.random.default_rng(7)
    acts = [np.maximum(rng.normal(-1.5, 1, (280, 16_384)), 0).astype(np.float32) for _ in range(2)]
    start = time.process_time()
    features.auroc(*acts)
    assert time.process_time() - start < 15


def test_the_smallest_lower_bound_is_the_smallest_one_sided_bound():
    rng = np.random.default_rng(8)
    x = {k: rng.normal(m, 1, (15, 6)) for k, m in (("AS-AN", 2), ("AS-HS", 1), ("AS-DS", 3))}
    expected = np.min(
        [
            scipy_stats.ttest_1samp(v, 0, alternative="greater").confidence_interval(0.95).low
            for v in x.values()
        ],
        axis=0,
    )
    assert np.allclose(np.min([features.lower_bound(v) for v in x.values()], axis=0), expected)
    assert all(np.isnan(features.lower_bound(v[:1])).all() for v in x.values())


def test_the_smallest_lower_bound_covers():
    """Three equal means, the worst case for the *lower* side being one far smaller: at most 5 % too high."""
    rng = np.random.default_rng(9)
    contrasts = [rng.normal(m, 1, (12, 4000)) for m in (0, 9, 9)]
    assert (np.min(list(map(features.lower_bound, contrasts)), axis=0) > 0).mean() == pytest.approx(
        0.05, abs=0.012
    )


def test_corrections_are_statsmodels_and_skip_what_was_not_tested():
    p = np.random.default_rng(10).uniform(size=40) ** 3
    assert np.allclose(features.benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1])
    assert np.allclose(features.holm(p), multipletests(p, method="holm")[1])
    holes = np.insert(p, 3, np.nan)
    assert np.isnan(features.holm(holes)[3])
    assert np.allclose(np.delete(features.benjamini_hochberg(holes), 3), features.benjamini_hochberg(p))
    with pytest.raises(RequestError, match="outside"):
        features.holm([0.1, 1.2])


# --- counts, power, splits ----------------------------------------------------------------------------


def test_sign_test_gives_the_published_scenario_figures():
    assert design.sign_test(43, 60).p_value == pytest.approx(0.0011, abs=5e-5)
    assert design.sign_test(24, 40).p_value == pytest.approx(0.27, abs=5e-3)
    assert design.sign_test(0, 0).p_value == 1
    with pytest.raises(RequestError):
        design.sign_test(5, 4)


def test_mcnemar_is_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar

    assert design.mcnemar_exact(9, 2).p_value == pytest.approx(mcnemar([[30, 9], [2, 19]], exact=True).pvalue)


@pytest.mark.parametrize(("sd", "effect"), [(1.0, 0.5), (2.0, 0.3), (1.0, -3.0), (0.2, 0.01)])
def test_needed_n_is_statsmodels_rounded_up(sd, effect):
    n = design.needed_n(sd, effect)
    power = TTestPower()
    assert power.power(abs(effect) / sd, n, 0.05) >= 0.8
    assert n == 2 or power.power(abs(effect) / sd, n - 1, 0.05) < 0.8


def test_fewest_units():
    assert design.fewest_units(0.05) == 6
    assert design.fewest_units(1 / 128) == 8


@settings(max_examples=50, deadline=None)
@given(n=st.integers(9, 60), seed=st.integers(0, 99), kinds=st.integers(1, 5))
def test_splits_are_whole_disjoint_stratified_and_stable(n, seed, kinds):
    names = [f"template {i}" for i in range(n)]
    families = {name: f"family {i % kinds}" for i, name in enumerate(names)}
    splits = design.split_templates(names, seed=seed, families=families)
    assert sorted(sum(splits.values(), ())) == sorted(names)
    assert splits == design.split_templates(names, seed=seed, families=families)
    for split, share in design.DEFAULT_SHARES.items():
        assert abs(len(splits[split]) - share * n) <= 1
        for family in set(families.values()):
            members = [name for name in names if families[name] == family]
            held = [name for name in splits[split] if families[name] == family]
            assert abs(len(held) - share * len(members)) <= 2
    shuffled = design.split_templates(names[::-1], seed=seed, families=families)
    assert {k: set(v) for k, v in shuffled.items()} == {k: set(v) for k, v in splits.items()}


def test_splits_keep_report_templates_out_of_discovery():
    names = [f"t{i}" for i in range(35)]
    held = names[::3]
    splits = design.split_templates(names, must_report=held)
    assert set(held) <= set(splits["report"])
    assert [len(v) for v in splits.values()] == [14, 7, 14]
    assert splits != design.split_templates(names, seed=1, must_report=held)
    with pytest.raises(RequestError, match="empty"):
        design.split_templates(names[:2])
    with pytest.raises(RequestError, match="twice"):
        design.split_templates(["a", "a", "b"])
    with pytest.raises(RequestError, match="no template"):
        design.split_templates(names, must_report=["x"])


def test_sparse_auroc_is_that_of_all_values():
    """Zeros left out, of either sign, with ties and with columns of which one side never fires."""
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 4, size=(40, 60)) * (rng.random((40, 60)) < rng.random(60)) * 0.5
    x[:, 3], x[:15, 4], x[15:, 5] = 0, 0, 0
    x[:, 6] = rng.normal(size=40)
    text, column = np.nonzero(x)
    order = np.lexsort((x[text, column], column))
    text, column = text[order], column[order]
    found = features.sparse_auroc(column, x[text, column], text < 15, 60, 15, 25)
    assert found == pytest.approx(features.auroc(x[:15], x[15:]), abs=1e-15)
    assert (features.sparse_auroc(column[:0], x[0, :0], text[:0] < 15, 7, 15, 25) == 0.5).all()
