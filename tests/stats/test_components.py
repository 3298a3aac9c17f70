"""Variance components of crossed random effects, against statsmodels' sums of squares and against a table with known parts."""

import numpy as np
import pandas as pd
import pytest

from sae_bias.core.errors import RequestError
from sae_bias.stats.components import variance_components


def long_form(y, names):
    index = np.indices(y.shape).reshape(y.ndim, -1)
    return pd.DataFrame({name: index[i] for i, name in enumerate(names)} | {"y": y.ravel()})


def test_mean_squares_are_those_of_an_analysis_of_variance():
    smf, anova = (
        pytest.importorskip("statsmodels.formula.api"),
        pytest.importorskip("statsmodels.stats.anova"),
    )
    names = ["stems", "templates", "entities"]
    y = np.random.default_rng(0).normal(size=(3, 5, 4)) + np.arange(5)[:, None]
    found = variance_components(y, names).set_index("source")
    formula = "y ~ (C(stems) + C(templates) + C(entities)) ** 2"
    table = anova.anova_lm(smf.ols(formula, long_form(y, names)).fit(), typ=2)
    for source, row in found.iterrows():
        term = (
            "Residual"
            if source == "residual"
            else ":".join(f"C({name})" for name in str(source).split(" × "))
        )
        assert row["mean_square"] == pytest.approx(table.loc[term, "sum_sq"] / table.loc[term, "df"])
        assert row["df"] == table.loc[term, "df"]


def test_two_crossed_factors_are_as_reml_has_them():
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    rng = np.random.default_rng(1)
    y = rng.normal(size=(12, 1)) * 2 + rng.normal(size=(1, 10)) + rng.normal(size=(12, 10)) * 0.5
    found = variance_components(y, ["templates", "entities"]).set_index("source")["variance"]
    frame = long_form(y, ["templates", "entities"]).assign(all=1)
    parts = {"t": "0 + C(templates)", "e": "0 + C(entities)"}
    fit = mixed.MixedLM.from_formula("y ~ 1", groups="all", vc_formula=parts, re_formula="0", data=frame).fit(
        reml=True
    )
    reml = dict(zip(fit.model.exog_vc.names, fit.vcomp))
    assert found["templates"] == pytest.approx(reml["t"], rel=1e-2)
    assert found["entities"] == pytest.approx(reml["e"], rel=1e-2)
    assert found["residual"] == pytest.approx(fit.scale, rel=1e-3)


def test_known_parts_are_recovered_on_average():
    rng, draws = np.random.default_rng(2), []
    for _ in range(300):
        y = (
            rng.normal(size=(3, 8, 1, 1)) * 0
            + rng.normal(size=(1, 8, 1, 1))
            + 0.7 * rng.normal(size=(1, 1, 20, 1))
        )
        y = y + 0.5 * rng.normal(size=(1, 1, 20, 12)) + 0.3 * rng.normal(size=(3, 8, 20, 12))
        found = variance_components(y, ["stems", "words", "templates", "entities"]).set_index("source")[
            "variance"
        ]
        draws.append(found)
    mean = pd.DataFrame(draws).mean()
    expected = {"words": 1.0, "templates": 0.49, "templates × entities": 0.25, "residual": 0.09}
    for source, value in expected.items():
        assert mean[source] == pytest.approx(value, rel=0.1)
    assert mean[["stems", "stems × words", "words × entities"]].max() < 0.01


def test_a_table_with_gaps_or_one_factor_is_refused():
    with pytest.raises(RequestError, match="without gaps"):
        variance_components(np.array([[1.0, np.nan], [1.0, 2.0]]), ["a", "b"])
    with pytest.raises(RequestError, match="two factors"):
        variance_components(np.zeros((3, 1)), ["a", "b"])
    with pytest.raises(RequestError, match="2 axes and 1 names"):
        variance_components(np.zeros((3, 2)), ["a"])
    same = variance_components(np.zeros((3, 2)), ["a", "b"])
    assert same["variance"].eq(0).all()
    assert same["share"].isna().all()
