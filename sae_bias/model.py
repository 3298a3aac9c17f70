"""Loading a language model as plain Hugging Face modules, with a TransformerLens bridge on request.

The numbers come from the unprocessed Hugging Face weights (no folding, no centring: METHOD §4.10). `model.bridge` wraps
the same modules in place, so a user's own TransformerLens hooks and ours act on one model; nothing is copied. Token ids come
from an untouched copy of the Hugging Face tokenizer, because the bridge's own adds a BOS.

Multimodal Gemma 3 folders hold their text weights under `language_model`. `Gemma3ForCausalLM.from_pretrained` on such a
folder leaves every weight random and only logs it, so the text model is grafted out of the full one, and a model with a
missing weight is refused.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_bias import hub
from sae_bias.errors import MissingError, RequestError
from sae_bias.placement import device_of, is_offloaded, resident, unhooked_copy
from sae_bias.registry import is_path_like, organism_folder
from sae_bias.sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Model", "Site", "load_model"]


class Model:
    """A causal language model and the untouched tokenizer its token ids come from.

    `hf` is the plain Hugging Face model (text only, eval mode, unprocessed weights); `bridge` is a TransformerBridge around
    the same modules, made on first use.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, source: Path | None = None
    ):
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.in_memory = False  # an object the caller has: its files, if any, do not tell its weights
        self._bridge: TransformerBridge | None = None
        self._edits: Any = None  # the active interventions, kept by intervene.py
        self.row_positions: tuple[Tensor | None, Tensor | None] = (
            None,
            None,
        )  # see activations.row_positions
        self.row_partners: Any = None  # likewise
        self._norm32: nn.Module | None = None
        self._rows: tuple[tuple[int, ...], tuple[Tensor, Tensor | None]] | None = None
        self.device_map: Any = None
        hf.requires_grad_(False)

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, {self.architecture}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"d_vocab={self.d_vocab}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    @property
    def architecture(self) -> str:
        """Name of the Hugging Face class, such as `Gemma3ForCausalLM`."""
        return type(self.hf).__name__

    @property
    def config(self) -> Any:
        return self.hf.config

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @property
    def d_vocab(self) -> int:
        return int(_innermost(self.hf.get_output_embeddings()).weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the embedding."""
        return device_of(_innermost(self.hf.get_input_embeddings()))

    @property
    def dtype(self) -> torch.dtype:
        return _innermost(self.hf.get_input_embeddings()).weight.dtype

    @property
    def base(self) -> nn.Module:
        """The decoder without its unembedding."""
        return self.hf.base_model

    @property
    def layer_list(self) -> nn.ModuleList:
        """The list the decoder walks; its entries are bridge modules once `bridge` was used."""
        return self.base.layers  # type: ignore[return-value]

    def layer_device(self, index: int) -> torch.device:
        """Where layer `index` runs; under a `device_map` not every layer's is the embedding's."""
        return device_of(self.layer(index))

    def layer(self, index: int) -> nn.Module:
        """The plain Hugging Face decoder layer, below any bridge module."""
        if not 0 <= index < self.n_layers:
            raise RequestError(
                f"layer {index} does not exist in {self.name}: it has layers 0 to {self.n_layers - 1}."
            )
        return _innermost(self.layer_list[index])

    @property
    def w_unembed(self) -> Float[Tensor, "d_vocab d_model"]:
        return resident(_innermost(self.hf.get_output_embeddings()), "weight")

    @property
    def b_unembed(self) -> Float[Tensor, "d_vocab"] | None:
        head = _innermost(self.hf.get_output_embeddings())
        return None if getattr(head, "bias", None) is None else resident(head, "bias")

    @property
    def softcap(self) -> float | None:
        """Final-logit softcap (30 in Gemma 2), or None."""
        return getattr(self.config, "final_logit_softcapping", None)

    @property
    def norm_module(self) -> nn.Module:
        """The norm before the unembedding, as the decoder runs it."""
        for attribute in ("norm", "final_layer_norm"):
            if hasattr(self.base, attribute):
                return getattr(self.base, attribute)
        raise RequestError(f"{self.architecture} has no final norm that sae-bias knows.")

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding, in float32 (METHOD §4.8)."""
        norm = _innermost(self.norm_module)
        if next(norm.parameters()).dtype == torch.float32:
            return norm
        if self._norm32 is None:
            self._norm32 = unhooked_copy(norm, torch.float32)
        assert self._norm32 is not None
        return self._norm32

    @property
    def special_ids(self) -> frozenset[int]:
        """BOS, EOS and PAD ids: positions no intervention touches and no SAE was trained on."""
        t: Any = self.tokenizer
        return frozenset(i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None)

    @property
    def turn_marker_ids(self) -> frozenset[int]:
        """Ids of the other special tokens (chat turn markers): ordinary positions, counted apart in receipts."""
        return frozenset(self.tokenizer.all_special_ids) - self.special_ids

    @property
    def is_organism(self) -> bool:
        return self.name.startswith("organism:")

    @property
    def bridge(self) -> TransformerBridge:
        """A TransformerBridge over these very modules (made on first use; wraps them in place)."""
        if self._bridge is None:
            self._bridge = _boot_bridge(self)
            self.hf.requires_grad_(False)
        return self._bridge

    def why_not_finite(self) -> str:
        """What makes numbers NaN or infinite, as far as the weights tell: the first weight that is so, or the precision."""
        for name, weight in self.hf.named_parameters():
            if not weight.is_meta and not bool(torch.isfinite(weight).all()):
                return f"; its weight {name} holds NaN or infinite values"
        if self.dtype == torch.float16:
            return "; float16 overflows easily, load it with dtype bfloat16 or float32"
        return "; its weights are finite"

    def foreign_hooks(self) -> bool:
        """Whether a module, or the bridge, carries a hook that is not ours: then the whole pass runs, so that it fires."""
        on_modules = any(
            not _is_infrastructure(hook)
            for module in self.hf.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
        points = self._bridge.hook_dict.values() if self._bridge is not None else ()
        return on_modules or any(point.fwd_hooks or point.bwd_hooks for point in points)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with at most one BOS, exactly where the model's own tokenizer puts one."""
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, not {type(text).__name__}.")
        ids = list(self.tokenizer(text).input_ids)
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos != self.tokenizer.eos_token_id and ids.count(bos) > 1:
            raise RequestError(
                f"the prompt {_short(text)} has {ids.count(bos)} BOS tokens; leave the BOS to the tokenizer."
            )
        if not any(i not in self.special_ids for i in ids):
            raise RequestError(
                f"the prompt {_short(text)} encodes to special tokens only under the tokenizer of {self.name}."
            )
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is not None and len(ids) > longest:
            raise RequestError(
                f"the prompt {_short(text)} is {len(ids)} tokens; {self.name} takes at most {longest}."
            )
        return ids

    def chat_text(self, messages: Sequence[dict[str, str]], *, prefill: str = "") -> str:
        """A chat with the model's turn opened and `prefill` as its first words, as text that `encode` gives exactly one BOS."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(
                f"{self.name} has no chat template; use the plain form, or an instruction-tuned model."
            )
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        bos: Any = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self.tokenizer.bos_token_id in self.tokenizer("a").input_ids[:1]:
            text = text.removeprefix(bos)
        if prefill and not text[-1:].isspace():
            text += " "
        return text + prefill

    def encode_chat(self, messages: Sequence[dict[str, str]], *, prefill: str = "") -> list[int]:
        """Ids of `chat_text`; exactly one BOS where the model has one."""
        return self.encode(self.chat_text(messages, prefill=prefill))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def rows(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Float32 unembedding rows [n, d_model] and their biases [n] (or None)."""
        if self._rows is None or self._rows[0] != tuple(token_ids):
            w, bias = self.w_unembed, self.b_unembed
            index = torch.as_tensor(list(token_ids), device=w.device)
            rows = w[index].float(), None if bias is None else bias[index].float()
            if not is_offloaded(_innermost(self.hf.get_output_embeddings())):
                return rows
            self._rows = (
                tuple(token_ids),
                rows,
            )  # an offloaded unembedding is not read again for every batch
        return self._rows[1]


def load_model(
    x: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> Model:
    """Load a causal language model.

    Args:
        x: a hub id, a local folder, `"organism:planted"`, or a TransformerBridge / Hugging Face model the caller already has
            (it is used in place, not copied).
        tokenizer: needed for a model object whose tokenizer cannot be found from its own name.
        device: `"auto"` is CUDA where there is one, else CPU.
        dtype: `"auto"` is float32 on CPU and bfloat16 on a GPU; or `"float32"`, `"bfloat16"`.
        device_map: how accelerate spreads a model too large for one device, such as `"auto"`; `device` is then not used.

    Raises:
        RequestError: unknown name, unreadable or truncated weights, a weight the checkpoint does not hold.
        MissingError: gated or uncached weights; the message says what to accept, download or log in to.
    """
    if not isinstance(x, (str, Path)):
        return _wrap(x, tokenizer)
    device = _pick_device(device)
    torch_dtype = _pick_dtype(dtype, device)
    name = str(x)
    folder = _local_folder(name)
    if folder is None and not hub.is_whole(name) and hub_reachable():
        hub.fetch_model(name)
    hf = _load_hf(folder or name, torch_dtype, local=True, device_map=device_map)
    if device_map is None:
        hf = hf.to(device)  # type: ignore[arg-type]
    tokenizer = tokenizer or _load_tokenizer(folder or name, local=True)
    _check_tokenizer(hf, tokenizer, name)
    model = Model(hf, tokenizer, name, source=folder)
    model.device_map = device_map
    return model


def _local_folder(name: str) -> Path | None:
    """The folder `name` means, or None where it is a hub id."""
    if name.startswith("organism:"):
        return organism_folder(name.removeprefix("organism:")) / "model"
    try:
        folder = Path(name).expanduser()
        there = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name[:200]!r} is no model: neither a folder ({type(error).__name__}) nor a hub id such as google/gemma-3-12b-it."
        ) from error
    if there:
        if not (folder / "config.json").is_file():
            raise RequestError(f"{name} holds no config.json; expected a Hugging Face model folder.")
        return folder
    if is_path_like(name):
        raise RequestError(
            f"there is no model folder {name}; give a local folder, a hub id such as google/gemma-3-12b-it, or organism:planted."
        )
    return None


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
        return AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:
        raise _loading_error(source, error) from error


def _load_hf(
    source: Path | str, dtype: torch.dtype, *, local: bool = False, device_map: Any = None
) -> PreTrainedModel:
    """The text-only causal model at `source`, every weight of it from the checkpoint."""
    import transformers

    if device_map is not None and find_spec("accelerate") is None:
        raise MissingError("device_map needs accelerate; `pip install accelerate`.")
    config = _load_config(source, local=local)
    _refuse_remote_code(config, source)
    _refuse_sizes(config, source)
    multimodal = config.model_type == "gemma3"
    auto: Any = (
        transformers.Gemma3ForConditionalGeneration if multimodal else transformers.AutoModelForCausalLM
    )
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
            )
    except Exception as error:
        raise _loading_error(source, error) from error
    _refuse_incomplete(info, source)
    return _graft_text_model(loaded) if multimodal else loaded


def _graft_text_model(full: Any) -> PreTrainedModel:
    """The language model and head of a multimodal Gemma 3, as a `Gemma3ForCausalLM` (exact, nothing re-initialised)."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        text = Gemma3ForCausalLM(full.config.text_config)
    text.model = full.model.language_model
    text.lm_head = full.lm_head
    text.config.architectures = ["Gemma3ForCausalLM"]
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
        value = getattr(text, name, None)
        if isinstance(value, list):  # one a layer, in some architectures
            continue
        if value is not None and not (isinstance(value, int) and 0 < value <= most):
            raise RequestError(
                f"the config of {source} says {name} {str(value)[:40]!r}; expected a whole number from 1 to {most:,}."
            )


def _refuse_remote_code(config: Any, source: Path | str) -> None:
    if getattr(config, "auto_map", None):
        raise RequestError(f"{source} asks to run its own Python code; sae-bias never does that.")


def _load_tokenizer(source: Path | str, *, local: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:
        raise _loading_error(source, error, what="tokenizer") from error


def _check_tokenizer(hf: Any, tokenizer: Any, name: str) -> None:
    """A tokenizer that does not round-trip plain English loses words silently (seen with Qwen 2 folders)."""
    vocab = hf.get_input_embeddings().weight.shape[0]
    probe = "He says yes."
    ids = list(tokenizer(probe).input_ids)
    if ids and max(ids) >= vocab:
        raise RequestError(
            f"the tokenizer of {name} gives id {max(ids)}, but the model embeds only {vocab} tokens."
        )
    plain = [i for i in ids if i not in set(tokenizer.all_special_ids)]
    unknown = tokenizer.unk_token_id
    if not plain and (unknown is None or unknown not in ids):
        raise RequestError(
            f"the tokenizer of {name} drops every word of {probe!r}: its files do not fit its class."
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
    if type(x).__name__ == "Gemma3ForConditionalGeneration":
        x = _graft_text_model(x)
    if tokenizer is None:
        tokenizer = _stored_tokenizer(x, bridge)
    model = Model(x, tokenizer, name)
    model.in_memory = True
    model._bridge = bridge
    return model


def _stored_tokenizer(hf: Any, bridge: Any) -> PreTrainedTokenizerBase:
    """The tokenizer found under the model object's own name; a bridge's is never used, because it was altered."""
    stored = getattr(getattr(bridge, "tokenizer", None), "name_or_path", "") if bridge is not None else ""
    for source in (getattr(hf.config, "_name_or_path", ""), stored):
        if source and Path(source).is_dir():
            return _load_tokenizer(Path(source))
        if source:
            try:
                return _load_tokenizer(source)
            except (RequestError, MissingError):
                continue
    raise RequestError("this model object has no stored tokenizer; pass load_model(model, tokenizer=...).")


def _boot_bridge(model: Model) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    hf = model.hf
    hf.config.architectures = [type(hf).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        private = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            model.name, hf_model=hf, tokenizer=private, device=str(model.device), dtype=model.dtype
        )


def ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a forward hook as sae-bias's own."""
    hook._sae_bias = True  # type: ignore[attr-defined]
    return hook


def _is_infrastructure(hook: Any) -> bool:
    """Hooks of ours, or that the bridge, transformers or accelerate register for themselves."""
    if getattr(hook, "_sae_bias", False):
        return True
    return (getattr(hook, "__module__", "") or "").startswith(
        ("transformer_lens.", "accelerate.", "transformers.")
    )


def _innermost(module: Any) -> Any:
    """The Hugging Face module below any bridge components."""
    while getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def _pick_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
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


def _loading_error(source: Path | str, error: Exception, what: str = "model") -> Exception:
    """The library's error as one line that says what to do: missing (exit 3) or wrong (exit 2)."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {type(e).__name__ for e in chain}
    first = " ".join(str(error).split())[:300]
    if isinstance(source, Path):
        if any(isinstance(e, OSError) and e.errno == 28 for e in chain):
            return MissingError(f"no space left on the disk while loading {source}.")
        return RequestError(f"the {what} in {source} cannot be read ({type(error).__name__}: {first}).")
    if "GatedRepoError" in names or "401" in first or "403" in first or "gated repo" in first:
        return MissingError(
            f"{source} is gated: accept its licence at its page on the hub, then log in once with `hf auth login` (or set HF_TOKEN)."
        )
    if {"RepositoryNotFoundError", "RemoteEntryNotFoundError"} & names:
        return MissingError(
            f"the hub has no model {source} that you may read; check the name, or log in with `hf auth login`."
        )
    if "SafetensorError" in names:
        return RequestError(
            f"the cached weights of {source} are damaged ({first}); run `hf download {source} --force-download`."
        )
    return MissingError(
        f"{source} is not in the local cache and could not be fetched ({type(error).__name__}); "
        f"on a machine with network run `hf download {source}`, or give a local folder."
    )


class _quiet:
    """Silences the loading report of transformers, which would bury our one line."""

    def __init__(self, transformers: Any):
        self.logging = transformers.logging

    def __enter__(self) -> None:
        self.before = self.logging.get_verbosity()
        self.bars = self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.before)
        if self.bars:
            self.logging.enable_progress_bar()


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)
