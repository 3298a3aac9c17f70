"""LoRA adapter folders: merged exactly where peft is, the line that does it where it is not."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from architectures import PAIRS
from safetensors.torch import load_file, save_file

import sae_bias as sb

ALPHA, RANK = 8, 2


def adapter(tiny, folder):
    """An adapter as peft writes it, by hand: ΔW = (alpha / r)·B·A on layer 1's query projection."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny.folder), "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "layers_to_transform": [1]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    q = tiny.model.layer(1).self_attn.q_proj.weight
    a, b = (
        torch.randn(RANK, q.shape[1], generator=generator),
        torch.randn(q.shape[0], RANK, generator=generator),
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return q + ALPHA / RANK * b @ a


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter_is_added_to_its_base(make_tiny, tmp_path):
    tiny = make_tiny("llama")
    merged = adapter(tiny, tmp_path / "lora")
    model = sb.load_model(tmp_path / "lora")
    torch.testing.assert_close(model.layer(1).self_attn.q_proj.weight, merged, atol=1e-5, rtol=0)
    ids = torch.tensor([model.encode(PAIRS[0][2])])
    own = tiny.fresh().hf
    own.model.layers[1].self_attn.q_proj.weight.data = merged
    with torch.no_grad():
        torch.testing.assert_close(
            model.hf(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-4, rtol=0
        )


def test_without_peft_the_line_that_merges_it_is_said(make_tiny, tmp_path, monkeypatch):
    adapter(make_tiny("llama"), tmp_path / "lora")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "sae_bias.models.adapters.find_spec", lambda name: None if name == "peft" else found(name)
    )
    with pytest.raises(sb.MissingError, match=r"pip install peft.*merge_and_unload"):
        sb.load_model(tmp_path / "lora")


def test_a_pickled_adapter_and_one_without_a_base_are_refused(make_tiny, tmp_path):
    folder = tmp_path / "lora"
    adapter(make_tiny("llama"), folder)
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(sb.RequestError, match="pickled"):
        sb.load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(sb.RequestError, match="base_model_name_or_path"):
        sb.load_model(folder)
