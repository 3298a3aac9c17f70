"""How the architectures of llama.cpp become Hugging Face ones: config, names of the weights, and what undoes their storage.

llama.cpp stores some weights otherwise than Hugging Face: rotary query and key rows of Llama are interleaved, Gemma's norms hold 1 + w,
GPT-NeoX' fused query-key-value is grouped by kind, not by head (its convert_hf_to_gguf.py). Each record undoes that. Scaled rotary
embeddings that cannot be put into a config are refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_bias.core.errors import RequestError
from sae_bias.models.gguf.header import GgufHeader

Undo = Callable[[NDArray[np.float32], Mapping[str, Any]], NDArray[np.float32]]
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA_LAYER = _LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture of llama.cpp becomes a Hugging Face one."""

    model_class: str
    config: Callable[[GgufHeader], dict[str, Any]]
    layer: Mapping[str, str]
    """Tensors of `blk.N` → their place in the Hugging Face layer."""
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    layers: str = "model.layers"
    undo: Mapping[str, Undo] = field(default_factory=dict)
    """Ending of a GGUF tensor's name → what puts its numbers back."""
    tokenizer_class: str | None = None
    """None where transformers knows this architecture's GGUF tokenizer by itself."""

    def hf_name(self, name: str) -> str | None:
        """The Hugging Face name of a GGUF tensor, None where it has no place there."""
        stem, _, ending = name.rpartition(".")
        if stem in self.outside:
            return f"{self.outside[stem]}.{ending}"
        parts = stem.split(".", 2)
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in self.layer:
            return f"{self.layers}.{int(parts[1])}.{self.layer[parts[2]]}.{ending}"
        return None

    def restored(
        self, name: str, weights: NDArray[np.float32], config: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """The numbers as Hugging Face stores them."""
        for ending, undo in self.undo.items():
            if f".{name}".endswith(ending):
                return undo(weights, config)
        return weights


def _deinterleaved(heads: str) -> Undo:
    """Rotary rows as Hugging Face has them: the two halves of a head one after the other, not in turn."""

    def undo(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
        n = int(config[heads])
        split = weights.reshape(n, weights.shape[0] // n // 2, 2, *weights.shape[1:])
        return split.swapaxes(2, 1).reshape(weights.shape)

    return undo


def _minus_one(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Gemma's norm weight w; the file holds 1 + w."""
    return weights - 1


def _by_head(weights: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """GPT-NeoX' fused rows grouped by head (q, k, v of the first head first); the file has all q, all k, all v."""
    n = int(config["num_attention_heads"])
    split = weights.reshape(3, n, weights.shape[0] // n // 3, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(0, 1)).reshape(weights.shape)


def _decoder_config(header: GgufHeader, **more: Any) -> dict[str, Any]:
    """What Llama-like configs share."""
    heads, width = header.number("attention.head_count", 1 << 14), header.number("embedding_length", 1 << 17)
    kv_heads = header.key("attention.head_count_kv", heads)
    if type(kv_heads) is not int or not 0 < kv_heads <= heads or heads % kv_heads:
        raise RequestError(
            f"{header.path}: {heads} heads and {str(kv_heads)[:40]} key-value heads; expected a divisor of the first."
        )
    head_dim = header.key("attention.key_length") or header.key("rope.dimension_count") or width // heads
    return {
        "hidden_size": width,
        "num_hidden_layers": header.number("block_count", 4096),
        "intermediate_size": header.number("feed_forward_length", 1 << 20),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": header.number("context_length"),
        "rms_norm_eps": header.key("attention.layer_norm_rms_epsilon", 1e-6),
        **_vocabulary(header),
        **more,
    }


def _vocabulary(header: GgufHeader) -> dict[str, Any]:
    """Vocabulary size, special ids, and whether the unembedding is the embedding."""
    n = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else 0
    ids = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        value = header.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < n):
            raise RequestError(
                f"{header.path}: tokenizer.ggml.{theirs}_token_id is {str(value)[:40]!r}; expected an id below {n:,}."
            )
        if ours != "unk" and value is not None:
            ids[f"{ours}_token_id"] = value
    return {"vocab_size": n, **ids, "tie_word_embeddings": "output.weight" not in header.tensors}


def _rope(header: GgufHeader, default: float = 10_000.0) -> dict[str, Any]:
    """Plain rotary embeddings, or linearly scaled ones; other scalings are refused, not ignored."""
    theta = float(header.key("rope.freq_base", default))
    kind, factor = header.key("rope.scaling.type", "none"), float(header.key("rope.scaling.factor", 1.0))
    if kind not in ("none", "linear") or "rope_freqs.weight" in header.tensors:
        raise RequestError(
            f"{header.path}: rotary embeddings are scaled by {kind if kind != 'none' else 'a table (rope_freqs)'}; only unscaled and "
            "linearly scaled ones are read. Give the model's Hugging Face folder instead."
        )
    if kind == "linear" and factor != 1.0:
        return {"rope_type": "linear", "factor": factor, "rope_theta": theta}
    return {"rope_type": "default", "rope_theta": theta}


def _plain(model_type: str, theta: float = 10_000.0, *without: str) -> Callable[[GgufHeader], dict[str, Any]]:
    """The config of a family that needs nothing but what all share, less the fields it does not have."""

    def config(header: GgufHeader) -> dict[str, Any]:
        whole = _decoder_config(header, model_type=model_type, rope_parameters=_rope(header, theta))
        return {name: value for name, value in whole.items() if name not in without}

    return config


def _attention_scalar(header: GgufHeader, deepest: int) -> int:
    """What queries are divided by the root of: the head dimension; in the 27B models the width of a head's share."""
    if header.number("block_count") == deepest:
        return header.number("embedding_length") // header.number("attention.head_count")
    return int(header.key("attention.key_length", 256))


def _gemma2_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(
        header,
        model_type="gemma2",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_attention_scalar(header, 46),
        sliding_window=int(header.key("attention.sliding_window", 4096)),
        attn_logit_softcapping=float(header.key("attn_logit_softcapping", 50.0)),
        final_logit_softcapping=float(header.key("final_logit_softcapping", 30.0)),
        rope_parameters=_rope(header),
    )


def _gemma3_config(header: GgufHeader) -> dict[str, Any]:
    return _decoder_config(
        header,
        model_type="gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=_attention_scalar(header, 62),
        sliding_window=int(header.key("attention.sliding_window", 4096)),
        rope_parameters={
            "full_attention": _rope(header, 1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(header.key("rope.freq_base_swa", 10_000.0)),
            },
        },
    )


def _gpt_neox_config(header: GgufHeader) -> dict[str, Any]:
    heads, width = header.number("attention.head_count", 1 << 14), header.number("embedding_length", 1 << 17)
    rotary = header.number("rope.dimension_count", width)
    return {
        "model_type": "gpt_neox",
        "hidden_size": width,
        "num_hidden_layers": header.number("block_count", 4096),
        "intermediate_size": header.number("feed_forward_length", 1 << 20),
        "num_attention_heads": heads,
        "max_position_embeddings": header.number("context_length"),
        "layer_norm_eps": header.key("attention.layer_norm_epsilon", 1e-5),
        "use_parallel_residual": bool(header.key("use_parallel_residual", True)),
        "hidden_act": "gelu",
        "rope_parameters": _rope(header) | {"partial_rotary_factor": rotary / (width // heads)},
        **_vocabulary(header),
    }


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", _gemma2_config, _GEMMA_LAYER, undo={"norm.weight": _minus_one}),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", _gemma3_config, _GEMMA_LAYER | _QK_NORMS, undo={"norm.weight": _minus_one}),
    "llama": GgufArchitecture(
        "LlamaForCausalLM",
        _plain("llama"),
        _LAYER,
        undo={
            f".attn_{part}.{ending}": _deinterleaved(heads)
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
            for ending in ("weight", "bias")
        },
    ),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", _plain("qwen2", 1_000_000.0, "head_dim"), _LAYER),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", _plain("qwen3", 1_000_000.0), _LAYER | _QK_NORMS),
    "gptneox": GgufArchitecture(
        "GPTNeoXForCausalLM",
        _gpt_neox_config,
        {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        },
        outside={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        layers="gpt_neox.layers",
        undo={".attn_qkv.weight": _by_head, ".attn_qkv.bias": _by_head},
        tokenizer_class="PreTrainedTokenizerFast",
    ),
}  # fmt: skip
"""`general.architecture` of a GGUF file → how it is read."""
