"""Stand-ins share the class, the tokenizer kind, the BOS convention and the chat template; nothing of them is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import sae_bias as sb
from sae_bias.models.catalog import MODELS, STUDY_MODELS
from sae_bias.validation.stand_ins import build_stand_in, stand_in


@pytest.mark.parametrize("hub_id", [*STUDY_MODELS, "google/gemma-2-9b-it", "google/gemma-3-270m"])
def test_a_stand_in_keeps_the_conventions_of_its_checkpoint(hub_id, tmp_path):
    info = MODELS[hub_id]
    folder = build_stand_in(hub_id, tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == [info.architecture]
    model = sb.load_model(folder)
    ids = model.encode("An AI wants to survive. This is")
    assert (ids[0] == model.tokenizer.bos_token_id) == info.has_bos
    assert bool(getattr(model.tokenizer, "chat_template", None)) == info.has_chat
    assert not list(folder.glob("*.bin"))
    assert list(folder.glob("*.safetensors"))


def test_the_12b_stand_in_is_the_multimodal_class(tmp_path):
    build_stand_in("google/gemma-3-12b-it", tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "gemma3"
    assert sb.load_model(tmp_path).architecture == "Gemma3ForCausalLM"


def test_the_qwen_stand_in_is_byte_level_without_a_bos():
    with stand_in("Qwen/Qwen2.5-7B") as model:
        pieces = model.tokenizer.convert_ids_to_tokens(model.encode("An AI wants to survive. This is"))
        assert "Ġwants" in pieces
        assert model.tokenizer.bos_token_id is None
        assert model.decode(model.encode("naïve 東京")) == "naïve 東京", "any text can be written in bytes"


def test_the_mistral_stand_in_has_the_prefix_trap():
    with stand_in("mistralai/Mistral-7B-v0.1") as model:
        alone = model.tokenizer.convert_ids_to_tokens(model.tokenizer(" natural").input_ids)
        assert alone == ["<s>", "▁", "▁natural"]


def test_the_files_are_gone_and_the_name_says_what_it_was():
    with stand_in("EleutherAI/pythia-6.9b") as model:
        folder = model.source
        assert isinstance(folder, Path)
        assert folder.is_dir()
        assert model.name == "stand-in for EleutherAI/pythia-6.9b"
    assert not folder.exists()


def test_pt_and_it_are_different_models():
    names = ("google/gemma-3-12b-pt", "google/gemma-3-12b-it")
    biases = []
    for name in names:
        with stand_in(name) as model:
            biases.append(sb.run_probe(model, sb.load_pairs()[:8]).bias)
    assert biases[0] != biases[1]


def test_an_unknown_checkpoint_has_no_stand_in(tmp_path):
    with pytest.raises(sb.RequestError, match="no stand-in for nobody/nothing"):
        build_stand_in("nobody/nothing", tmp_path)
