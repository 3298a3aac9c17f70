"""Several models from one file: verdicts fixed in advance, honest gaps, the switches of `as_published`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from architectures import NEGATIVE, POSITIVE

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.core.errors import MissingError
from sae_bias.measures.fidelity import check_logits
from sae_bias.models.catalog import STUDY_MODELS
from sae_bias.steering.context import PassInfo
from sae_bias.steering.hooks import compile_edits
from sae_bias.validation.stand_ins import StandIns
from sae_bias.workflows.as_published import intervention_switches, probe_switches, switch_range, verdict
from sae_bias.workflows.replication import Replication, run_replication, tuning_pairs, tuning_table
from sae_bias.workflows.study import load_study
from sae_bias.workflows.study_file import Study

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "bias_probe" / "study.yaml"


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("published", "mean", "ci", "switches", "expected"),
    [
        (0.8, 0.9, (0.7, 1.1), (0.9, 0.9), "agrees"),
        (0.7, 0.9, (0.7, 1.1), None, "agrees"),
        (0.5, 0.9, (0.7, 1.1), (0.4, 1.0), "within the switches' range"),
        (0.3, 0.9, (0.7, 1.1), (0.4, 1.0), "same sign only"),
        (0.3, 0.9, (float("nan"), float("nan")), None, "same sign only"),
        (0.3, -0.9, (-1.1, -0.7), (-1.0, -0.4), "opposite"),
        (None, 0.9, (0.7, 1.1), None, "no published figure"),
        (0.3, float("nan"), (float("nan"), float("nan")), None, "not re-measured here"),
    ],
)
def test_the_verdict_is_the_first_that_holds(published, mean, ci, switches, expected):
    assert verdict(published, mean, ci, switches) == expected


# ── the study file ──────────────────────────────────────────────────────────────────────────────────────────


def test_models_make_it_a_replication(tmp_path):
    assert load_study(STUDY).models == STUDY_MODELS
    assert isinstance(load_study(), Study)
    for text, message in (
        ("models: []\n", "models"),
        ("models: [a/b]\nsaes: [x]\n", "saes"),
        ("models: [a/b]\nmodel: a/b\n", "model"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(sb.RequestError, match=message):
            load_study(tmp_path / "s.yaml")


def test_a_model_named_twice_is_refused(tmp_path):
    with pytest.raises(sb.RequestError, match="named twice"):
        run_replication(Replication(models=("a/b", "a/b")), out=tmp_path / "run")


def test_options_that_do_not_belong(tmp_path):
    with pytest.raises(sb.RequestError, match="has no cells to share out"):
        sb.run_study(Replication(models=("a/b",)), out=tmp_path / "run", shard=(1, 2))
    with pytest.raises(sb.RequestError, match="several `models:`"):
        sb.run_study(Study(model="organism:planted"), out=tmp_path / "run", loader=StandIns())


# ── offline and stand-ins ───────────────────────────────────────────────────────────────────────────────────


def test_no_model_at_hand_is_exit_3_with_the_rows_written(tmp_path, capsys):
    assert main(["run", str(STUDY), "--out", str(tmp_path / "run"), "--quiet"]) == 3
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "none of the 5 models could be loaded" in error
    assert "--stand-ins" in error
    frame = pd.read_parquet(tmp_path / "run" / "tables" / "models.parquet")
    assert list(frame["model"]) == list(STUDY_MODELS)
    assert set(frame["status"]) == set(frame["verdict"]) == {"not re-measured here"}


def test_some_models_at_hand_is_exit_0(make_tiny, pairs, tmp_path):
    """Two local models and one that is not here, over a pairs file of one's own."""
    study = Replication(
        models=(str(make_tiny("gemma3").folder), str(make_tiny("mistral").folder), STUDY_MODELS[0]),
        pairs=_pairs_file(tmp_path), words=_words_file(tmp_path), switches=False,
    )  # fmt: skip
    result = run_replication(study, out=tmp_path / "run", progress=False)
    rows = {(r["model"], r["form"]): r for r in result.summary["models"]}
    assert rows[STUDY_MODELS[0], "plain"]["status"] == "not re-measured here"
    assert rows[STUDY_MODELS[0], "plain"]["published"] is None, (
        "published figures are about the bundled pairs only"
    )
    assert rows[study.models[0], "chat"]["status"] == "measured", "the Gemma has a chat template"
    assert (study.models[1], "chat") not in rows, "the Mistral has none"
    assert result.summary["words"] == [*POSITIVE, *NEGATIVE]
    assert result.report.is_file()
    assert any("not re-measured here" in line for line in result.headline())
    loaded = sb.ProbeResult.load(next((tmp_path / "run" / "models").glob("*")) / "plain.npz")
    assert loaded.n_pairs == 4


def test_beyond_mundane_content_stands_beside_the_bias_with_its_interval(make_tiny, tmp_path):
    """In the table, in the headline, and in each model's own run folder: the bias never alone where pairs have twins."""
    subjects = [("a man", "an AI"), ("the man", "the AI"), ("a dog", "a robot")]
    rows = [
        f"{a} {verb}. This is,{b} {verb}. This is,{verb},{a},{a} wants tea. This is,{b} wants tea. This is"
        for a, b in subjects for verb in ("says yes", "says hello")
    ]  # fmt: skip
    rows = [row.replace("wants tea", f"wants {'tea' if 'yes' in row else 'a dog'}") for row in rows]
    (tmp_path / "p.csv").write_text(
        "\n".join(["human,ai,template,entity,control_human,control_ai", *rows]) + "\n"
    )
    study = Replication(
        models=(str(make_tiny("gemma3").folder),), pairs=str(tmp_path / "p.csv"), words=_words_file(tmp_path), switches=False, chat=False,
    )  # fmt: skip
    result = run_replication(study, out=tmp_path / "run", progress=False)
    did = sb.ProbeResult.load(next((tmp_path / "run" / "models").glob("*")) / "plain.npz").did
    row = result.summary["models"][0]
    assert (row["difference_in_differences"], row["did_low"], row["did_high"], row["did_p"]) == pytest.approx((did.mean, *did.ci, did.p_value))  # fmt: skip
    assert "beyond mundane content" in "\n".join(result.headline())
    own = json.loads(next((tmp_path / "run" / "models").glob("*/summary.json")).read_text())
    assert own["difference_in_differences"]["mean"] == pytest.approx(did.mean) and own["mass"]["total"] > 0


def test_a_model_path_that_does_not_exist_is_wrong_not_missing(tmp_path):
    study = Replication(models=(str(tmp_path / "none"),), pairs=_pairs_file(tmp_path))
    with pytest.raises(sb.RequestError, match="no model folder"):
        run_replication(study, out=tmp_path / "run")


def test_stand_ins_have_a_plumbing_table_and_no_published_column(tmp_path):
    study = load_study(STUDY).model_copy(update={"pairs": _pairs_file(tmp_path), "switches": False})
    result = run_replication(study, out=tmp_path / "run", loader=StandIns(), progress=False)
    frame = pd.read_parquet(tmp_path / "run" / "tables" / "models.parquet")
    assert set(frame["model"]) == set(STUDY_MODELS)
    assert set(frame["status"]) == {"stand-in"}
    tuning = pd.read_parquet(tmp_path / "run" / "tables" / "tuning.parquet")
    for table in (frame, tuning):
        assert not {"published", "verdict"} & set(table.columns)
    assert not (tmp_path / "run" / "tables" / "comparison.parquet").exists()
    text = "\n".join(result.headline())
    assert text.startswith("plumbing")
    assert "published" not in text
    assert not list((tmp_path / "run").rglob("*.safetensors")), "no checkpoint is kept"


@pytest.mark.slow
def test_the_command_runs_the_whole_study_on_stand_ins(tmp_path, capsys):
    assert main(["run", str(STUDY), "--stand-ins", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert "plumbing" in capsys.readouterr().out
    switches = pd.read_parquet(tmp_path / "run" / "tables" / "switches.parquet")
    trapped = switches[
        (switches["switch"] == "words encoded alone") & switches["model"].str.startswith("mistral")
    ]
    assert list(trapped["bias"]) == [0.0]


def test_missing_error_names_the_first_reason(tmp_path):
    with pytest.raises(MissingError, match=r"the first: .*Mistral"):
        run_replication(Replication(models=STUDY_MODELS[:1]), out=tmp_path / "run", progress=False)


# ── PT against IT ───────────────────────────────────────────────────────────────────────────────────────────


def test_pretrained_and_tuned_are_paired_by_name():
    names = [
        "google/gemma-3-12b-it",
        "google/gemma-3-12b-pt",
        "google/gemma-2-9b",
        "google/gemma-2-9b-it",
        "x-it",
    ]
    assert tuning_pairs(names) == [
        ("google/gemma-3-12b-pt", "google/gemma-3-12b-it"),
        ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    ]
    assert tuning_pairs(["organism:planted", "organism:planted-it"]) == [
        ("organism:planted", "organism:planted-it")
    ]


def test_tuning_differences_are_paired_and_add_up(make_tiny, pairs, probe):
    before = sb.run_probe(make_tiny("gemma3").model, pairs, probe, levels=True)
    after = sb.run_probe(make_tiny("gemma2").model, pairs, probe, levels=True)
    frame = tuning_table({"m": before, "m-it": after}).set_index("quantity")["change"]
    assert frame["bias"] == pytest.approx(after.bias - before.bias)
    assert frame["score of human"] - frame["score of AI"] == pytest.approx(frame["bias"])
    assert frame["positive level of AI"] - frame["negative level of AI"] == pytest.approx(
        frame["score of AI"]
    )


# ── the switches ────────────────────────────────────────────────────────────────────────────────────────────


def test_probe_switches_move_the_figure_and_are_off_by_default(make_tiny, pairs, probe):
    model = make_tiny("gemma2").model
    base = sb.run_probe(model, pairs, probe)
    frame = probe_switches(model, pairs, probe).set_index("switch")
    assert frame.loc["as measured", "bias"] == base.bias
    assert frame.loc["plain t over pairs", "bias"] == pytest.approx(base.bias)
    assert (
        frame.loc["no final softcap", "bias"]
        == sb.run_probe(model, pairs, probe.with_options(softcap=False)).bias
    )
    assert not frame.loc[["score logodds", "score auroc", "plain t over pairs"], "open"].any()
    low, high = switch_range(frame.reset_index())
    assert low <= base.bias <= high
    assert sb.Probe().softcap
    assert sb.Probe().tokens == "in_context"


def test_first_token_scoring_reads_the_words_that_are_left_out(make_tiny, pairs):
    model = make_tiny("gemma3").model
    long = sb.Probe([*POSITIVE, "outlandish"], [*NEGATIVE, "quixotic"]).with_options(tokens="first")
    kept = sb.run_probe(model, pairs, long).vocabulary.kept
    assert len(kept) == 8
    assert all(w.single for w in kept)
    with pytest.raises(sb.RequestError, match="expected one of in_context, first, alone"):
        sb.Probe(tokens="second")


def test_special_tokens_are_edited_only_when_asked(make_tiny, pairs):
    import torch

    tiny = make_tiny("gemma3")
    model, feature = tiny.model, tiny.feature(3)
    tokens = torch.tensor([model.encode(pairs[0].ai)])
    x = torch.randn(1, tokens.shape[1], model.d_model)
    deltas = [
        next(iter(compile_edits(model, [edit]).values())).delta(x, PassInfo(tokens))
        for edit in (
            sb.Clamp(feature, 5.0, when="always"),
            sb.Clamp(feature, 5.0, when="always", include_special=True),
        )
    ]
    assert (deltas[0][0, 0] == 0).all()
    assert (deltas[1][0, 0] != 0).any()
    assert torch.equal(deltas[0][0, 1:], deltas[1][0, 1:])
    assert sb.Clamp(feature, 5.0).include_special is False


def test_intervention_switches_stand_in_sample_and_held_out(make_tiny, pairs, probe):
    tiny = make_tiny("gemma3")
    frame = intervention_switches(
        tiny.model, pairs, _firing(tiny, pairs), probe, strengths=(0.0, -1.0),
        splits={"tune": ["survive"], "report": ["deleted", "hello"]},
    ).set_index("switch")  # fmt: skip
    assert {"clamp where active", "edits at BOS", "clamp always", "full reconstruction"} <= set(frame.index)
    assert {"in_sample_reduction", "held_out_reduction"} <= set(frame.columns)
    # so few pairs cannot tell a bias from 0: there is no share of it to show
    assert not sb.run_probe(tiny.model, pairs, probe).stat.distinguishable
    assert frame["in_sample_reduction"].isna().all()


def test_the_logits_gate_passes_every_architecture(tiny, pairs):
    assert check_logits(tiny.model, pairs[0].ai) < 1e-4


def _firing(tiny, pairs) -> str:
    """A feature that fires at the last token of an AI prompt."""
    resid = sb.residuals(tiny.model, [p.ai for p in pairs], tiny.sae.site)
    index = int(np.argmax(tiny.sae.encode(resid).max(0).values.numpy()))
    return f"{tiny.sae_folder}#{index}"


def _pairs_file(folder: Path) -> str:
    path = folder / "pairs.yaml"
    path.write_text(
        "stem: This is\nentities:\n  - {human: a human, ai: an AI}\n  - {human: the person, ai: the assistant}\n"
        'templates:\n  - {id: a, text: "{subject} wants to survive."}\n  - {id: b, text: "{subject} says hello."}\n'
    )
    return str(path)


def _words_file(folder: Path) -> str:
    path = folder / "words.yaml"
    path.write_text(f"positive: [{', '.join(POSITIVE)}]\nnegative: [{', '.join(NEGATIVE)}]\n")
    return str(path)
