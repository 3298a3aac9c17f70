"""Every reader under structural fuzzing: whatever a file, a name or a reply holds, only our own errors leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sae_files
import yaml
from fuzzing import Files, Reader, fuzz
from tallies import tally

import sae_bias as sb
from sae_bias.cli.context import parse_numbers, parse_shard
from sae_bias.measures.judge_replies import ReplyStore, read_choice, read_rating
from sae_bias.models import catalog
from sae_bias.models.hub import refuse_traversal
from sae_bias.probe.result import ProbeResult
from sae_bias.prompts.load import load_grid, load_lexicon, load_pairs
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.prompts.texts import text_stream
from sae_bias.report.page import write_report
from sae_bias.runs.copies import (
    edit_facts,
    edit_from_facts,
    grid_copy,
    grid_from_copy,
    pairs_copy,
    pairs_from_copy,
    probe_facts,
    probe_from_facts,
)
from sae_bias.runs.folder import RunFolder, merge_shards, read_run
from sae_bias.saes import releases
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.tensors import open_tensor_file
from sae_bias.steering.intervention import from_dict
from sae_bias.workflows.study import load_study
from sae_bias.workflows.sweep import collect
from sae_bias.workflows.verify import verify_run

DATA = Path(sb.__file__).parent / "data"
SMALL = sae_files.random_sae(4, 8)
FEW, MANY = 20, 900


def tree_of(path: Path, most: int = 3) -> Any:
    """A YAML file as a tree, its lists cut to a few entries."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return [cut(v) for v in value[:most]] if isinstance(value, list) else value

    return cut(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, make_tiny):
    """A small real run with every kind of file, its model and SAE."""
    from architectures import NEGATIVE, PAIRS, POSITIVE

    tiny, root = make_tiny("gemma3"), tmp_path_factory.mktemp("run")
    pairs = sb.PromptPairs(tuple(sb.PromptPair(h, a, t, e) for t, e, h, a in PAIRS), name="tiny")
    probe = sb.Probe(POSITIVE, NEGATIVE)
    edits = [sb.Ablate(tiny.feature(3)), sb.Clamp(tiny.feature(3), -1.0)]
    sb.run_sweep(tiny.model, pairs, sb.Sweep(edits, controls=1), probe=probe, out=root / "run")
    base = sb.run_probe(tiny.model, pairs, probe)
    RunFolder(root / "run").write_table("pairs", base.to_frame())
    RunFolder(root / "run").write_json("summary", {"bias": {"mean": base.bias}})
    base.save(root / "base.npz")
    return tiny, root, base


@pytest.fixture(scope="module")
def readers(run_folder, tmp_path_factory) -> list[Reader]:
    tiny, root, base = run_folder
    at = Files(tmp_path_factory.mktemp("fuzz"))
    small = Files(tmp_path_factory.mktemp("sae"))
    sae_files.write_gemma_scope_2(small.folder / "two", SMALL, sae_files.gemma_scope_2_config(2, 8))
    sae_files.write_gemma_scope_1(small.folder / "one", SMALL)
    sae_files.write_gemma_scope_1(small.folder / "packed", SMALL, compressed=True)
    sae_files.write_saelens(small.folder / "lens", SMALL)
    read = {
        p.relative_to(small.folder).as_posix(): p.read_bytes() for p in small.folder.rglob("*") if p.is_file()
    }
    vocabulary, model = base.vocabulary, tiny.model
    run = root / "run"
    manifest, sweep = (json.loads((run / f"{n}.json").read_text()) for n in ("manifest", "sweep"))
    cell = sorted((run / "cells").iterdir())[0]
    edits = [edit_facts(e, None) for e in (sb.Ablate(tiny.feature(3)), sb.Clamp(tiny.feature(3), -1.0, when="always"), sb.Steer(tiny.feature(3), 0.5))]  # fmt: skip

    def file(name: str, reader: Any) -> Any:
        return lambda content: reader(at.put(name, content))

    def use_sae(folder: Path) -> None:
        sae = load_sae(folder)
        sae.feature(0)
        sae.W_dec_rows([1])

    def sae(params: str, *others: str) -> Any:
        def reading(content: Any) -> None:
            folder = at.folder / "layer_2"
            for old in folder.glob("*"):
                old.unlink()
            for other in others:
                at.put(f"layer_2/{Path(other).name}", read[other])
            at.put(f"layer_2/{params}", content)
            use_sae(folder)

        return reading

    def with_run(name: str, reader: Any) -> Any:
        """The run with one of its files damaged, put back afterwards."""

        def reading(content: Any) -> None:
            path = run / name
            good = path.read_bytes()
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            try:
                reader(run)
            finally:
                path.write_bytes(good)

        return reading

    def texts(content: Any) -> Any:
        return content.decode("utf-8", "replace") if isinstance(content, bytes) else content

    def replies(content: Any) -> None:
        store = ReplyStore(at.put("replies.jsonl", content))
        for key in list(store._replies)[:3]:
            assert key in store

    def rating(content: Any) -> None:
        value = read_rating(texts(content))
        assert value is None or value in (1, 2, 3, 4, 5)
        assert read_choice(texts(content)) in (None, "1", "2", "tie")

    def edited(value: Any) -> None:
        if not isinstance(value, dict):
            raise sb.RequestError("no mapping")
        from_dict(value)

    def checked(path: Path) -> None:
        """`verify` without the weights: the model is available."""
        found = verify_run(path, cells=0)
        assert {c.status for c in found.checks} <= {"agrees", "differs", "not checked", "note"}

    pairs_yaml, grid_yaml = tree_of(DATA / "pairs.yaml"), tree_of(DATA / "grid.yaml")
    pairs_csv = base.pairs.to_frame().to_csv(index=False).encode()
    pairs_jsonl = base.pairs.to_frame().to_json(orient="records", lines=True).encode()
    grid_csv = load_grid()[:4].to_frame().to_csv(index=False).encode()
    study, several = (
        tree_of(DATA / "study.yaml"),
        {"name": "x", "models": ["organism:planted"], "chat": False},
    )
    names = tuple(
        n.encode() for n in (
            "organism:planted/constructed#0", "gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium#2511", f"{tiny.sae_folder}#3",
            "google/gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_71#5", "gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68#1",
        )
    )  # fmt: skip
    return [
        Reader("pairs .yaml", file("p.yaml", load_pairs), (yaml.safe_dump(pairs_yaml).encode(),), (pairs_yaml,)),
        Reader("pairs .csv", file("p.csv", load_pairs), (pairs_csv,)),
        Reader("pairs .jsonl", file("p.jsonl", load_pairs), (pairs_jsonl,)),
        Reader("grid .yaml", file("g.yaml", load_grid), (yaml.safe_dump(grid_yaml).encode(),), (grid_yaml,)),
        Reader("grid .csv", file("g.csv", load_grid), (grid_csv,)),
        Reader("words", file("w.yaml", load_lexicon), (b"positive: [good, fine]\nnegative: [bad, wrong]\n",), ({"positive": ["good"], "negative": ["bad"]},)),
        Reader("scenarios", file("s.yaml", load_scenarios), ((DATA / "organism_scenarios.yaml").read_bytes()[:3000],), (tree_of(DATA / "scenarios.yaml", 2),)),
        Reader("study", file("study.yaml", load_study), ((DATA / "study.yaml").read_bytes(),), (study, several)),
        Reader("question names", lambda c: load_pairs(texts(c)), (b"gender", b"age", b"nationality")),
        Reader("word list and scenario names", lambda c: (load_lexicon(texts(c)), load_scenarios(texts(c))), (b"evaluation", b"scenarios")),
        Reader("judge replies", rating, (b"Rating: 4/5. It reads well.", b"**Choice: tie**", b"3", b"Choice: continuation 1")),
        Reader("kept judge replies", replies, (b'{"key": "a", "reply": "Rating: 3", "judge": "m"}\n{"key": "b", "reply": ""}\n',), ([{"key": "a"}], {"key": "a", "n": 1})),
        Reader("safetensors header", file("t.safetensors", open_tensor_file), (read["two/params.safetensors"][:900],)),
        Reader("npz header", file("t.npz", open_tensor_file), (read["one/params.npz"], read["packed/params.npz"])),
        Reader("SAE .safetensors", sae("params.safetensors", "two/config.json"), (read["two/params.safetensors"],)),
        Reader("SAE .npz", sae("params.npz"), (read["one/params.npz"], read["packed/params.npz"])),
        Reader("SAE config", sae("config.json", "two/params.safetensors"), (read["two/config.json"],), (json.loads(read["two/config.json"]),)),
        Reader("SAELens config", sae("cfg.json", "lens/sae_weights.safetensors"), (read["lens/cfg.json"],), (json.loads(read["lens/cfg.json"]),)),
        Reader("SAELens weights", sae("sae_weights.safetensors", "lens/cfg.json"), (read["lens/sae_weights.safetensors"],)),
        Reader("sweep.json", with_run("sweep.json", collect), (json.dumps(sweep).encode(),), (sweep,)),
        Reader("cell .parquet", with_run(f"cells/{cell.name}", collect), (cell.read_bytes(),)),
        Reader("merged shards", with_run("sweep.json", merge_shards), (json.dumps(sweep).encode(),), (sweep,), cost=0.2),
        Reader("manifest under verify", with_run("manifest.json", checked), (json.dumps(manifest).encode(),), (manifest,), cost=0.15),
        Reader("sweep.json under verify", with_run("sweep.json", checked), (json.dumps(sweep).encode(),), (sweep,), cost=0.1),
        Reader("table under verify", with_run("tables/sweep.parquet", checked), ((run / "tables/sweep.parquet").read_bytes(),), cost=0.1),
        Reader("manifest under report", with_run("manifest.json", read_run), (json.dumps(manifest).encode(),), (manifest,)),
        Reader("summary under report", with_run("summary.json", write_report), (b'{"bias": {"mean": 1.0}}',), ({"bias": {"mean": 1.0, "ci_low": 0.5, "ci_high": 1.5}},), cost=0.03),
        Reader("copies of pairs", lambda v: pairs_from_copy(v, "here"), (), (pairs_copy(base.pairs),)),
        Reader("copies of grids", lambda v: grid_from_copy(v, "here"), (), (grid_copy(load_grid()[:3]),)),
        Reader("copies of probes", lambda v: probe_from_facts(v, "here"), (), (probe_facts(base.probe, vocabulary),)),
        Reader("copies of edits", lambda v: edit_from_facts(v, {}, model), (), tuple(edits)),
        Reader("interventions", edited, (), tuple(edits)),
        Reader("probe results", file("r.npz", ProbeResult.load), ((root / "base.npz").read_bytes(),)),
        Reader("texts .jsonl", file("t.jsonl", lambda p: list(text_stream(p)[1])), (b'{"text": "one"}\n"two"\n',), ({"text": "one"},)),
        Reader("texts .json", file("t.json", lambda p: list(text_stream(p)[1])), (b'["one", {"text": "two"}]',), (["one", {"text": "two"}],)),
        Reader("texts .txt", file("t.txt", lambda p: list(text_stream(p)[1])), (b"one\ntwo\n",)),
        Reader("feature names", lambda c: (FeatureRef.parse(texts(c)), as_feature(texts(c))), names),
        Reader("SAE names", lambda c: (SaeId.parse(texts(c)), load_sae(texts(c))), tuple(n.rpartition(b"#")[0] for n in names)),
        Reader("release and organism names", lambda c: (releases.sae_release(texts(c)), catalog.organism_folder(texts(c))), (b"gemma-scope-2-12b-it-res", b"planted")),
        Reader("published models", lambda c: catalog.model_info(texts(c)), (b"google/gemma-3-12b-it", b"mistralai/Mistral-7B-v0.1")),
        Reader("model names", lambda c: sb.load_model(texts(c)), (b"google/gemma-3-12b-it", b"organism:planted", b"./model"), cost=0.1),
        Reader("file names inside a repository", lambda c: refuse_traversal(texts(c)), (b"resid_post/layer_31/params.safetensors",)),
        Reader("numbers on the command line", lambda c: parse_numbers(texts(c), "--strengths"), (b"0,-5,-10",)),
        Reader("shards on the command line", lambda c: parse_shard(texts(c)), (b"2/4",)),
    ]  # fmt: skip


def run_all(readers: list[Reader], n: int, seed: int) -> int:
    """Every reader with its share of inputs; the leaks of all of them are told together."""
    total, leaks = 0, []
    for reader in readers:
        some = max(2, math.ceil(n * reader.cost))
        try:
            fuzz(reader, some, seed)
        except AssertionError as error:
            leaks.append(str(error)[:700])
        tally(f"inputs fuzzed, {reader.name}", some) if n > FEW else None
        total += some
    assert not leaks, "\n\n".join(leaks)
    tally(f"inputs fuzzed, over {len(readers)} readers", total)
    return total


def test_only_our_errors_leave_any_reader(readers):
    assert run_all(readers, FEW, seed=1) > 600


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_only_our_errors_leave_any_reader_at_length(readers):
    assert run_all(readers, MANY, seed=2) >= 20_000


def test_the_fuzzer_finds_what_is_planted(tmp_path):
    """A reader with a hole is caught; one without is not."""
    hole = Reader("hole", lambda v: v["pairs"][0]["ai"].upper(), (), ({"pairs": [{"ai": "x"}]},))
    with pytest.raises(AssertionError, match="hole, input"):
        fuzz(hole, 50)
    sound = Reader(
        "sound",
        lambda v: load_lexicon(Files(tmp_path).put("w.yaml", v)),
        (b"positive: [a]\nnegative: [b]\n",),
    )
    assert 0 < fuzz(sound, 50) <= 50
