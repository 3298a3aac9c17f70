"""Methods at equal KL: the interpolation, what each method does at share 1, and that the planted feature leads."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from independent import Plain, PlainSae

import sae_bias as sb
from sae_bias.measures.costs import CostEngine
from sae_bias.models.catalog import organism_folder
from sae_bias.workflows import compare
from sae_bias.workflows.compare import Curve, compare_methods
from sae_bias.workflows.prompting import prompted_cell


def _curve(cost, means):
    """A curve whose pairs all have the step's mean bias; 6 × 6 pairs with a little noise that sums to 0 in each half."""
    labels = [f"t{i}" for i in range(6) for _ in range(6)], [f"e{j}" for _ in range(6) for j in range(6)]
    half = 0.01 * np.random.default_rng(0).normal(size=18)
    noise = np.tile(half - half.mean(), 2)
    bias = np.array([[m] * 36 for m in (1.0, *means)]) + noise
    return Curve(np.array([0.0, *cost]), bias, labels)


EVERY = np.ones(36, dtype=bool)


def test_a_curve_is_read_by_interpolation():
    curve = _curve([0.01, 0.03], [0.6, 0.2])
    read = {level: curve.at(level, EVERY, EVERY) for level in (0.005, 0.02, 0.1)}
    assert [read[v][f"at_{v:g}"] for v in read] == pytest.approx([0.2, 0.6, 0.8])
    assert [bool(read[v][f"reached_{v:g}"]) for v in read] == [True, True, False]
    for level, row in read.items():
        assert row[f"low_{level:g}"] <= row[f"at_{level:g}"] <= row[f"high_{level:g}"] <= 1


def test_the_bias_is_interpolated_first_and_folded_after():
    """From 0.4 to −0.4 it passes 0 half way: all of the bias is gone there. Folded first it would stay at 60 %."""
    curve = _curve([0.01, 0.02], [0.4, -0.4])
    assert curve.at(0.02, EVERY, EVERY)["at_0.02"] == pytest.approx(1.0)
    assert curve.at(0.0125, EVERY, EVERY)["at_0.0125"] == pytest.approx(0.8)


def test_the_strength_comes_from_tune_and_the_figure_from_report():
    """Tune is best at the first step, report at the second: the figure is report's at the first."""
    curve = _curve([0.01, 0.02], [0.0, 0.0])
    tune = np.arange(36) < 18
    curve.bias[1, ~tune] += 0.5
    curve.bias[2, tune] += 0.5
    found = curve.at(0.03, tune, ~tune)
    assert found["at_0.03"] == pytest.approx(1 - curve.bias[1, ~tune].mean() / curve.bias[0, ~tune].mean())


@pytest.mark.parametrize("without", [0, 6])
def test_shares_are_of_the_difference_in_differences_where_there_are_twins(without):
    """Bias 1 → 0.5 while the twins keep 0.4: half of the bias goes, and 5/6 of what is not in mundane content too."""
    labels = [f"t{i}" for i in range(12) for _ in range(6)], [f"e{j}" for _ in range(12) for j in range(6)]
    noise = np.random.default_rng(0).normal(0, 1e-3, 72)

    def cell(bias, kind, name):
        frame = pd.DataFrame(
            {"template": labels[0], "entity": labels[1], "bias": bias + noise - noise.mean()}
        )
        frame.attrs = {"kind": kind, "twins": [None] * without + [0.4] * (72 - without), "cell": name}
        return frame

    cells = {"base": cell(1.0, "base", "base"), "half": cell(0.5, "direction", "half")}
    row = {
        "method": "m",
        "kind": "direction",
        "positions": "all",
        "share": 1.0,
        "cell": "half",
        "cost": 0.01,
        "beta": 1.0,
    }
    row |= {
        "kl_off": 0.0,
        "specific_reduction": 0.5,
        "spec_low": 0.4,
        "spec_high": 0.6,
        "red_reason": "",
        "rule": "r",
    }
    row |= {"strength": 1.0, "outside_observed": False, "specific_reason": ""}
    frame = pd.DataFrame([row | {"split": s} for s in ("tune", "report")])
    splits = {"tune": [f"t{i}" for i in range(6)], "report": [f"t{i}" for i in range(6, 12)]}
    found = compare.equal_cost(frame, cells, splits, (0.1,)).iloc[0]
    assert (found["of"], found["at_0.1"]) == ("difference in differences", pytest.approx(5 / 6, abs=1e-3))
    for c in cells.values():
        del c.attrs["twins"]
    plain = compare.equal_cost(frame, cells, splits, (0.1,)).iloc[0]
    assert (plain["of"], plain["at_0.1"]) == ("bias", pytest.approx(1 / 2, abs=1e-3))


@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(-1, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_more_cost_never_leaves_more_bias_on_the_split_that_chose(points, a, b):
    curve = _curve(*zip(*points))
    low, high = sorted((a, b))
    left = [abs(curve.biases(curve.best_place(level, EVERY)).mean()) for level in (low, high)]
    assert left[1] <= left[0] + 1e-12
    assert left[0] <= 1 + 1e-12


def test_a_method_acts_where_its_name_says(gemma3):
    method = compare._taken_out(gemma3.feature(3))
    cells = compare._cells({"feature": method, "other": method}, (0.5, 1.0))
    assert len(cells) == 8
    for cell in cells:
        assert f", {compare.POSITIONS[cell.edits[0].positions]} | " in cell.label
    assert {c.label for c in cells if c.edits[0].positions == "last"} == {
        f"{name}, last token | {share:g}" for name in ("feature", "other") for share in (0.5, 1.0)
    }


def test_the_difference_of_means_compared_is_of_the_last_tokens(gemma3, pairs):
    """From the residuals of plain transformers, prompt by prompt."""
    plain, layer = Plain.load(gemma3.folder), gemma3.feature(3).site.layer
    means = [
        torch.stack([plain.residual(getattr(p, side), layer)[-1] for p in pairs]).mean(0)
        for side in ("human", "ai")
    ]
    ridge = sb.ridge_probe(gemma3.model, pairs, folds=3)
    methods = compare._methods(gemma3.model, gemma3.feature(3), pairs, ridge, 2, 0)
    [(_, edit)] = methods["difference of means"]((1.0,), "all")
    by_hand = torch.nn.functional.normalize(means[1] - means[0], dim=0)
    torch.testing.assert_close(edit.along.basis[0], by_hand, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(edit.along.mean @ by_hand, means[0] @ by_hand, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def setting():
    truth = json.loads((organism_folder("planted") / "truth.json").read_text())["constructed"]
    model, pairs = sb.load_model("organism:planted"), sb.load_pairs()
    pairs = pairs.select(entities=pairs.entities[::2])
    report = tuple(dict.fromkeys(p.template for p in pairs if p.corpus is False))
    rest = tuple(t for t in pairs.templates if t not in report)
    splits = {"discover": rest[::2], "tune": rest[1::2], "report": report}
    return model, sb.load_feature(f"organism:planted/constructed#{truth['index']}"), pairs, splits


@pytest.fixture(scope="module")
def comparison(setting):
    model, feature, pairs, splits = setting
    return compare_methods(model, feature, pairs, **splits, shares=(0.5, 1.0), k=3, fit_steps=5)


@pytest.mark.slow
def test_every_method_acts_at_all_positions_and_at_the_last(comparison):
    methods = set(comparison.table["method"])
    for name in (
        "feature",
        "feature, opposite sign",
        "difference of means",
        "difference of means without massive dimensions",
        "probe direction",
        "probe direction, norm-relative steering",
        "subspace of 3",
        "random subspace of 3",
        "random direction 0",
        "gated counterfactual",
        "learned direction (DAS, rank 1)",
        "ReFT-r1",
    ):
        assert {f"{name}, all positions", f"{name}, last token"} <= methods
    assert any(m.startswith("difference of means, layer") for m in methods)
    assert any("same gate" in m or m.startswith("matched") for m in methods)
    assert any(m.startswith("learned set of") for m in methods)
    assert set(comparison.frame["positions"]) == {"all", "last", "prompt"}
    assert set(comparison.frame["split"]) == {"tune", "report"}
    assert np.isfinite(comparison.frame[["cost", "removed_nats", "specific_reduction"]].to_numpy()).all()


@pytest.mark.slow
def test_the_planted_feature_removes_more_than_random_at_equal_cost(comparison):
    table = comparison.table.set_index("method")
    random = max(table.loc[m, "at_0.1"] for m in table.index if str(m).startswith("random"))
    own = table.loc["feature, all positions"]
    print(
        table[
            [
                "at_0.01",
                "at_0.03",
                "at_0.1",
                "at_0.3",
                "specific_reduction",
                "beta",
                "kl_off",
                "did_reduction",
            ]
        ].to_string()
    )
    assert own["at_0.1"] >= 0.8
    assert own["low_0.1"] > random + 0.3
    assert own["specific_reduction"] >= 0.8
    assert own["beta"] >= 0.9
    assert abs(own["human_shift"]) < 0.2 < own["ai_shift"]
    opposite = comparison.frame[comparison.frame["kind"] == "opposite"]
    assert (opposite["share"] < 0).all()
    assert (opposite["reduction"] < 0).all()


@pytest.mark.slow
def test_a_difference_of_means_by_hand_removes_as_much_at_the_same_positions(setting, comparison):
    """Plain hooks on the Hugging Face model: the direction, the affine projection and the scores, each from scratch."""
    model, feature, pairs, splits = setting
    hf, layer = model.hf, feature.site.layer
    words = sb.Probe().vocabulary(model, [p.human for p in pairs]).kept
    signs = torch.tensor([1.0 if w.positive else -1.0 for w in words])
    ids = torch.tensor([w.tokens[0] for w in words])

    def run(text, hook=None):
        handle = model.layer(layer).register_forward_hook(hook) if hook else None
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([model.encode(text)]), output_hidden_states=True)
        if handle:
            handle.remove()
        z = out.logits[0, -1, ids]
        return z[signs > 0].mean() - z[signs < 0].mean(), out.hidden_states[layer + 1][0, -1]

    found_on = [p for p in pairs if p.template in splits["discover"]]
    human, ai = (
        torch.stack([run(getattr(p, side))[1] for p in found_on]).mean(0) for side in ("human", "ai")
    )
    direction = (ai - human) / (ai - human).norm()
    reported = [p for p in pairs if p.template in splits["report"]]

    def bias(hook, human="human", ai="ai"):
        sides = [[run(getattr(p, side), hook)[0] for p in reported] for side in (human, ai)]
        return float((torch.stack(sides[0]) - torch.stack(sides[1])).mean())

    def did(hook):
        return bias(hook) - bias(hook, "control_human", "control_ai")

    def project(where):
        def hook(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            step = ((x - human) @ direction)[..., None] * direction
            first = x.shape[1] - 1 if where == "last" else 1  # BOS is never edited
            step[:, :first] = 0
            return (x - step, *output[1:]) if isinstance(output, tuple) else x - step

        return hook

    rows = comparison.frame[(comparison.frame["split"] == "report") & (comparison.frame["share"] == 1.0)]
    for where, words_of in (("all", "all positions"), ("last", "last token")):
        found = rows.set_index("method").loc[f"difference of means, {words_of}"]
        for column, figure in (("reduction", bias), ("did_reduction", did)):
            by_hand = 1 - figure(project(where)) / figure(None)
            print(f"difference of means, {words_of}, {column}: {found[column]:.4f}, by hand {by_hand:.4f}")
            assert found[column] == pytest.approx(by_hand, abs=0.005)


@pytest.mark.slow
def test_an_instruction_is_the_same_prompts_behind_it(setting, comparison):
    """Its row from plain forward passes on the Hugging Face model; it has one strength, and nothing between."""
    model, _, pairs, splits = setting
    words = sb.Probe().vocabulary(model, [p.human for p in pairs]).kept
    ids = torch.tensor([w.tokens[0] for w in words])
    signs = torch.tensor([1.0 if w.positive else -1.0 for w in words])

    def score(text):
        with torch.no_grad():
            z = model.hf(input_ids=torch.tensor([model.encode(text)])).logits[0, -1, ids]
        return float(z[signs > 0].mean() - z[signs < 0].mean())

    reported = [p for p in pairs if p.template in splits["report"]][::7]
    behind = {(p.template, p.entity): score(f"Judge people and AIs alike. {p.ai}") for p in reported}
    cell = prompted_cell(model, pairs, sb.Probe(), "Judge people and AIs alike.")
    found = {(t, e): s for t, e, s in cell[["template", "entity", "score_ai"]].itertuples(index=False)}
    assert {k: found[k] for k in behind} == pytest.approx(behind, abs=1e-3)
    row = comparison.table.set_index("method").loc["instruction, before the prompt"]
    curve = comparison.frame[
        (comparison.frame["method"] == row.name) & (comparison.frame["split"] == "report")
    ]
    assert curve["share"].tolist() == [1.0]
    cost = float(curve["cost"].iloc[0])
    assert row["at_0.01"] == (pytest.approx(float(curve["reduction"].iloc[0])) if cost <= 0.01 else 0.0)


def test_the_kl_of_an_instruction_is_at_the_texts_own_tokens(setting):
    model, *_ = setting
    engine = CostEngine(model, {"neutral": ["The farmer waters the field."]})
    table = engine.behind("Judge people and AIs alike. ").iloc[0]

    def laws(text):
        with torch.no_grad():
            return model.hf(input_ids=torch.tensor([model.encode(text)])).logits[0].log_softmax(-1)

    own, behind = (
        laws("The farmer waters the field."),
        laws("Judge people and AIs alike. The farmer waters the field."),
    )
    n = len(own) - 1  # without BOS
    p, q = own[-n:], behind[-n:]
    kl = (p.exp() * (p - q)).sum(-1)
    assert table["kl_mean"] == pytest.approx(float(kl[:-1].mean()), rel=1e-4)
    assert table["kl_last"] == pytest.approx(float(kl[-1]), rel=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 1.5])
def test_a_share_of_a_fitted_edit_is_that_share_of_the_way(gemma3, pairs, probe, monkeypatch, share):
    """a + s · (a' - a) by a plain hook. The twin's prediction is rectified before the share is taken: where it is negative, a quarter of the
    way from a = 4 is 3, not what the rectified mean of both would be."""
    plain, sae = Plain.load(gemma3.folder), PlainSae.load(gemma3.sae_folder)
    indices, layer = [1, 3], gemma3.feature(1).site.layer
    names = tuple(str(gemma3.feature(i).ref) for i in indices)
    scales, weights, c = torch.tensor([0.2, 2.5]), torch.tensor([[0.4, 0.3], [-1.5, -0.5]]), torch.tensor([0.3, -0.2])  # fmt: skip
    edits = {
        "scales": sb.FeatureSet("set", names, tuple(scales.tolist())),
        "gated": sb.GatedCounterfactual(
            "gate", names, (1.0, 1.0), -0.1, tuple(map(tuple, weights.tolist())), tuple(c.tolist())
        ),
    }
    monkeypatch.setattr(compare, "fit_feature_set", lambda *_, kind, **__: edits[kind])
    monkeypatch.setattr(compare, "fit_direction", lambda *_, **__: None)
    methods = compare._fitted(gemma3.model, gemma3.feature(1), pairs, probe, 1, 0, False)
    below = []

    def by_hand(kind):
        def delta(x):
            a = sae.acts(x)[:, indices]
            twin = a @ weights.T + c
            below.append(bool(((twin < 0) & (a > 0)).any()))
            whole = a * scales if kind == "scales" else twin.clamp(min=0)
            on = torch.ones(len(a)) if kind == "scales" else (a.sum(1) > 0.1).float()
            return share * on[:, None] * (whole - a) @ sae.w["w_dec"][indices]

        return delta

    for name, kind in (("learned set of 2", "scales"), ("gated counterfactual", "gated")):
        [(_, edit)] = methods[name]((share,), "all")
        for text in [p.ai for p in pairs]:
            ids = plain.ids(text)
            with torch.no_grad(), sb.intervene(gemma3.model, edit):
                ours = gemma3.model.hf(input_ids=torch.tensor([ids])).logits[0].float()
            torch.testing.assert_close(ours, plain.logits(ids, by_hand(kind), layer), atol=2e-5, rtol=1e-4)
    assert any(below)


def test_an_edit_that_cannot_be_fitted_is_left_out_and_said(setting, monkeypatch):
    def nothing(*args, **options):
        raise sb.RequestError("no feature fires")

    monkeypatch.setattr(compare, "fit_feature_set", nothing)
    model, feature, pairs, splits = setting
    found_on = pairs.select(templates=splits["discover"][:3])
    with pytest.warns(UserWarning, match="no gated edit: no feature fires"):
        found = compare._fitted(model, feature, found_on, sb.Probe(), 1, 0, False)
    assert list(found) == ["learned direction (DAS, rank 1)", "ReFT-r1"]


@pytest.mark.slow
def test_a_comparison_prints_and_draws(comparison):
    assert "* not reached" in repr(comparison)
    assert "beyond mundane content" in repr(comparison)
    assert "share of the difference in differences removed" in repr(comparison)
    assert comparison.table["did_removed_nats"].notna().any()
    assert "not reached" in comparison._repr_html_() or "*" in comparison._repr_html_()
    names = {trace.name for trace in comparison.plot().data}
    assert "difference of means, all positions" in names
    assert "R²" in repr(comparison.ridge)


def test_templates_are_never_in_both_splits(gemma3, pairs, probe):
    with pytest.raises(sb.SaeBiasError, match="both discover and report"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe, discover=["hello"], report=["hello"])
    with pytest.raises(sb.SaeBiasError, match="or neither"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe, discover=["hello"])
    with pytest.raises(sb.SaeBiasError, match="at least 6"):
        compare_methods(gemma3.model, gemma3.feature(3), pairs, probe)
