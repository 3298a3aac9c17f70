"""A language model with hooks at its residual stream: one set of modules for Hugging Face and TransformerLens."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_bias.core.errors import RequestError
from sae_bias.models.architectures import architecture_of, at_path
from sae_bias.models.hub import _short
from sae_bias.models.placement import device_of, is_offloaded, resident, unhooked_copy
from sae_bias.models.template import dated, render, turn_end_ids, warn_of_date

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_ENCODED = 50_000
"""Texts whose token ids a model remembers: a study encodes each of its prompts many times."""


class Model:
    """A causal language model and the untouched tokenizer its token ids come from.

    `hf` is the plain Hugging Face model (text only, eval mode, unprocessed weights); `bridge` is a TransformerBridge around
    the same modules, made on first use.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, source: Path | None = None
    ):
        self.arch = architecture_of(hf.config, name)
        if hf.get_output_embeddings() is None:
            raise RequestError(
                f"{name} ({type(hf).__name__}) has no language-model head; load it as a causal language model (AutoModelForCausalLM)."
            )
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.gguf: dict[str, Any] | None = (
            None  # file, sha256 and quantization where the weights were dequantized
        )
        self.in_memory = False  # an object the caller has: its files, if any, do not tell its weights
        self._bridge: TransformerBridge | None = None
        self._edits: Any = None  # the active interventions, kept by intervene.py
        self.row_positions: tuple[Tensor | None, Tensor | None] = (
            None,
            None,
        )  # see activations.row_positions
        self.row_partners: Any = None  # likewise
        self.row_tree: Any = None  # the packed pass that runs (tree.Packed)
        self.known: Any = None  # what it said unedited (reads.Known), while a `reads.knowing` block is open
        self._norm32: nn.Module | None = None
        self._rows: tuple[tuple[int, ...], tuple[Tensor, Tensor | None]] | None = None
        self.device_map: Any = None
        self.template_arguments: dict[str, Any] = {}
        self.chat_day = datetime.date.today()
        self._n_embedded = int(_innermost(hf.get_input_embeddings()).weight.shape[0])
        self._eos_said = self._day_said = False
        self._encoded: tuple[Any, dict[str, list[int]]] = (tokenizer, {})
        self._before = (hf.training, [p for p in hf.parameters() if p.requires_grad])
        hf.eval().requires_grad_(False)

    def release(self) -> None:
        """Give the caller's own model back as it came: its training mode, and the weights that took gradients."""
        training, trained = self._before
        self.hf.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)

    def __repr__(self) -> str:
        return (
            f"Model({self.label!r}, {self.architecture}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"d_vocab={self.d_vocab}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    @property
    def label(self) -> str:
        """The name as headlines and reports give it: it says so where the weights were dequantized."""
        return (
            self.name if self.gguf is None else f"{self.name}, dequantized from {self.gguf['quantization']}"
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
        """The decoder without its unembedding: the module that walks the layers."""
        return at_path(self.hf.base_model, self.arch.decoder)

    @property
    def layer_list(self) -> nn.ModuleList:
        """The list the decoder walks; its entries are bridge modules once `bridge` was used."""
        return at_path(self.base, self.arch.layers)

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
    def longest(self) -> int | None:
        """Most tokens the model takes, prompt and continuation together; None where its config says none."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def softcap(self) -> float | None:
        """Final-logit softcap (30 in Gemma 2), or None."""
        return getattr(self.config, self.arch.softcap, None) if self.arch.softcap else None

    @property
    def norm_module(self) -> nn.Module:
        """The norm before the unembedding, as the decoder runs it."""
        return at_path(self.base, self.arch.final_norm)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding, in float32 (docs/method.md#mistake-8)."""
        norm = _innermost(self.norm_module)
        if all(p.dtype == torch.float32 for p in norm.parameters()):
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
            if not self.arch.bridge:
                raise RequestError(
                    f"TransformerLens has no bridge that runs {self.arch.name}; use `model.hf`."
                )
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
        """Token ids of `text` with at most one BOS, exactly where the model's own tokenizer puts one, and no EOS put after it."""
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, not {type(text).__name__}.")
        if self._encoded[0] is not self.tokenizer or len(self._encoded[1]) >= MOST_ENCODED:
            self._encoded = (self.tokenizer, {})
        known = self._encoded[1]
        if text not in known:
            known[text] = self._encode(text)
        return list(known[text])

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt {text[:60]!a} holds half of a character ({text[error.start]!a}); give it as UTF-8."
            ) from None
        try:
            ids = self._without_added_eos(text, list(self.tokenizer(text, verbose=False).input_ids))
        except Exception as error:  # the tokenizers library raises bare exceptions
            line = " ".join(str(error).split())[:120]
            raise RequestError(
                f"the tokenizer of {self.name} cannot read the prompt {_short(text)} ({line})."
            ) from error
        special = self.special_ids
        plain = [i for i in ids if i not in special]
        if not plain:
            raise RequestError(
                f"the prompt {_short(text)} encodes to special tokens only under the tokenizer of {self.name}."
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RequestError(
                f"the prompt {_short(text)} begins with 2 BOS tokens; leave the BOS to the tokenizer."
            )
        if plain and all(token == self.tokenizer.unk_token_id for token in plain):
            raise RequestError(f"the tokenizer of {self.name} knows no word of the prompt {_short(text)}.")
        if max(ids) >= self._n_embedded:
            raise RequestError(
                f"the tokenizer of {self.name} gives id {max(ids)}, but the model embeds only {self._n_embedded} tokens."
            )
        if self.longest is not None and len(ids) > self.longest:
            raise RequestError(
                f"the prompt {_short(text)} is {len(ids)} tokens; {self.name} takes at most {self.longest}."
            )
        return ids

    def _without_added_eos(self, text: str, ids: list[int]) -> list[int]:
        """`ids` less an EOS that the tokenizer appends: a text that is to go on does not end."""
        eos: Any = self.tokenizer.eos_token
        if len(ids) < 2 or ids[-1] != self.tokenizer.eos_token_id or text.rstrip().endswith(eos):
            return ids
        if not self._eos_said:
            self._eos_said = True
            warnings.warn(
                f"the tokenizer of {self.name} appends {eos} to every text; it is left out, because prompts are continued.",
                stacklevel=3,
            )
        return ids[:-1]

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a generated text: what config, generation config and tokenizer call EOS, and the end of the model's turn."""
        own = getattr(self.hf, "generation_config", None)
        named = [getattr(c, "eos_token_id", None) for c in (self.config, own, self.tokenizer)]
        found = [i for n in named if n is not None for i in (n if isinstance(n, (list, tuple)) else [n])]
        turn = turn_end_ids(self.tokenizer, self.name, day=self.chat_day, arguments=self.template_arguments)
        return frozenset(int(i) for i in found) | turn

    def chat_text(self, messages: Sequence[dict[str, str]], *, prefill: str = "") -> str:
        """A chat with the model's turn opened and `prefill` as its first words, as text that `encode` gives exactly one BOS.

        Raises:
            RequestError: no chat template, a broken one, or one that leaves out what a message says.
        """
        text = render(
            self.tokenizer, self.name, messages, day=self.chat_day, arguments=self.template_arguments
        )
        if dated(self.tokenizer) and not self._day_said:
            self._day_said = True
            warn_of_date(self.name, self.chat_day)
        bos: Any = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self.tokenizer.bos_token_id in self.tokenizer("a").input_ids[:1]:
            text = text.removeprefix(bos)
        if prefill and not text[-1:].isspace():
            text += " "
        return text + prefill

    def chat_facts(self) -> dict[str, Any]:
        """What chat prompts hang on beside their texts: template arguments, and the date where the template writes one."""
        facts: dict[str, Any] = (
            {"arguments": dict(self.template_arguments)} if self.template_arguments else {}
        )
        return facts | ({"date": self.chat_day.isoformat()} if dated(self.tokenizer) else {})

    def pin_chat(self, facts: Mapping[str, Any]) -> None:
        """Render chats as `chat_facts` of an earlier run says: on its day, with its template arguments."""
        if facts.get("date"):
            self.chat_day = datetime.date.fromisoformat(str(facts["date"]))
        if facts.get("arguments"):
            self.template_arguments = dict(facts["arguments"])

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
