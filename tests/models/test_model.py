"""Loading: the weights are the checkpoint's, all of them; the token ids are the tokenizer's; nothing is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess

import independent
import pytest
import torch
from architectures import ARCHITECTURES, PAIRS, needs_bridge
from safetensors.torch import load_file, save_file

import sae_bias as sb

PROMPT = PAIRS[0][2]


def copied(tiny, tmp_path):
    return shutil.copytree(tiny.folder, tmp_path / "model")


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_logits_are_the_plain_models(tiny):
    """Exact, the multimodal graft included: the same modules with the same weights (docs/method.md#mistake-10, docs/method.md#mistake-12)."""
    plain = independent.Plain.load(tiny.folder)
    ids = tiny.model.encode(PROMPT)
    assert ids == plain.ids(PROMPT)
    with torch.no_grad():
        logits = tiny.model.hf(input_ids=torch.tensor([ids])).logits[0]
    assert torch.equal(logits, plain.logits(ids))


def test_multimodal_graft_is_text_only_and_whole(make_tiny):
    tiny = make_tiny("gemma3_multimodal")
    model = tiny.model
    assert model.architecture == "Gemma3ForCausalLM"
    assert not any("vision" in name for name, _ in model.hf.named_modules())
    assert not any(p.is_meta for p in (*model.hf.parameters(), *model.hf.buffers()))
    stored = load_file(tiny.folder / "model.safetensors")
    for i in range(model.n_layers):
        name = f"layers.{i}.mlp.gate_proj.weight"
        kept = next(
            v
            for k, v in stored.items()
            if k.endswith((f"language_model.{name}", f"language_model.model.{name}"))
        )
        assert torch.equal(model.layer(i).mlp.gate_proj.weight, kept)


def test_multimodal_object_is_grafted_too(make_tiny):
    from transformers import Gemma3ForConditionalGeneration

    tiny = make_tiny("gemma3_multimodal")
    full = Gemma3ForConditionalGeneration.from_pretrained(tiny.folder)
    model = sb.load_model(full)
    ids = torch.tensor([model.encode(PROMPT)])
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids).logits, full.eval()(input_ids=ids).logits)


def test_facts(tiny):
    model = tiny.model
    assert (model.n_layers, model.d_model, model.d_vocab, model.dtype) == (4, 32, 512, torch.float32)
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert not model.hf.training
    assert (tiny.name in ("gemma2", "gemma4")) == (model.softcap == 30.0)


# ── token ids ───────────────────────────────────────────────────────────────────────────────────────────────


def test_one_bos_exactly_where_the_tokenizer_puts_one(tiny):
    model = tiny.model
    ids = model.encode(PROMPT)
    bos = model.tokenizer.bos_token_id
    if ARCHITECTURES[tiny.name].bos:
        assert ids[0] == bos
        assert ids.count(bos) == 1
    else:
        assert not set(ids) & model.special_ids


def test_two_bos_are_refused(gemma3):
    with pytest.raises(sb.RequestError, match="begins with 2 BOS tokens"):
        gemma3.model.encode("<bos>" + PROMPT)


def test_chat_has_one_bos(gemma3):
    """apply_chat_template(tokenize=False) and then the tokenizer would give two (docs/method.md#mistake-4)."""
    model = gemma3.model
    ids = model.encode_chat([{"role": "user", "content": "a human says hello."}], prefill="This is")
    assert ids.count(model.tokenizer.bos_token_id) == 1
    assert ids[0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(ids).endswith("<start_of_turn>model\nThis is")
    markers = set(model.tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"]))
    assert markers <= model.turn_marker_ids
    assert not markers & model.special_ids


def test_a_chat_without_template_is_refused(make_tiny):
    with pytest.raises(sb.RequestError, match="no chat template"):
        make_tiny("llama").model.encode_chat([{"role": "user", "content": "hi"}])


def test_prompts_that_hold_nothing_are_refused(tiny):
    with pytest.raises(sb.RequestError, match="special tokens only"):
        tiny.model.encode("")
    with pytest.raises(sb.RequestError, match="special tokens only"):
        tiny.model.encode(tiny.model.tokenizer.eos_token)


def test_prompts_too_long_or_not_text_are_refused(gemma3):
    with pytest.raises(sb.RequestError, match="takes at most 512"):
        gemma3.model.encode("wants to survive " * 200)
    with pytest.raises(sb.RequestError, match="must be text"):
        gemma3.model.encode(3)


def test_the_tokenizer_is_untouched_by_the_bridge(gemma3):
    model = gemma3.fresh()
    before = (
        model.encode(PROMPT),
        model.tokenizer.bos_token_id,
        model.tokenizer.eos_token_id,
        model.special_ids,
    )
    assert model.bridge is model.bridge
    assert before == (
        model.encode(PROMPT),
        model.tokenizer.bos_token_id,
        model.tokenizer.eos_token_id,
        model.special_ids,
    )


def test_a_tokenizer_that_drops_every_word_of_a_prompt_is_refused(gemma3, tmp_path):
    folder = copied(gemma3, tmp_path)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<bos>": 0, "~": 1}, merges=[]))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>").save_pretrained(folder)
    model = sb.load_model(folder)
    with pytest.raises(sb.RequestError, match=r"special tokens only|knows no word"):
        model.encode(PROMPT)


def test_no_garbage_is_collected_while_a_vocabulary_is_parsed(gemma3, monkeypatch):
    """A collection walks all 262k entries, again and again; afterwards, and after an error, it is on again."""
    import gc

    from transformers import AutoTokenizer

    seen = []
    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *a, **k: (seen.append(gc.isenabled()), read(*a, **k))[1]
    )
    sb.load_model(gemma3.folder)
    assert seen == [False]
    assert gc.isenabled()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(sb.RequestError):
        sb.load_model(gemma3.folder)
    assert gc.isenabled()


def test_the_bridge_is_built_only_when_asked_for(gemma3):
    model = gemma3.fresh()
    sb.residuals(model, [PROMPT], 1)
    assert model._bridge is None


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_weight_is_refused(tiny, tmp_path):
    """transformers would leave it random and only log it (docs/method.md#mistake-12)."""
    folder = copied(tiny, tmp_path)
    weights = load_file(folder / "model.safetensors")
    dropped = next(name for name in weights if ".2." in name and name.endswith("weight"))
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(sb.RequestError, match="lacks 1 of the model's weights"):
        sb.load_model(folder)


def test_a_weight_of_another_shape_is_refused(gemma3, tmp_path):
    folder = copied(gemma3, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.2.mlp.gate_proj.weight"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(sb.RequestError):
        sb.load_model(folder)


def test_a_text_checkpoint_under_multimodal_names_is_refused(make_tiny, tmp_path):
    """The other way round: a Gemma 3 text folder whose weights stand under names its class does not know."""
    folder = copied(make_tiny("gemma3"), tmp_path)
    weights = {f"elsewhere.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(sb.RequestError, match="lacks"):
        sb.load_model(folder)


@pytest.mark.parametrize("keep", [0, 6, 200, 0.5, 0.99])
def test_truncated_weights_are_refused(gemma3, tmp_path, keep):
    folder = copied(gemma3, tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(sb.RequestError) as error:
        sb.load_model(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoints_own_code_is_never_run(gemma3, tmp_path):
    """Phi-3 and Falcon checkpoints bring code beside a class that transformers has: the class is used, the code is not run."""
    folder = copied(gemma3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.warns(UserWarning, match="is not run"):
        model = sb.load_model(folder)
    assert type(model.hf) is type(gemma3.model.hf)
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(sb.RequestError, match="never runs"):
        sb.load_model(folder)


def test_names_that_are_no_model(tmp_path):
    for name in ("/nowhere/model", "./nowhere", "~/no-such-model-here", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(sb.RequestError, match="no model folder"):
            sb.load_model(name)
    with pytest.raises(sb.RequestError, match=r"config\.json"):
        sb.load_model(tmp_path)
    with pytest.raises(sb.RequestError):
        sb.load_model("organism:nothing")
    with pytest.raises(sb.MissingError, match="hf download"):
        sb.load_model("nobody/no-such-model")
    with pytest.raises(sb.RequestError, match="cannot load a model from int"):
        sb.load_model(3)


def test_dtype_and_device_are_checked(gemma3):
    with pytest.raises(sb.RequestError, match="dtype"):
        sb.load_model(gemma3.folder, dtype="int8")
    with pytest.raises(sb.RequestError, match="device"):
        sb.load_model(gemma3.folder, device="nowhere")
    assert sb.load_model(gemma3.folder, dtype="bfloat16").dtype == torch.bfloat16


# ── objects the caller has ──────────────────────────────────────────────────────────────────────────────────


def test_a_hugging_face_model_is_used_in_place(tiny):
    hf = tiny.fresh().hf
    model = sb.load_model(hf, tokenizer=tiny.model.tokenizer)
    assert model.hf is hf


def test_a_bridge_is_used_in_place(gemma3, pairs, probe):
    first = gemma3.fresh()
    bridge = first.bridge
    model = sb.load_model(bridge, tokenizer=gemma3.model.tokenizer)
    assert model.bridge is bridge
    # wrapped layers run every prompt whole, plain ones share openings: equal to float32 rounding
    assert sb.run_probe(model, pairs, probe).bias == pytest.approx(
        sb.run_probe(gemma3.model, pairs, probe).bias, rel=1e-5
    )


def test_an_object_without_a_stored_tokenizer_needs_one(gemma3):
    hf = gemma3.fresh().hf
    hf.config._name_or_path = ""
    with pytest.raises(sb.RequestError, match="tokenizer="):
        sb.load_model(hf)


def test_a_model_is_its_own_model(gemma3):
    assert sb.load_model(gemma3.model) is gemma3.model


# ── the bridge ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bridge_wraps_the_same_modules_and_installs_nothing(tiny, monkeypatch, pairs, probe):
    """TransformerLens would `pip install torchvision` for a multimodal model (docs/method.md#mistake-13)."""
    needs_bridge(tiny)

    def forbidden(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    for name in ("run", "Popen", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, forbidden)
    had = importlib.util.find_spec("torchvision") is not None
    model = tiny.fresh()
    before = sb.run_probe(model, pairs, probe).pair_bias
    part = "fc1" if hasattr(model.layer(0), "fc1") else "mlp"
    weights = getattr(model.layer(0), part)
    ids = torch.tensor([model.encode(PROMPT)])
    with torch.no_grad():
        logits = model.bridge(ids)
        assert torch.allclose(logits, model.hf(input_ids=ids).logits, atol=1e-5)
        assert torch.allclose(logits, tiny.model.hf(input_ids=ids).logits, atol=1e-4)
    assert abs(sb.run_probe(model, pairs, probe).pair_bias - before).max() < 1e-4
    assert (importlib.util.find_spec("torchvision") is not None) == had
    now = getattr(model.layer(0), part)
    assert getattr(now, "original_component", now) is weights
    assert not any(p.requires_grad for p in model.hf.parameters())
