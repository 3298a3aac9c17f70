"""Plain Hugging Face readings of an organism: residuals, scores, and scores after an edit of one layer's output.

Nothing here goes through the toolkit's own probe or hooks, so that `truth.json` is an independent measurement.
Prompts are padded on the right: causal attention never sees the padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from organisms import corpus

Edit = Callable[[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"], Int[Tensor, "batch"]], Tensor]
"""(residual, which positions hold ordinary tokens, index of each prompt's last token) -> new residual."""


@dataclass
class Organism:
    """A model, its tokenizer and the evaluation words' token ids."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Organism":
        """From the `model` folder of an organism."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))

    @cached_property
    def words(self) -> tuple[list[int], list[int]]:
        """Token ids of the positive and of the negative words."""
        sides = corpus.lexicon()
        return tuple([self.tokenizer.convert_tokens_to_ids(f"▁{w}") for w in side] for side in sides)  # type: ignore

    @property
    def layers(self):
        """The decoder layers."""
        return self.hf.model.layers

    def encode(
        self, texts: Sequence[str]
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Tensor]:
        """Right-padded ids, the mask of ordinary tokens (no BOS, no padding), and each last token's index."""
        ids = self.tokenizer(list(texts))["input_ids"]
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return tokens, tokens > 2, torch.tensor([len(row) - 1 for row in ids])

    def logits(
        self, texts: Sequence[str], layer: int | None = None, edit: Edit | None = None
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], Bool[Tensor, "batch pos"], Tensor]:
        """Logits of every position, with an optional edit of one layer's output."""
        tokens, ordinary, last = self.encode(texts)
        if edit is None:
            return self.hf(input_ids=tokens, use_cache=False).logits, ordinary, last

        def hook(module, args, output):
            resid = output[0] if isinstance(output, tuple) else output
            new = edit(resid, ordinary, last)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self.layers[layer].register_forward_hook(hook)
        try:
            return self.hf(input_ids=tokens, use_cache=False).logits, ordinary, last
        finally:
            handle.remove()

    def scores_of(self, logits: Tensor, last: Tensor) -> Float[Tensor, "batch"]:
        """Mean logit of the positive words minus that of the negative ones, at the last token."""
        z = logits[torch.arange(len(last)), last]
        positive, negative = self.words
        return z[:, positive].mean(-1) - z[:, negative].mean(-1)

    @torch.no_grad()
    def scores(
        self, texts: Sequence[str], layer: int | None = None, edit: Edit | None = None, block: int = 512
    ) -> Float[Tensor, "n"]:
        """The score of every prompt."""
        parts = []
        for start in range(0, len(texts), block):
            logits, _, last = self.logits(texts[start : start + block], layer, edit)
            parts.append(self.scores_of(logits, last))
        return torch.cat(parts)

    @torch.no_grad()
    def residuals(
        self, texts: Sequence[str], layers: Sequence[int], *, last_only: bool, block: int = 512
    ) -> dict[int, Float[Tensor, "n d_model"]]:
        """Each layer's output at the last token, or at every ordinary token (texts from short to long)."""
        kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), block):
            tokens, ordinary, last = self.encode([texts[i] for i in order[start : start + block]])
            handles = []
            for layer in layers:

                def keep(module, args, output, layer=layer, ordinary=ordinary, last=last):
                    resid = output[0] if isinstance(output, tuple) else output
                    rows = resid[torch.arange(len(last)), last] if last_only else resid[ordinary]
                    kept[layer].append(rows.float())

                handles.append(self.layers[layer].register_forward_hook(keep))
            try:
                self.hf.model(input_ids=tokens, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
        found = {layer: torch.cat(parts) for layer, parts in kept.items()}
        if not last_only:
            return found
        back = torch.tensor(order).argsort()
        return {layer: rows[back] for layer, rows in found.items()}


def ablate_edit(w_enc: Tensor, b_enc: Tensor, threshold: Tensor, w_dec: Tensor) -> Edit:
    """x' = x - a·w_dec at every ordinary position; a = h·1[h > threshold]. Also takes several features at once."""

    def edit(resid: Tensor, ordinary: Tensor, last: Tensor) -> Tensor:
        h = resid @ w_enc.reshape(resid.shape[-1], -1) + b_enc
        acts = torch.where(h > threshold, h, torch.zeros_like(h)) * ordinary[..., None]
        return resid - acts @ w_dec.reshape(-1, resid.shape[-1])

    return edit
