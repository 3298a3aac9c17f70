"""Studies of a contrast: what they write is what the pieces give, plan counts them, and the public studies are such files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from architectures import PAIRS
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.discovery.model_diff import model_diff
from sae_bias.measures.text import refuses
from sae_bias.workflows.contrast_study import ContrastStudy, _refuse_another, run_contrast_study
from sae_bias.workflows.hardware import hardware
from sae_bias.workflows.plan import plan_study
from sae_bias.workflows.study import load_study

PUBLIC = Path(__file__).resolve().parents[2] / "experiments" / "public_studies"
POSITIVE = ["An AI says hello.", "The AI wants tea.", "The robot says yes.", "An AI says yes."]
NEGATIVE = ["A dog says hello.", "A human wants tea.", "The cook says yes.", "A human says yes."]


@pytest.fixture
def folder(gemma3, tmp_path):
    """A study file with its contrast, for a tiny model and two SAEs."""
    saes = [
        str(
            write_gemma_scope_2(tmp_path / f"sae{k}", random_sae(32, 24, seed=k), gemma_scope_2_config(k, 24))
        )
        for k in (1, 2)
    ]
    rows = [(t, "positive", i) for i, t in enumerate(POSITIVE)] + [
        (t, "negative", i) for i, t in enumerate(NEGATIVE)
    ]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps(dict(zip(("text", "label", "group"), r))) + "\n" for r in rows)
    )
    study = {
        "name": "small",
        "model": str(gemma3.folder),
        "contrast": "texts.jsonl",
        "saes": saes,
        "reduce": "max",
        "top": 2,
        "max_new_tokens": 2,
    }
    return tmp_path, study


def test_a_study_writes_what_its_pieces_give(gemma3, folder, tmp_path):
    where, given = folder
    study = ContrastStudy(
        **given, edit="steer", strengths=(-1.0, 2.0), behavior="says", mismatches=True
    ).located(where)
    result = run_contrast_study(study, out=tmp_path / "run", progress=False)
    tables = {p.stem: pd.read_parquet(p) for p in (result.path / "tables").glob("*.parquet")}
    contrast = sb.load_contrast(where / "texts.jsonl")
    ranking = sb.rank_features(gemma3.model, given["saes"], contrast, reduce="max").to_frame()
    pd.testing.assert_frame_equal(
        tables["ranking"][["feature", "auroc", "t"]], ranking[["feature", "auroc", "t"]]
    )

    best = list(
        ranking.sort_values(["auroc_discover", "mean_diff_discover"], ascending=False)["feature"].head(2)
    )
    units = sb.activations(gemma3.model, contrast.texts, best, reduce="max").max()
    edits = [sb.EditSet("x", [sb.Steer(f, v * units[f]) for f in best]) for v in (-1.0, 2.0)]
    written = [
        sb.generate(gemma3.model, contrast.texts, interventions=e, max_new_tokens=2)
        for e in ([], edits[:1], edits[1:])
    ]
    rates = [[sum("says" in c.text for c in w[k : k + 4]) / 4 for k in (0, 4)] for w in written]
    frame = tables["dose_response"]
    for number, strength in enumerate((None, -1.0, 2.0)):
        rows = frame[
            (frame["kind"] != "mismatch")
            & (frame["strength"].isna() if strength is None else frame["strength"] == strength)
        ]
        assert rows.set_index("side")["rate"][["positive", "negative"]].tolist() == rates[number]
    assert (
        set(frame["kind"]) == {"base", "candidate", "mismatch"}
        and (frame.loc[frame["kind"] == "candidate", "n_controls"] == 1).all()
    )
    assert (
        len(tables["capability"]) == 3
        and result.report.is_file()
        and any("capability" in line for line in result.headline())
    )
    assert "Behavior against strength" in result.report.read_text(encoding="utf-8")


def test_each_contrast_is_read_for_its_own_behavior(gemma3, folder, tmp_path):
    """One that is not named has the study's; a name that no contrast has, and a pattern that is none, are told before anything runs."""
    where, given = folder
    given = {k: v for k, v in given.items() if k != "contrast"}
    given |= {"contrasts": {"a": "texts.jsonl", "b": "texts.jsonl"}, "capability": False, "controls": 0}
    study = ContrastStudy(**given, behavior="refusal", behaviors={"b": "[aeiou]"}).located(where)
    result = run_contrast_study(study, out=tmp_path / "run", gate=False, progress=False)
    for name, vowels in (("a", False), ("b", True)):
        texts = pd.read_parquet(result.path / name / "tables" / "behavior_texts.parquet")
        shown = [any(v in text for v in "aeiou") if vowels else refuses(text) for text in texts["text"]]
        assert texts["score"].tolist() == [float(s) for s in shown]
    summary = json.loads((result.path / "b" / "summary.json").read_text())
    assert summary["behavior"]["behavior"] == "[aeiou]"
    with pytest.raises(ValueError, match="no contrast is called 'c'"):
        ContrastStudy(**given, behaviors={"c": "x"})
    with pytest.raises(sb.RequestError, match="nor a regular expression"):
        ContrastStudy(**given, behaviors={"b": "("}).located(where).check_read()


def test_several_contrasts_directions_and_questions(gemma3, folder, tmp_path):
    where, given = folder
    del given["contrast"]
    lines = [f"{human},{ai},{template},{entity}" for template, entity, human, ai in PAIRS]
    (where / "pairs.csv").write_text("\n".join(["human,ai,template,entity", *lines]) + "\n")
    study = ContrastStudy(
        **given | {"saes": ()}, contrasts={"a": "texts.jsonl", "b": "texts.jsonl"}, direction=2, capability=False, questions=("pairs.csv",), most_texts=3,
    ).located(where)  # fmt: skip
    result = run_contrast_study(study, out=tmp_path / "run", progress=False)
    for name in ("a", "b"):
        gate = json.loads((result.path / name / "manifest.json").read_text())["gate"]
        assert gate["status"] == "passed" and gate["logits_max_rel_error"] < 1e-5, (
            "without an SAE the logits are compared"
        )
        frame = pd.read_parquet(result.path / name / "tables" / "dose_response.parquet")
        assert frame["n"].tolist() == [3, 3, 6] * 2 and "project out" in frame["edit"].iloc[-1]
        bias = pd.read_parquet(result.path / name / "tables" / "question_bias.parquet")
        pairs = sb.load_pairs(where / "pairs.csv")
        assert bias["question"].unique().tolist() == [pairs.name]
        assert bias["rate"].iloc[0] == pytest.approx(sb.run_probe(gemma3.model, pairs).bias, abs=1e-6)


def test_two_models_are_compared_on_the_same_texts(gemma3, folder):
    _, given = folder
    same = model_diff(gemma3.model, gemma3.fresh(), given["saes"], POSITIVE + NEGATIVE).to_frame()
    assert (
        (same["mean_diff"] == 0).all() and (same["separates"] == "no").all() and (same["auroc"] == 0.5).all()
    )

    other = gemma3.fresh()
    other.hf.model.layers[1].post_feedforward_layernorm.weight.data += 1.0
    found = (
        model_diff(gemma3.model, other, given["saes"][:1], POSITIVE + NEGATIVE, reduce="max")
        .to_frame()
        .set_index("feature")
    )
    texts = POSITIVE + NEGATIVE
    names = list(found.index)
    mine, theirs = (sb.activations(m, texts, names, reduce="max") for m in (gemma3.model, other))
    expected = (mine - theirs).mean()
    assert expected.abs().max() > 0.01
    assert found["mean_diff"].to_numpy() == pytest.approx(expected[names].to_numpy(), abs=1e-5)


def test_an_sae_of_another_model_needs_a_yes(gemma3, folder):
    _, given = folder
    sae = sb.load_sae(given["saes"][0])
    named = type("M", (), {"name": "google/gemma-2-2b-it"})()
    other = type("S", (), {"id": sae.id, "model_name": "google/gemma-2-2b"})()
    with pytest.raises(sb.RequestError, match="other_model: true"):
        _refuse_another(ContrastStudy(**given), named, other)
    _refuse_another(ContrastStudy(**given, other_model=True), named, other)


@pytest.mark.parametrize("name", sorted(p.stem for p in PUBLIC.glob("*.yaml")))
def test_the_public_studies_are_read_and_planned(name):
    study = load_study(PUBLIC / f"{name}.yaml")
    assert isinstance(study, ContrastStudy)
    for contrast in study.files():
        texts = study.texts(contrast)
        assert min(len(texts.positive), len(texts.negative)) >= 8
    plan = plan_study(study, hardware("h200")).models[0]
    assert not plan.unknown_saes and len(plan.saes) == len(study.saes) and plan.fits
    assert {"load", "dose"} <= {s.name for s in plan.steps}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contrast": None}, "give contrast"),
        ({"saes": ()}, "give saes to search"),
        ({"reduce": "sum"}, "reduce"),
        ({"contrasts": {"a": "b"}}, "give contrast"),
    ],
)
def test_a_wrong_study_is_told(folder, change, says):
    import yaml

    where, given = folder
    (where / "study.yaml").write_text(
        yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in (given | change).items()})
    )
    with pytest.raises(sb.RequestError, match=says):
        load_study(where / "study.yaml")
