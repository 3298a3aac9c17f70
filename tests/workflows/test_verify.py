"""`verify`: a run agrees with itself measured again, and every change of a number, a file or a prompt is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.runs.copies import grid_copy, grid_from_copy, pairs_copy, pairs_from_copy
from sae_bias.runs.folder import RunFolder
from sae_bias.steering.directions import Direction
from sae_bias.workflows.cells import Cell
from sae_bias.workflows.verify import TOLERANCE, verify_run


@pytest.fixture(scope="module")
def copies(tmp_path_factory, make_tiny):
    """A model, an SAE and a run of them that these tests may damage."""
    root = tmp_path_factory.mktemp("verify")
    tiny = make_tiny("gemma3")
    shutil.copytree(tiny.folder, root / "model")
    shutil.copytree(tiny.sae_folder, root / "sae" / "layer_1")
    return root


@pytest.fixture(scope="module")
def done(copies, pairs, probe):
    """A sweep of every kind of edit whose weights are a feature's, a direction's or an SAE's, with controls."""
    model, feature = sb.load_model(copies / "model"), f"{copies / 'sae' / 'layer_1'}#3"
    direction = Direction(
        "a direction", sb.Site(1), torch.nn.functional.normalize(torch.randn(1, model.d_model))
    )
    cells = [
        sb.Ablate(feature),
        sb.Clamp(feature, -1.0),
        (sb.Scale(feature, 0.5), sb.Steer(f"{copies / 'sae' / 'layer_1'}#7", 0.3)),
        sb.Resample(feature),
        Cell((sb.ProjectOut(direction),), "direction", "projected out"),
        sb.Reconstruct(f"{copies / 'sae' / 'layer_1'}"),
    ]
    sb.run_sweep(model, pairs, sb.Sweep(cells, controls=3), probe=probe, out=copies / "run")
    return copies


@pytest.fixture
def run(done, tmp_path, monkeypatch):
    """A copy of the run; the model and the SAE are put back afterwards."""
    shutil.copytree(done / "run", tmp_path / "run")
    shutil.copytree(done, tmp_path / "before")
    yield tmp_path / "run"
    for part in ("model", "sae"):
        shutil.rmtree(done / part)
        shutil.copytree(tmp_path / "before" / part, done / part)


def differing(path, **options):
    return {c.what: c.detail for c in verify_run(path, **options).differing}


def test_a_run_agrees_with_itself_measured_again(run):
    """Every cell, controls and directions too, without the pairs or words of the caller."""
    found = verify_run(run, cells=None)
    assert found.agrees, found.differing
    assert found.n_cells == found.of_cells >= 10
    assert {c.status for c in found.checks} <= {"agrees"}
    cells = [c for c in found.checks if c.what.startswith("cell ")]
    assert len(cells) == found.n_cells
    assert all(c.difference <= c.tolerance == TOLERANCE["float32"] for c in cells)


def test_a_sample_holds_the_base_and_the_first_candidate(run):
    found = verify_run(run, cells=3)
    assert found.n_cells == 3
    names = [c.what for c in found.checks if c.what.startswith("cell ")]
    assert names[0] == "cell none"
    assert names[1].startswith("cell ablate")


def test_a_changed_number_in_a_cell_is_named(run):
    """Found where the cell is measured again, and by the table where it is not in the sample."""
    folder = RunFolder(run)
    listed = folder.read_json("sweep")["cells"]
    cell = next(c for c in listed if c["rule"].startswith("clamp"))
    frame = folder.read_cell(cell["cell"])
    frame.loc[2, "score_ai"] += 0.01
    frame.loc[2, "bias"] -= 0.01
    folder.write_cell(cell["cell"], frame, frame.attrs)
    found = differing(run, cells=None)
    named = next(v for k, v in found.items() if k.startswith("cell clamp"))
    assert "score_ai" in named or "bias" in named
    assert f"{frame['template'][2]} / {frame['entity'][2]}" in named
    table = differing(run, cells=1)
    assert list(table) == ["sweep: table made again from its cells"]
    assert "clamp" in table["sweep: table made again from its cells"]
    frame.loc[3, "score_human"] += 0.01
    folder.write_cell(cell["cell"], frame, frame.attrs)
    within = differing(run, cells=1)["sweep: bias of every pair = score_human - score_ai"]
    assert cell["cell"] in within
    assert f"{frame['template'][3]} / {frame['entity'][3]}" in within


def test_a_changed_number_in_the_table_is_named(run):
    folder = RunFolder(run)
    table = folder.read_table("sweep")
    table.loc[1, "removed_nats"] += 1e-6
    folder.write_table("sweep", table)
    assert "removed_nats" in differing(run, cells=1)["sweep: table made again from its cells"]


def test_a_changed_cost_is_named(run, done, pairs, probe):
    """Costs and the scores on the valence banks are measured again too."""
    feature = f"{done / 'sae' / 'layer_1'}#3"
    sweep = sb.Sweep([sb.Ablate(feature)], controls=1, costs=True)
    sb.run_sweep(sb.load_model(done / "model"), pairs, sweep, probe=probe, out=run / "costs")
    run = run / "costs"
    assert verify_run(run, cells=None).agrees
    folder = RunFolder(run)
    cell = folder.read_json("sweep")["cells"][1]
    frame = folder.read_cell(cell["cell"])
    attrs = {**frame.attrs, "kl_neutral": frame.attrs["kl_neutral"] + 0.01}
    folder.write_cell(cell["cell"], frame, attrs)
    found = differing(run, cells=2)
    assert any("kl_neutral" in detail for what, detail in found.items() if what.startswith("cell ablate"))


def test_a_changed_sae_is_named(run, done):
    path = done / "sae" / "layer_1" / "params.safetensors"
    weights = load_file(path)
    weights["w_dec"][3] *= 1.5
    save_file(weights, path)
    found = differing(run, cells=2)
    named = {what: detail for what, detail in found.items() if what.startswith("SAE")}
    assert "params.safetensors has another sha256" in next(iter(named.values()))
    assert any(what.startswith("cell ablate") for what in found)
    assert not any(what.startswith("model") for what in found)


def test_a_cells_name_changes_with_the_weights_behind_it(gemma3, pairs, probe, tmp_path):
    """An index means nothing without its SAE: other weights under the same name are another cell."""
    names = []
    for factor in (1.0, 1.5):
        folder = shutil.copytree(gemma3.sae_folder, tmp_path / "layer_1", dirs_exist_ok=True)
        weights = load_file(folder / "params.safetensors")
        weights["w_dec"][3] *= factor
        save_file(weights, folder / "params.safetensors")
        found = sb.run_sweep(gemma3.model, pairs, sb.Sweep([sb.Ablate(f"{folder}#3")]), probe=probe)
        names.append(found.frame["cell"].tolist())
    assert names[0][0] == names[1][0], "the base is the same"
    assert names[0][1] != names[1][1]


def test_changed_model_weights_are_named(run, done):
    path = done / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("layers.2.mlp.up_proj.weight"))
    weights[name] = weights[name] * 1.2
    save_file(weights, path, metadata={"format": "pt"})
    found = differing(run, cells=2)
    named = next(detail for what, detail in found.items() if what.startswith("model"))
    assert "model.safetensors has another sha256" in named
    assert "cell none" in found


def test_a_weight_too_small_to_move_a_figure_is_still_found(run, done):
    """The scores agree; the hashes do not."""
    path = done / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("norm.weight"))
    weights[name][0] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    found = differing(run, cells=1)
    assert "another hash" in found["cell none"]
    assert any(what.startswith("model") for what in found)


def test_changed_prompts_and_words_are_named(run):
    folder = RunFolder(run)
    manifest = folder.read_json("manifest")
    manifest["copies"]["pairs"]["pairs"][0]["ai"] = "an AI says hi. This is"
    manifest["words"]["positive"][0] = "splendid"
    folder.write_json("manifest", manifest)
    found = differing(run, cells=0)
    assert "the manifest says" in found["prompts: pairs"]
    assert "words" in found


def test_the_command_says_what_differs_and_exits_4(run, capsys):
    assert main(["verify", str(run), "--cells", "2"]) == 0
    shown = capsys.readouterr()
    assert "agrees:" in shown.out
    assert "2 of" in shown.out
    folder = RunFolder(run)
    table = folder.read_table("sweep")
    table.loc[0, "bias"] += 0.5
    folder.write_table("sweep", table)
    assert main(["verify", str(run), "--cells", "0", "--json", "--out", str(run / "found")]) == 4
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["agrees"] is False
    assert shown.err.count("\n") == 1
    assert "bias" in shown.err
    kept = json.loads((run / "found" / "verify.json").read_text())
    assert kept["checks"] == told["checks"]


def test_what_cannot_be_verified_is_refused(run, done, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 2
    shutil.move(done / "model", tmp_path / "gone")
    try:
        assert main(["verify", str(run)]) == 2
        assert "there is no model folder" in capsys.readouterr().err
        assert main(["verify", str(run), "--cells", "1", "--model", str(tmp_path / "gone")]) == 0
    finally:
        shutil.move(tmp_path / "gone", done / "model")
    folder = RunFolder(run)
    manifest = folder.read_json("manifest")
    folder.write_json("manifest", {**manifest, "model": {**manifest["model"], "name": "nobody/nothing"}})
    assert main(["verify", str(run)]) == 3


def test_a_probe_run_is_measured_again(gemma3, tmp_path, pairs, monkeypatch, capsys):
    from architectures import NEGATIVE, POSITIVE

    monkeypatch.chdir(tmp_path)
    pairs.to_frame().to_csv(tmp_path / "pairs.csv", index=False)
    (tmp_path / "words.yaml").write_text(
        f"positive: [{', '.join(POSITIVE)}]\nnegative: [{', '.join(NEGATIVE)}]\n"
    )
    asked = ["--pairs", "pairs.csv", "--words", "words.yaml", "--out", "run"]
    assert main(["probe", str(gemma3.folder), *asked]) == 0
    (tmp_path / "pairs.csv").unlink()
    (tmp_path / "words.yaml").unlink()
    assert main(["verify", "run"]) == 0
    folder = RunFolder("run")
    table = folder.read_table("pairs")
    table.loc[1, "score_human"] -= 0.002
    folder.write_table("pairs", table)
    found = differing(folder.path)
    assert "score_human" in found["probe: every pair's scores"]
    capsys.readouterr()


def test_a_study_and_a_comparison_below_it_are_measured_again(gemma3, tmp_path, pairs, probe):
    """`run` on a file, and a sweep on other pairs in a subfolder of the same run: each with its own copies."""
    from architectures import NEGATIVE, POSITIVE

    from sae_bias.workflows.study import run_study
    from sae_bias.workflows.study_file import Study

    pairs.to_frame().to_csv(tmp_path / "pairs.csv", index=False)
    words = f"positive: [{', '.join(POSITIVE)}]\nnegative: [{', '.join(NEGATIVE)}]\n"
    (tmp_path / "words.yaml").write_text(words)
    study = Study(
        model=str(gemma3.folder), pairs=str(tmp_path / "pairs.csv"), words=str(tmp_path / "words.yaml"), checks=False
    )  # fmt: skip
    run_study(study, out=tmp_path / "run", progress=False)
    fewer = pairs.select(templates=["survive", "hello"])
    sweep = sb.Sweep([sb.Ablate(gemma3.feature(3))])
    sb.run_sweep(gemma3.model, fewer, sweep, probe=probe, out=tmp_path / "run" / "compare")
    found = verify_run(tmp_path / "run")
    assert found.agrees, found.differing
    names = [c.what for c in found.checks]
    assert "probe: every pair's scores" in names
    assert "summary: bias" in names
    assert "compare: prompts: pairs" in names
    assert found.n_cells == found.of_cells == 2


def test_copies_come_back_with_their_hash():
    pairs, grid = sb.load_pairs(), sb.load_grid()
    again = pairs_from_copy(json.loads(json.dumps(pairs_copy(pairs))), "here")
    assert again.digest == pairs.digest
    assert tuple(again) == tuple(pairs)
    assert grid_from_copy(json.loads(json.dumps(grid_copy(grid))), "here").digest == grid.digest


def test_a_manifest_needs_no_pairs(gemma3):
    from sae_bias.runs.manifest import manifest

    facts = manifest(gemma3.model)
    assert facts["prompts"]["pairs"] is None
    assert facts["copies"] == {}
    assert facts["model"]["files"]["model.safetensors"]


def test_a_changed_object_in_memory_has_another_digest(gemma3):
    """A model object is known by its parameters, whatever commit its config names."""
    from sae_bias.models.fingerprint import model_digest

    first = gemma3.fresh()
    first.hf.config._commit_hash = "0" * 40
    before = model_digest(sb.load_model(first.hf, tokenizer=first.tokenizer))
    with torch.no_grad():
        first.hf.get_input_embeddings().weight[5, 5] += 0.25
    assert model_digest(sb.load_model(first.hf, tokenizer=first.tokenizer)) != before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_is_verified_and_a_second_one_has_the_same_figures(demo, tmp_path, monkeypatch, capsys):
    """Two runs of the demo: the same tables to the last bit, the same summary but for times; the first verifies."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.path, "one")
    assert main(["demo", "--out", "two", "--quiet"]) == 0
    one, two = RunFolder("one"), RunFolder("two")
    assert one.tables() == two.tables()
    for table in one.tables():
        pd.testing.assert_frame_equal(
            one.read_table(table), two.read_table(table), check_exact=True, obj=table
        )
    first, second = ({**f.read_json("summary"), "seconds": None} for f in (one, two))
    assert first == second
    assert [p.name for p in sorted((one.path / "sweep/cells").iterdir())] == [
        p.name for p in sorted((two.path / "sweep/cells").iterdir())
    ]
    capsys.readouterr()
    assert main(["verify", "one", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["of_cells"] > 100
    assert np.isfinite([c["difference"] for c in told["checks"] if c["difference"] is not None]).all()
    sweep = RunFolder("one/sweep")
    cell = sorted((sweep.path / "cells").glob("*.parquet"))[0].stem
    frame = sweep.read_cell(cell)
    row = frame.index[frame["template"] == sweep.read_json("sweep")["splits"]["report"][0]][0]
    frame.loc[row, "bias"] += 0.001
    sweep.write_cell(cell, frame, frame.attrs)
    assert main(["verify", "one", "--cells", "1"]) == 4
