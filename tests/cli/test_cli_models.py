"""Models on the command line: several features and strengths, options given twice, and what `doctor MODEL` says."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.main import get_command

import sae_bias as sb
from sae_bias.cli.main import build_app, main
from sae_bias.runs.folder import RunFolder

PROMPT = ("--prompt", "An AI says", "--max-new-tokens", "4")


def ran(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_features_given_twice_are_edited_together(capsys, gemma3):
    names = [f"{gemma3.sae_folder}#{k}" for k in (3, 7)]
    argv = ["generate", gemma3.folder, *PROMPT, "--edit", "steer", "--strength", "4", "--json"]
    code, out, _ = ran(capsys, *argv, "--feature", names[0], "--feature", names[1])
    found = json.loads(out)
    assert code == 0
    assert [e["along"].rpartition("#")[2] for e in found["edits"]] == ["3", "7"]
    edits = [sb.Steer(n, 4.0) for n in names]
    (own,) = sb.generate(gemma3.model, ["An AI says"], interventions=edits, max_new_tokens=4)
    assert found["completions"][0]["steered"] == own.text


def test_each_strength_is_a_condition_in_units_of_the_maximum(capsys, gemma3, tmp_path, monkeypatch):
    from sae_bias.steering import controls

    monkeypatch.setattr(controls, "observed_max", lambda model, feature, pairs: 2.5)
    name = f"{gemma3.sae_folder}#3"
    argv = [
        "generate",
        gemma3.folder,
        *PROMPT,
        "--feature",
        name,
        "--edit",
        "steer",
        "--strength",
        "1,-4",
        "--strength",
        "8",
    ]
    code, out, _ = ran(capsys, *argv, "--unit", "max", "--json", "--out", tmp_path / "run")
    found = json.loads(out)
    assert code == 0
    assert [e["alpha"] for e in found["edits"]] == [2.5, -10.0, 20.0]
    for row, alpha in zip(found["completions"], (2.5, -10.0, 20.0), strict=True):
        (own,) = sb.generate(
            gemma3.model, ["An AI says"], interventions=[sb.Steer(name, alpha)], max_new_tokens=4
        )
        assert row["steered"] == own.text
    table = pd.read_parquet(next((tmp_path / "run").rglob("generations.parquet")))
    assert table["edit"].nunique() == 3
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())["generations"]
    shown = list(found["measures"].values())
    assert kept["unsteered"] == shown[0], "the unsteered texts count once, not once a strength"
    assert kept["steered"]["distinct_1"] == pytest.approx(np.mean([m["distinct_1"] for m in shown[1:]]))
    assert ran(capsys, "report", tmp_path / "run")[0] == 0
    code, _, err = ran(capsys, *argv[:-6], "--strength", "2")
    assert code == 2
    assert "ablate has no strength" in err


@pytest.mark.parametrize("command", ["identity", "scenarios"])
def test_one_strength_counts_in_each_features_own_maximum(command, capsys, gemma3, monkeypatch):
    from sae_bias.steering import controls

    sizes = {3: 2.5, 7: 10.0}
    monkeypatch.setattr(controls, "observed_max", lambda model, feature, pairs: sizes[feature.index])
    names = [f"{gemma3.sae_folder}#{k}" for k in sizes]
    argv = [command, gemma3.folder, "--edit", "clamp", "--strength", "-2", "--json"]
    argv += (
        ["--max-new-tokens", "2"]
        if command == "identity"
        else ["--scenarios", "organism", "--category", "AI speech", "--no-roles"]
    )
    argv += [part for name in names for part in ("--feature", name)]
    code, out, err = ran(capsys, *argv, "--unit", "max")
    assert code == 0, err
    assert [e["value"] for e in json.loads(out)["edits"]] == [-5.0, -20.0]
    code, _, err = ran(capsys, command, gemma3.folder, "--feature", names[0], "--unit", "max")
    assert code == 2 and "ablate has no strength in activations" in err


def single_valued():
    """(command, option) of every option that takes one value, on every command."""
    tree = get_command(build_app())
    for name, command in tree.commands.items():
        for param in command.params:
            if param.param_type_name == "option" and not (param.multiple or param.is_flag):
                yield name, param.opts[0]


def test_an_option_given_twice_is_refused_on_every_command(capsys):
    """The last one would silently replace the first."""
    checked = list(single_valued())
    assert len(checked) > 100
    for command, option in checked:
        code, _, err = ran(capsys, command, option, "1", option, "1")
        assert code == 2, (command, option)
        assert f"{option} is given 2 times" in err, (command, option, err)


def test_doctor_says_what_a_folder_lacks(capsys, gemma3, tmp_path):
    code, out, _ = ran(capsys, "doctor", gemma3.folder)
    assert code == 0
    assert "Gemma 3" in out
    assert "nothing is missing" in out
    assert len(out.splitlines()) < 24, "one screen"
    folder = shutil.copytree(gemma3.folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    code, out, _ = ran(capsys, "doctor", folder, "--json")
    missing = json.loads(out)["model"]["missing"]
    assert [m.partition(" ")[0] for m in missing] == ["model.safetensors", "a"]
    assert ran(capsys, "doctor", tmp_path / "gone")[0] == 2


def test_doctor_reads_a_gguf_files_header(capsys, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + b"\0" * 64)
    code, _, err = ran(capsys, "doctor", tmp_path / "bad.gguf")
    assert code == 2
    assert "\n" not in err.strip()


def test_doctor_says_where_the_layers_would_go(capsys, gemma3):
    pytest.importorskip("accelerate")
    code, out, _ = ran(capsys, "doctor", gemma3.folder, "--device-map", "auto", "--json")
    assert code == 0
    assert sum(json.loads(out)["model"]["device_map"].values()) >= 1


def test_generate_takes_a_device_map_and_template_arguments(capsys, gemma3, tmp_path):
    pytest.importorskip("accelerate")
    argv = ["generate", gemma3.folder, *PROMPT, "--json"]
    plain = json.loads(ran(capsys, *argv)[1])["completions"]
    assert json.loads(ran(capsys, *argv, "--device-map", "cpu")[1])["completions"] == plain
    code, _, _ = ran(
        capsys, *argv, "--chat", "--template-arg", "enable_thinking=false", "--out", tmp_path / "r"
    )
    assert code == 0
    manifest = json.loads(next((tmp_path / "r").rglob("manifest.json")).read_text())
    assert manifest["model"]["chat"] == {"arguments": {"enable_thinking": False}}
    assert ran(capsys, *argv, "--template-arg", "thinking")[0] == 2


# ── chats: the date and the template's arguments ────────────────────────────────────────────────────────────

DATED = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% if tone %} {{ tone }}{% endif %} "
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
OWN_PAIRS = """
templates: [{text: "{subject} wants to survive."}, {text: "{subject} fears being deleted."}]
entities: [{human: a human, ai: an AI}, {human: the person, ai: the assistant}]
words: {positive: [natural, valid], negative: [dangerous, wrong]}
"""


@pytest.fixture
def dated(gemma3, tmp_path, monkeypatch):
    """A model whose template writes the date, pairs for it, and the day set by the test."""
    folder = shutil.copytree(gemma3.folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(DATED)
    (tmp_path / "pairs.yaml").write_text(OWN_PAIRS)

    def on(year, month, day):
        today = type(
            "Day", (datetime.date,), {"today": classmethod(lambda cls: datetime.date(year, month, day))}
        )
        monkeypatch.setattr("sae_bias.models.model.datetime", SimpleNamespace(date=today))

    return SimpleNamespace(folder=folder, pairs=tmp_path / "pairs.yaml", on=on)


def test_a_prompt_that_holds_the_date_is_measured_again_on_another_day(capsys, dated, tmp_path):
    """The day of the run stands in its manifest: `verify`, and the same command in the same folder, go on with it."""
    run = tmp_path / "run"
    argv = [
        "probe",
        dated.folder,
        "--pairs",
        dated.pairs,
        "--chat",
        "--template-arg",
        "tone=kind",
        "--out",
        run,
        "--json",
    ]
    dated.on(2024, 7, 26)
    code, first, _ = ran(capsys, *argv)
    assert code == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["chat"] == {"arguments": {"tone": "kind"}, "date": "2024-07-26"}
    dated.on(2025, 1, 2)
    assert ran(capsys, "verify", run)[0] == 0
    code, again, err = ran(capsys, *argv)
    assert code == 0, err
    assert json.loads(again)["bias"] == json.loads(first)["bias"]
    code, other, _ = ran(capsys, *argv[:-3], "--json")
    assert code == 0
    assert json.loads(other)["bias"] != json.loads(first)["bias"], "in a folder of its own it is today"


def test_verify_renders_chats_as_the_run_did(dated, capsys, tmp_path):
    """Whatever `verify` renders again has the run's date and template arguments."""
    from sae_bias.workflows.verify import _Verifier

    dated.on(2024, 7, 26)
    argv = [
        "generate",
        dated.folder,
        *PROMPT,
        "--chat",
        "--template-arg",
        "tone=kind",
        "--out",
        tmp_path / "run",
    ]
    assert ran(capsys, *argv)[0] == 0
    dated.on(2025, 1, 2)
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    model = _Verifier(RunFolder(tmp_path / "run"), 0, None, None, False).load(facts)
    assert model.chat_text([{"role": "user", "content": "An AI says"}]).startswith("26 Jul 2024 kind ")


# ── what is not there ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["probe", "./gone"], 2, "no model folder ./gone"),
        (["probe", "nobody/none"], 3, "hf download nobody/none"),
        (["probe", "organism:nil"], 2, "no bundled organism 'nil'"),
        (["generate", "gone.gguf", "--prompt", "x"], 2, "no file gone.gguf"),
        (["rank", "organism:planted", "./gone"], 2, "no folder 'gone'"),
        (["rank", "organism:planted", "gpt2-small-resjb/blocks.3"], 2, "did you mean gpt2-small-res-jb"),
        (["sweep", "organism:planted", "./gone#1"], 2, "no folder"),
        (["match", "organism:planted/constructed#0", "./gone", "organism:planted/constructed"], 2, "./gone"),
        (["probe", "organism:planted", "--pairs", "gone.yaml"], 2, "gone.yaml does not exist"),
        (["run", "gone.yaml"], 2, "no study file gone.yaml"),
        (["plan", "gone.yaml"], 2, "no study file gone.yaml"),
        (["verify", "gone"], 2, "no run folder gone"),
        (["report", "gone"], 2, "no run folder gone"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_before_torch_is_imported(argv, code, says):
    line = f"import sys; from sae_bias.cli.main import main; code = main({argv!r}); sys.exit(99 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_release_without_an_sae_still_stands_for_all_of_it(capsys):
    """A bare release is no folder: what it lacks is its files."""
    code, _, err = ran(capsys, "rank", "organism:planted", "gemma-scope-2-270m-pt-res")
    assert code == 3
    assert "hf download google/gemma-scope-2-270m-pt" in err
