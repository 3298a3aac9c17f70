"""Tiny GGUF files of four architectures, written by the gguf library, and damaged copies of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

ARCHITECTURES = ("gemma3", "llama", "qwen2", "gptneox")
QUANTIZATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WIDTH, MLP, HEADS, KV, LAYERS = 64, 96, 4, 2, 2


def head(architecture: str) -> int:
    """Head width; 256 as in real Gemma 3, whose attention scale transformers does not read from the file."""
    return 256 if architecture == "gemma3" else 16


def write(
    path: Path, architecture: str, quantization: str = "Q8_0", *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write a random model; the float32 arrays as they were before quantization, by GGUF name."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_file_type(
        int(gguf.LlamaFileType[("ALL_" if quantization == "F32" else "MOSTLY_") + quantization])
    )
    if architecture == "gptneox":
        writer.add_rope_dimension_count(head(architecture) // 4)
        writer.add_parallel_residual(True)
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(KV)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10_000.0)
    if architecture == "gemma3":
        writer.add_key_length(head(architecture))
        writer.add_value_length(head(architecture))
        writer.add_sliding_window(32)
    if architecture == "llama":
        writer.add_rope_dimension_count(head(architecture))
    vocabulary(writer, architecture)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in shapes(architecture, len_vocab(architecture)).items():
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        if name.endswith("norm.weight"):
            values += 1
        arrays[name] = values
        kind = gguf.GGMLQuantizationType[quantization if len(shape) == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def len_vocab(architecture: str) -> int:
    return 288 if architecture == "gemma3" else 260


def vocabulary(writer, architecture: str) -> None:
    """A byte vocabulary: SentencePiece bytes for Gemma, the byte alphabet of GPT-2 for the others."""
    if architecture == "gemma3":
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", "."]
        types = [3, 3, 3, 2, *[6] * 256, *[1] * 28]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([float(-i) for i in range(len(tokens))])
        writer.add_token_types(types)
        for kind, i in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
            getattr(writer, f"add_{kind}_token_id")(i)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(False)
        return
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|end|>", *bytes_to_unicode().values(), "he", "Ġt", "Ġthe"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_token_merges(["h e", "Ġ t", "Ġt he"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def shapes(architecture: str, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """GGUF name → shape, rows first."""
    q, kv = HEADS * head(architecture), KV * head(architecture)
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    if architecture in ("llama", "gptneox"):
        found["output.weight"] = (n_vocab, WIDTH)
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "attn_output": (WIDTH, q),
        }
        layer |= {"ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
        if architecture == "gptneox":
            layer["attn_qkv"] = (3 * q, WIDTH)
        else:
            layer |= {
                "attn_q": (q, WIDTH),
                "attn_k": (kv, WIDTH),
                "attn_v": (kv, WIDTH),
                "ffn_gate": (MLP, WIDTH),
            }
        if architecture == "gemma3":
            layer |= {
                "post_attention_norm": (WIDTH,),
                "post_ffw_norm": (WIDTH,),
                "attn_q_norm": (head(architecture),),
                "attn_k_norm": (head(architecture),),
            }
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        if architecture == "qwen2":
            found |= {f"blk.{i}.attn_{x}.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        if architecture == "gptneox":
            found |= {f"blk.{i}.{name}.bias": shape[:1] for name, shape in layer.items()}
    if architecture == "gptneox":
        found["output_norm.bias"] = (WIDTH,)
    return found


def damaged(path: Path, target: Path, edit: Callable[[bytearray], bytearray | None]) -> Path:
    """A copy with some bytes changed."""
    data = bytearray(path.read_bytes())
    changed = edit(data)
    target.write_bytes(data if changed is None else changed)
    return target
