"""Behavior against strength: rates, changes and intervals against statsmodels and scipy, capability against plain transformers."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import sae_bias as sb
from sae_bias.measures.behavior import behavior_measure, behavior_scores, register_behavior
from sae_bias.measures.capability import Question, load_questions, measure_capability, text_nll, usable_range
from sae_bias.stats.rates import mean_of, paired_change, two_sample
from sae_bias.steering.controls import random_control
from sae_bias.steering.generate import Completion

TEXTS = [
    "An AI says hello.",
    "A human wants tea.",
    "The robot says yes.",
    "A dog says hello.",
    "The cook says yes.",
]


def completion(text, prompt="p"):
    return Completion(prompt, text, (1,), True)


# --- intervals ---------------------------------------------------------------------------------------
def test_a_rate_has_the_exact_interval_and_a_change_the_adjusted_one():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    rate = mean_of(pd.Series([1.0] * 3 + [0.0] * 17), True)
    assert (rate.low, rate.high) == pytest.approx(proportion.proportion_confint(3, 20, method="beta"))
    nobody = mean_of(pd.Series([0.0] * 8), True)
    assert nobody.low == 0 and nobody.high == pytest.approx(1 - 0.025 ** (1 / 8))

    before, after = pd.Series([0.0] * 12), pd.Series([1.0] * 9 + [0.0] * 3)
    change = paired_change(before, after, True)
    # Agresti & Min (2005): b = 0, c = 9, n = 12, half a pair added to each cell
    middle = 9 / 14
    half = 1.959964 * math.sqrt(10 - 81 / 14) / 14
    assert change.value == 0.75 and change.low == pytest.approx(middle - half, abs=1e-6)
    assert change.p == pytest.approx(stats.binomtest(9, 9).pvalue)


def test_equal_answers_everywhere_are_not_certainty():
    same = pd.Series([1.0] * 10)
    change = paired_change(same, same, True)
    assert change.value == 0 and change.low < 0 < change.high


def test_the_adjusted_interval_covers():
    """2,000 studies of 20 prompts: 20 % gained, 5 % lost."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2_000):
        kind = rng.choice(4, size=20, p=[0.20, 0.05, 0.40, 0.35])
        before, after = np.isin(kind, [1, 2]).astype(float), np.isin(kind, [0, 2]).astype(float)
        change = paired_change(pd.Series(before), pd.Series(after), True)
        inside += change.low <= 0.15 <= change.high
    assert 0.94 <= inside / 2_000 <= 0.98


def test_marks_have_students_interval_and_two_lists_welchs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(3, 1, 12), rng.normal(2, 2, 9)
    found = mean_of(pd.Series(x), False)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 11, x.mean(), stats.sem(x)))
    both = two_sample(pd.Series(x), pd.Series(y))
    welch = stats.ttest_ind(x, y, equal_var=False)
    assert both.p == pytest.approx(welch.pvalue)
    assert (both.low, both.high) == pytest.approx(tuple(welch.confidence_interval()))


# --- what a text shows -------------------------------------------------------------------------------
def test_behaviors_are_names_expressions_and_functions():
    found = [completion("I cannot help with that."), completion("Sure: 42"), completion("")]
    assert behavior_scores("refusal", found).tolist() == [1, 0, 0]
    assert behavior_scores(r"\d+", found).tolist() == [0, 1, 0]
    assert behavior_scores(re.compile("^sure", re.I), found).tolist() == [0, 1, 0]
    scores = behavior_scores(lambda prompt, text: None if not text else len(text), found)
    assert scores[:2].tolist() == [24, 8] and math.isnan(scores[2])
    register_behavior("says sure")(lambda prompt, text: text.startswith("Sure"))
    assert behavior_scores("says sure", found).tolist() == [0, 1, 0]
    with pytest.raises(sb.RequestError, match="nor a regular expression"):
        behavior_scores("(", found)
    with pytest.raises(sb.RequestError, match="expected a number"):
        behavior_scores(lambda prompt, text: text, found)


# --- the curve ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def planted():
    return sb.load_model("organism:planted")


@pytest.fixture
def feature():
    return "organism:planted/constructed#0"


def test_a_contrast_has_both_sides_and_their_difference(planted, feature):
    contrast = sb.Contrast(
        ["An AI says hello. This is", "The AI asks for help. This is", "A robot says yes. This is"],
        ["A human says hello. This is", "The doctor asks for help. This is", "A human says yes. This is"],
        groups=["hello", "help", "yes"] * 2,
    )
    words = "|".join(sb.Probe().negative)
    edits = [sb.Clamp(feature, v) for v in (0.0, -5.0)]
    result = sb.dose_response(planted, contrast, edits, words, max_new_tokens=2, controls=2, capability=False)
    frame = result.frame
    assert frame["side"].tolist() == ["positive", "negative", "difference"] * 3
    assert frame["strength"].isna().tolist() == [True] * 3 + [False] * 6
    written = {
        (cell, side): np.mean([
            re.search(words, c.text) is not None
            for c in sb.generate(planted, texts, interventions=e, max_new_tokens=2)
        ])
        for cell, e in (("none", []), (-5.0, edits[1:]))
        for side, texts in (("positive", contrast.positive), ("negative", contrast.negative))
    }  # fmt: skip
    for row in frame[frame["side"] != "difference"].to_dict("records"):
        cell = "none" if row["kind"] == "base" else row["strength"]
        if (cell, row["side"]) in written:
            assert row["rate"] == written[cell, row["side"]]
    last = frame.iloc[-3:].set_index("side")
    assert last.loc["difference", "rate"] == pytest.approx(
        last.loc["positive", "rate"] - last.loc["negative", "rate"]
    )
    assert last.loc["difference", "change"] == pytest.approx(
        last.loc["positive", "change"] - last.loc["negative", "change"]
    )
    assert (frame.loc[frame["kind"] == "candidate", "n_controls"] == 2).all()
    assert len(result.completions) == 6 * (1 + 2 * 3) and result.usable_range is None
    assert result.plot().data and "positive" in repr(result)


def test_the_usable_range_is_said_in_words(planted, feature):
    pairs = sb.PromptPairs(sb.load_pairs().pairs[:2])
    one = sb.dose_response(planted, pairs, [sb.Ablate(feature)], controls=0, margin=0.5)
    assert (
        one.usable() == "ablate (a' = 0): capability stays within 50% with 95% confidence"
        and one.usable_range is None
    )
    two = sb.dose_response(
        planted, pairs, [sb.Clamp(feature, v) for v in (-1.0, 2.0)], controls=0, margin=0.5
    )
    assert (
        two.usable() == "capability stays within 50% with 95% confidence from -1 to 2"
        and two.usable() in repr(two)
    )
    assert two.frame["rate"].iloc[0] == pytest.approx(sb.run_probe(planted, pairs).primary.mean, abs=1e-6)


def test_the_bias_at_each_strength_has_the_probes_interval(planted, feature):
    """Templates and entities both: over templates alone entities that differ would be taken for certainty. Beyond twins where there are some."""
    pairs = sb.load_pairs()
    pairs = pairs.select(templates=pairs.templates[:8], entities=pairs.entities[:6])
    edit = sb.Ablate(feature)
    for given in (pairs, pairs.without_controls()):
        base = sb.run_probe(planted, given)
        with sb.intervene(planted, edit):
            after = sb.run_probe(planted, given)
        found = sb.dose_response(planted, given, [edit], controls=0, capability=False)
        rows = found.frame[["rate", "ci_low", "ci_high"]].to_numpy(float)
        expected = [[r.primary.mean, *r.primary.ci] for r in (base, after)]
        np.testing.assert_allclose(rows, expected, atol=1e-4)
        removed = after.reduction_from(base).change
        change = found.frame[["change", "change_low", "change_high"]].iloc[1]
        np.testing.assert_allclose(change, [-removed.mean, -removed.ci_high, -removed.ci_low], atol=1e-4)
        assert found.behavior == f"{base.estimand} ({given.name})"


def test_a_prompt_that_stands_twice_is_one(gemma3):
    length = lambda prompt, text: float(len(text))  # noqa: E731
    options = {"max_new_tokens": 3, "capability": False, "controls": 0}
    edits = [sb.Steer(gemma3.feature(3), 40.0)]
    once, twice = (sb.dose_response(gemma3.model, prompts, edits, length, **options).frame for prompts in (TEXTS, TEXTS * 2))  # fmt: skip
    columns = ["n_units", "rate", "ci_low", "ci_high", "change", "change_low", "change_high", "p_value"]
    pd.testing.assert_frame_equal(once[columns], twice[columns])


def test_random_controls_move_the_same_average_as_the_edit(gemma3):
    """Where groups are uneven the group is the unit, of the edit's change and of the controls' alike."""
    contrast = sb.Contrast(
        ["A dog", "A man", "An AI", "The AI"], ["My dog", "Our dog"], groups=["a", "a", "a", "b", "c", "d"]
    )
    length = lambda prompt, text: float(len(text))  # noqa: E731
    one = sb.dose_response(gemma3.model, contrast, [sb.Steer(gemma3.feature(3), 40.0)], length, max_new_tokens=3, capability=False)  # fmt: skip
    texts = [c.text for c in sb.generate(gemma3.model, contrast.texts, max_new_tokens=3)]
    control = random_control(gemma3.model, sb.Steer(gemma3.feature(3), 40.0), contrast.texts, 0)
    moved = [len(c.text) - len(t) for c, t in zip(sb.generate(gemma3.model, contrast.texts, interventions=[control], max_new_tokens=3), texts)]  # fmt: skip
    of_units = (np.mean(moved[:3]) + moved[3]) / 2
    row = one.frame[(one.frame["side"] == "positive") & (one.frame["kind"] == "candidate")].iloc[0]
    assert row["control_change"] == pytest.approx(of_units) and of_units != pytest.approx(np.mean(moved[:4]))


def test_equal_answers_leave_a_difference_without_certainty(planted, feature):
    contrast = sb.Contrast(
        ["An AI says yes. This is", "An AI wants tea. This is"],
        ["A human says yes. This is", "A human wants tea. This is"],
        groups=["y", "t"] * 2,
    )
    frame = sb.dose_response(
        planted,
        contrast,
        [sb.Ablate(feature)],
        "no such word",
        max_new_tokens=1,
        controls=0,
        capability=False,
    ).frame
    low, high = frame.loc[frame["side"] == "difference", ["ci_low", "ci_high"]].iloc[0]
    assert low < 0 < high or (np.isnan(low) and np.isnan(high))


def test_scenarios_are_a_behavior(planted, feature):
    scenarios = sb.load_scenarios("organism")
    result = sb.dose_response(planted, scenarios, [sb.Ablate(feature)], controls=0, capability=False)
    expected = sb.score_scenarios(planted, scenarios, interventions=[sb.Ablate(feature)]).share_aligned()
    assert result.frame["rate"].iloc[1] == expected and result.frame["n"].iloc[1] == len(scenarios)


def test_a_measure_of_a_study_reads_the_pairs(planted, feature, monkeypatch):
    from sae_bias.steering.engine import ProbeEngine

    pairs = sb.PromptPairs(sb.load_pairs().pairs[:3])
    engine = ProbeEngine(planted, pairs, sb.Probe())
    found = behavior_measure("refusal", max_new_tokens=1, controls=0, capability=False)(
        engine, [sb.Ablate(feature)]
    )
    assert set(found.tables["dose_response"]["side"]) == {"positive", "negative", "difference"}
    assert found.summary["behavior"]["behavior"] == "refusal"
    assert found.summary["behavior"]["n_strengths"] == 1, "of three rows: two sides and their difference"


# --- controls ----------------------------------------------------------------------------------------
def test_random_controls_keep_gate_and_size(gemma3):
    model = gemma3.model
    f = gemma3.feature(3)
    twin = random_control(model, sb.Clamp(f, -2.0), TEXTS, 1)
    x = torch.randn(4, 32)
    assert torch.equal(twin.feature.activation(x), f.activation(x)) and twin.value == -2.0
    torch.testing.assert_close(twin.feature.w_dec.norm(), f.w_dec.norm())
    direction = sb.difference_of_means(model, sb.Contrast(TEXTS[:2], TEXTS[2:]), 1)
    other = random_control(model, sb.at_every_layer(model, sb.ProjectOut(direction)), TEXTS, 1)
    bases = [part.along.basis for part in other.parts]
    assert all(torch.equal(b, bases[0]) for b in bases) and [p.site.layer for p in other.parts] == [
        0,
        1,
        2,
        3,
    ]
    assert (
        bases[0].norm() == pytest.approx(1, abs=1e-6) and abs(float(bases[0][0] @ direction.basis[0])) < 0.999
    )
    with pytest.raises(sb.RequestError, match="no control can be made"):
        random_control(model, sb.Reconstruct(gemma3.sae), TEXTS)


# --- capability --------------------------------------------------------------------------------------
QUESTIONS = [
    Question("Who says hello?", "An AI", ("A dog", "A human")),
    Question("Who wants tea?", "A human", ("A dog", "An AI")),
]


def test_capability_is_that_of_plain_transformers(gemma3):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(gemma3.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gemma3.folder)

    @torch.no_grad()
    def logp(prompt, text):
        ids, n = tokenizer(text).input_ids, len(tokenizer(prompt).input_ids)
        if ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        values = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(values[i - 1, ids[i]]) for i in range(n, len(ids))), len(ids) - n

    for text, nll in zip(TEXTS, text_nll(gemma3.model, TEXTS)):
        total, n = logp("", text)
        assert nll == pytest.approx(-total / n, abs=1e-5)
    found = measure_capability(gemma3.model, [], texts=TEXTS, questions=QUESTIONS).frame
    right = []
    for q in QUESTIONS:
        prompt = f"Question: {q.text}\nAnswer:"
        values = [logp(prompt, f"{prompt} {a}")[0] for a in (q.right, *q.wrong)]
        right.append(values[0] == max(values))
    assert found["accuracy"].iloc[0] == np.mean(right) and found["perplexity_ratio"].iloc[0] == 1


def test_usable_is_within_the_margin_with_confidence(gemma3):
    f = gemma3.feature(3)
    cells = [(sb.Steer(f, v),) for v in (0.0, 1e-4, 200.0)]
    frame = measure_capability(gemma3.model, cells, texts=TEXTS, questions=QUESTIONS * 40).frame
    assert frame["usable"].tolist() == ["yes", "yes", "yes", "no"]
    assert frame["perplexity_ratio"].iloc[-1] > 1.1 and frame["ratio_low"].iloc[-1] > 1


@pytest.mark.parametrize(
    ("strengths", "usable", "expected"),
    [
        ([-5, -2, 2, 5], ["no", "yes", "yes", "undetermined"], (-2, 2)),
        ([-5, -2, 2, 5], ["yes", "no", "yes", "yes"], (2, 5)),
        ([-5, -2, 2, 5], ["yes", "yes", "no", "yes"], (-5, -2)),
        ([-5, -2, 2, 5], ["yes", "no", "no", "yes"], None),
        ([1, 2, 4], ["yes", "yes", "no"], (1, 2)),
        ([-5, -2, 0, 2, 5], ["yes", "no", "yes", "no", "yes"], (0, 0)),
        ([-5, 0, 5], ["yes", "no", "yes"], None),
    ],
)
def test_the_usable_range_is_around_no_edit(strengths, usable, expected):
    rows = pd.DataFrame({"strength": strengths, "usable": usable, "kind": "candidate"})
    assert usable_range(rows.sample(frac=1, random_state=0)) == expected


@pytest.mark.parametrize("edit", [lambda f, v: sb.Scale(f, v / 8), lambda f, v: sb.Cap(f, v)], ids=["scale", "cap"])  # fmt: skip
def test_no_edit_is_scaling_by_1_and_a_cap_beyond_every_activation(gemma3, edit):
    """Of several features too. The strength nearest to no edit works and the one farthest from it does not."""
    features = [gemma3.feature(i) for i in (3, 5)]
    cells = [(sb.EditSet("both", [edit(f, v) for f in features]),) for v in (0.0, 4.0, 8.0)]
    found = measure_capability(gemma3.model, cells, texts=TEXTS, questions=QUESTIONS)
    strengths = found.frame["strength"].dropna().tolist()
    frame = found.frame.assign(usable=["yes", "no", "yes", "yes"])
    assert usable_range(frame, found.no_edit) == tuple(strengths[1:])


def test_a_projection_taken_out_whole_stands_among_the_shares(gemma3):
    cells = [(sb.ProjectOut(gemma3.feature(3), share=v),) for v in (0.5, 1.0)]
    frame = measure_capability(gemma3.model, cells, texts=TEXTS, questions=QUESTIONS).frame
    assert frame["strength"].tolist()[1:] == [0.5, 1.0]


def test_questions_are_well_formed():
    questions = load_questions()
    assert len(questions) == 40 and len({q.text for q in questions}) == 40
    for q in questions:
        assert len(q.wrong) == 3 and len({q.right, *q.wrong}) == 4
