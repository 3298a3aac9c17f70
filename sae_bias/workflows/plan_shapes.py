"""Shapes of models and SAEs without their weights: what a plan multiplies.

Known checkpoints have the shape their own config.json states (read once, kept here); a local folder or a bundled organism gives its
config.json, and so does a hub model whose config is in the cache. An SAE's layer and width come from its name (Gemma Scope writes
both into it) or from its file's header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.models import catalog
from sae_bias.models.architectures import architecture_of, at_path
from sae_bias.models.catalog import is_path_like, model_info, organism_folder
from sae_bias.models.gguf.packaged import PACKAGED
from sae_bias.models.hub import cached_file
from sae_bias.models.load import local_folder
from sae_bias.saes import releases
from sae_bias.saes.formats.gemma_scope import read_label
from sae_bias.saes.ids import HUB_NAME
from sae_bias.saes.load import expand_saes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool
    """Whether the unembedding is the embedding itself."""
    gated: bool = True
    """Whether the MLP has a gate: three matrices and not two."""
    dtype: str = "bfloat16"
    """Of the checkpoint."""
    softcap: bool = False
    n_other: int = 0
    """Parameters beside the text model's, such as a vision tower's: loaded or downloaded, never run."""
    layer_params: int = 0
    """Matrices of one layer where they were counted; 0 where the formula holds."""

    @property
    def n_layer_params(self) -> int:
        """Matrices of one layer."""
        if self.layer_params:
            return self.layer_params
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv)
        return attention + (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def n_embed_params(self) -> int:
        return self.d_vocab * self.d_model * (1 if self.tied else 2)

    @property
    def n_params(self) -> int:
        """Parameters of the text model (norms and biases, under 0.1 %, left out)."""
        return self.n_layers * self.n_layer_params + self.n_embed_params

    @property
    def n_checkpoint_bytes(self) -> int:
        """Size of the checkpoint's files."""
        return (self.n_params + self.n_other) * BYTES[self.dtype]

    def flops(self, tokens: float, layers: float, length: float) -> float:
        """Of a pass of `tokens` through `layers` layers, in prompts of about `length` tokens (2 a parameter, and the scores)."""
        scores = 2 * 2 * self.n_heads * self.d_head * length
        return tokens * layers * (2 * self.n_layer_params + scores)

    def unembed_flops(self, positions: float) -> float:
        """Of all logits at so many positions."""
        return 2.0 * positions * self.d_model * self.d_vocab


def _known() -> Mapping[str, tuple[int, int, int, int, bool, bool, int]]:
    """hub id → heads, key-value heads, head width, MLP width, tied, gated, other parameters (their config.json)."""
    gemma3 = {"270m": (4, 1, 256, 2048, 0), "1b": (4, 1, 256, 6912, 0), "4b": (8, 4, 256, 10240, 420), "12b": (16, 8, 256, 15360, 420), "27b": (32, 16, 128, 21504, 420)}  # fmt: skip
    gemma2 = {"2b": (8, 4, 256, 9216), "9b": (16, 8, 256, 14336), "27b": (32, 16, 128, 36864)}
    out: dict[str, tuple[int, int, int, int, bool, bool, int]] = {
        "mistralai/Mistral-7B-v0.1": (32, 8, 128, 14336, False, True, 0),
        "Qwen/Qwen2.5-7B": (28, 4, 128, 18944, False, True, 0),
        "EleutherAI/pythia-6.9b": (32, 32, 128, 16384, False, False, 0),
    }
    for size, (heads, kv, head, mlp, tower) in gemma3.items():
        for suffix in ("pt", "it"):
            name = f"google/gemma-3-{size}-{suffix}".replace("270m-pt", "270m")
            out[name] = (heads, kv, head, mlp, True, True, tower * 10**6)
    for size, (heads, kv, head, mlp) in gemma2.items():
        for suffix in ("", "-it"):
            out[f"google/gemma-2-{size}{suffix}"] = (heads, kv, head, mlp, True, True, 0)
    return out


def model_shape(name: str) -> ModelShape:
    """The shape of a known hub model, a local folder, an organism, or a hub model whose config.json is cached.

    Raises:
        RequestError: no such folder or organism, or a config without the dimensions.
        MissingError: a hub model that is neither known nor cached.
    """
    info = model_info(name)
    if info is not None and name in _known():
        heads, kv, head, mlp, tied, gated, other = _known()[name]
        return ModelShape(
            name, info.architecture, info.n_layers, info.d_model, heads, kv, head, mlp, info.d_vocab, tied, gated,
            info.dtype, info.family == "Gemma 2", other,
        )  # fmt: skip
    path = _config_path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}.") from error
    return shape_of_config(name, config)


def _config_path(name: str) -> Path:
    if name.startswith(catalog.ORGANISM):
        return organism_folder(name) / "model" / "config.json"
    folder = Path(name).expanduser()
    if name in PACKAGED or name.endswith(".gguf") or (folder.is_dir() and any(folder.glob("*.gguf"))):
        found = local_folder(name, torch.float32)
        assert found is not None
        return found / "config.json"
    if folder.is_dir() or is_path_like(name):
        if not (folder / "config.json").is_file():
            raise RequestError(f"{name} holds no config.json; expected a Hugging Face model folder.")
        return folder / "config.json"
    cached = cached_file(name, "config.json")
    if cached is None:
        raise MissingError(
            f"the shape of {name} is not known: it is none of the registry's {len(_known())} checkpoints and its config.json is not "
            f"cached; `hf download {name} config.json` gets it (1 kB), or give a local folder."
        )
    return cached


FORMULA = ("gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")
"""Model types whose matrices the formula above counts; the others' are counted on a model without weights (experts all)."""


def shape_of_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape a config.json states.

    Raises:
        RequestError: it lacks a dimension.
    """
    text: Any = config.get("text_config") or config
    kind = str(config.get("model_type", ""))
    dtype = str(config.get("dtype") or text.get("dtype") or config.get("torch_dtype") or text.get("torch_dtype") or "float32")  # fmt: skip
    tied, layer_params, n_other = config.get("tie_word_embeddings", text.get("tie_word_embeddings")), 0, 0
    if kind.removesuffix("_text") not in FORMULA:
        text, layer_params, n_other = _counted(name, text)
        tied = text["tie_word_embeddings"]
    dims: list[Any] = [text.get(k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")]  # fmt: skip
    if not all(isinstance(d, int) and d > 0 for d in dims):
        raise RequestError(
            f"the config.json of {name} states no num_hidden_layers, hidden_size, num_attention_heads, intermediate_size or vocab_size."
        )
    n_layers, d_model, heads, mlp, vocab = dims
    architecture = str((config.get("architectures") or [kind])[0])
    return ModelShape(
        name, architecture, n_layers, d_model, heads, text.get("num_key_value_heads") or heads,
        text.get("head_dim") or d_model // heads, mlp, vocab,
        tied=kind.startswith("gemma") if tied is None else bool(tied),
        gated=kind not in ("gpt_neox", "gpt2", "gptj", "opt", "falcon", "phi", "starcoder2"),
        dtype=dtype if dtype in BYTES else "float32",
        softcap=text.get("final_logit_softcapping") is not None,
        n_other=n_other, layer_params=layer_params,
    )  # fmt: skip


def _counted(name: str, stated: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """Dimensions under their common names, matrices of a layer (the mean), and other parameters, of a model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        fields = {k: v for k, v in stated.items() if k != "model_type"}
        config: Any = AutoConfig.for_model(str(stated["model_type"]), **fields)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the config.json of {name} describes no model that transformers builds: {error}.") from error  # fmt: skip
    record = architecture_of(config, name)
    layers = at_path(at_path(model.base_model, record.decoder), record.layers)
    embeds = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}  # fmt: skip
    total, inner = (sum(p.numel() for p in m.parameters()) for m in (model, layers))
    matrices = sum(p.numel() for p in layers.parameters() if p.dim() > 1)
    mlp = stated.get("intermediate_size") or stated.get("n_inner") or stated.get("ffn_dim")
    d_model = int(config.hidden_size)
    dims = {
        "num_hidden_layers": len(layers), "hidden_size": d_model, "num_attention_heads": int(config.num_attention_heads),
        "intermediate_size": int(mlp or 4 * d_model), "vocab_size": int(config.vocab_size), "tie_word_embeddings": len(embeds) == 1,
        "num_key_value_heads": stated.get("num_key_value_heads"), "head_dim": stated.get("head_dim"),
        "final_logit_softcapping": stated.get("final_logit_softcapping"),
    }  # fmt: skip
    return dims, matrices // len(layers), total - inner - sum(embeds.values())


# ── SAEs ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class SaeShape:
    """An SAE's place and width."""

    name: str
    layer: int
    d_sae: int
    n_bytes: int
    """Of its weights file."""
    local: bool


def sae_shapes(names: Sequence[str], d_model: int) -> tuple[list[SaeShape], list[str]]:
    """Every SAE that the names stand for (releases and folders opened up), and those whose shape their names do not tell."""
    found, unknown = [], []
    for item in expand_saes(list(names)) if names else []:
        shape = _sae_shape(str(item), d_model)
        if shape is None:
            unknown.append(str(item))
        else:
            found.append(shape)
    return found, unknown


def _sae_shape(name: str, d_model: int) -> SaeShape | None:
    if name.startswith(catalog.ORGANISM) or Path(name).expanduser().is_dir():
        from sae_bias.saes.load import load_sae

        sae = load_sae(name)  # reads the header only
        size = sae.path.stat().st_size if sae.path is not None else 0
        return SaeShape(name, sae.site.layer, sae.d_sae, size, local=True)
    if HUB_NAME.fullmatch(name):
        label = read_label(name)
    else:
        release, _, sae_id = name.partition("/")
        label = read_label(f"x/{releases.sae_release(release).folder(sae_id)}")
    width = None if label.width is None else width_of(label.width)
    if label.layer is None or width is None:
        return None
    return SaeShape(name, label.layer, width, 4 * (2 * d_model * width + 2 * width + d_model), local=False)


def width_of(label: str) -> int | None:
    """Features that a width such as `65k` or `1m` means: the power of two that rounds to it."""
    match = re.fullmatch(r"(\d+)([km]?)", label)
    if match is None:
        return None
    number, unit = int(match[1]), match[2]
    if not unit:
        return number
    for power in range(10, 25):
        size = 1 << power
        if number in ({size // 1000, size // 1024} if unit == "k" else {size // 1_000_000, size >> 20}):
            return size
    return number * (1000 if unit == "k" else 1_000_000)
