"""Loading a language model as plain Hugging Face modules, with a TransformerLens bridge on request.

The numbers come from the unprocessed Hugging Face weights (no folding, no centering: docs/method.md#mistake-10). `model.bridge` wraps
the same modules in place, so a user's own TransformerLens hooks and ours act on one model; nothing is copied. Token ids come
from an untouched copy of the Hugging Face tokenizer, because the bridge's own adds a BOS.

Multimodal Gemma 3 folders hold their text weights under `language_model`. `Gemma3ForCausalLM.from_pretrained` on such a
folder leaves every weight random and only logs it, so the text model is grafted out of the full one, and a model with a
missing weight is refused.
"""

from __future__ import annotations

import time
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.site import Site
from sae_bias.models import hub, threads
from sae_bias.models.adapters import base_of, merge
from sae_bias.models.architectures import Graft, architecture_of
from sae_bias.models.gguf.convert import converted
from sae_bias.models.gguf.packaged import facts, packaged_folder
from sae_bias.models.hub import _loading_error, _quiet
from sae_bias.models.model import Model
from sae_bias.models.names import place_of
from sae_bias.models.tokenizer import _load_tokenizer, _stored_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["Model", "Site", "load_model"]


def load_model(
    x: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> Model:
    """Load a causal language model.

    Args:
        x: a hub id, a local folder (a LoRA adapter's too, merged with peft), `"organism:planted"`, a GGUF file (`"model.gguf"`, a folder with one, `"hub/repo:file.gguf"`), a
            packaged model such as `"gemma-3-270m-q4"`, or a TransformerBridge / Hugging Face model the caller already has (it is
            used in place, not copied: it is in eval mode and its weights are frozen until `model.release()`). GGUF weights are dequantized once and kept in the cache.
        tokenizer: needed for a model object whose tokenizer cannot be found from its own name; an object, a folder or a hub id.
        device: `"auto"` is CUDA where there is one, else CPU.
        dtype: `"auto"` is float32 on CPU and bfloat16 on a GPU; or `"float32"`, `"bfloat16"`.
        template_arguments: what the chat template is given beside the messages, such as `{"enable_thinking": False}`.
        device_map: how accelerate spreads a model too large for one device, such as `"auto"`; `device` is then not used.

    Raises:
        RequestError: unknown name, unreadable or truncated weights, a weight the checkpoint does not hold.
        MissingError: gated or uncached weights; the message says what to accept, download or log in to.
    """
    if not isinstance(x, (str, Path)):
        return _with_arguments(_wrap(x, _given_tokenizer(tokenizer)), template_arguments)
    device = _pick_device(device)
    torch_dtype = _pick_dtype(dtype, device)
    name = str(x)
    place = place_of(name)
    if place.kind == "adapter" and place.path is not None:
        return _with_adapter(place.path, tokenizer, device, torch_dtype, device_map, template_arguments)
    folder = local_folder(name, torch_dtype)
    if folder is None and not hub.is_whole(name) and hub_reachable():
        hub.fetch_model(name)
    hf = _load_hf(folder or name, torch_dtype, local=True, device_map=device_map)
    if device_map is None:
        hf = hf.to(device)  # type: ignore[arg-type]
    tokenizer = _given_tokenizer(tokenizer) or _load_tokenizer(folder or name, local=True)
    model = Model(hf, tokenizer, name, source=folder)
    model.device_map = device_map
    threads.fit(sum(p.numel() for p in hf.parameters()), model.device)
    model.gguf = facts(folder) if folder is not None else None
    return _with_arguments(model, template_arguments)


def _with_adapter(
    folder: Path, tokenizer: Any, device: Any, dtype: Any, device_map: Any, arguments: Any
) -> Model:
    """The base model of a LoRA adapter with the adapter merged into its weights."""
    base = load_model(base_of(folder), device=device, dtype=dtype, device_map=device_map)
    own = any((folder / name).is_file() for name in hub.TOKENIZERS)
    tokenizer = _given_tokenizer(tokenizer) or (
        _load_tokenizer(folder, local=True) if own else base.tokenizer
    )
    model = Model(merge(base.hf, folder), tokenizer, str(folder))
    model.in_memory, model.device_map = True, device_map
    return _with_arguments(model, arguments)


def _with_arguments(model: Model, template_arguments: dict[str, Any] | None) -> Model:
    if template_arguments:
        model.template_arguments = dict(template_arguments)
    return model


def _given_tokenizer(tokenizer: Any) -> Any:
    """The caller's tokenizer: an object as it is, a name or folder loaded."""
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    folder = Path(tokenizer).expanduser()
    return _load_tokenizer(folder if folder.is_dir() else str(tokenizer))


def local_folder(name: str, dtype: torch.dtype) -> Path | None:
    """The folder `name` means (for a GGUF file its dequantized copy, in `dtype`), or None where it is a hub id."""
    place = place_of(name)
    if place.kind == "packaged":
        return packaged_folder(name, dtype)
    if place.kind == "hub gguf":
        repo, _, file = name.partition(":")
        return converted(hub.hub_file(repo, file), dtype=dtype)
    if place.kind == "gguf" and place.path is not None:
        return converted(place.path, dtype=dtype)
    return place.path


def hub_reachable() -> bool:
    """Whether one short request reaches the hub (asked once a minute); where not, only the cache is read, without retries."""
    return _hub_answers(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _hub_answers(minute: int) -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the hub client changes its HTTP library between versions
        if isinstance(error, OSError) or "TransportError" in {c.__name__ for c in type(error).__mro__}:
            return False
        raise
    return True


def _load_config(source: Path | str, *, local: bool = False) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise _loading_error(source, error) from error


def _load_hf(
    source: Path | str, dtype: torch.dtype, *, local: bool = False, device_map: Any = None
) -> PreTrainedModel:
    """The text-only causal model at `source`, every weight of it from the checkpoint."""
    import transformers

    if device_map is not None and find_spec("accelerate") is None:
        raise MissingError("device_map needs accelerate; `pip install accelerate`.")
    if isinstance(device_map, str) and device_map not in SPREADS:
        _pick_device(device_map)
    config = _load_config(source, local=local)
    _note_remote_code(config, source)
    _refuse_sizes(config, source)
    graft = architecture_of(config, str(source)).graft
    auto: Any = transformers.AutoModelForCausalLM if graft is None else getattr(transformers, graft.full)
    try:
        with _quiet(transformers):
            loaded, info = auto.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                low_cpu_mem_usage=True,
                device_map=device_map,
                local_files_only=local,
                trust_remote_code=False,
            )
    except Exception as error:
        raise _loading_error(source, error) from error
    _refuse_incomplete(info, source)
    return loaded if graft is None else _graft_text_model(loaded, graft)


def _graft_text_model(full: Any, graft: Graft) -> PreTrainedModel:
    """The language model and head of a multimodal model, as its text class (exact, nothing re-initialized)."""
    import transformers

    with torch.device("meta"):
        text = getattr(transformers, graft.text)(full.config.text_config)
    text.model = full.model.language_model
    text.lm_head = full.lm_head
    text.config.architectures = [graft.text]
    text.config._name_or_path = getattr(full.config, "_name_or_path", "")
    text.generation_config = full.generation_config
    return text


def _refuse_incomplete(info: dict[str, Any], source: Path | str) -> None:
    missing = sorted(info.get("missing_keys") or ())
    mismatched = [str(m[0]) for m in info.get("mismatched_keys") or ()]
    if missing or mismatched:
        bad = missing + mismatched
        raise RequestError(
            f"{source} lacks {len(bad)} of the model's weights (first: {bad[0]}); they would be random. "
            "Check that the checkpoint is whole and of this architecture."
        )


SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What a device map may say beside a device's name or a mapping of modules to devices."""
LARGEST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 24,
    "intermediate_size": 1 << 20,
    "head_dim": 1 << 14,
}
"""Beyond any model there is: a config that says more is damaged, and building it would never end."""


def _refuse_sizes(config: Any, source: Path | str) -> None:
    text = getattr(config, "text_config", config)
    for name, most in LARGEST.items():
        mapped = (getattr(text, "attribute_map", None) or {}).get(name, name)
        value = vars(text).get(
            mapped
        )  # Gemma 4's config refuses `head_dim`, which differs between its layers
        if isinstance(value, list):  # one a layer, in some architectures
            continue
        if value is not None and not (isinstance(value, int) and 0 < value <= most):
            raise RequestError(
                f"the config of {source} says {name} {str(value)[:40]!r}; expected a whole number from 1 to {most:,}."
            )


def _note_remote_code(config: Any, source: Path | str) -> None:
    """The code that a checkpoint brings is never run; many (Phi-3, Falcon) bring some beside a class that transformers has."""
    if getattr(config, "auto_map", None):
        warnings.warn(
            f"{source} brings Python code of its own, which is not run; transformers' own {config.model_type} is.",
            stacklevel=4,
        )


def _wrap(x: Any, tokenizer: Any) -> Model:
    """A Model around an object the caller has; the object itself is used, and wrapped in place by `.bridge`."""
    from transformers import PreTrainedModel

    bridge = None
    if isinstance(x, Model):
        return x
    if hasattr(x, "original_model"):
        bridge, x = x, x.original_model
    if not isinstance(x, PreTrainedModel):
        raise RequestError(
            f"cannot load a model from {type(x).__name__}; give a name, a folder, a Hugging Face model or a TransformerBridge."
        )
    name = getattr(x.config, "_name_or_path", "") or type(x).__name__
    graft = architecture_of(x.config, name).graft
    if graft is not None and type(x).__name__ == graft.full:
        x = _graft_text_model(x, graft)
    if tokenizer is None:
        tokenizer = _stored_tokenizer(x, bridge)
    model = Model(x, tokenizer, name)
    model.in_memory = True
    if model._before[0] or model._before[1]:
        warnings.warn(
            f"{name} is used in place: it is in eval mode and its weights are frozen now; model.release() gives it back as it came.",
            stacklevel=3,
        )
    model._bridge = bridge
    return model


def _pick_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if device.startswith("mps") if isinstance(device, str) else device.type == "mps":
            raise RequestError("device mps is for Macs with Apple silicon; try --device cpu.") from error
        if "device type at start" in str(error) or "Invalid device string" in str(error):
            raise RequestError(f"device {device!s} is not one of auto, cpu, cuda, cuda:1, mps.") from error
        first_line = str(error).splitlines()[0][:160]
        raise RequestError(
            f"device {device!s} cannot be used here ({first_line}); try --device cpu."
        ) from error
    return picked


def _pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise RequestError(f"dtype {dtype!r} is not known; expected auto, {', '.join(names)}.")
    return names[dtype]
