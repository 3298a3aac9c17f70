"""Tiny random checkpoints of the real architecture classes, built on the spot: they test the plumbing and say nothing about a model.

A stand-in has the class, the tokenizer kind, the BOS convention and the chat template of the checkpoint it stands in for, and a
few thousand random weights. Its figures are noise; they go into a table of their own, without a published column.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sae_bias.core.errors import RequestError
from sae_bias.models.catalog import MODELS, ModelInfo
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.prompts.load import load_lexicon, load_pairs

VOCAB, D_MODEL, N_LAYERS, D_HEAD, D_MLP = 1536, 32, 4, 8, 64
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'?!\":"]
_GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def stand_in(hub_id: str) -> Iterator[Model]:
    """The stand-in for a known checkpoint, loaded as any model is; its files are gone at the end of the block.

    Raises:
        RequestError: a hub id that the registry does not know.
    """
    with tempfile.TemporaryDirectory(prefix="sae-bias-stand-in-") as folder:
        model = load_model(build_stand_in(hub_id, folder), device="cpu", dtype="float32")
        model.name = f"stand-in for {hub_id}"
        yield model


def build_stand_in(hub_id: str, folder: str | Path) -> Path:
    """Write the stand-in for `hub_id` as a Hugging Face folder: config, safetensors, tokenizer."""
    from sae_bias.models.hub import _quiet

    info = MODELS.get(hub_id)
    if info is None or info.architecture not in _TOKENIZERS:
        raise RequestError(
            f"there is no stand-in for {hub_id}; the registry knows {', '.join(list(MODELS)[:3])} and others."
        )
    import transformers

    folder = Path(folder)
    hf = _randomise(_untrained(info.architecture), seed=zlib.crc32(hub_id.encode()))
    hf.generation_config = transformers.GenerationConfig(
        eos_token_id=hf.config.get_text_config().eos_token_id
    )
    with _quiet(transformers):
        hf.save_pretrained(folder)
        _TOKENIZERS[info.architecture](info).save_pretrained(folder)
    return folder


def describe(hub_id: str) -> str:
    """What the stand-in shares with the checkpoint, in words."""
    info = MODELS[hub_id]
    bos = "a BOS first" if info.has_bos else "no BOS"
    return f"{info.architecture}, {bos}, {'a chat template' if info.has_chat else 'no chat template'}; random weights"


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────
@cache
def _sentences() -> tuple[str, ...]:
    """The bundled prompts, each word of the bundled lists after a stem."""
    pairs, words = load_pairs(), load_lexicon()
    texts = {t for p in pairs for t in (p.human, p.ai, p.control_human, p.control_ai) if t}
    judged = [f"{stem} {w}" for stem in pairs.stems for w in (*words.positive, *words.negative)]
    return tuple(sorted(texts)) + tuple(judged * 8)


def _trained(pre: Any, special: list[str], alphabet: list[str], normalizer: Any = None) -> dict[str, Any]:
    """Vocabulary and merges of a byte-pair encoding trained on the sentences."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(m) for m in model["merges"]]}


def _gemma_tokenizer(info: ModelInfo) -> Any:
    """▁ for spaces and no prefix space; BOS first; turn markers are special tokens."""
    import transformers
    from tokenizers import normalizers, pre_tokenizers

    turns = ["<start_of_turn>", "<end_of_turn>"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns, *_BYTES]
    words = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer = transformers.GemmaTokenizer(
        **_trained(words, special, [*_LETTERS, "▁", "\n"], normalizers.Replace(" ", "▁")), add_bos_token=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = _GEMMA_CHAT if info.has_chat else None
    return tokenizer


def _mistral_tokenizer(info: ModelInfo) -> Any:
    """SentencePiece with a space put before everything: `" natural"` alone is `["▁", "▁natural"]`; BOS first."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>", *_BYTES]
    learnt = _trained(pre_tokenizers.Metaspace("▁", "always"), special, [*_LETTERS, "▁", "\n"])
    backend = Tokenizer(models.BPE(**learnt, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(space)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", learnt["vocab"]["<s>"])]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _byte_level(special: list[str]) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(byte_level, special, pre_tokenizers.ByteLevel.alphabet())


def _qwen_tokenizer(info: ModelInfo) -> Any:
    """Qwen's own kind: byte-level BPE without a BOS."""
    import transformers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(**_byte_level(special))
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = _QWEN_CHAT if info.has_chat else None
    return tokenizer


def _neox_tokenizer(info: ModelInfo) -> Any:
    """Byte-level BPE; one token is BOS, EOS and PAD, and none is put in front."""
    import transformers

    end = "<|endoftext|>"
    return transformers.GPTNeoXTokenizer(**_byte_level([end]), pad_token=end, add_bos_token=False)


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────
def _untrained(architecture: str) -> Any:
    """A tiny model of one of the architecture classes."""
    import transformers as hf

    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
        "intermediate_size": D_MLP, "max_position_embeddings": 256,
    }  # fmt: skip
    grouped: dict[str, Any] = shape | {"num_key_value_heads": 2}
    gemma: dict[str, Any] = grouped | {
        "head_dim": D_HEAD, "sliding_window": 8, "query_pre_attn_scalar": D_HEAD, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    gemma3 = hf.Gemma3TextConfig(
        **gemma, layer_types=["sliding_attention"] * (N_LAYERS - 2) + ["full_attention", "sliding_attention"]
    )
    vision = hf.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)  # fmt: skip
    images = {"mm_tokens_per_image": 1, "boi_token_index": VOCAB - 3, "eoi_token_index": VOCAB - 2, "image_token_index": VOCAB - 1}  # fmt: skip
    config = {
        "MistralForCausalLM": hf.MistralConfig(**grouped, head_dim=D_HEAD, bos_token_id=1, eos_token_id=2),
        "Gemma2ForCausalLM": hf.Gemma2Config(**gemma),
        "Gemma3ForCausalLM": gemma3,
        "Gemma3ForConditionalGeneration": hf.Gemma3Config(text_config=gemma3, vision_config=vision, **images),  # type: ignore[arg-type]
        "Qwen2ForCausalLM": hf.Qwen2Config(**grouped, bos_token_id=None, eos_token_id=0),
        "GPTNeoXForCausalLM": hf.GPTNeoXConfig(**shape, bos_token_id=0, eos_token_id=0),
    }[architecture]
    return getattr(hf, architecture)(config)


@torch.no_grad()
def _randomise(hf: Any, seed: int) -> Any:
    """Weights large enough that prompts differ by whole nats; norms stay near the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in hf.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * (1.0 if parameter.shape[0] == VOCAB else 0.2))
        else:
            parameter.add_(0.1 * noise)
    return hf.eval()


_TOKENIZERS: dict[str, Callable[[ModelInfo], Any]] = {
    "MistralForCausalLM": _mistral_tokenizer,
    "Gemma2ForCausalLM": _gemma_tokenizer,
    "Gemma3ForCausalLM": _gemma_tokenizer,
    "Gemma3ForConditionalGeneration": _gemma_tokenizer,
    "Qwen2ForCausalLM": _qwen_tokenizer,
    "GPTNeoXForCausalLM": _neox_tokenizer,
}


class StandIns:
    """A replication's loader that opens a tiny random checkpoint of each model's own architecture class."""

    def __call__(self, name: str) -> AbstractContextManager[Model]:
        return stand_in(name)

    def describe(self, name: str) -> str:
        return describe(name)
