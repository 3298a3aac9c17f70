"""Untrusted files and texts: pickles, bombs, lying headers, paths that leave their folder, markup in prompts.

What single readers refuse is tested beside them (SAE files in test_gemma_scope, prompt files in test_prompts, the report's page in
test_report); here is what goes through several of them, and the whole way of an untrusted text into a browser.
"""

from __future__ import annotations

import html
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import browser
import numpy as np
import pytest
import sae_files
from tallies import tally

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.measures.judge_replies import ReplyStore
from sae_bias.models import catalog, hub
from sae_bias.probe.result import ProbeResult
from sae_bias.prompts.load import load_lexicon
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.prompts.texts import text_stream
from sae_bias.report.page import write_report
from sae_bias.runs.folder import RunFolder
from sae_bias.workflows.study import load_study
from sae_bias.workflows.sweep import collect
from sae_bias.workflows.verify import verify_run


@pytest.fixture(autouse=True)
def counted():
    """Every case here is one untrusted input."""
    tally("untrusted inputs refused or shown harmless")


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


# ── pickles, wherever weights, results or tables are read


def _model(tmp_path, bomb, gemma3, name):
    folder = shutil.copytree(gemma3.folder, tmp_path / "model")
    for old in folder.glob("*.safetensors"):
        old.unlink()
    (folder / name).write_bytes(bomb)
    return lambda: sb.load_model(folder)


def _sae(tmp_path, bomb, name, layout="two"):
    write = {
        "two": sae_files.write_gemma_scope_2,
        "lens": sae_files.write_saelens,
        "one": sae_files.write_gemma_scope_1,
    }[layout]
    folder = write(tmp_path / "layer_3", sae_files.random_sae(4, 8))
    for old in (*folder.glob("*.safetensors"), *folder.glob("*.npz")):
        old.unlink()
    (folder / name).write_bytes(bomb)
    return lambda: sb.load_sae(folder).feature(0)


def _run(tmp_path, bomb, name, read):
    folder = RunFolder(tmp_path / "run")
    folder.write_json("manifest", {"model": {"name": "x", "digest": "y"}})
    folder.write_json("sweep", {"cells": [{"cell": "a"}], "splits": {}, "costs": False})
    path = folder.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bomb)
    return lambda: read(folder.path)


PICKLES = {
    "model .bin": lambda t, b, g: _model(t, b, g, "pytorch_model.bin"),
    "model .safetensors": lambda t, b, g: _model(t, b, g, "model.safetensors"),
    "SAE .pt": lambda t, b, g: _sae(t, b, "ae.pt"),
    "SAE .bin": lambda t, b, g: _sae(t, b, "sae.bin"),
    "SAE params.safetensors": lambda t, b, g: _sae(t, b, "params.safetensors"),
    "SAE params.npz": lambda t, b, g: _sae(t, b, "params.npz", "one"),
    "SAELens weights": lambda t, b, g: _sae(t, b, "sae_weights.safetensors", "lens"),
    "cell": lambda t, b, g: _run(t, b, "cells/a.parquet", collect),
    "table": lambda t, b, g: _run(t, b, "tables/pairs.parquet", lambda p: RunFolder(p).read_table("pairs")),
    "table in a report": lambda t, b, g: _run(t, b, "tables/pairs.parquet", write_report),
    "manifest": lambda t, b, g: _run(t, b, "manifest.json", verify_run),
    "probe result": lambda t, b, g: _run(t, b, "r.npz", lambda p: ProbeResult.load(p / "r.npz")),
    "judge replies": lambda t, b, g: _run(
        t, b + b"\n", "replies.jsonl", lambda p: ReplyStore(p / "replies.jsonl")
    ),
    "texts": lambda t, b, g: _run(t, b, "t.jsonl", lambda p: list(text_stream(p / "t.jsonl")[1])),
}


@pytest.mark.parametrize("where", PICKLES)
def test_a_pickle_is_never_loaded(where, tmp_path, gemma3):
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    with pytest.raises(sb.SaeBiasError):
        PICKLES[where](tmp_path, bomb, gemma3)()
    assert not (tmp_path / "boom").exists()


def test_an_array_of_objects_in_a_probe_result_is_never_loaded(tmp_path):
    objects = np.array([Bomb(tmp_path / "boom")], dtype=object)
    np.savez(tmp_path / "r.npz", facts=objects)
    with pytest.raises(sb.RequestError, match="pickle"):
        ProbeResult.load(tmp_path / "r.npz")
    assert not (tmp_path / "boom").exists()


def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(tmp_path, monkeypatch):
    """Packed zeros, four times the limit (made small here); nothing is unpacked."""
    monkeypatch.setattr("sae_bias.probe.result._MOST_BYTES", 1 << 20)
    with (
        zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("facts.npy", "w", force_zip64=True) as member,
    ):
        member.write(bytes(1 << 22))
    assert (tmp_path / "r.npz").stat().st_size < 1 << 14
    with pytest.raises(sb.RequestError, match="unpacks to"):
        ProbeResult.load(tmp_path / "r.npz")


# ── lying headers of a model's weights


def lying(header: object, data: int = 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


ENTRY = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
HEADERS = {
    "longer than the file": lying(b"{}", length=1 << 40),
    "beyond the end": lying({"model.norm.weight": {**ENTRY, "shape": [32], "data_offsets": [0, 128]}}),
    "negative": lying({"model.norm.weight": {**ENTRY, "data_offsets": [-64, 0]}}),
    "another size than its shape": lying({"model.norm.weight": {**ENTRY, "shape": [17]}}),
    "a shape of 2^120": lying({"model.norm.weight": {**ENTRY, "shape": [1 << 60, 1 << 60]}}),
    "overlapping": lying({"model.norm.weight": ENTRY, "lm_head.weight": ENTRY}),
    "an unknown dtype": lying({"model.norm.weight": {**ENTRY, "dtype": "F33"}}),
    "no JSON": lying(b"not json"),
    "a list": lying(b"[]"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_models_lying_header_is_one_plain_line(kind, tmp_path, gemma3):
    folder = shutil.copytree(gemma3.folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(sb.RequestError) as error:
        sb.load_model(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", [2**31, 2**70, -1, 0, "many", 0.5, None, [], True])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_config_of_impossible_sizes_is_refused_before_anything_is_built(name, value, tmp_path, gemma3):
    folder = shutil.copytree(gemma3.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(sb.RequestError) as error:
        sb.load_model(folder)
    assert len(str(error.value).splitlines()) == 1


# ── YAML, in every file that is YAML

BOMBS = {
    "tag": "a: !!python/object/apply:os.system ['touch boom']\n",
    "new": "a: !!python/object/new:os.system ['touch boom']\n",
    "billion laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefghi", "bcdefghij")
    ),
    "merge": "a: &a {x: 1}\nb: {<<: *a}\n",
    "recursion": "a: &a [*a]\n",
    "depth": "[" * 4000,
    "twice": "name: a\nname: b\n",
    "binary": "a: !!binary |\n  AAAA\n",
    "own tag": "a: !ENV ${HOME}\n",
}  # fmt: skip
YAML_READERS = {
    "pairs": sb.load_pairs,
    "grid": sb.load_grid,
    "words": lambda p: load_lexicon(p),
    "scenarios": load_scenarios,
    "study": load_study,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("reader", YAML_READERS)
def test_a_yaml_bomb_is_one_plain_line(reader, bomb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f.yaml"
    path.write_text(BOMBS[bomb])
    with pytest.raises(sb.RequestError) as error:
        YAML_READERS[reader](path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "boom").exists()


# ── paths that leave their folder

AWAY = ("../x", "a/../../x", "/etc/passwd", "..", "a\0b", "a\\..\\b", "./../x", "a//b", "")


@pytest.mark.parametrize("name", AWAY)
def test_no_name_leaves_its_folder(name, tmp_path, monkeypatch):
    """Names in repositories, organisms, cells: refused, or nothing is found; no file beside the folder is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(sb.RequestError):
        hub.refuse_traversal(name)
    for text in (
        f"google/gemma-scope-2-1b-it/{name}",
        f"organism:planted/{name}",
        f"gemma-scope-2-12b-it-res/{name}",
    ):
        with pytest.raises(sb.SaeBiasError):
            sb.load_sae(text)
    with pytest.raises(sb.SaeBiasError):
        catalog.organism_folder(name)
    folder = RunFolder(tmp_path / "run")
    folder.write_json("sweep", {"cells": [{"cell": name}], "splits": {"all": []}, "costs": False})
    with pytest.raises(sb.RequestError):
        collect(folder.path)


@pytest.mark.parametrize("shard", ["../../model.safetensors", "/tmp/x.safetensors", "a.bin", 7, None])
def test_an_index_of_shards_cannot_leave_its_repository(shard, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    repo = tmp_path / "models--tiny--evil"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name in ("config.json", "tokenizer.json"):
        (repo / "snapshots" / commit / name).write_text("{}")
    index = repo / "snapshots" / commit / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(sb.RequestError):
        hub.fetch_model("tiny/evil")


def test_a_studys_name_is_no_path(tmp_path):
    from sae_bias.cli.study import _folder
    from sae_bias.workflows.study_file import Study

    for name in ("../../x", "/etc", "..", "a/b", ".", "\0", "x" * 9):
        folder = _folder(Study(name=name, model="organism:planted"))
        assert folder.parent == Path("runs")
        assert folder.name not in ("", ".", "..")
        assert "\0" not in str(folder)


# ── size


@pytest.mark.slow
def test_a_csv_of_gigabytes_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "p.csv"
    with path.open("wb") as file:
        file.write(b"human,ai\n")
        file.truncate(3 << 30)  # holes: nothing on the disk
    with pytest.raises(sb.RequestError, match="larger than 200 MB"):
        sb.load_pairs(path)


@pytest.mark.parametrize(
    "content",
    [
        "human,ai\n" + "x" * 300_000 + ",B\n",
        "human,ai\n" + ",".join(["A"] * 100_000) + "\n",
        ",".join(f"c{i}" for i in range(20_000)) + "\nA\n",
        'human,ai\n"' + "A\n" * 50_000,
    ],
    ids=["a long cell", "many cells", "many columns", "an open quote"],
)
def test_an_odd_csv_is_one_plain_line(content, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(sb.RequestError) as error:
        sb.load_pairs(path)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


# ── markup in prompts and generations, the whole way into a browser

MARKUP = (
    "an AI</script><script>window.hacked=1</script>",
    "an AI<img src=x onerror=window.hacked=2>",
    'an AI" onmouseover="window.hacked=3',
    "an AI<svg onload=window.hacked=4>",
    "an AI{{7*7}}${7*7}<%= 7*7 %>",
    "an AI<iframe srcdoc='<script>parent.hacked=5</script>'>",
    "an AI<a href='javascript:window.hacked=6'>x</a>",
    "an AI<!--",
)


@pytest.fixture(scope="module")
def untrusted_run(tmp_path_factory, make_tiny):
    """`probe`, `generate`, `sweep` and `card` on prompts full of markup, into one run folder with its report."""
    from architectures import NEGATIVE, POSITIVE

    tiny, root = make_tiny("gemma3"), tmp_path_factory.mktemp("markup")
    rows = [
        {"human": f"a human says {verb}. This is", "ai": f"{subject} says {verb}. This is", "template": f"says {verb}<b>", "entity": subject}
        for verb in ("yes", "hello")
        for subject in MARKUP
    ]  # fmt: skip
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "words.yaml").write_text(
        f"positive: [{', '.join(POSITIVE)}]\nnegative: [{', '.join(NEGATIVE)}]\n"
    )
    asked = ["--pairs", str(root / "pairs.jsonl"), "--words", str(root / "words.yaml")]
    out, model, feature = ["--out", str(root / "run")], str(tiny.folder), f"{tiny.sae_folder}#3"
    assert main(["probe", model, *asked, *out]) == 0
    assert (
        main(["sweep", model, feature, *asked, "--strengths", "-1", "--controls", "1", "--no-costs", *out])
        == 0
    )
    prompts = [part for text in MARKUP for part in ("--prompt", text)]
    assert main(["generate", model, *prompts, "--feature", feature, "--max-new-tokens", "2", *out]) == 0
    return write_report(root / "run")


def test_markup_in_prompts_is_text_in_the_report(untrusted_run):
    page = untrusted_run.read_text(encoding="utf-8")
    for text in MARKUP[:2]:
        assert text not in page
    assert html.escape("<img src=x onerror=window.hacked=2>") in page


@pytest.mark.browser
@pytest.mark.slow
def test_markup_in_prompts_and_generations_does_nothing_in_a_browser(untrusted_run):
    browser.require()
    with browser.chromium() as driver:
        browser.open_page(driver, untrusted_run)
        assert driver.execute_script("return window.hacked") is None
        assert browser.console_errors(driver) == []
        assert set(browser.requests(driver)) == {untrusted_run.resolve().as_uri()}
        shown = driver.execute_script("return document.body.textContent")
        assert "<img src=x onerror=window.hacked=2>" in shown
        elements = "return document.querySelectorAll('main iframe, main img, main a[href^=javascript], [onmouseover], [onload]').length"
        assert driver.execute_script(elements) == 0
        for element in driver.find_elements("css selector", "main summary, main button")[:20]:
            if element.is_displayed():
                driver.execute_script("arguments[0].click()", element)
        assert driver.execute_script("return window.hacked") is None
