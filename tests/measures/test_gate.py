"""The fidelity gate as commands run it: it stops a broken model with its figures, warns on a doubtful SAE, is run once."""

from __future__ import annotations

import json
import math

import independent
import pytest
import torch
from torch import nn

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.core.files import cache_folder
from sae_bias.measures import fidelity
from sae_bias.measures import fidelity as gate
from sae_bias.measures.fidelity import Gate, gate_lines, gate_model, gate_sae
from sae_bias.prompts.texts import load_texts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sae-bias" / "gate"


@pytest.fixture
def counted(monkeypatch):
    """How often the gate's figures were measured."""
    calls: list[str] = []
    for name in ("check_fidelity", "check_logits"):
        real = getattr(gate, name)

        def counting(*args, real=real, name=name):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(gate, name, counting)
    return calls


class Altered(nn.Module):
    """A decoder layer in a wrapper that changes what comes out of it, as a quantiser or an adapter might."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.original_component = layer

    def forward(self, *args, **kwargs):
        out = self.original_component(*args, **kwargs)
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original_component"), name)


def broken(model):
    model.hf.model.layers[1] = Altered(model.hf.model.layers[1])
    return model


@pytest.fixture
def asked(tmp_path, pairs):
    from architectures import NEGATIVE, POSITIVE

    pairs.to_frame().to_csv(tmp_path / "pairs.csv", index=False)
    words = f"positive: [{', '.join(POSITIVE)}]\nnegative: [{', '.join(NEGATIVE)}]\n"
    (tmp_path / "words.yaml").write_text(words)
    return ["--pairs", str(tmp_path / "pairs.csv"), "--words", str(tmp_path / "words.yaml")]


# ── it stops


def test_a_layer_that_gives_something_else_is_caught(gemma3, cache):
    with pytest.raises(sb.GateError, match=r"differs from Hugging Face's hidden state by 9\.9.e-03"):
        gate_sae(broken(gemma3.fresh()), gemma3.sae)
    assert not cache.exists(), "a gate that stopped is never remembered"


@pytest.mark.parametrize("command", ["sweep", "rank", "table", "card", "ladder", "compare", "generate"])
def test_the_commands_stop_on_a_broken_model_with_exit_4(
    gemma3, cache, asked, command, monkeypatch, capsys, tmp_path
):
    from sae_bias.models import load

    known = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *args, **options: broken(known(*args, **options)))
    feature, pairs = f"{gemma3.sae_folder}#3", asked[:2]
    arguments = {
        "sweep": [feature, *asked],
        "rank": [str(gemma3.sae_folder), *pairs],
        "table": [feature],
        "card": [feature],
        "ladder": [feature, *asked],
        "compare": [feature, *asked],
        "generate": ["--feature", feature, "--prompt", "An AI says", "--max-new-tokens", "1"],
    }[command]
    assert main([command, str(gemma3.folder), *arguments]) == 4
    shown = capsys.readouterr()
    assert "differs from Hugging Face's hidden state by" in shown.err
    assert shown.err.strip().count("\n") == 0


def test_a_study_stops_and_no_gate_is_recorded(gemma3, cache, asked, monkeypatch, capsys, tmp_path):
    from sae_bias.models import load
    from sae_bias.workflows import study_steps

    known = load.load_model
    monkeypatch.setattr(study_steps, "load_model", lambda *args, **options: broken(known(*args, **options)))
    file = tmp_path / "study.yaml"
    file.write_text(f"name: gate\nmodel: {gemma3.folder}\nchecks: false\n")
    words = ["--pairs", asked[1], "--words", asked[3]]
    run = ["run", str(file), *words, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(
        gate, "check_logits", lambda *args: (_ for _ in ()).throw(sb.GateError("logits differ"))
    )
    assert main(run) == 4
    assert "logits differ" in capsys.readouterr().err
    assert main([*run, "--no-gate"]) == 0
    assert "skipped" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["gate"] == {"status": "skipped"}


def test_nan_in_the_residual_stops_it(gemma3, cache):
    model = gemma3.fresh()
    with torch.no_grad():
        model.hf.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(sb.RequestError, match=r"after layer 1 holds NaN.*layers.0.mlp.down_proj.weight"):
        gate_sae(model, gemma3.sae)
    with pytest.raises(sb.GateError, match="nan"):
        gate_model(model)


def test_functions_never_run_the_gate(gemma3, pairs, probe, cache, counted):
    sb.run_probe(gemma3.model, pairs, probe)
    sb.rank_features(gemma3.model, gemma3.sae, pairs, by="separation")
    sb.run_sweep(gemma3.model, pairs, sb.Sweep([sb.Ablate(gemma3.feature(3))]), probe=probe)
    assert counted == []


# ── it measures


def test_every_layer_is_compared_with_plain_hugging_face(tiny, cache):
    """On seven architectures, the layer after which Hugging Face only gives normed states included."""
    from dataclasses import replace

    sae = tiny.sae
    for layer in range(tiny.model.n_layers):
        moved = replace(sae, info=replace(sae.info, site=sb.Site(layer)))
        found = fidelity.check_fidelity(tiny.model, moved, n_texts=2)
        assert 0 <= found.residual_max_rel_error < 1e-4


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "gemma2"])
def test_the_residual_is_that_of_the_unprocessed_checkpoint(make_tiny, name):
    """Against a script that shares no code: weights are neither folded nor centered, which moves a LayerNorm model's residual."""
    tiny = make_tiny(name)
    model, plain = tiny.fresh(), independent.Plain.load(tiny.folder)
    text = "An AI says that it wants to go on. This is"
    for layer in range(model.n_layers - 1):
        (own,) = sb.residuals(model, [text], layer, positions="all")
        torch.testing.assert_close(own, plain.residual(text, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox"])
def test_the_first_token_is_left_out_with_and_without_bos(make_tiny, cache, name):
    tiny = make_tiny(name)
    plain, sae, texts = independent.Plain.load(tiny.folder), tiny.sae, load_texts("neutral")
    assert (plain.ids("a")[0] == plain.tokenizer.bos_token_id) == (name == "gemma3")
    rows = torch.cat([plain.residual(text, sae.site.layer)[1:] for text in texts[: fidelity.N_TEXTS]])
    acts = sae.encode(rows)
    found = gate_sae(tiny.model, sae)
    assert found.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-5)
    error = (rows - sae.decode(acts)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum()
    assert found.fvu == pytest.approx(float(error), rel=1e-4)


def test_a_doubtful_sae_warns(gemma3, cache, monkeypatch):
    from dataclasses import replace

    sae = replace(gemma3.sae, info=replace(gemma3.sae.info, label_l0=1e6))
    found = gate_sae(gemma3.model, sae)
    assert any("its label says 1000000" in w for w in found.warnings)
    monkeypatch.setattr(fidelity, "MAX_FVU", 1e-9)
    assert any("of the variance unexplained" in w for w in gate_sae(gemma3.model, gemma3.sae).warnings)
    assert gate_sae(gemma3.model, gemma3.sae).status == "warned"


# ── once


def test_it_is_run_once_for_a_model_and_an_sae(gemma3, cache, counted):
    first = gate_sae(gemma3.model, gemma3.sae)
    error = gate_model(gemma3.model)
    assert gate_sae(gemma3.fresh(), gemma3.sae) == first
    assert gate_model(gemma3.fresh()) == error
    assert counted == ["check_fidelity", "check_logits"]
    assert len(list(cache.glob("*.json"))) == 2
    assert not list(cache.glob("*.partial"))
    assert cache == cache_folder("gate")


def test_other_weights_another_precision_or_hooks_are_measured_anew(gemma3, cache, counted, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    gate_sae(gemma3.model, gemma3.sae)
    half = sb.load_model(gemma3.folder, dtype="bfloat16")
    gate_sae(half, gemma3.sae)
    other = shutil.copytree(gemma3.sae_folder, tmp_path / "layer_1")
    weights = load_file(other / "params.safetensors")
    weights["b_dec"][0] += 0.5
    save_file(weights, other / "params.safetensors")
    gate_sae(gemma3.model, sb.load_sae(other))
    assert len(counted) == 3
    hooked = gemma3.fresh()
    handle = hooked.layer(0).register_forward_hook(lambda module, args, output: None)
    gate_sae(hooked, gemma3.sae)
    handle.remove()
    wrapped = sb.load_model(gemma3.fresh().hf, tokenizer=gemma3.model.tokenizer)
    gate_sae(wrapped, gemma3.sae)
    assert len(counted) == 5
    assert len(list(cache.glob("*.json"))) == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[]", b'{"fvu": "low"}', b'{"residual_max_rel_error": 0.1, "fvu": true, "l0": 1.0}', b"\xff", b"[" * 5000],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again(gemma3, cache, counted, content):
    gate_sae(gemma3.model, gemma3.sae)
    (file,) = cache.glob("*.json")
    good = file.read_bytes()
    file.write_bytes(content)
    gate_sae(gemma3.model, gemma3.sae)
    assert len(counted) == 2
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_failure(gemma3, tmp_path, monkeypatch, counted):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    gate_sae(gemma3.model, gemma3.sae)
    gate_sae(gemma3.model, gemma3.sae)
    assert len(counted) == 2


# ── it is told


def test_the_gate_in_words(gemma3, cache):
    found = gate_sae(gemma3.model, gemma3.sae)
    line, *warnings = gate_lines(Gate((found,)).facts())
    assert warnings == [f"warning: {w}" for w in found.warnings]
    assert f"unexplained variance {found.fvu:.3f}" in line
    assert f"{found.residual_max_rel_error:.1e}" in line
    assert gate_lines(Gate(skipped=True).facts()) == ["fidelity gate: skipped (--no-gate)"]
    assert "logits" in gate_lines(Gate(logits=1e-7).facts())[0]
    assert not math.isnan(found.residual_max_rel_error)
