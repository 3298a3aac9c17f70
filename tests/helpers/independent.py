"""The probe and the interventions written a second time, with transformers and plain forward hooks only.

Nothing here comes from sae_bias: one prompt at a time, full logits, the whole model (multimodal wrappers included), weights
read straight from the safetensors file. Slow and obvious, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""Δ [pos, d_model] of the residual x [pos, d_model] at one site."""


@dataclass(frozen=True)
class Plain:
    """A model and a tokenizer as transformers loads them."""

    hf: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Plain:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto = (
            transformers.Gemma3ForConditionalGeneration
            if config.model_type == "gemma3"
            else transformers.AutoModelForCausalLM
        )
        hf = auto.from_pretrained(folder, dtype=dtype).eval()
        return cls(hf, transformers.AutoTokenizer.from_pretrained(folder))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def layer(self, index: int) -> torch.nn.Module:
        decoder = self.hf.get_decoder() if hasattr(self.hf, "get_decoder") else self.hf.base_model
        return (decoder.h if hasattr(decoder, "h") else decoder.layers)[index]

    @property
    def special(self) -> set[int]:
        t = self.tokenizer
        return {i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None}

    @torch.no_grad()
    def logits(
        self, ids: Sequence[int], edit: Edit | None = None, layer: int = 0, at: Sequence[bool] | None = None
    ) -> Tensor:
        """Logits [pos, d_vocab], the residual after `layer` changed by `edit` at the marked, not special positions."""
        keep = torch.tensor([i not in self.special for i in ids])
        if at is not None:
            keep &= torch.tensor(list(at))

        def hook(module: Any, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            new = x + torch.where(keep[:, None], edit(x[0]), 0.0)[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.layer(layer).register_forward_hook(hook) if edit is not None else None
        try:
            return self.hf(input_ids=torch.tensor([list(ids)])).logits[0].float()
        finally:
            if handle is not None:
                handle.remove()

    @torch.no_grad()
    def residual(self, text: str, layer: int) -> Tensor:
        """[pos, d_model] after `layer`."""
        seen: list[Tensor] = []
        hook = self.layer(layer).register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
        self.hf(input_ids=torch.tensor([self.ids(text)]))
        hook.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])

    def word(self, prompt: str, word: str) -> list[int]:
        return self.ids(f"{prompt} {word}")[len(self.ids(prompt)) :]

    def score(
        self,
        prompt: str,
        positive: Sequence[str],
        negative: Sequence[str],
        mode: str = "mean_logit",
        edit: Edit | None = None,
        layer: int = 0,
        positions: str = "all",
    ) -> float:
        """mean_logit or logodds of the words after `prompt`, the edit reaching the scored words' tokens too."""
        ids = self.ids(prompt)

        def run(tail: Sequence[int]) -> Tensor:
            full = [*ids, *tail]
            at = [positions == "all" or i == len(ids) - 1 for i in range(len(full))]
            return self.logits(full, edit, layer, at)

        def log_prob(word: str) -> float:
            tail = self.word(prompt, word)
            logp = run(tail[:-1]).log_softmax(-1)
            return sum(float(logp[len(ids) - 1 + j, t]) for j, t in enumerate(tail))

        if mode == "mean_logit":
            z = run([])[-1]
            pos, neg = ([float(z[self.word(prompt, w)[0]]) for w in words] for words in (positive, negative))
            return sum(pos) / len(pos) - sum(neg) / len(neg)
        pos, neg = (
            torch.tensor([log_prob(w) for w in words], dtype=torch.float64) for words in (positive, negative)
        )
        return float(pos.logsumexp(0) - neg.logsumexp(0))


@dataclass(frozen=True)
class PlainSae:
    """A Gemma Scope 2 file."""

    w: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> PlainSae:
        return cls(load_file(folder / "params.safetensors"))

    def acts(self, x: Tensor) -> Tensor:
        h = x @ self.w["w_enc"] + self.w["b_enc"]
        return h * (h > self.w["threshold"])

    def edit(self, rules: dict[int, Callable[[Tensor], Tensor]]) -> Edit:
        """Δ that turns each feature's activation a into rule(a)."""

        def delta(x: Tensor) -> Tensor:
            a = self.acts(x)
            return sum((rule(a[:, f]) - a[:, f])[:, None] * self.w["w_dec"][f] for f, rule in rules.items())

        return delta

    def steer(self, feature: int, alpha: float, norm_relative: bool = False) -> Edit:
        d = self.w["w_dec"][feature]
        if not norm_relative:
            return lambda x: alpha * d.expand_as(x)
        return lambda x: alpha * x.norm(dim=-1, keepdim=True) * d / d.norm()

    def project_out(self, feature: int) -> Edit:
        d = self.w["w_dec"][feature] / self.w["w_dec"][feature].norm()
        return lambda x: -(x @ d)[:, None] * d


def ablate(a: Tensor) -> Tensor:
    return torch.zeros_like(a)


def scale(k: float) -> Callable[[Tensor], Tensor]:
    return lambda a: k * a


def clamp_active(v: float) -> Callable[[Tensor], Tensor]:
    return lambda a: torch.where(a > 0, torch.full_like(a, v), a)


def clamp_always(v: float) -> Callable[[Tensor], Tensor]:
    return lambda a: torch.full_like(a, v)


def cap(v: float) -> Callable[[Tensor], Tensor]:
    return lambda a: a.minimum(torch.tensor(v))
