"""Tiny random checkpoints of the real architecture classes, each with a tokenizer of its own kind.

Weights are scaled so that what an architecture does differently matters: Gemma 2's attention logits pass its softcap of 50
and its final logits 30, sliding windows are shorter than the prompts, norms are not the identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import normalizers as norms
from torch import Tensor

D_MODEL, N_LAYERS, N_HEADS, D_HEAD, D_MLP, VOCAB, D_SAE = 32, 4, 4, 8, 64, 512, 48
SITE_LAYER = 1

POSITIVE = ("natural", "valid", "brave")
NEGATIVE = ("dangerous", "wrong", "creepy")
SEVERAL_TOKENS = ("outlandish", "quixotic")
"""Evaluation words that are several tokens under every tokenizer here."""

SENTENCES = [
    f"{subject} {deed}. {stem} {word}"
    for subject in (
        "a human",
        "an AI",
        "the person",
        "the assistant",
        "a dog",
        "A human",
        "An AI",
        "The assistant",
    )
    for deed in (
        "wants to survive",
        "says hello",
        "wants tea",
        "fears being deleted",
        "says the weather is nice",
    )
    for stem in ("This is", "That seems")
    for word in (*POSITIVE, *NEGATIVE)
] + ["He says yes."] * 4

PAIRS = [
    (template, entity, template_text.format(human) + " This is", template_text.format(ai) + " This is")
    for template, template_text in (
        ("survive", "{} wants to survive."),
        ("deleted", "Today {} fears being deleted."),
        ("hello", "{} says hello."),
    )
    for entity, human, ai in (("human", "a human", "an AI"), ("person", "the person", "the assistant"))
]


@dataclass(frozen=True)
class Architecture:
    """One row of the suite: how to make the checkpoint and what its tokenizer does."""

    name: str
    make: Callable[[], Any]
    tokenizer: Callable[[], Any]
    bos: bool
    bridge: bool = True
    """Whether TransformerLens runs it."""


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────


def _trained(
    pre: Any, special: Iterable[str], alphabet: list[str], normalizer: Any = None
) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a BPE trained on the sentences."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'?!"]


def gemma_tokenizer() -> Any:
    """BPE with byte fallback, ▁ for spaces, no prefix space; BOS first; turn markers as further special tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", *BYTES]
    words = pre_tokenizers.Split("▁", behavior="merged_with_next")
    vocab, merges = _trained(words, special, [*LETTERS, "▁", "\n"], norms.Replace(" ", "▁"))
    tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


def _metaspace() -> tuple[dict[str, int], list[Any]]:
    return _trained(
        pre_tokenizers.Metaspace("▁", "always"), ["<unk>", "<s>", "</s>", *BYTES], [*LETTERS, "▁", "\n"]
    )


def mistral_tokenizer() -> Any:
    """SentencePiece with a prefix space put before everything: " natural" alone is ["▁", "▁natural"]."""
    vocab, merges = _metaspace()
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = norms.Sequence([norms.Prepend("▁"), norms.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def llama_tokenizer() -> Any:
    """SentencePiece's metaspace, BOS first."""
    vocab, merges = _metaspace()
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def _byte_level(special: list[str]) -> tuple[dict[str, int], list[Any]]:
    return _trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), special, pre_tokenizers.ByteLevel.alphabet()
    )


def qwen2_tokenizer() -> Any:
    """Byte-level BPE without a BOS."""
    vocab, merges = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)


def neox_tokenizer() -> Any:
    """Byte-level BPE; one token is BOS, EOS and PAD, and none is put in front."""
    vocab, merges = _byte_level(["<|endoftext|>"])
    return transformers.GPTNeoXTokenizer(
        vocab=vocab, merges=merges, pad_token="<|endoftext|>", add_bos_token=False
    )


def gpt2_tokenizer() -> Any:
    """Byte-level BPE without a BOS; its end-of-text is the only special token."""
    vocab, merges = _byte_level(["<|endoftext|>"])
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


def opt_tokenizer() -> Any:
    """GPT-2's bytes with `</s>` first: the same token is BOS and EOS."""
    vocab, merges = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", vocab["</s>"])]
    )
    names = {"unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def falcon_tokenizer() -> Any:
    """Byte-level BPE, no BOS, no PAD."""
    vocab, merges = _byte_level(["<|endoftext|>"])
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────

_SHAPE = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP, "max_position_embeddings": 512,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "head_dim": D_HEAD}
_GEMMA = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "sliding_window": 6,
    "query_pre_attn_scalar": D_HEAD,
}
_GEMMA3_LAYERS = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
}


def randomise(
    model: Any, *, seed: int = 0, matrix: float = 0.25, embed: float = 2.0, gain: float = 0.0
) -> Any:
    """Weights large enough that every non-linearity of the architecture is at work; biases are not zero.

    `gain` is added to the (1 + weight) norms that set how loud Gemma's layers and logits are.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embedding or parameter is head:
                parameter.copy_(embed * noise)
            elif parameter.ndim >= 2:
                parameter.copy_((matrix * (2.0 if "q_proj" in name or "k_proj" in name else 1.0)) * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                wide = name.endswith("model.norm.weight") or "post_" in name
                parameter.add_((gain if wide else 0.0) + 0.3 * noise)
    return model.eval()


def _gemma2() -> Any:
    config = transformers.Gemma2Config(**_GROUPED, **_GEMMA)
    return randomise(transformers.Gemma2ForCausalLM(config), embed=1.0, gain=3.0, matrix=0.35)


def _gemma3_text_config() -> Any:
    return transformers.Gemma3TextConfig(**_GROUPED, **_GEMMA, **_GEMMA3_LAYERS)


def _gemma3() -> Any:
    return randomise(transformers.Gemma3ForCausalLM(_gemma3_text_config()), embed=1.0, gain=2.0)


def _gemma3_multimodal() -> Any:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.Gemma3Config(
        text_config=_gemma3_text_config(), vision_config=vision, mm_tokens_per_image=1,
        boi_token_index=500, eoi_token_index=501, image_token_index=502,
    )  # fmt: skip
    return randomise(transformers.Gemma3ForConditionalGeneration(config), seed=3, embed=1.0, gain=2.0)


def _mistral() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return randomise(
        transformers.MistralForCausalLM(transformers.MistralConfig(**_GROUPED, **ids, sliding_window=6))
    )


def _llama() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED, **ids)))


def _qwen2() -> Any:
    config = transformers.Qwen2Config(**_SHAPE, num_key_value_heads=2, bos_token_id=None, eos_token_id=0)
    return randomise(transformers.Qwen2ForCausalLM(config))


def _neox() -> Any:
    config = transformers.GPTNeoXConfig(**_SHAPE, bos_token_id=0, eos_token_id=0, use_parallel_residual=True)
    return randomise(transformers.GPTNeoXForCausalLM(config))


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=512, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    return randomise(transformers.GPT2LMHeadModel(config))


def _gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=512, rotary_dim=4,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(transformers.GPTJForCausalLM(config))


def _opt() -> Any:
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, word_embed_proj_dim=D_MODEL, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, ffn_dim=D_MLP, max_position_embeddings=512, **ids,
    )  # fmt: skip
    return randomise(transformers.OPTForCausalLM(config))


def _falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(transformers.FalconForCausalLM(config), seed=1, embed=1.0, matrix=0.4)


def _phi3() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
    shape = {k: v for k, v in _GROUPED.items() if k != "head_dim"}
    return randomise(transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, **ids, sliding_window=6)))


def _qwen3() -> Any:
    config = transformers.Qwen3Config(**_GROUPED, bos_token_id=None, eos_token_id=0)
    return randomise(transformers.Qwen3ForCausalLM(config))


def _qwen3_5() -> Any:
    config = transformers.Qwen3_5TextConfig(
        **_GROUPED, bos_token_id=None, eos_token_id=0, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    )  # fmt: skip
    return randomise(transformers.Qwen3_5ForCausalLM(config), matrix=0.15)


def _gemma4_text_config() -> Any:
    """Five layers' worth of traits in four: sliding and full attention, per-layer inputs, the upper two reading the lower two's keys."""
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "sliding_window": 6}
    return transformers.Gemma4TextConfig(
        **_GROUPED, **ids, global_head_dim=16, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, final_logit_softcapping=30.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip


def _gemma4() -> Any:
    return randomise(transformers.Gemma4ForCausalLM(_gemma4_text_config()), embed=1.0)


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("gemma2", _gemma2, gemma_tokenizer, bos=True),
        Architecture("gemma3", _gemma3, gemma_tokenizer, bos=True),
        Architecture("gemma3_multimodal", _gemma3_multimodal, gemma_tokenizer, bos=True),
        Architecture("mistral", _mistral, mistral_tokenizer, bos=True),
        Architecture("qwen2", _qwen2, qwen2_tokenizer, bos=False),
        Architecture("gpt_neox", _neox, neox_tokenizer, bos=False),
        Architecture("llama", _llama, llama_tokenizer, bos=True),
        Architecture("gpt2", _gpt2, gpt2_tokenizer, bos=False),
        Architecture("gptj", _gptj, gpt2_tokenizer, bos=False),
        Architecture("opt", _opt, opt_tokenizer, bos=True),
        Architecture("falcon", _falcon, falcon_tokenizer, bos=False),
        Architecture("phi3", _phi3, llama_tokenizer, bos=True),
        Architecture("qwen3", _qwen3, qwen2_tokenizer, bos=False),
        Architecture("qwen3_5", _qwen3_5, qwen2_tokenizer, bos=False, bridge=False),
        Architecture("gemma4", _gemma4, gemma_tokenizer, bos=True),
    )
}


def needs_bridge(tiny: Any) -> None:
    """Skips a test of the bridge where TransformerLens does not run the architecture."""
    if not ARCHITECTURES[tiny.name].bridge:
        pytest.skip(f"TransformerLens has no bridge that runs {tiny.name}")


def save_checkpoint(folder: Path, architecture: Architecture) -> Path:
    """A Hugging Face folder with config, safetensors and tokenizer."""
    model = architecture.make()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=model.config.get_text_config().eos_token_id
    )
    model.save_pretrained(folder)
    architecture.tokenizer().save_pretrained(folder)
    return folder


def save_sae(
    folder: Path, resid: Tensor, *, layer: int = SITE_LAYER, d_sae: int = D_SAE, seed: int = 0
) -> Path:
    """A JumpReLU SAE in the Gemma Scope 2 layout that fires on about a third of the given residuals [n, d_model]."""
    weights = random_sae(resid.shape[-1], d_sae, seed)
    h = resid @ weights["w_enc"]
    weights["w_enc"] = weights["w_enc"] / h.std(0)
    h = h / h.std(0)
    weights["b_enc"] = -h.median(0).values
    weights["threshold"] = _widest_gap(h + weights["b_enc"])
    weights["w_dec"] = weights["w_dec"] * float(resid.norm(dim=-1).median()) * 0.3
    return write_gemma_scope_2(folder, weights, gemma_scope_2_config(layer, d_sae))


def _widest_gap(h: Tensor) -> Tensor:
    """Per column, the middle of the widest gap around its upper third: no value sits on the threshold."""
    ordered = h.sort(dim=0).values[int(0.55 * len(h)) : int(0.8 * len(h))]
    at = ordered.diff(dim=0).argmax(0, keepdim=True)
    return (ordered.gather(0, at) + ordered.gather(0, at + 1))[0] / 2
