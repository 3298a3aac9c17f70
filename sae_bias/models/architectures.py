"""What sae-bias has to know of a model family, as one record: where its layers and its final norm are, and how its logits end.

A record is found by the `model_type` of the checkpoint's config. Adding an architecture is one record, also from another
distribution (`sae_bias.core.registry` says how a plugin is named):

    register(Architecture("Mine", ("mine",), layers="blocks", final_norm="out_norm"))

Everything else reads the record: capture and edits take `layers`, the pass that resumes at a layer takes `tuple_output` and
`shared_kv`, the float32 ending takes `final_norm` and `softcap`, the direct path and the logit lens take `norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Norm:
    """A final norm as a gain, a bias and a scale: norm(x) = c(x) · scale(x) · gain + bias, c the identity or the centering."""

    centered: bool
    """A LayerNorm subtracts the mean; an RMS norm does not."""

    def center(self, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b d_model"]:
        """x without its mean where the norm takes it out."""
        return x - x.mean(-1, keepdim=True) if self.centered else x

    def scale(self, module: nn.Module, x: Float[Tensor, "*b d_model"]) -> Float[Tensor, "*b 1"]:
        """1/rms(x), or 1/std(x) in a LayerNorm."""
        return self.center(x).pow(2).mean(-1, keepdim=True).add(_eps(module)).rsqrt()

    @torch.no_grad()
    def gain(self, module: nn.Module, d_model: int) -> Float[Tensor, "d_model"]:
        """What a vector of unit scale is multiplied by (Gemma's 1 + w included: it is measured, not read)."""
        weight = getattr(module, "weight", None)
        device = torch.device("cpu") if weight is None else weight.device
        ones = torch.ones(d_model, dtype=torch.float32, device=device)
        if self.centered:
            return ones if weight is None else weight.float()
        return module(ones) * (1 + _eps(module)) ** 0.5

    def bias(self, module: nn.Module) -> Float[Tensor, "d_model"] | float:
        """What a LayerNorm adds at the end."""
        bias = getattr(module, "bias", None)
        return bias.float() if self.centered and bias is not None else 0.0

    def frozen(
        self, module: nn.Module, x: Float[Tensor, "*b d_model"], at: Float[Tensor, "*b d_model"]
    ) -> Float[Tensor, "*b d_model"]:
        """The norm of x with its scale taken from `at`: linear in x."""
        gain = self.gain(module, x.shape[-1])
        return self.center(x) * self.scale(module, at) * gain + self.bias(module)


RMS, LAYER_NORM = Norm(centered=False), Norm(centered=True)


def _eps(module: nn.Module) -> float:
    """The small number the norm adds to its mean square."""
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


@dataclass(frozen=True)
class Graft:
    """A multimodal checkpoint whose language model is run alone."""

    full: str
    """Class in transformers that reads the checkpoint."""
    text: str
    """Class that the language model and the head are put into; its decoder is `model`."""


@dataclass(frozen=True)
class Architecture:
    """One model family."""

    name: str
    """As people call it."""
    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    layers: str = "layers"
    """The list of layers, below the decoder."""
    final_norm: str = "norm"
    """The norm before the unembedding, below the decoder."""
    norm: Norm = RMS
    attn: str = "self_attn"
    """The attention, below a layer."""
    attn_proj: str = "o_proj"
    """Its output projection, below the attention."""
    mlp: str = "mlp"
    """The MLP, below a layer."""
    decoder: str = ""
    """Where the module that walks the layers is, below `base_model`; empty where it is that module."""
    tuple_output: bool = False
    """Whether a layer returns a tuple, of which the residual is the first."""
    softcap: str = ""
    """The config's field for the cap of the final logits."""
    graft: Graft | None = None
    refuse: Callable[[PretrainedConfig], str] = lambda config: ""
    """Why a text config of this family is not supported; empty where it is."""
    bridge: bool = True
    """Whether the TransformerLens that is installed runs it."""
    masks: str = ""
    """How its decoder takes masks of a tree's own (`models.tree`): "one" for all layers (with the config's window), "by_type" of the
    layer; empty where that is not known, and sequences then run as they are."""
    shared_kv: Callable[[PretrainedConfig], int] = lambda config: -1
    """The lowest layer whose keys and values layers further up read again (Gemma 4); -1 where each has its own."""

    def packs(self, config: PretrainedConfig) -> bool:
        """Whether a model of this config runs a packed tree: not where positions are read off the mask (ALiBi) or frequencies off
        the longest sequence, attention looks ahead, or its kernel takes no mask."""
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {r.get("rope_type") for r in [rope, *rope.values()] if isinstance(r, dict)}
        bound = getattr(config, "alibi", False) or getattr(config, "use_bidirectional_attention", None) in (True, "all")  # fmt: skip
        kernel = getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        return bool(self.masks) and kernel and not bound and not kinds & {"dynamic", "longrope"}


ARCHITECTURES: Registry[Architecture] = Registry("model architecture")
"""Records by `model_type`."""


def register(record: Architecture) -> Architecture:
    """Make an architecture known under each of its `model_types`."""
    for model_type in record.model_types:
        ARCHITECTURES.register(model_type)(record)
    return record


def architecture_of(config: PretrainedConfig, name: str) -> Architecture:
    """The record of a config.

    Raises:
        RequestError: no record, or a variant of the family that is not supported; named in one line.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise RequestError(
            f"{name} is of the architecture {model_type!r}, which sae-bias does not read; it reads {', '.join(known())} "
            "(another one is one record: sae_bias.models.architectures.register)."
        )
    record = ARCHITECTURES.get(str(model_type))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if why := record.refuse(text):
        raise RequestError(f"{name} ({record.name}) is not supported: {why}.")
    return record


def known() -> list[str]:
    """Names of the architectures, each once."""
    return list(dict.fromkeys(record.name for record in ARCHITECTURES))


def at_path(module: Any, path: str) -> Any:
    """`decoder.layers` below a module."""
    for part in path.split(".") if path else ():
        module = getattr(module, part)
    return module


def _opt(config: PretrainedConfig) -> str:
    if not config.do_layer_norm_before or getattr(config, "_remove_final_layer_norm", False):
        return (
            "it has no final norm (do_layer_norm_before=False, as OPT-350m), which the probe's ending needs"
        )
    if config.word_embed_proj_dim != config.hidden_size:
        return "it projects its residual before the unembedding (word_embed_proj_dim)"
    return ""


def _gemma4_shared(config: PretrainedConfig) -> int:
    """Layers from the first shared one on read the keys of the last layer of their own type below it."""
    first = config.num_hidden_layers - (config.num_kv_shared_layers or 0)
    own, shared = config.layer_types[:first], config.layer_types[first:]
    return min((first - 1 - own[::-1].index(kind) for kind in set(shared)), default=-1)


for _record in (
    Architecture("Gemma", ("gemma",), masks="one"),
    Architecture("Gemma 2", ("gemma2",), masks="by_type", softcap="final_logit_softcapping"),
    Architecture("Gemma 3", ("gemma3_text",), masks="by_type", softcap="final_logit_softcapping"),
    Architecture(
        "Gemma 3", ("gemma3",), graft=Graft("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"), softcap="final_logit_softcapping"
    ),
    Architecture(
        "Gemma 4", ("gemma4_text",), masks="by_type", softcap="final_logit_softcapping", shared_kv=_gemma4_shared
    ),
    Architecture(
        "Gemma 4", ("gemma4",), graft=Graft("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"), softcap="final_logit_softcapping", shared_kv=_gemma4_shared
    ),
    Architecture("Llama", ("llama",), masks="one"),
    Architecture("Mistral", ("mistral",), masks="one"),
    Architecture("Mixtral", ("mixtral",), masks="one"),
    Architecture("Qwen 2", ("qwen2",), masks="by_type"),
    Architecture("Qwen 3", ("qwen3",), masks="by_type"),
    Architecture("Qwen 3", ("qwen3_moe",), masks="one"),
    Architecture("Qwen 3.5", ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), bridge=False),  # TransformerLens 3.9 reads fields that transformers 5 no longer has
    Architecture("GPT-NeoX", ("gpt_neox",), masks="one", final_norm="final_layer_norm", norm=LAYER_NORM, attn="attention", attn_proj="dense"),
    Architecture("GPT-2", ("gpt2",), masks="one", layers="h", final_norm="ln_f", norm=LAYER_NORM, attn="attn", attn_proj="c_proj"),
    Architecture("GPT-J", ("gptj",), masks="one", layers="h", final_norm="ln_f", norm=LAYER_NORM, tuple_output=True, attn="attn", attn_proj="out_proj"),
    Architecture("GPT-OSS", ("gpt_oss",), masks="by_type"),
    Architecture("OPT", ("opt",), masks="one", decoder="decoder", final_norm="final_layer_norm", norm=LAYER_NORM, refuse=_opt, attn_proj="out_proj"),
    Architecture("Falcon", ("falcon",), masks="one", layers="h", final_norm="ln_f", norm=LAYER_NORM, tuple_output=True, attn="self_attention", attn_proj="dense"),
    Architecture("Phi", ("phi",), masks="one", final_norm="final_layernorm", norm=LAYER_NORM, attn_proj="dense"),
    Architecture("Phi-3", ("phi3",), masks="one"),
    Architecture("OLMo 2", ("olmo2",), masks="one"),
    Architecture("OLMo 2", ("olmo3",), masks="by_type"),
    Architecture("SmolLM 3", ("smollm3",), masks="by_type"),
    Architecture("StarCoder 2", ("starcoder2",), masks="one", norm=LAYER_NORM),
    Architecture("StableLM", ("stablelm",), masks="one", norm=LAYER_NORM),
):  # fmt: skip
    register(_record)
