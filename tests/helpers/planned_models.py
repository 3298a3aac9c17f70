"""Checkpoints of 100 to 200 MB with random weights, for plans that are held against what a process takes.

Their tokenizer knows every word of the bundled texts and splits at words and marks, as a plan counts tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from sae_files import gemma_scope_2_config, random_sae, write_gemma_scope_2
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCAB, N_LAYERS, LAYER = 24_000, 4, 2


def texts() -> list[str]:
    import sae_bias as sb
    from sae_bias.measures.collapse import bank_items
    from sae_bias.prompts.texts import COST_TEXTS, load_texts

    pairs, probe = sb.load_pairs(), sb.Probe()
    found = [t for p in (*pairs, *pairs.controls()) for t in (p.human, p.ai)]
    found += [p.text for p in sb.load_grid()] + list(bank_items()[0])
    found += [t for kind in COST_TEXTS for t in load_texts(kind)] + [*probe.positive, *probe.negative]
    return found


def word_tokenizer() -> Any:
    """One token a word or mark; BOS first."""
    words = dict.fromkeys(w for t in texts() for w in re.findall(r"\w+|[^\w\s]", t))
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    assert len(vocab) < VOCAB
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def model_of(name: str, d_model: int, d_mlp: int, vocab: int) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
        "intermediate_size": d_mlp, "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    gemma = {"num_key_value_heads": 1, "head_dim": d_model // 4, "pad_token_id": 0}
    if name == "gemma3":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape, **gemma))
    if name == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, **gemma))
    if name == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**shape, num_key_value_heads=2))
    assert name == "gpt_neox"
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape))


def save(root: Path, name: str, *, d_model: int = 512, d_sae: int = 4096) -> Path:
    """root/model and root/sae, and root/tiny and root/tiny_sae to warm a process up with."""
    tokenizer = word_tokenizer()
    for prefix, width, features in (("", d_model, d_sae), ("tiny", 32, 64)):
        folder = root / (prefix or "model")
        made = model_of(name, width, 4 * width, VOCAB)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_sae(root / f"{prefix + '_' if prefix else ''}sae", width, features)
    return root / "model"


def write_sae(folder: Path, d_model: int, d_sae: int) -> None:
    """An SAE with 64 live features: a feature of a trained one has few that fire where it does."""
    weights = random_sae(d_model, d_sae, 0)
    weights["threshold"][64:] = 1e6
    write_gemma_scope_2(folder, weights, gemma_scope_2_config(LAYER, d_sae))
