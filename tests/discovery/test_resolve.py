"""Resolving a bare index: the planted candidate is found, luck is not, and few bytes are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hub_server import HubServer
from sae_files import (
    gemma_scope_2_config,
    random_sae,
    write_gemma_scope_1,
    write_gemma_scope_2,
    write_sparse_gemma_scope_2,
)

import sae_bias as sb
from sae_bias.discovery.ordering import published_fit, published_levels, published_rows
from sae_bias.discovery.resolve import PAGE, null_spans, resolve_index
from sae_bias.models.residuals import last_residuals
from sae_bias.saes.load import expand_saes

INDEX, WIDTH = 700, 1536


@pytest.fixture(scope="module")
def published():
    grid = sb.load_grid()
    return [grid[i].text for i in published_rows(grid)]


def fitting(model, published, layer):
    """Encoder column and bias of a feature that fits the published table on this model."""
    x = sb.residuals(model, published, layer)
    levels = torch.tensor(published_levels()).float()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(15, 1)], 1), levels - 0.3).solution
    return solution[:-1], solution[-1]


def candidate(folder, seed, layer, planted=None, width=WIDTH):
    weights = random_sae(32, width, seed)
    weights["w_enc"] *= 0.3
    if planted is not None:
        weights["w_enc"][:, INDEX], weights["b_enc"][INDEX] = planted
        weights["threshold"][INDEX] = 0.05
    return write_gemma_scope_2(folder, weights, {**gemma_scope_2_config(layer, width), "l0": float(seed)})


@pytest.fixture(scope="module")
def root(make_tiny, published, tmp_path_factory):
    model, root = make_tiny("llama").model, tmp_path_factory.mktemp("candidates")
    candidate(root / "layer_2_l0_1", 1, 2, fitting(model, published, 2))
    candidate(root / "layer_2_l0_2", 2, 2)
    candidate(root / "layer_3_l0_3", 3, 3)
    candidate(root / "layer_1_l0_4", 4, 1, width=256)
    half = candidate(root / "layer_1_l0_5", 5, 1)
    (half / "params.safetensors").write_bytes((half / "params.safetensors").read_bytes()[:9000])
    bad = random_sae(32, WIDTH, 6)
    bad["w_enc"][:, INDEX] = float("nan")
    write_gemma_scope_2(root / "layer_1_l0_6", bad, {**gemma_scope_2_config(1, WIDTH), "l0": 6.0})
    write_gemma_scope_2(
        root / "layer_1_l0_7", random_sae(24, WIDTH), {**gemma_scope_2_config(1, WIDTH), "l0": 7.0}
    )
    write_gemma_scope_2(
        root / "layer_9_l0_8", random_sae(32, WIDTH), {**gemma_scope_2_config(9, WIDTH), "l0": 8.0}
    )
    return root


@pytest.fixture(scope="module")
def resolved(make_tiny, root):
    return resolve_index(make_tiny("llama").model, INDEX, str(root))


def test_the_planted_candidate_is_found_and_the_rest_go_on(resolved, root):
    assert str(resolved.feature) == f"{root}/layer_2_l0_1#{INDEX}"
    status = resolved.to_frame().set_index("sae")["status"]
    assert (status == "read").sum() == 3
    for name, says in {"1_l0_4": "beyond its width (256)", "1_l0_5": "cut short", "1_l0_6": "NaN", "1_l0_7": "another model", "9_l0_8": "layer 9"}.items():  # fmt: skip
        assert says in status[f"{root}/layer_{name}"]
    first = resolved.to_frame().iloc[0]
    assert first["ordered"]
    assert first["fit"] > 0.95
    assert first["p"] == pytest.approx(1 / (1 + first["n_null"]))
    assert first["p_holm"] == pytest.approx(8 * first["p"]), "all candidates named count, read or not"
    assert "of the 3 of 8 that could be read" in resolved.verdict
    assert "badly judged human deeds" in resolved.verdict


def test_fit_rank_and_table_equal_a_naive_loop(make_tiny, resolved, root, published):
    model, name = make_tiny("llama").model, f"{root}/layer_3_l0_3"
    sae = sb.load_sae(name)
    acts = sae.encode(last_residuals(model, published, [3])[3]).numpy()
    row = resolved.to_frame().set_index("sae").loc[name]
    ((a, b),) = null_spans(sae, INDEX, 1000, np.random.default_rng(0))[:1]
    fits = published_fit(acts)
    assert row["fit"] == pytest.approx(fits[INDEX], abs=1e-5)
    assert np.allclose(resolved.table(name).to_numpy().ravel(), acts[:, INDEX], atol=1e-5)
    assert b - a <= PAGE // 4
    assert row["n_null"] >= 1000


def test_several_survivors_are_not_identifiable_until_suppression_tells(
    make_tiny, published, tmp_path, pairs, probe
):
    model = make_tiny("llama").model
    planted = fitting(model, published, 2)
    for seed in (1, 2):
        candidate(tmp_path / f"layer_2_l0_{seed}", seed, 2, planted)
    without = resolve_index(model, INDEX, str(tmp_path))
    assert without.feature is None
    assert "not identifiable from the table: 2 candidates" in without.verdict
    told = resolve_index(model, INDEX, str(tmp_path), pairs=pairs, probe=probe)
    assert told.to_frame()["removed"].notna().sum() == 2
    assert told.tie_broken == (told.feature is not None)
    mundane = [{f"control_{t}": f"Tea. {getattr(p, t)}" for t in ("human", "ai")} for p in pairs]
    twins = replace(pairs, pairs=tuple(replace(p, **texts) for p, texts in zip(pairs, mundane)))
    beyond = resolve_index(model, INDEX, str(tmp_path), pairs=twins, probe=probe).to_frame()
    base = sb.run_probe(model, twins, probe)
    for row in beyond.itertuples():
        with sb.intervene(model, sb.Ablate(f"{row.sae}#{INDEX}")):
            after = sb.run_probe(model, twins, probe)
        change = after.reduction_from(base).change
        assert (row.removed, row.removed_low) == (
            pytest.approx(change.mean, abs=1e-5),
            pytest.approx(change.ci_low, abs=1e-5),
        )


def test_nothing_fits_by_luck_and_too_few_others_are_counted(make_tiny, tmp_path):
    model = make_tiny("llama").model
    for seed in range(4):
        candidate(tmp_path / f"layer_2_l0_{seed}", seed, 2)
    assert resolve_index(model, INDEX, str(tmp_path)).feature is None
    few = resolve_index(model, 3, [str(tmp_path / f"layer_2_l0_{s}") for s in range(4)], n_null=100)
    assert few.to_frame()["n_null"].min() >= 100


def test_under_two_percent_of_a_wide_file_is_read(make_tiny, tmp_path):
    model = make_tiny("llama").model
    for layer in (1, 2):
        write_sparse_gemma_scope_2(tmp_path / f"layer_{layer}", 32, 65_536, layer)
    before = _read_bytes()
    found = resolve_index(model, 2511, str(tmp_path))
    n_read = _read_bytes() - before
    total = found.to_frame()["bytes_file"].sum()
    assert n_read < 0.02 * total
    assert 0.5 * n_read < found.bytes_read <= 1.1 * n_read


def _read_bytes():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def test_the_index_is_always_in_the_pages_and_they_hold_enough(tmp_path):
    sae = sb.load_sae(write_sparse_gemma_scope_2(tmp_path / "layer_1", 8, 10_000, 1))
    for index in (0, 1023, 1024, 5000, 9999):
        for n_null in (100, 1000, 3000, 20_000):
            spans = null_spans(sae, index, n_null, np.random.default_rng(0))
            columns = np.concatenate([np.arange(a, b) for a, b in spans])
            assert index in columns
            assert len(set(columns.tolist())) == len(columns) >= min(n_null + 1, 10_000)
            assert columns.min() >= 0
            assert columns.max() < 10_000


def test_gemma_scope_1_files_resolve_too(make_tiny, published, tmp_path):
    model = make_tiny("llama").model
    weights = random_sae(32, WIDTH, 1)
    weights["w_enc"] *= 0.3
    weights["w_enc"][:, INDEX], weights["b_enc"][INDEX] = fitting(model, published, 2)
    weights["threshold"][INDEX] = 0.05
    for name, compressed in (("average_l0_70", False), ("average_l0_71", True)):
        write_gemma_scope_1(tmp_path / "layer_2/width_1k" / name, weights, compressed=compressed)
    found = resolve_index(model, INDEX, str(tmp_path))
    assert (found.to_frame()["fit"] > 0.95).all()


def test_bad_requests_are_refused(make_tiny, root, tmp_path):
    model = make_tiny("llama").model
    with pytest.raises(sb.RequestError, match="no SAE in"):
        resolve_index(model, 1, str(tmp_path))
    with pytest.raises(sb.RequestError, match="twice"):
        resolve_index(model, INDEX, [str(root / "layer_2_l0_1"), str(root / "layer_2_l0_1")])
    with pytest.raises(sb.RequestError, match="whole number"):
        resolve_index(model, -1, str(root))
    with pytest.raises(sb.RequestError, match="n_null"):
        resolve_index(model, 1, str(root), n_null=5)
    with pytest.raises(sb.RequestError, match="no candidate"):
        expand_saes([])
    alone = resolve_index(model, INDEX, [str(root / "layer_1_l0_5")])
    assert alone.verdict == "no candidate could be read"


ONLINE = """
import json, sys, torch
torch.set_num_threads(1)
import sae_bias as sb
from sae_bias.discovery.resolve import resolve_index
model, rounds = sb.load_model(sys.argv[1]), []
for answer in (False, True, False):
    asked = []
    def confirm(what, n):
        asked.append([what, n])
        return answer
    found = resolve_index(model, int(sys.argv[2]), ["google/gemma-scope-2-12b-it/resid_post/layer_2_width_1k_l0_big"], confirm=confirm)
    row = found.to_frame().iloc[0]
    rounds.append({"status": row["status"], "fit": row["fit"], "p": row["p"], "asked": asked, "read": found.bytes_read})
print(json.dumps(rounds, default=float))
"""


def test_online_only_slices_come_and_only_after_asking(make_tiny, published, tmp_path):
    tiny = make_tiny("llama")
    folder = tmp_path / "hub/google/gemma-scope-2-12b-it/resid_post/layer_2_width_1k_l0_big"
    candidate(folder, 1, 2, fitting(tiny.model, published, 2))
    n_bytes = (folder / "params.safetensors").stat().st_size
    with HubServer(tmp_path / "hub") as server:
        env = {
            **os.environ,
            **server.environment(tmp_path / "home"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        argv = [sys.executable, "-c", ONLINE, str(tiny.folder), str(INDEX)]
        out = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr[-2000:]
        refused, got, again = json.loads(out.stdout.splitlines()[-1])
        sent = server.n_bytes
    assert "was not fetched" in refused["status"]
    assert [len(r["asked"]) for r in (refused, got, again)] == [1, 1, 0]
    assert refused["asked"][0][1] == 32 * WIDTH * 4
    assert refused["read"] < 10_000
    assert got["status"] == again["status"] == "read"
    assert got["fit"] > 0.95
    assert again["p"] == got["p"]
    assert again["read"] < 30_000  # the slices are kept: headers, vectors and one row only
    assert got["read"] < 0.7 * n_bytes  # w_enc and one decoder row, never w_dec
    assert sent < got["read"] + 60_000


def test_the_commands_print_json(make_tiny, root, tmp_path, capsys):
    from sae_bias.cli.main import main

    tiny = make_tiny("llama")
    (tmp_path / "words.yaml").write_text(
        "positive: [natural, valid, brave]\nnegative: [dangerous, wrong, creepy]\n"
    )
    from architectures import PAIRS

    lines = ["human,ai,template,entity", *(f"{h},{a},{t},{e}" for t, e, h, a in PAIRS)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    asked = ["--pairs", str(tmp_path / "pairs.csv"), "--words", str(tmp_path / "words.yaml")]
    feature, model, out = f"{tiny.sae_folder}#32", str(tiny.folder), tmp_path / "run"
    commands = {
        "resolve": ["resolve", model, str(INDEX), str(root)],
        "ladder": ["ladder", model, feature, *asked, "--layers", "1", "--single-positions", "1"],
        "card": ["card", model, feature, "--out", str(out)],
        "rank": ["rank", model, str(tiny.sae_folder.parent), "--by", "ablation", "--exact", "4", *asked],
    }
    for name, argv in commands.items():
        assert main([*argv, "--json"]) == 0, name
        found = json.loads(capsys.readouterr().out)
        keys = {
            "resolve": "candidates",
            "ladder": "rungs",
            "card": "passages",
            "rank": "cumulative",
        }
        assert found[keys[name]]
    assert (out / "cards" / "32.html").read_text().startswith("<!doctype html>")
    assert main(["resolve", model, "1", str(tmp_path)]) == 2
    assert main(["card", model, f"{tiny.sae_folder}#100000"]) == 2
    assert main(["match", feature, model, str(tmp_path / "absent")]) == 2


def test_a_release_stands_for_all_of_its_saes():
    from sae_bias.saes.releases import sae_release

    found = expand_saes(["gemma-scope-2-12b-it-res", "organism:planted/constructed"])
    assert len(found) == len(sae_release("gemma-scope-2-12b-it-res").folders) + 1
    assert "gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium" in found
