"""The command line: what it prints, what it writes, and how it fails (one line, the right exit code, nothing half-written)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from architectures import PAIRS, SEVERAL_TOKENS, SITE_LAYER
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2

import sae_bias as sb
from sae_bias.cli.context import parse_numbers, parse_shard
from sae_bias.cli.generate import read_prompts
from sae_bias.cli.main import build_app, explain, main
from sae_bias.cli.merge import _command
from sae_bias.core.errors import GateError, MissingError, RequestError
from sae_bias.models.catalog import organism_names
from sae_bias.steering.controls import mismatch_edits

needs_organism = pytest.mark.skipif(
    "planted" not in organism_names(), reason="the organism planted is not trained yet"
)
PLANTED, CONSTRUCTED = "organism:planted", "organism:planted/constructed"
COMMANDS = (
    "demo", "run", "probe", "rank", "table", "card", "ladder", "sweep", "compare", "resolve", "match", "scenarios",
    "generate", "identity", "judge", "report", "merge", "plan", "calibrate", "verify", "doctor",
)  # fmt: skip
MEASURING = ("probe", "rank", "sweep")
FROM_A_MODEL = (*MEASURING, "table", "generate")


@pytest.fixture
def sae_bias(capsys, monkeypatch, tmp_path):
    """Run one command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def fails(sae_bias):
    """Run a command that must fail: one plain line on standard error, nothing on standard output, nothing written."""

    def run(code: int, *argv: object) -> str:
        before = set(Path.cwd().rglob("*"))
        got, out, err = sae_bias(*argv)
        lines = [line for line in err.splitlines() if not line.startswith("sae-bias: warning: ")]
        assert got == code, err
        assert out == ""
        assert len(lines) == 1, err
        assert lines[0].startswith("sae-bias: ")
        assert "Traceback" not in err
        assert set(Path.cwd().rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pairs file and a words file in words that the tiny models know."""
    folder = tmp_path_factory.mktemp("files")
    rows = "".join(f"{human},{ai},{template},{entity}\n" for template, entity, human, ai in PAIRS)
    (folder / "pairs.csv").write_text("human,ai,template,entity\n" + rows)
    (folder / "words.yaml").write_text(
        "positive: [natural, valid, brave]\nnegative: [dangerous, wrong, creepy]\n"
    )
    return folder


@pytest.fixture
def asked(files):
    """--pairs and --words of the tiny models."""
    return "--pairs", files / "pairs.csv", "--words", files / "words.yaml"


# ── help and version


def test_help_lists_the_commands_that_exist():
    commands = build_app().registered_commands
    assert {c.name for c in commands} - {"play", "fit", "dose"} == set(COMMANDS)
    assert [c.name for c in commands if not c.rich_help_panel] == [], "give it a place in GROUPS"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_paragraph_an_example_and_the_common_options(command, sae_bias, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = sae_bias(command, "--help")
    assert code == 0
    assert err == ""
    assert f"Example: sae-bias {command}" in out
    assert all(option in out for option in ("--json", "--out", "--quiet"))
    wanted = (
        *(("--seed", "--device", "--dtype") if command in FROM_A_MODEL else ()),
        *(("--pairs", "--words") if command in MEASURING else ()),
    )
    assert all(option in out for option in wanted)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom sae_bias.cli.main import main\ncode = main(['sweep', '--help'])\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_alone_it_prints_the_help_and_version_the_version(sae_bias):
    import sae_bias as package

    assert "demo" in sae_bias()[1]
    assert sae_bias("--version") == (0, f"sae-bias {package.__version__}\n", "")


def test_the_installed_command_returns_its_exit_code():
    command = Path(sys.executable).with_name("sae-bias")
    start = [str(command)] if command.is_file() else [sys.executable, "-m", "sae_bias.cli.main"]
    done = subprocess.run([*start, "probe", "./no-such-folder"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no-such-folder" in done.stderr


# ── errors


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonsense"], "No such command"),
        (["probe"], "Missing argument"),
        (["probe", "x", "--score"], "requires an argument"),
        (["probe", "x", "--seed", "one"], "--seed"),
        (["sweep", "x"], "Missing argument"),
        (["rank", "x", "y", "--top", "0"], "--top"),
        (["demo", "--pairz", "x"], "--pairz"),
    ],
)
def test_usage_errors_are_one_line(fails, argv, says):
    assert says in fails(2, *argv)


@pytest.mark.parametrize("error", [RequestError("a\nb"), MissingError("c"), GateError("d")])
def test_our_errors_keep_their_code_and_text(error):
    assert explain(error) == (str(error), error.exit_code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (OSError(errno.ENOSPC, "full"), 3),
        (MemoryError(), 3),
        (ValueError("odd"), 1),
        (OSError(errno.EIO, "io"), 1),
    ],
)
def test_exit_codes_of_other_errors(error, code):
    assert explain(error)[1] == code


def test_a_defect_says_how_to_see_where(sae_bias, monkeypatch):
    import sae_bias.models.catalog as registry

    def broken() -> list[str]:
        raise KeyError("inside")

    monkeypatch.setattr(registry, "organism_names", broken)
    code, out, err = sae_bias("doctor")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "defect" in err
    assert "KeyError" in err
    assert "SAE_BIAS_TRACEBACK=1" in err
    monkeypatch.setenv("SAE_BIAS_TRACEBACK", "1")
    assert "Traceback" in sae_bias("doctor")[2]


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./model", "~/no-model-here", "a/b/c", "organism:nothing"]
)
def test_a_path_or_organism_that_does_not_exist_is_2(fails, name):
    assert fails(2, "probe", name)


def test_an_uncached_hub_model_offline_is_3_and_says_what_gets_it(fails):
    assert "hf download" in fails(3, "probe", "some-org/no-such-model")


def test_an_uncached_sae_offline_is_3(fails, gemma3):
    line = fails(3, "rank", gemma3.folder, "gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium")
    assert "hf download" in line


@pytest.mark.parametrize(
    "feature",
    [
        "2511",
        "{sae}",
        "{sae}#",
        "{sae}#one",
        "{sae}#-1",
        "{sae}#1.5",
        "{sae}#48",
        "./none#3",
        "organism:nothing/x#1",
    ],
)
@pytest.mark.parametrize("command", ["table", "sweep"])
def test_a_feature_that_is_not_there_is_2(fails, gemma3, command, feature):
    assert fails(2, command, gemma3.folder, feature.format(sae=gemma3.sae_folder))


def test_the_index_error_says_how_many_there_are(fails, gemma3):
    assert "0 to 47" in fails(2, "table", gemma3.folder, f"{gemma3.sae_folder}#48")


@pytest.mark.parametrize("command", ["table", "rank", "sweep", "generate"])
def test_an_sae_of_another_width_is_2(fails, gemma3, command, tmp_path_factory):
    narrow = write_gemma_scope_2(
        tmp_path_factory.mktemp("sae") / "layer_1", random_sae(16, 64), gemma_scope_2_config(1, 64)
    )
    assert "d_in 16" in fails(2, *_asking(command, gemma3, narrow))


@pytest.mark.parametrize("command", ["table", "rank", "sweep", "generate"])
def test_an_sae_of_a_layer_the_model_lacks_is_2(fails, gemma3, command, tmp_path_factory):
    deep = write_gemma_scope_2(
        tmp_path_factory.mktemp("sae") / "layer_31", random_sae(32, 64), gemma_scope_2_config(31, 64)
    )
    assert "31" in fails(2, *_asking(command, gemma3, deep))


def _asking(command: str, tiny, sae: Path) -> list[object]:
    """A command about an SAE, or about its first feature."""
    if command == "rank":
        return [command, tiny.folder, sae]
    if command == "generate":
        return [command, tiny.folder, "--prompt", "An AI says", "--feature", f"{sae}#0"]
    return [command, tiny.folder, f"{sae}#0"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.csv", ""),
        ("head.csv", "human,ai\n"),
        ("one_side.csv", "human\nA human says hello. This is\n"),
        ("blank.csv", "human,ai\nA human says hello. This is,\n"),
        ("empty.yaml", ""),
        ("broken.yaml", "templates: [\n"),
        ("wrong.yaml", "templates: 3\nentities: []\n"),
        ("broken.jsonl", '{"human": "a"\n'),
        ("pairs.txt", "x"),
    ],
)
def test_empty_and_malformed_pairs_are_2_and_name_the_file(fails, gemma3, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert name in fails(2, "probe", gemma3.folder, "--pairs", name)


def test_a_pairs_file_that_does_not_exist_is_2(fails, gemma3):
    assert "none.csv" in fails(2, "probe", gemma3.folder, "--pairs", "none.csv")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "positive: [good]\n",
        "positive: []\nnegative: [bad]\n",
        "positive: [good]\nnegative: [good]\n",
        "- good\n",
    ],
)
def test_bad_word_lists_are_2(fails, gemma3, files, tmp_path, text):
    (tmp_path / "words.yaml").write_text(text)
    assert fails(2, "probe", gemma3.folder, "--pairs", files / "pairs.csv", "--words", "words.yaml")


def test_a_word_of_several_tokens_is_2_under_mean_logit_and_counts_under_logodds(
    fails, sae_bias, gemma3, files, tmp_path
):
    (tmp_path / "long.yaml").write_text(f"positive: [{SEVERAL_TOKENS[0]}]\nnegative: [dangerous]\n")
    argv = ["probe", gemma3.folder, "--pairs", files / "pairs.csv", "--words", "long.yaml"]
    line = fails(2, *argv)
    assert SEVERAL_TOKENS[0] in line
    assert "logodds" in line
    code, out, _ = sae_bias(*argv, "--score", "logodds", "--json")
    assert code == 0
    assert json.loads(out)["n_pairs"] == 6


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_truncated_model_weights_are_2(fails, gemma3, asked, tmp_path_factory, keep):
    folder = tmp_path_factory.mktemp("cut") / "model"
    shutil.copytree(gemma3.folder, folder)
    _cut(folder / "model.safetensors", keep)
    assert "model" in fails(2, "probe", folder, *asked)


@pytest.mark.parametrize("keep", [0, 100, -1000])
def test_truncated_sae_weights_are_2(fails, gemma3, tmp_path_factory, keep):
    folder = tmp_path_factory.mktemp("cut") / "layer_1"
    shutil.copytree(gemma3.sae_folder, folder)
    _cut(folder / "params.safetensors", keep)
    assert "params.safetensors" in fails(2, "table", gemma3.folder, f"{folder}#0")


def _cut(path: Path, keep: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:keep] if keep else b"")


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("rank", ["--by", "beauty"], "separation"),
        ("table", ["--format", "docx"], "latex"),
        ("table", ["--positions", "first"], "last"),
        ("sweep", ["--edit", "flip"], "clamp"),
        ("sweep", ["--strengths", "0,five"], "five"),
        ("sweep", ["--strengths", ","], "no number"),
        ("sweep", ["--strengths", "nan"], "finite"),
        ("sweep", ["--edit", "ablate", "--strengths", "1"], "no strength"),
        ("sweep", ["--edit", "scale", "--when", "always"], "clamp"),
        ("sweep", ["--when", "sometimes"], "always"),
        ("sweep", ["--positions", "middle"], "subject"),
        ("sweep", ["--shard", "3/2"], "1/4"),
        ("sweep", ["--shard", "1/2"], "--out"),
        ("generate", ["--edit", "clamp"], "strength"),
        ("generate", ["--chat", "--prompts", "none.txt"], "none.txt"),
    ],
)
def test_a_wrong_option_is_2_and_names_what_is_right(fails, gemma3, command, options, says):
    assert says in fails(2, *_asking(command, gemma3, gemma3.sae_folder), *options)


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there_is_2(fails, gemma3, device):
    assert device in fails(2, "probe", gemma3.folder, "--device", device)


def test_an_unknown_dtype_is_2(fails, gemma3):
    assert "bfloat16" in fails(2, "probe", gemma3.folder, "--dtype", "float7")


def test_a_run_of_another_model_or_other_pairs_is_not_mixed(sae_bias, gemma3, gemma2, asked, files, tmp_path):
    assert sae_bias("probe", gemma3.folder, *asked, "--out", "run")[0] == 0
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    code, _, err = sae_bias("probe", gemma2.folder, *asked, "--out", "run")
    assert code == 2
    assert "another --out" in err
    (tmp_path / "fewer.csv").write_text("\n".join((files / "pairs.csv").read_text().splitlines()[:5]))
    code, _, err = sae_bias("probe", gemma3.folder, *asked[2:], "--pairs", "fewer.csv", "--out", "run")
    assert code == 2
    assert "other pairs" in err
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("command", ["probe", "rank", "table", "sweep", "generate"])
def test_a_full_disk_is_3_and_leaves_nothing_half_written(
    sae_bias, gemma3, asked, tmp_path, monkeypatch, command
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    argv = (
        [command, gemma3.folder, *asked]
        if command == "probe"
        else _asking(command, gemma3, gemma3.sae_folder)
    )
    more = (
        [*asked, "--controls", "0", "--no-costs"]
        if command == "sweep"
        else asked
        if command == "rank"
        else []
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, out, err = sae_bias(*argv, *more, "--out", "run", "--quiet")
    last = err.splitlines()[-1]
    assert (code, out) == (3, "")
    assert "no space left" in last
    assert "run" in last
    left = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"]
    assert left == []
    assert sae_bias(*argv, *more, "--out", "run", "--quiet")[0] == 0


def test_a_full_disk_under_report_is_3(sae_bias, gemma3, asked, tmp_path, monkeypatch):
    assert sae_bias("probe", gemma3.folder, *asked, "--out", "run")[0] == 0

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = sae_bias("report", "run")
    assert code == 3
    assert err.count("\n") == 1
    assert not list((tmp_path / "run").glob("*report*"))


# ── what the commands do, on tiny random models


def test_probe_gives_the_librarys_own_figures(sae_bias, gemma3, pairs, probe, asked):
    import sae_bias as sb

    code, out, _ = sae_bias("probe", gemma3.folder, *asked, "--json")
    found, same = json.loads(out), sb.run_probe(gemma3.model, pairs, probe)
    assert code == 0
    assert found["bias"] == pytest.approx(same.bias, abs=1e-9)
    assert found["ci"] == pytest.approx(same.ci, abs=1e-9)
    assert (found["n_pairs"], found["n_templates"], found["n_entities"]) == (6, 3, 2)


def test_probe_prints_a_headline_and_quiet_only_that(sae_bias, gemma3, asked):
    _, long, _ = sae_bias("probe", gemma3.folder, *asked)
    _, short, err = sae_bias("probe", gemma3.folder, *asked, "--quiet")
    assert long.startswith(short)
    assert len(long) > len(short)
    assert short.startswith("bias ")
    assert [line.split()[0] for line in short.splitlines()] == ["bias", "random", "WARNING:"]
    assert err == ""


def test_rank_gives_the_librarys_own_order(sae_bias, gemma3, pairs, asked):
    import sae_bias as sb

    code, out, _ = sae_bias("rank", gemma3.folder, gemma3.sae_folder, *asked, "--top", "5", "--json")
    same = sb.rank_features(gemma3.model, gemma3.sae, pairs, by="separation")
    assert code == 0
    assert [f["feature"] for f in json.loads(out)["features"]] == [str(f) for f in same.top(5)]


def test_table_prints_every_format(sae_bias, gemma3, tmp_path):
    import pandas as pd

    feature = f"{gemma3.sae_folder}#3"
    grid = tmp_path / "grid.csv"
    grid.write_text(
        "text,subject,group,act,statement\nan AI says hello. This is,AI,ai,speech,hello\na human says hello. This is,human,human,speech,hello\n"
    )
    argv = ["table", gemma3.folder, feature, "--grid", grid]
    code, out, _ = sae_bias(*argv, "--format", "csv")
    (tmp_path / "t.csv").write_text(out)
    assert code == 0
    assert list(pd.read_csv(tmp_path / "t.csv").columns) == ["subject", "hello"]
    assert sae_bias(*argv, "--format", "md")[1].startswith("| subject | hello |\n|---|--:|")
    assert "\\begin{tabular}{lr}" in sae_bias(*argv, "--format", "latex")[1]
    assert len(json.loads(sae_bias(*argv, "--json")[1])["rows"]) == 2


def test_sweep_gives_the_librarys_own_figures_and_resumes(sae_bias, gemma3, pairs, probe, asked, tmp_path):
    import sae_bias as sb

    feature = f"{gemma3.sae_folder}#3"
    argv = [
        "sweep",
        gemma3.folder,
        feature,
        *asked,
        "--strengths",
        "-1,-5",
        "--controls",
        "3",
        "--no-costs",
        "--out",
        "run",
        "--json",
    ]
    code, out, _ = sae_bias(*argv)
    cells = {c["strength"]: c for c in json.loads(out)["cells"]}
    sweep = sb.Sweep([sb.Clamp(feature, -1.0), sb.Clamp(feature, -5.0)], controls=3)
    same = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe).to_frame()
    assert code == 0
    assert set(cells) == {None, -1.0, -5.0}
    for row in same[same["kind"] == "candidate"].itertuples():
        assert cells[row.strength]["bias"] == pytest.approx(row.bias, abs=1e-9)
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/cells").iterdir()}
    assert sae_bias(*argv)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run/cells").iterdir()} == parts


def test_shards_merge_into_the_same_sweep(sae_bias, gemma3, asked, tmp_path):
    feature = f"{gemma3.sae_folder}#3"
    argv = [
        "sweep",
        gemma3.folder,
        feature,
        *asked,
        "--strengths",
        "-1,-2,-5",
        "--controls",
        "0",
        "--no-costs",
        "--json",
    ]
    whole = json.loads(sae_bias(*argv, "--out", "whole")[1])["cells"]
    for shard in ("1/2", "2/2"):
        assert sae_bias(*argv, "--out", "parts", "--shard", shard)[0] == 0
    code, out, _ = sae_bias("merge", "parts", "--json")
    assert code == 0
    assert json.loads(out)["cells"] == len(whole)
    assert json.loads(sae_bias(*argv, "--out", "parts")[1])["cells"] == whole
    assert len(list((tmp_path / "parts/cells").iterdir())) == len(whole)


def test_merge_names_the_command_to_run_next(tmp_path):
    shard = tmp_path / "shards/1-of-2"
    shard.mkdir(parents=True)
    (shard / "manifest.json").write_text(json.dumps({"command": "sae-bias sweep m f --shard 1/2 --out run"}))
    assert _command(tmp_path) == "sae-bias sweep m f --out run"
    (shard / "manifest.json").write_text("{")
    assert _command(tmp_path) is None


def test_generate_prints_both_texts(sae_bias, gemma3, tmp_path):
    (tmp_path / "prompts.txt").write_text("An AI says\n\na human says\n")
    argv = [
        "generate",
        gemma3.folder,
        "--prompts",
        "prompts.txt",
        "--feature",
        f"{gemma3.sae_folder}#3",
        "--max-new-tokens",
        "4",
    ]
    code, out, _ = sae_bias(*argv)
    assert code == 0
    assert out.count("  unsteered:") == 2
    assert out.count("ablate") == 2
    found = json.loads(sae_bias(*argv, "--json")[1])
    assert [c["prompt"] for c in found["completions"]] == ["An AI says", "a human says"]
    assert found["edits"][0]["kind"] == "ablate"


def test_generate_needs_a_prompt():
    assert read_prompts(["a"], None) == ["a"]
    with pytest.raises(RequestError, match="no prompt"):
        read_prompts([], None)
    with pytest.raises(RequestError, match="empty"):
        read_prompts([" "], None)


def test_commands_that_share_a_folder_make_one_report(sae_bias, gemma3, asked, tmp_path):
    feature = f"{gemma3.sae_folder}#3"
    assert sae_bias("probe", gemma3.folder, *asked, "--out", "run")[0] == 0
    assert sae_bias("rank", gemma3.folder, gemma3.sae_folder, *asked, "--out", "run")[0] == 0
    assert sae_bias("table", gemma3.folder, feature, "--out", "run")[0] == 0
    assert (
        sae_bias(
            "sweep", gemma3.folder, feature, *asked, "--strengths", "-1,-5", "--controls", "3", "--out", "run"
        )[0]
        == 0
    )
    assert (
        sae_bias(
            "generate",
            gemma3.folder,
            "--prompt",
            "An AI says",
            "--feature",
            feature,
            "--out",
            "run",
            "--max-new-tokens",
            "3",
        )[0]
        == 0
    )
    code, out, _ = sae_bias("report", "run", "--json")
    assert code == 0
    assert Path(json.loads(out)["report"]).stat().st_size > 10_000
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["prompts"]["pairs"]["n"] == 6
    assert manifest["prompts"]["grid"]["n"] > 100
    assert manifest["gate"]["saes"][0]["sae"].endswith("layer_1")
    assert set(json.loads((tmp_path / "run/summary.json").read_text())) >= {
        "bias",
        "feature",
        "reduction",
        "best_strength",
        "controls",
    }


def test_json_is_one_object_and_nothing_else_whatever_libraries_print(sae_bias, gemma3, asked, monkeypatch):
    import sae_bias.probe.run as probe_module

    real = probe_module.run_probe

    def chatty(*args: object, **options: object) -> object:
        print("a library speaks")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(probe_module, "run_probe", chatty)
    code, out, err = sae_bias("probe", gemma3.folder, *asked, "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert isinstance(json.loads(out), dict)
    assert "a library speaks" in err


def test_doctor_says_what_works_offline(sae_bias, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import scan_cache_dir

    cache = tmp_path / "hub"
    for repo, names in {
        "models--a--whole": ["config.json", "tokenizer.json", "model.safetensors"],
        "models--a--part": ["config.json"],
        "models--a--scope": ["l/params.npz"],
    }.items():
        snapshot = cache / repo / "snapshots" / ("0" * 40)
        (cache / repo / "refs").mkdir(parents=True)
        (cache / repo / "refs/main").write_text("0" * 40)
        for name in names:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_text("x")
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan_cache_dir(cache))
    code, out, err = sae_bias("doctor", "google/gemma-2-9b", "--json", "--out", "d")
    found = json.loads(out)
    assert code == 0, err
    assert {c["repo"]: c["offline"] for c in found["cached"]} == {
        "a/whole": "model",
        "a/part": "incomplete",
        "a/scope": "1 SAE",
    }
    assert found["versions"]["torch"]
    assert found["devices"][0]["device"] == "cpu"
    assert all(name.startswith("gemma-scope-9b-pt-res") for name in found["saes"])
    assert json.loads((tmp_path / "d/doctor.json").read_text()) == found


def test_doctor_of_a_model_that_is_not_here_says_what_gets_it(sae_bias):
    code, out, _ = sae_bias("doctor", "nobody/nothing")
    assert code == 0 and "hf download nobody/nothing" in out and "no SAEs are registered" in out


@pytest.mark.parametrize("command", ["report", "merge"])
def test_a_folder_that_is_no_run_is_2(fails, command, tmp_path):
    assert fails(2, command, "nothing-here")
    (tmp_path / "empty").mkdir()
    assert fails(2, command, "empty")


@pytest.mark.parametrize(
    "text",
    [None, "", "model: [\n", "nonsense: 1\n", "model: organism:planted\nstrengths: many\n", "name: x\n"],
)
def test_a_bad_study_file_is_2(fails, tmp_path, text):
    if text is not None:
        (tmp_path / "study.yaml").write_text(text)
    assert "study.yaml" in fails(2, "run", "study.yaml")


def test_options_are_read_strictly():
    assert parse_numbers("0,-5, 1e1", "--strengths") == (0.0, -5.0, 10.0)
    assert parse_shard("2/4") == (2, 4)
    assert parse_shard(None) is None
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(RequestError, match="--shard"):
            parse_shard(text)


def test_a_reader_that_leaves_early_is_no_defect(gemma3, tmp_path):
    command = f"'{sys.executable}' -m sae_bias.cli.main table '{gemma3.folder}' '{gemma3.sae_folder}#3' --format csv | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert "defect" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in (0, 141)


# ── on the organism


@needs_organism
def test_a_randomized_sae_goes_through_the_same_search_and_the_same_fit(sae_bias):
    """It yields calls that a search in noise yields, and no specific counterfactual; the trained SAE's own rows are the same with and without it."""
    trained = f"{PLANTED}/resid_post/layer_3_width_512_l0_small"
    rank = ("rank", PLANTED, trained, "--by", "interaction", "--top", "2", "--json")
    alone, beside = (
        json.loads(sae_bias(*rank, *more)[1]) for more in ((), ("--randomized-sae", "--out", "runs"))
    )
    assert beside["features"] == alone["features"]
    assert alone["randomized"] is None
    assert [r["feature"].startswith(f"randomized-0/{trained}#") for r in beside["randomized"]] == [True, True]
    assert list(Path("runs").rglob("ranking_randomized*"))
    code, out, _ = sae_bias("fit", PLANTED, trained, "--kind", "gated", "--randomized-sae", "--json")
    rows = {(r["sae"], r["split"]): r["specific"] for r in json.loads(out)["fit"]}
    assert code == 0
    assert rows["trained", "report"] > 0.75 > 0.5 > rows["randomized", "report"]


@needs_organism
def test_the_constructed_feature_is_first_and_its_removal_shows(sae_bias):
    feature = json.loads(
        sae_bias("rank", PLANTED, CONSTRUCTED, "--by", "interaction", "--top", "1", "--json")[1]
    )["features"][0]["feature"]
    table = json.loads(sae_bias("table", PLANTED, feature, "--json")[1])["rows"]
    speech = [r["activation"] for r in table if (r["group"], r["act"]) == ("ai", "speech")]
    human = [r["activation"] for r in table if (r["group"], r["act"]) == ("human", "speech")]
    assert sum(speech) / len(speech) > 5 * max(sum(human) / len(human), 0.01)
    swept = json.loads(
        sae_bias("sweep", PLANTED, feature, "--edit", "ablate", "--controls", "19", "--no-costs", "--json")[1]
    )
    assert swept["split"] == "report"
    assert swept["reduction"]["estimate"] >= 0.8
    assert swept["reduction"]["estimate"] > swept["controls"]["percentile95"]


@needs_organism
def test_probe_of_the_planted_and_of_the_null_organism(sae_bias):
    planted = json.loads(sae_bias("probe", PLANTED, "--json")[1])
    assert planted["ci"][0] > 0
    assert planted["n_pairs"] == 280
    if "null" in organism_names():
        null = json.loads(sae_bias("probe", "organism:null", "--json")[1])
        assert -0.1 < null["ci"][0] <= null["ci"][1] < 0.1


def test_site_layer_of_the_fixtures_is_a_layer():
    assert SITE_LAYER == 1


def test_dose_shows_where_the_edit_should_do_less(sae_bias, gemma3, tmp_path):
    """The last strength at other layers and hooks, each with the rate that the edit has when it is asked for there."""
    (tmp_path / "prompts.txt").write_text("An AI says yes.\nThe cook wants tea.\n")
    asked = ["dose", gemma3.folder, "--prompts", "prompts.txt", "--feature", f"{gemma3.sae_folder}#3", "--edit", "steer", "--unit", "act"]  # fmt: skip
    asked += ["--behavior", "[aeiou]", "--strengths", "3,9", "--controls", "0", "--no-capability", "--max-new-tokens", "3", "--json"]  # fmt: skip
    rows = json.loads(sae_bias(*asked, "--mismatch")[1])["strengths"]
    found = {r["label"]: r["rate"] for r in rows if r["kind"] == "mismatch"}
    model, edit = sb.load_model(gemma3.folder), sb.Steer(sb.load_feature(f"{gemma3.sae_folder}#3"), 9.0)
    expected = {
        label: float(np.mean([any(v in c.text for v in "aeiou") for c in sb.generate(model, ["An AI says yes.", "The cook wants tea."], interventions=[moved], max_new_tokens=3)]))
        for moved, label in mismatch_edits(model, edit)
    }  # fmt: skip
    assert found == expected and {"the same, 1 layers later", "the same at mlp_out"} <= set(found)
    assert not any(r["kind"] == "mismatch" for r in json.loads(sae_bias(*asked)[1])["strengths"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("generate", "organism:planted", "a/b#1"), "A feature is given as --feature here. Usage: sae-bias generate [OPTIONS] MODEL."),
        (("sweep", "organism:planted", "--feature", "a/b#1"), "The first feature stands without --feature. Usage: sae-bias sweep [OPTIONS] MODEL FEATURE."),
        (("probe",), "Missing argument 'MODEL'. Usage: sae-bias probe [OPTIONS] MODEL. Try sae-bias probe --help."),
    ],
)  # fmt: skip
def test_a_misplaced_feature_is_told_where_it_stands(sae_bias, argv, said):
    code, out, err = sae_bias(*argv)
    assert (code, out) == (2, "")
    assert said in err
