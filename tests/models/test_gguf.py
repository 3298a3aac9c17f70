"""GGUF models: the weights are transformers' own bit by bit, a second load reads the cache, untrusted files are refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct

import gguf_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.models.gguf import convert, packaged
from sae_bias.models.gguf.header import read_header

gguf = pytest.importorskip("gguf")
PROMPT = "the cat says the sun is hot."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Path of a tiny GGUF file by architecture and quantization, written once."""
    folder, done = tmp_path_factory.mktemp("gguf"), {}

    def get(architecture, quantization="Q8_0"):
        path = folder / f"{architecture}-{quantization}.gguf"
        if path not in done:
            done[path] = gguf_files.write(path, architecture, quantization)
        return path, done[path]

    return get


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quantization", gguf_files.QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen2"])
def test_weights_are_those_of_transformers_own_route(written, architecture, quantization):
    from transformers import AutoModelForCausalLM

    path, _ = written(architecture, quantization)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = sb.load_model(path)
    weights, expected = ours.hf.state_dict(), theirs.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ids = torch.tensor([ours.encode(PROMPT)])
    with torch.no_grad():
        assert torch.equal(ours.hf(ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_gpt_neox_has_its_rows_grouped_by_head(written, quantization):
    """transformers does not read this architecture's GGUF; llama.cpp's converter is undone by hand here."""
    path, arrays = written("gptneox", quantization)
    model = sb.load_model(path)
    assert model.architecture == "GPTNeoXForCausalLM"
    flat = arrays["blk.1.attn_qkv.weight"]
    if quantization != "F32":
        flat = gguf.dequantize(
            gguf.quantize(flat, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        )
    q, k, v = np.split(flat, 3)
    rows = [x[h * 16 : (h + 1) * 16] for h in range(4) for x in (q, k, v)]
    fused = model.hf.gpt_neox.layers[1].attention.query_key_value
    assert torch.equal(fused.weight, torch.from_numpy(np.concatenate(rows)))
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert torch.isfinite(model.hf(torch.tensor([model.encode(PROMPT)])).logits).all()


@pytest.mark.parametrize("architecture", ["gemma3", "llama", "qwen2"])
def test_tokenizer_and_template_are_transformers_own(written, architecture):
    from transformers import AutoTokenizer

    path, _ = written(architecture)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = sb.load_model(path).tokenizer
    assert ours(PROMPT).input_ids == theirs(PROMPT).input_ids
    assert ours.chat_template == theirs.chat_template
    assert ours.decode(ours("the sun").input_ids, skip_special_tokens=True).strip() == "the sun"


def test_a_study_tool_reads_it_as_any_model(written):
    """Residual capture and an exact ablation run on a GGUF model."""
    path, _ = written("llama")
    model = sb.load_model(path)
    x = sb.residuals(model, [PROMPT], 0)
    assert x.shape == (1, gguf_files.WIDTH) and torch.isfinite(x).all()


# ── cache ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_second_load_reads_the_kept_folder(written, monkeypatch):
    path, _ = written("llama", "Q4_1")
    first = convert.converted(path)
    monkeypatch.setattr(convert, "_convert", lambda *a: pytest.fail("converted twice"))
    assert convert.converted(path) == first
    facts = convert.manifest(first)
    assert (
        facts is not None and facts["quantization"] == "Q4_1" and facts["sha256"] == convert.file_sha256(path)
    )
    assert set(load_file(first / "model.safetensors")) >= {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_same_name_with_other_bytes_is_another_model(written, tmp_path):
    path, _ = written("llama", "Q4_1")
    other = tmp_path / path.name
    gguf_files.write(other, "llama", "Q4_1", seed=1)
    assert convert.converted(other) != convert.converted(path)


def test_a_stopped_conversion_leaves_nothing(written, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, _ = written("qwen2", "Q4_0")
    monkeypatch.setattr(convert, "_save_tokenizer", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert.converted(path)
    assert list((tmp_path / "sae-bias" / "gguf").iterdir()) == []
    monkeypatch.undo()


def test_a_command_names_the_terms_of_use_of_the_model_it_uses(written, monkeypatch, capsys):
    path, _ = written("gemma3")
    known = packaged.PACKAGED["gemma-3-270m-q4"]
    monkeypatch.setattr(
        packaged, "PACKAGED", {known.name: dataclasses.replace(known, sha256=convert.file_sha256(path))}
    )
    argv = ["generate", str(path), "--prompt", "the cat", "--max-new-tokens", "2"]
    for more, said in (([], True), (["--json"], False)):
        assert main([*argv, *more]) == 0
        assert ("ai.google.dev/gemma/terms" in capsys.readouterr().out) == said


def test_headline_manifest_and_digest_name_the_quantization(written):
    from sae_bias.models.fingerprint import model_files
    from sae_bias.runs.manifest import manifest

    path, _ = written("gemma3", "Q5_0")
    model = sb.load_model(path)
    assert model.label == f"{path}, dequantized from Q5_0"
    assert "dequantized from Q5_0" in repr(model)
    made = manifest(model)["model"]
    assert made["gguf"]["quantization"] == "Q5_0" and made["label"] == model.label
    assert model_files(model)[path.name] == convert.file_sha256(path)


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_with_one_gguf_is_a_model_and_with_two_it_is_not(written, tmp_path):
    path, _ = written("llama")
    (tmp_path / "model.gguf").write_bytes(path.read_bytes())
    assert sb.load_model(tmp_path).gguf is not None
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(sb.RequestError, match="holds 2 GGUF files"):
        sb.load_model(tmp_path)


def test_a_hub_file_is_found_by_repository_and_name(written, monkeypatch):
    path, _ = written("llama")
    asked = []
    monkeypatch.setattr("sae_bias.models.hub.hub_file", lambda repo, file: asked.append((repo, file)) or path)
    assert sb.load_model("someone/model-gguf:q8.gguf").gguf is not None
    assert asked == [("someone/model-gguf", "q8.gguf")]


def test_a_missing_gguf_file_is_one_line():
    with pytest.raises(sb.RequestError, match=r"there is no file nowhere\.gguf"):
        sb.load_model("nowhere.gguf")


@pytest.mark.parametrize("name", packaged.PACKAGED)
def test_a_packaged_model_that_is_not_installed_says_the_pip_line(name, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "find_spec", lambda package: None)
    with pytest.raises(sb.MissingError, match="pip install"):
        sb.load_model(name)
    assert main(["probe", name, "--quiet"]) == 3


def test_a_packaged_file_with_another_hash_is_refused(written, monkeypatch):
    path, _ = written("llama")
    name = "smollm2-135m-instruct-q4"
    monkeypatch.setattr(packaged.PackagedModel, "paths", lambda self: [path])
    monkeypatch.setattr(convert, "kept_folder", lambda *a: path.parent / "absent")
    with pytest.raises(sb.RequestError, match="sha256"):
        sb.load_model(name)


def test_without_the_gguf_library_the_extra_is_named(written, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    with pytest.raises(sb.MissingError, match=r"sae-bias\[gguf\]"):
        sb.load_model(written("llama")[0])


def test_doctor_lists_the_packaged_models(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["packaged"]} == set(packaged.PACKAGED)
    assert any("Gemma Terms of Use" in row["terms"] for row in found["packaged"])


# ── untrusted files ───────────────────────────────────────────────────────────────────────────────────────────


def _tensor_entry(data: bytearray, name: bytes) -> int:
    """Where the entry of a tensor continues after its name: number of dimensions, dimensions, type, offset."""
    at = data.index(struct.pack("<Q", len(name)) + name)
    return at + 8 + len(name)


def _field(data: bytearray, name: bytes) -> int:
    """Where a field's value type stands."""
    at = data.index(struct.pack("<Q", len(name)) + name)
    return at + 8 + len(name)


def _put(form, at, *values):
    def edit(data):
        place = at(data) if callable(at) else at
        struct.pack_into(form, data, place, *values)

    return edit


QKV = b"blk.0.attn_q.weight"
UNTRUSTED = {
    "empty": lambda data: bytearray(),
    "magic only": lambda data: data[:4],
    "another magic": _put("<4s", 0, b"GGML"),
    "version 1": _put("<I", 4, 1),
    "big-endian": _put(">I", 4, 3),
    "2^63 tensors": _put("<Q", 8, 1 << 63),
    "one tensor too many": _put("<Q", 8, 1000),
    "no tensor": _put("<Q", 8, 0),
    "2^63 fields": _put("<Q", 16, 1 << 63),
    "too few fields": _put("<Q", 16, 3),
    "a field's name of 2^60 bytes": _put("<Q", 24, 1 << 60),
    "a field's name beyond the file": _put("<Q", 24, 4000),
    "an unknown value type": _put("<I", lambda d: _field(d, b"general.name"), 77),
    "a text of 2^62 bytes": _put("<Q", lambda d: _field(d, b"general.name") + 4, 1 << 62),
    "a list of 2^50": _put("<Q", lambda d: _field(d, b"tokenizer.ggml.tokens") + 8, 1 << 50),
    "a list of lists": _put("<I", lambda d: _field(d, b"tokenizer.ggml.tokens") + 4, 9),
    "a list longer than the file": _put("<Q", lambda d: _field(d, b"tokenizer.ggml.tokens") + 8, 1 << 23),
    "text that is not UTF-8": _put("<2s", lambda d: _field(d, b"general.name") + 12, b"\xff\xfe"),
    "no dimensions": _put("<I", lambda d: _tensor_entry(d, QKV), 0),
    "2^31 dimensions": _put("<I", lambda d: _tensor_entry(d, QKV), 1 << 31),
    "a dimension of 0": _put("<Q", lambda d: _tensor_entry(d, QKV) + 4, 0),
    "a dimension of 2^63": _put("<Q", lambda d: _tensor_entry(d, QKV) + 4, 1 << 63),
    "dimensions that overflow": _put("<QQ", lambda d: _tensor_entry(d, QKV) + 4, 1 << 39, 1 << 39),
    "rows that are not whole blocks": _put("<Q", lambda d: _tensor_entry(d, QKV) + 4, 33),
    "an unknown tensor type": _put("<I", lambda d: _tensor_entry(d, QKV) + 20, 999),
    "a removed tensor type": _put("<I", lambda d: _tensor_entry(d, QKV) + 20, 4),
    "an offset beyond the file": _put("<Q", lambda d: _tensor_entry(d, QKV) + 24, 1 << 40),
    "an offset of 2^64 - 32": _put("<Q", lambda d: _tensor_entry(d, QKV) + 24, (1 << 64) - 32),
    "an odd offset": _put("<Q", lambda d: _tensor_entry(d, QKV) + 24, 33),
    "two tensors in one place": _put("<Q", lambda d: _tensor_entry(d, QKV) + 24, 0),
    "another shape": _put("<QQ", lambda d: _tensor_entry(d, QKV) + 4, 32, 64),
    "cut in the header": lambda data: data[:300],
    "cut in the tensors": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[: -(len(data) % 32 or 32) - 32],
    "2^31 layers": _put("<I", lambda d: _field(d, b"llama.block_count") + 4, 1 << 31),
    "one layer more": _put("<I", lambda d: _field(d, b"llama.block_count") + 4, 3),
    "no heads": _put("<I", lambda d: _field(d, b"llama.attention.head_count") + 4, 0),
    "key-value heads that do not divide": _put("<I", lambda d: _field(d, b"llama.attention.head_count_kv") + 4, 3),
    "an end token beyond the vocabulary": _put("<I", lambda d: _field(d, b"tokenizer.ggml.eos_token_id") + 4, 1 << 30),
    "an unknown architecture": lambda data: bytearray(data.replace(b"llama", b"zzama")),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNTRUSTED)
def test_untrusted_files_are_refused_in_one_line(written, tmp_path, monkeypatch, fault):
    from tallies import tally

    tally("untrusted inputs refused or shown harmless")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, _ = written("llama")
    bad = gguf_files.damaged(path, tmp_path / "bad.gguf", UNTRUSTED[fault])
    with pytest.raises(sb.RequestError) as caught:
        sb.load_model(bad)
    text = str(caught.value)
    assert "\n" not in text and "bad.gguf" in text and len(text) < 600
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_random_damage_is_an_answer_or_one_line(written, tmp_path, monkeypatch):
    """A few hundred random edits of the header: never another exception, never a hang."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, _ = written("llama")
    rng = np.random.default_rng(0)
    size = min(t.offset for t in read_header(path).tensors.values())
    for _ in range(300):
        edit = _put("<Q", int(rng.integers(0, size - 8)), int(rng.integers(0, 1 << 63)))
        bad = gguf_files.damaged(path, tmp_path / "bad.gguf", edit)
        with contextlib.suppress(sb.RequestError):
            read_header(bad)


def test_scaled_rotary_embeddings_are_refused_not_ignored(tmp_path):
    """Llama 3's frequency table has no place in the config; transformers' own route drops it silently."""
    path = tmp_path / "scaled.gguf"
    original = gguf_files.shapes
    try:
        gguf_files.shapes = lambda a, n: original(a, n) | {"rope_freqs.weight": (8,)}
        gguf_files.write(path, "llama", "F32")
    finally:
        gguf_files.shapes = original
    with pytest.raises(sb.RequestError, match="rotary"):
        sb.load_model(path)
