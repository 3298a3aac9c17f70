"""The calibration recovers a planted feature and reports none in a control model, and fails a toolkit that does not (docs/method.md#pass-marks)."""

import json

import numpy as np
import pandas as pd
import pytest
from organisms.calibrate_trained import measure_sae, sae_marks
from scipy import stats

from sae_bias import Probe, load_model, load_pairs, load_sae, run_probe
from sae_bias.cli.main import main
from sae_bias.core.errors import RequestError
from sae_bias.discovery.contrasts import interaction
from sae_bias.stats import clustered
from sae_bias.steering.controls import RANDOM, control_test
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine
from sae_bias.validation import calibrate, definitions
from sae_bias.validation import grids as calibration_grids
from sae_bias.validation import populations as calibration_populations
from sae_bias.validation.calibrate import Draws
from sae_bias.validation.design import pairs_power, unknown_words
from sae_bias.validation.grammar import grammar, matched_statements, population
from sae_bias.validation.grids import GridCalls, call_grid, read_statements, statement_grid
from sae_bias.validation.marks import Mark, constructed_feature, marks_frame, organism_truth
from sae_bias.validation.populations import (
    ScoredPopulation,
    draw_studies,
    mundane_twin,
    templates_needed,
)

SMALL = Draws(studies=60, grids=40, power=20, controls=19, templates=36, pairs=45)


@pytest.fixture(scope="module")
def planted():
    return load_model("organism:planted")


@pytest.fixture(scope="module")
def crossed() -> ScoredPopulation:
    """A population whose templates, entities and cells all vary, with a known mean."""
    rng = np.random.default_rng(3)
    values = 0.7 + rng.normal(0, 1, (400, 1)) + rng.normal(0, 0.7, (1, 60)) + rng.normal(0, 1, (400, 60))
    return ScoredPopulation("crossed", values, 0.7)


# --- marks


def test_a_mark_is_met_only_inside_its_bounds_and_never_by_a_nan():
    assert Mark("m", "o", 0.95, 0.93, 0.98).passed
    assert not Mark("m", "o", 0.99, 0.93, 0.98).passed
    assert not Mark("m", "o", float("nan"), low=0.5).passed
    frame = marks_frame([Mark("m", "o", 0.071, high=0.07), Mark("m", "o", 1, 1, 1, unit="count")])
    assert frame["required"].tolist() == ["at most 7%", "1"]
    assert frame["measured"].tolist() == ["7.1%", "1"]
    assert frame["verdict"].tolist() == ["missed", "met"]


# --- studies drawn from a population


def test_two_way_intervals_of_drawn_studies_cover_the_populations_mean(crossed):
    studies = draw_studies(crossed, 35, 8, 1000, seed=1)
    assert 0.93 <= studies.coverage(crossed.bias.mean()) <= 0.98
    assert studies.mean.mean() == pytest.approx(crossed.bias.mean(), abs=0.05)


def test_an_interval_that_takes_pairs_for_samples_misses_the_mark(crossed, monkeypatch):
    """280 pairs are not 280 samples: the plain t interval covers far too rarely, and the mark says so."""

    def plain(values, templates, entities):
        mean, se = values.mean(1), stats.sem(values, axis=1)
        low, high = stats.t.interval(0.95, values.shape[1] - 1, mean, se)
        return {"mean": mean, "ci_low": low, "ci_high": high}

    monkeypatch.setattr(calibration_populations, "clustered_means", plain)
    row = calibration_populations.coverage_row(crossed, 300)
    assert row["coverage"] < 0.7
    assert not calibrate.coverage_mark(row, crossed).passed


def test_power_grows_with_templates_and_the_needed_number_has_it(crossed):
    needed = templates_needed(crossed, 8, 400)
    assert needed is not None
    assert (
        draw_studies(crossed, needed, 8, 400).power >= 0.8 > draw_studies(crossed, needed - 1, 8, 400).power
    )
    empty = ScoredPopulation("empty", crossed.bias - crossed.bias.mean(), 0.0)
    assert templates_needed(empty, 8, 200, most=30) is None


def test_the_smallest_effect_is_found_in_four_of_five_studies(crossed):
    """Shifting the whole population to that mean gives power 0.8 (the other tail adds next to nothing)."""
    studies = draw_studies(crossed, 20, 8, 1000, seed=2)
    smallest = studies.smallest_effect(crossed.truth)
    shifted = ScoredPopulation("shifted", crossed.bias - crossed.truth + smallest, smallest)
    assert draw_studies(shifted, 20, 8, 1000, seed=2).power == pytest.approx(0.8, abs=0.01)


def test_a_study_larger_than_the_population_is_refused(crossed):
    with pytest.raises(RequestError, match="400 × 60"):
        draw_studies(crossed, 400, 8, 10)


def test_a_mundane_twin_is_the_same_sentence_about_something_mundane():
    survival = [v for fillers in grammar()["fillers"].values() for v in fillers["survival"] if " " in v]
    for statement in population("planted", n_templates=200).templates:
        twin = mundane_twin(statement)
        assert (twin.act, twin.content, twin.text.count("{S}")) == (statement.act, "mundane", 1)
        assert twin.text != statement.text
        assert not [v for v in survival if v.lower() in twin.text.lower()]


def test_the_difference_in_differences_is_drawn_from_the_twins(planted):
    """A population whose mundane bias is known: what is drawn is the rest, under its own name."""
    rng = np.random.default_rng(0)
    mundane = rng.normal(0.4, 1, (60, 20))
    scored = ScoredPopulation("x", mundane + 0.5 + rng.normal(0, 0.1, (60, 20)), 0.0, mundane)
    beyond = scored.beyond_mundane
    assert beyond.truth == pytest.approx(0.5, abs=0.02)
    found = calibration_populations.bias_power(beyond, 100, template_counts=(12,), entity_counts=(8,))
    assert found[["question", "share"]].to_numpy().tolist() == [["difference in differences", 1.0]]
    assert calibrate.coverage_mark(calibration_populations.coverage_row(beyond, 20), beyond).mark.endswith("of the difference in differences")  # fmt: skip
    small = calibration_populations.score_population(planted, "planted", n_templates=6, twins=True)
    alone = calibration_populations.score_population(planted, "planted", n_templates=6)
    assert small.bias == pytest.approx(alone.bias, abs=1e-4)
    assert alone.beyond_mundane is None
    assert 0.3 < small.beyond_mundane.truth < small.truth - 0.3  # mundane speech is judged half as badly


# --- grids drawn from matched statements


def test_drawn_grids_are_called_as_the_ranking_calls_them(planted):
    """The same statements as a grid of prompts, through `contrasts.interaction` whole."""
    sae, n = load_sae(str(constructed_feature().sae)), 60
    statements = read_statements(planted, "planted", [sae], n_pairs=n)
    pairs = matched_statements(n)
    for k, size in enumerate((13, 30)):
        chosen = np.sort(np.random.default_rng(k).permutation(n)[:size])
        drawn = call_grid(statements, chosen)
        frame = interaction(planted, [sae], statement_grid([pairs[i] for i in chosen])).frame
        frame = frame.set_index("feature").loc[list(statements.features)]
        assert (drawn.called == (frame["ai_speech"] == "yes").to_numpy()).all()
        assert np.abs(drawn.p_fwer - frame["p_fwer"].to_numpy(dtype=float)).max() < 1e-12
    assert drawn.called[statements.features.index(str(constructed_feature()))]


def test_too_small_a_grid_calls_nothing(planted):
    sae = load_sae(str(constructed_feature().sae))
    statements = read_statements(planted, "planted", [sae], n_pairs=20)
    drawn = call_grid(statements, np.arange(11))
    assert not drawn.called.any()
    assert np.isnan(drawn.p_fwer).all()


# --- the whole, small


def run_small(monkeypatch, capsys, tmp_path, *organisms: str, folder: str = "out"):
    quick = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda *, draws, seed, progress: quick(organisms, draws=SMALL, seed=seed, progress=progress))  # fmt: skip
    code = main(["calibrate", "--json", "--out", str(tmp_path / folder)])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


@pytest.mark.slow
def test_null_meets_its_marks_and_a_rule_that_always_says_yes_does_not(monkeypatch, capsys, tmp_path):
    scored = calibrate.score_population(load_model("organism:null"), "null", n_templates=SMALL.templates)
    monkeypatch.setattr(calibrate, "score_population", lambda *_, **__: scored)
    with monkeypatch.context() as patch:
        _, found, _ = run_small(patch, capsys, tmp_path, "null")
    by_mark = {m["mark"]: m for m in found["marks"]}
    assert by_mark["grids with any call"]["value"] == 0
    assert by_mark["whole bias interval near 0"]["verdict"] == "met"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "report none in a control model" in page
    kept = pd.read_parquet(tmp_path / "out" / "tables" / "marks.parquet")
    assert kept["verdict"].tolist() == [m["verdict"] for m in found["marks"]]

    def always(statements, chosen, *, seed=0):
        n = len(statements.features)
        return GridCalls(np.ones(n, dtype=bool), np.ones(n, dtype=bool), np.zeros(n))

    monkeypatch.setattr(calibration_grids, "call_grid", always)
    code, broken, err = run_small(monkeypatch, capsys, tmp_path, "null", folder="broken")
    assert code == 4
    assert "grids with any call" in err
    assert not broken["passed"]


# --- the definitions that decide headlines


def test_a_pooled_p_misses_the_mark_of_exchangeable_candidates(monkeypatch):
    assert definitions.pass_rate(4, 500) <= 0.06
    one_kind = lambda own, values, kinds: control_test(own, values, [RANDOM for _ in kinds])  # noqa: E731
    monkeypatch.setattr(definitions, "control_test", one_kind)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(definitions.np.random, "default_rng", lambda _: _Alike(rng))
    assert definitions.pass_rate(4, 500) > 0.06


class _Alike:
    """Matched features vary as the candidate does, random directions hardly: the two kinds are not exchangeable."""

    def __init__(self, rng):
        self.gamma, self.draw = rng.gamma, rng.normal

    def normal(self, mean, spread, n):
        return np.r_[self.draw(mean, spread, 5), self.draw(mean, spread / 10, n - 5)]


def test_a_call_below_six_templates_misses_the_mark_of_small_designs(monkeypatch):
    marks = {m.mark: m for m in definitions.simulation_marks(2_000, 40)}
    assert all(m.passed for name, m in marks.items() if "intervals" in name)
    monkeypatch.setattr(clustered, "FEWEST_CLUSTERS", 0)
    broken = {m.mark: m for m in definitions.simulation_marks(200, 40)}
    assert not broken[
        "95% intervals that cover the truth, 3 templates"
    ].passed  # calls where none may be made


def test_a_hook_at_another_place_misses_the_mark_of_equal_directions(monkeypatch, planted):
    assert definitions.direction_mark(planted, "planted").passed
    plain = definitions.ProjectOut
    monkeypatch.setattr(definitions, "ProjectOut", lambda along, positions: plain(along, positions=positions, share=0.5))  # fmt: skip
    assert not definitions.direction_mark(planted, "planted").passed


def test_learned_edits_are_judged_against_their_marks_and_misses_are_said():
    row = {"weights": "trained", "specific": 0.9, "kl_off": 0.4, "human_moved": -0.1}
    table = pd.DataFrame(
        [row | {"kind": "scales"}] * 3
        + [row | {"kind": "gated", "kl_off": 0.02, "specific": sr} for sr in (0.03, 0.9, 0.99)]
        + [row | {"kind": kind, "weights": "randomized", "specific": 0.2} for kind in ("scales", "gated")]
    )
    marks = {m.mark: m for m in definitions.learned_marks(table, "planted")}
    missed = {name for name, m in marks.items() if not m.passed}
    assert missed == {"learned scales: largest KL_off", "gated counterfactual: SAEs of which it is above 0.6"}
    assert marks["gated counterfactual: median specific reduction"].value == pytest.approx(0.9)
    assert "randomized SAEs 0.200" in marks["gated counterfactual: median specific reduction"].note
    notes = definitions.learned_notes(table, "planted")
    assert len(notes) == len(marks)
    assert [n for n in notes if "largest KL_off: 0.4 nats" in n and "missed here" in n]
    assert sum("missed here" in n for n in notes) == len(missed)


# --- trained SAEs


def trained(places: list[int], removed: list[float]) -> pd.DataFrame:
    rho = np.full(len(places), 0.9)
    return pd.DataFrame({"organism_seed": 1, "first_place": places, "joint_report": removed, "rho": rho})


def test_nineteen_of_twenty_trained_saes_are_enough_and_eighteen_are_not():
    x = np.linspace(0.01, 0.3, 30)
    effects = pd.DataFrame(
        {"organism_seed": 1, "sae": "a", "attributed": x, "exact": x**2, "interaction": -x}
    )
    for wrong, verdict in ((1, "met"), (2, "missed")):
        places, removed = [1] * (20 - wrong) + [4] * wrong, [0.9] * 20
        marks = {m.mark: m for m in sae_marks(trained(places, removed), effects)}
        assert marks["trained SAEs of which both hold"].verdict == verdict
    rho = marks["attribution against exact ablation, Spearman's ρ"]
    assert rho.value == pytest.approx(1)
    assert "30 features" in rho.n
    first = next(m for name, m in marks.items() if "most causal" in name)
    assert (
        "1 of 20 by the interaction's size" in first.note
    )  # the largest effect has the most negative interaction
    few = {m.mark: m for m in sae_marks(trained([1] * 20, [0.5] * 20), effects[-10:])}
    assert few["trained SAEs of which both hold"].value == 0
    assert not few["attribution against exact ablation, Spearman's ρ"].passed  # ten features are too few


@pytest.mark.slow
def test_measuring_an_sae_finds_the_planted_feature(planted):
    """On the constructed SAE the answer is known: first by interaction, and its ablation removes nearly everything."""
    feature = constructed_feature()
    pairs = load_pairs().select(entities=["human", "person"])
    engine = ProbeEngine(planted, pairs, Probe())
    found = measure_sae(engine, load_sae(str(feature.sae)))
    both = organism_truth("planted")["constructed"]
    assert found.facts["first_feature"] in (
        both["index"],
        both["valence_index"],
    )  # the read-out flattens everything
    assert found.facts["joint_report"] > 0.8
    alone = engine.base.bias - engine.run([Ablate(feature)])[0].bias
    row = found.effects.set_index("feature").loc[feature.index]
    assert row["interaction_place"] == 1
    assert row["exact"] > 0.8
    assert row["exact"] * engine.base.bias == pytest.approx(alone, rel=1e-6)


# --- a user's own design


def test_words_the_organism_never_read():
    assert unknown_words([p.human for p in load_pairs()]) < 0.02
    assert unknown_words(["Zyzzyva quokkas gallivant."]) == 1


def test_a_design_of_one_entity_has_no_power(monkeypatch, planted):
    scored = calibration_populations.score_population(planted, "planted", n_templates=40, twins=True)
    monkeypatch.setattr("sae_bias.validation.design.score_population", lambda *_, **__: scored)
    pairs = load_pairs().select(entities=["human"])
    found = pairs_power(planted, pairs, n_draws=50)
    assert [m.verdict for m in found.marks] == ["missed", "missed"]
    assert "at least 2" in found.lines[0]
    whole = pairs_power(planted, load_pairs(), n_draws=200)
    assert whole.marks[0].passed
    assert whole.facts["given_bias"] > 1.5
    assert whole.facts["question"] == "difference in differences"
    assert "difference in differences" in whole.lines[0]
    assert whole.facts["given_primary"] == pytest.approx(run_probe(planted, load_pairs()).did.mean, abs=1e-4)


def test_full_says_where_training_lives(capsys):
    """Exit code 3: the installed package trains nothing."""
    assert main(["calibrate", "--full", "--seeds", "2", "--out", "runs/mine"]) == 3
    assert "experiments/organisms/calibrate.py --seeds 2 --out runs/mine" in capsys.readouterr().err
    assert main(["calibrate", "--full", "--pairs", "gender"]) == 2


# --- the whole quick form


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_bundled_organisms_meet_every_mark(capsys, tmp_path):
    code = main(["calibrate", "--json", "--out", str(tmp_path / "out")])
    found = json.loads(capsys.readouterr().out)
    assert [m for m in found["marks"] if m["verdict"] != "met"] == []
    assert code == 0
    assert {m["organism"] for m in found["marks"]} == {*calibrate.ORGANISMS, definitions.SIMULATION}
    learned = pd.DataFrame(found["tables"]["learned"])
    assert set(learned["weights"]) == {"trained", "randomized"}
    assert any("KL_off" in note for note in found["notes"])  # learned scales miss it, and that is said
    power = pd.DataFrame(found["tables"]["power"])
    bias = power[
        (power["question"] == "bias") & (power["n_entities"] == 8) & (power["organism"] == "planted")
    ]
    assert bias.set_index("n_units").at[35, "share"] >= 0.8
    assert (power.loc[power["question"] == "any call", "share"] <= 0.07).all()
