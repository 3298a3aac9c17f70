"""One model's arithmetic for a plan: operations and bytes of a pass, of its gradients, of logits, of SAE blocks.

Factors that depend on how PyTorch runs a layer (how many copies are held at its widest point) are those measured on small checkpoints
of the same architectures (tests/workflows/test_plan.py holds the estimates to 15 % of what a process takes). Free blocks that the C
library keeps for itself are not counted: tensors above 32 MB, as a real model's are, leave none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from sae_bias.models.forward import BATCH_TOKENS
from sae_bias.models.model import Model
from sae_bias.models.reads import MOST_KNOWN
from sae_bias.models.tree import PADDED, Tree, attention_price, passes_of
from sae_bias.saes.stream import block_width
from sae_bias.workflows.hardware import DISK_BYTES_PER_SECOND, STREAMING, Hardware
from sae_bias.workflows.plan_shapes import BYTES, ModelShape, SaeShape

Shape = tuple[int, int]
"""Rows of a pass, and their length."""
HELD = ("kept residuals", "what was read before", "key-value cache", "the baseline's weights")


@dataclass(frozen=True)
class Step:
    """One step of the study: what it computes, reads and holds beside the weights."""

    name: str
    flops: float
    seconds: float
    token_layers: float = 0.0
    """Tokens that pass a layer, summed over the layers; of a backward pass the forward one alone."""
    parts: dict[str, float] = field(default_factory=dict)
    """Bytes on the device by part, without the weights: those of `HELD` last, of the others the largest counts."""
    read_bytes: float = 0.0
    host_bytes: float = 0.0
    """Bytes of the process's own memory for tables."""

    @property
    def device_bytes(self) -> float:
        held = sum(size for name, size in self.parts.items() if name in HELD)
        return held + max((size for name, size in self.parts.items() if name not in HELD), default=0.0)


class WordModel(Model):
    """Stands in for a model whose tokens are words and marks: whatever plans sequences plans them for it, and nothing runs."""

    ids: ClassVar[dict[str, int]] = {}

    def __init__(self, name: str = "words"):
        self.name, self.gguf = name, None
        self.tokenizer: Any = SimpleNamespace(bos_token_id=0, eos_token_id=None, unk_token_id=None)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def softcap(self) -> None:
        return None

    def encode(self, text: str) -> list[int]:
        """A BOS, then words and punctuation marks."""
        return [0, *(self.ids.setdefault(w, len(self.ids) + 1) for w in re.findall(r"\w+|[^\w\s]", text))]


@dataclass(frozen=True)
class Work:
    """What passes cost."""

    token_layers: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.token_layers + other.token_layers, self.flops + other.flops)


@dataclass(frozen=True)
class Texts:
    """Prompts as the tokens of a `WordModel`."""

    sequences: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        words = WordModel()
        return cls(tuple(tuple(words.encode(t)) for t in texts))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.sequences))

    @cached_property
    def distinct(self) -> int:
        """Distinct prefixes."""
        return len(Tree(self.sequences))

    @property
    def n(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mean(self) -> float:
        return self.tokens / max(1, self.n)

    def batches(self, budget: int) -> list[Shape]:
        """Passes of texts of one length, as they are."""
        found: list[Shape] = []
        for length, n in Counter(self.lengths).items():
            size = max(1, budget // length)
            found += [(min(size, n - start), length) for start in range(0, n, size)]
        return found

    def passes(self, budget: int, padded: int, price: float) -> list[Shape]:
        """Passes of their tree of prefixes (`models.reads`), or of the texts as they are where those cost less."""
        if not self.sequences:
            return []
        rows = passes_of(Tree(self.sequences).rows(price), budget, padded)
        packed = [(len(p), len(p[0].nodes)) for p in rows]
        return min(
            packed, self.batches(budget), key=lambda found: sum(b * n * (1 + price * n) for b, n in found)
        )


class Costs:
    """The arithmetic of one model in one dtype on one device."""

    def __init__(self, model: ModelShape, dtype: str, hardware: Hardware, *, kept_layers: int | None = None):
        """`kept_layers`: of a study that keeps what it has read (`models.reads.knowing`), at how many layers."""
        self.model, self.dtype, self.hardware = model, dtype, hardware
        self.kind = "cpu" if hardware.is_cpu else "cuda"
        self.size = BYTES[dtype]
        self.budget = BATCH_TOKENS[self.kind]
        self.kept_layers = kept_layers if dtype == "float32" else None
        self.passed: dict[tuple[int, ...], float] = {}
        self._passes: dict[Texts, list[Shape]] = {}
        self.known = 0.0
        """Bytes of what is kept so far."""

    def run(self, texts: Texts, layers: float, times: float = 1.0, *, alone: bool = False, gradients: bool = False) -> Work:  # fmt: skip
        """`texts` through so many layers: what they begin with once (in float32), or every text `alone`."""
        tokens = times * (texts.tokens if alone else sum(b * n for b, n in self.passes(texts)))
        flops = self.model.flops(tokens, layers, texts.mean)
        return Work(tokens * layers, (3 if gradients else 1) * flops)

    def base(self, texts: Texts, layers: float, *, kept: bool = False, ends: bool = False) -> Work:
        """`texts` unedited: those that no step before has passed through so many layers; `kept`: their residuals are, `ends`: and the last ones."""
        if self.kept_layers is None:
            return self.run(texts, layers)
        new = [s for s in dict.fromkeys(texts.sequences) if self.passed.get(s, 0) < layers]
        fresh = Texts(tuple(s for s in new if kept and s not in self.passed))
        self.passed.update(dict.fromkeys(new, layers))
        kept_now = self.kept(fresh.distinct, self.kept_layers + ends) + self.kept(len(new), 1)
        self.known = min(MOST_KNOWN, self.known + kept_now)
        return self.run(Texts(tuple(new)), layers)

    def writing(self, prompts: Texts, new: int, times: int) -> tuple[Work, float, float]:
        """So many new tokens behind each prompt: work, seconds of reading the weights (once a new token of each batch), bytes of the cache."""
        m, tokens, batches = self.model, prompts.tokens + new * prompts.n, prompts.batches(self.budget)
        work = Work(times * tokens * m.n_layers, times * m.flops(tokens, m.n_layers, prompts.mean + new))
        streamed = times * new * len(batches) * m.n_params * self.size
        longest = max((n * (length + new) for n, length in batches), default=0)
        cache = 2.0 * longest * m.n_layers * m.n_kv * m.d_head * self.size
        return work, streamed / (STREAMING * self.hardware.bandwidth), cache

    def passes(self, texts: Texts) -> list[Shape]:
        """The passes that read `texts`."""
        if texts not in self._passes:
            m = self.model
            price = attention_price(m.n_layer_params, m.n_heads * m.d_head, m.d_model)
            self._passes[texts] = (
                texts.passes(self.budget, PADDED[self.kind], price)
                if self.dtype == "float32"
                else texts.batches(self.budget)
            )
        return self._passes[texts]

    def widest(self, *each: Texts) -> Shape:
        """Tokens of the largest pass of any of these texts, and the length of its rows."""
        return max(((b * n, n) for texts in each for b, n in self.passes(texts)), default=(0, 0))

    def nodes(self, texts: Texts) -> int:
        """Residuals that are kept of `texts` at a site."""
        return texts.distinct if self.dtype == "float32" else texts.tokens

    def passing(self, *each: Texts, logits: float = 0.0) -> dict[str, float]:
        """Parts of a step that reads these texts as they are."""
        return {"activations": self.activations(*self.widest(*each)), "logits": logits}

    def activations(self, tokens: float, length: float) -> float:
        """Bytes at the widest point of one layer."""
        m = self.model
        heads = (m.n_heads + 2 * m.n_kv) * m.d_head
        mlp, residual = (3 * m.d_mlp, 5 * m.d_model) if m.gated else (2 * m.d_mlp, 3 * m.d_model)
        attention = 2 * heads + m.n_heads * (m.d_head + 2 * length)
        return tokens * self.size * (residual + max(mlp, attention))

    def gradients(self, tokens: float, layers: float) -> float:
        """Bytes that a backward pass through so many layers keeps of the forward pass."""
        m = self.model
        heads = (2 * m.n_heads + 2 * m.n_kv) * m.d_head
        kept = (3 if m.gated else 2) * m.d_mlp + 2 * heads + 12 * m.d_model
        return tokens * layers * kept * self.size

    def kept(self, tokens: float, sites: int) -> float:
        return tokens * self.model.d_model * self.size * sites

    def logits(self, rows: int, copies: float) -> float:
        """Bytes of so many copies of a block of logits; a softcap alone makes three."""
        block = 4.0 * rows * self.model.d_vocab * max(copies, 3 if self.model.softcap else 0)
        whole = 0.0 if self.dtype == "float32" else 4.0 * self.model.d_vocab * self.model.d_model
        return block + whole

    def slices(self, saes: Sequence[SaeShape], rows: int, *, decoder: bool, copies: int) -> float:
        """One block of an SAE: encoder columns (and decoder rows), and `copies` of its activations on so many rows."""
        d, widest = self.model.d_model, max((s.d_sae for s in saes), default=0)
        width = min(widest, block_width(d, rows))
        return 4.0 * width * (d * (2 if decoder else 1) + copies * rows)

    def step(
        self, name: str, work: Work, parts: dict[str, float], *, f32: float = 0.0, read: float = 0.0, host: float = 0.0, extra: float = 0.0
    ) -> Step:  # fmt: skip
        """`work` in the model's dtype, `f32` operations in float32; reading does not overlap computing."""
        seconds = work.flops / self.hardware.rate(self.dtype) + f32 / self.hardware.rate("float32")
        seconds += read / DISK_BYTES_PER_SECOND + extra
        parts = parts | {"what was read before": self.known}
        return Step(
            name,
            work.flops + f32,
            seconds,
            work.token_layers,
            {k: v for k, v in parts.items() if v},
            read,
            host,
        )
