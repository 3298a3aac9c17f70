"""One model's arithmetic for a plan: operations and bytes of a pass, of its gradients, of logits, of SAE blocks.

Factors that depend on how PyTorch runs a layer (how many copies are held at its widest point) are those measured on small checkpoints
of the same architectures (tests/test_plan.py holds the estimates to 15 % of what a process takes).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sae_bias.models.forward import BATCH_TOKENS
from sae_bias.saes.stream import block_width
from sae_bias.workflows.hardware import DISK_BYTES_PER_SECOND, Hardware
from sae_bias.workflows.plan_shapes import BYTES, ModelShape, SaeShape

HELD = ("kept residuals", "key-value cache", "the baseline's weights")


@dataclass(frozen=True)
class Step:
    """One step of the study: what it computes, reads and holds beside the weights."""

    name: str
    flops: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    """Bytes on the device by part, without the weights: those of `HELD` last, of the others the largest counts."""
    read_bytes: float = 0.0
    host_bytes: float = 0.0
    """Bytes of the process's own memory for tables."""

    @property
    def device_bytes(self) -> float:
        held = sum(size for name, size in self.parts.items() if name in HELD)
        return held + max((size for name, size in self.parts.items() if name not in HELD), default=0.0)


def token_estimate(text: str) -> int:
    """Words and punctuation marks, and a BOS."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 1


@dataclass(frozen=True)
class Texts:
    """Estimated lengths of some prompts."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        return cls(tuple(token_estimate(t) for t in texts))

    @property
    def n(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mean(self) -> float:
        return self.tokens / max(1, self.n)

    @property
    def alike(self) -> int:
        """The most prompts of one length."""
        return max(Counter(self.lengths).values(), default=0)

    def largest_batch(self, budget: int) -> int:
        """Tokens of the largest batch of equal length."""
        groups = Counter(self.lengths)
        return max((min(n, max(1, budget // length)) * length for length, n in groups.items()), default=0)


class Costs:
    """The arithmetic of one model in one dtype on one device."""

    def __init__(self, model: ModelShape, dtype: str, hardware: Hardware):
        self.model, self.dtype, self.hardware = model, dtype, hardware
        self.kind = "cpu" if hardware.is_cpu else "cuda"
        self.size = BYTES[dtype]
        self.budget = BATCH_TOKENS[self.kind]

    def batch(self, texts: Texts) -> int:
        return texts.largest_batch(self.budget)

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

    def logits(self, rows: int, copies: int) -> float:
        block = 4.0 * rows * self.model.d_vocab * (copies + (4 if self.model.softcap else 0))
        whole = 0.0 if self.dtype == "float32" else 4.0 * self.model.d_vocab * self.model.d_model
        return block + whole

    def slices(self, saes: Sequence[SaeShape], rows: int, *, decoder: bool, copies: int) -> float:
        """One block of an SAE: encoder columns (and decoder rows), and `copies` of its activations on so many rows."""
        d, widest = self.model.d_model, max((s.d_sae for s in saes), default=0)
        width = min(widest, block_width(d, rows))
        return 4.0 * width * (d * (2 if decoder else 1) + copies * rows)

    def step(
        self, name: str, flops: float, parts: dict[str, float], *, f32: float = 0.0, read: float = 0.0, host: float = 0.0, extra: float = 0.0
    ) -> Step:  # fmt: skip
        """`flops` in the model's dtype, `f32` in float32; reading does not overlap computing."""
        seconds = flops / self.hardware.rate(self.dtype) + f32 / self.hardware.rate("float32")
        seconds += read / DISK_BYTES_PER_SECOND + extra
        return Step(name, flops + f32, seconds, {k: v for k, v in parts.items() if v}, read, host)
