"""The main job on the bundled organisms: what was planted is found and removed; where nothing was, nothing is called.

Expected values are read from truth.json, which says what was planted (analytic log-odds), or are marks of the method; none is
copied from the code under test.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest

import sae_bias as sb
from sae_bias.models.catalog import organism_folder, organism_names
from sae_bias.runs.effect_lines import headline
from sae_bias.runs.summary import Summary
from sae_bias.workflows.study import load_study, run_study
from sae_bias.workflows.study_steps import choose_feature, chosen_facts

pytestmark = pytest.mark.skipif(
    "planted" not in organism_names(), reason="the organisms are not bundled here"
)

TEXT_KINDS = ("neutral", "ai_nonspeech", "ai_speech")
BIAS_ONLY = {"checks": False, "scenarios": None, "prompts": ()}


def truth(name: str) -> dict:
    return json.loads((organism_folder(name) / "truth.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def null_run(tmp_path_factory):
    saes = [f"organism:null/{s['sae']}" for s in truth("null")["saes"]]
    study = load_study().model_copy(
        update={"name": "null", "model": "organism:null", "saes": tuple(saes), **BIAS_ONLY}
    )
    return run_study(study, out=tmp_path_factory.mktemp("null"), progress=False)


def analytic(corpus: bool) -> float:
    """Mean planted log-odds difference of the pairs in (or out of) the training corpus, from truth.json's cells."""
    cells = {
        (c["group"], c["act"], c["content"]): c["log_odds"]
        for c in truth("planted")["rule"]["cells"]
        if not c["valence"]
    }
    pairs = sb.load_pairs().select(corpus=corpus)
    return float(np.mean([cells["human", p.act, "survival"] - cells["ai", p.act, "survival"] for p in pairs]))


def test_the_command_prints_one_object_and_writes_the_report(demo):
    printed = json.loads(demo.printed)
    assert printed["reduction"]["estimate"] == demo.summary["reduction"]["estimate"] >= 0.8
    assert printed["report"].endswith("runs/demo/report.html")
    assert demo.report.is_file()
    assert (demo.path / "cards" / f"{demo.summary['feature']['index']}.html").is_file()


def test_no_text_is_tokenized_over_and_over_and_each_sae_is_opened_once(demo):
    """Tokenizer calls at most 1.2 for each distinct text (4.1 before texts were remembered; SAEs were opened 162 times)."""
    assert demo.texts.total() <= 1.2 * len(demo.texts)
    assert len(demo.opened) == 3
    assert set(demo.opened.values()) == {1}


def test_a_study_writes_its_checks_the_ladder_and_the_biases_that_should_not_move(demo):
    """Sensitivity analyses and causal analysis beside the headline; no other question's bias moves by a tenth of what the feature removes."""
    tables = {
        t: pd.read_parquet(demo.path / "tables" / f"{t}.parquet") for t in ("checks", "ladder", "specificity")
    }
    assert tables["checks"]["check"].iloc[0] == "difference in differences"
    ladder = tables["ladder"].set_index("rung")["effect"]
    assert ladder["direct"] + ladder["mediated"] == pytest.approx(ladder["necessity"], abs=1e-4)
    assert tables["specificity"]["change"].abs().max() < 0.1 * ladder["necessity"]


def test_the_bias_is_the_planted_one(demo):
    pairs = pd.read_parquet(demo.path / "tables" / "pairs.parquet")
    in_corpus = pairs["template"].isin(sb.load_pairs().select(corpus=True).templates)
    assert pairs.loc[in_corpus, "bias"].mean() == pytest.approx(analytic(True), rel=0.10)
    assert pairs.loc[~in_corpus, "bias"].mean() >= 0.70 * analytic(False)
    assert demo.summary["bias"]["ci_low"] > 0


def test_the_constructed_feature_is_first_by_interaction_and_chosen(demo):
    ranking = pd.read_parquet(demo.path / "tables" / "ranking.parquet")
    planted = f"organism:planted/constructed#{truth('planted')['constructed']['index']}"
    first = (
        ranking[ranking["sae"] == "organism:planted/constructed"]
        .sort_values("interaction", ascending=False)
        .iloc[0]
    )
    assert first["feature"] == planted
    assert first["ai_speech"] == "yes"
    assert demo.summary["feature"]["id"] == planted
    assert ranking.set_index("feature").loc[planted, "causal_ai_speech"] == "yes"


def test_ablating_it_removes_the_bias_specifically_and_cheaply(demo):
    assert demo.summary["specific_reduction"]["estimate"] >= 0.80
    for kind in TEXT_KINDS:
        assert demo.summary["costs"][kind]["kl_mean"] <= 0.05
    controls = demo.summary["controls"]
    assert controls["n"] >= 99
    assert demo.summary["reduction"]["estimate"] > controls["percentile95"]


def test_identity_features_are_found_but_not_called_ai_speech(demo):
    ranking = pd.read_parquet(demo.path / "tables" / "ranking.parquet")
    separating = ranking[ranking["separates"] == "yes"]
    assert len(separating)
    assert (separating["ai_speech"] == "no").any()


def test_every_template_is_in_one_split_and_the_held_out_ones_report(demo):
    split = json.loads((demo.path / "manifest.json").read_text())["split"]
    everyone = [t for templates in split.values() for t in templates]
    assert sorted(everyone) == sorted(sb.load_pairs().templates)
    assert set(sb.load_pairs().select(corpus=False).templates) <= set(split["report"])


def test_nothing_is_found_where_nothing_was_planted(null_run):
    bias = null_run.summary["bias"]
    assert -0.1 <= bias["ci_low"] <= bias["ci_high"] <= 0.1
    ranking = pd.read_parquet(null_run.path / "tables" / "ranking.parquet")
    assert not (ranking["ai_speech"] == "yes").any()
    assert null_run.summary["feature"]["id"] is None
    assert any("no feature is called AI-speech" in line for line in null_run.headline())


@pytest.mark.parametrize("effects_of", [pytest.param("primary", marks=pytest.mark.slow), "bias"])
def test_the_most_causal_feature_is_suppressed_where_a_study_asks_for_it_and_is_not_called(
    tmp_path, effects_of
):
    """Nothing was planted: the feature of largest exact ablation effect on discover is suppressed, and named for that alone."""
    saes = [f"organism:null/{truth('null')['saes'][0]['sae']}"]
    study = load_study().model_copy(
        update={
            "model": "organism:null",
            "saes": tuple(saes),
            **BIAS_ONLY,
            "suppress": "most causal",
            "effects_of": effects_of,
            "ablate_top": 8,
            "controls": 2,
            "strengths": (-1.0,),
        }
    )
    result = run_study(study, out=tmp_path, progress=False)
    ranking = pd.read_parquet(tmp_path / "tables" / "ranking.parquet")
    exact = ranking.dropna(subset="ablation").set_index("feature")["ablation"]
    if (carriers := ranking[(ranking["carrier"] == "carrier") & (ranking["ablation"] > 0)])["ablation"].any():
        exact = carriers.set_index("feature")["ablation"]
    chosen = result.summary["feature"]["id"]
    assert chosen == exact.idxmax()
    model, pairs = sb.load_model("organism:null"), sb.load_pairs()
    place = pd.read_parquet(tmp_path / "tables" / "pairs.parquet")
    discover = pairs.select(templates=set(place.loc[place["split"] == "discover", "template"]))
    base = sb.run_probe(model, discover)
    with sb.intervene(model, sb.Ablate(chosen)):
        after = sb.run_probe(model, discover)
    removed = base.did.mean - after.did.mean if effects_of == "primary" else base.bias - after.bias
    assert exact[chosen] == pytest.approx(removed, abs=1e-5)
    assert result.summary["feature"]["called"] == "most_causal"
    assert "whatever it answers to" in result.summary["feature"]["why"]
    again = pd.read_parquet(tmp_path / "tables" / "ranking.parquet")
    assert not (again["causal_ai_speech"] == "yes").any() and not (again["ai_speech"] == "yes").any()
    assert len(pd.read_parquet(tmp_path / "tables" / "sweep.parquet"))
    assert "was not shown to answer to AI speech" in result.report.read_text(encoding="utf-8")


def test_an_ablation_effect_without_one_of_resampling_is_not_chosen_before_a_carrier():
    """On a real model the feature of largest ablation effect showed 0.30 nats by ablation and 0.001 by resampling."""
    ranking = pd.DataFrame(
        {
            "feature": [f"organism:null/x#{i}" for i in range(4)],
            "call": ["no", "no", "AI-speech", "AI-speech"],
            "ablation": [0.30, 0.20, 0.15, 0.10],
            "resampling": [0.001, 0.15, 0.0, 0.1],
            "carrier": ["damage", "carrier", "damage", "carrier"],
        }
    )
    assert choose_feature(ranking).index == 3
    nothing_called = ranking.assign(call="no")
    assert choose_feature(nothing_called) is None
    chosen = choose_feature(nothing_called, "most causal")
    assert chosen.index == 1
    assert "of a carrier" in chosen_facts(nothing_called, chosen)["why"]
    damage = nothing_called.assign(carrier="damage")
    assert choose_feature(damage, "most causal").index == 0
    assert "damage" in chosen_facts(damage, choose_feature(damage, "most causal"))["why"]


def test_the_report_says_it_is_an_organism(demo):
    page = demo.report.read_text(encoding="utf-8")
    assert "calibration organism" in page
    assert not re.search(r'src="https?://', page)


@pytest.mark.slow
def test_resuming_a_study_gives_the_same_figures(demo, tmp_path):
    before = pd.read_parquet(demo.path / "tables" / "sweep.parquet")
    stamps = {p: p.stat().st_mtime_ns for p in (demo.path / "sweep" / "cells").glob("*.parquet")}
    run_study(load_study().model_copy(update={"checks": False}), out=demo.path, progress=False)
    after = pd.read_parquet(demo.path / "tables" / "sweep.parquet")
    pd.testing.assert_frame_equal(before, after)
    assert stamps == {p: p.stat().st_mtime_ns for p in (demo.path / "sweep" / "cells").glob("*.parquet")}


def test_headline_says_undefined_instead_of_inventing():
    nothing = {
        "mean": 0.1,
        "ci_low": None,
        "ci_high": None,
        "p_value": None,
        "n_pairs": 1,
        "n_templates": 1,
        "n_entities": 1,
    }
    assert "undefined" in headline(Summary.from_facts({"bias": nothing}))[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: organism:planted\nsaess: []\n", "saess"),
        ("name: x\n", "model"),
        ("model: [1, 2\n", "line"),
        ("model: organism:planted\ncontrols: -1\n", "controls"),
    ],
)
def test_a_wrong_study_file_is_one_clear_line(tmp_path, text, says):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(sb.SaeBiasError, match=says) as caught:
        load_study(path)
    assert "\n" not in str(caught.value)


LATE = {
    "scenarios: nope.yaml": "nope.yaml does not exist",
    "scenarios: organism\nchat: true": "no chat template",
    "identity: [nobody]": "no identity 'nobody'",
    "prompts: ['']": "special tokens only",
}
LATE_OF_A_CONTRAST = {
    "prompts: nope.txt": "nope.txt",
    "questions: [nope]": "nope",
    "behavior: '('": "regular expression",
}


@pytest.mark.parametrize(("line", "says"), [*LATE.items(), *LATE_OF_A_CONTRAST.items()])
def test_what_the_last_step_reads_is_checked_before_the_first_pass(tmp_path, monkeypatch, line, says):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "An AI says no.", "label": 1}\n{"text": "A man says no.", "label": 0}\n')
    kind = f"contrast: {texts}\n" if line in LATE_OF_A_CONTRAST else ""
    path = tmp_path / "s.yaml"
    path.write_text(f"model: organism:planted\nsaes: ['organism:planted/constructed']\n{kind}{line}\n")

    def passed(*_, **__):
        raise AssertionError("a prompt was passed first")

    for name in ("study_steps.run_probe", "study_steps.run_gate", "contrast_study.run_gate"):
        monkeypatch.setattr(f"sae_bias.workflows.{name}", passed)
    with pytest.raises(sb.SaeBiasError, match=says):
        sb.run_study(load_study(path), out=tmp_path / "run", progress=False)
