"""Named hardware, with the vendor's own figures and what share of them is assumed.

Peak rates are dense (no structured sparsity), bfloat16 with float32 accumulation on tensor cores and plain float32 beside it, as the
data sheets named state them. No pass reaches the peak: `UTILISATION` of it is assumed for the layers' matrix products, and
`STREAMING` of the memory's rate for steps that only read weights (generation, one token at a time). Both are assumptions, and
every table that uses them says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sae_bias.core.errors import RequestError

UTILISATION = 0.4
STREAMING = 0.6
DISK_BYTES_PER_SECOND = 1e9
"""Assumed rate at which weights and SAE files are read: one NVMe disk; a network file system may be ten times slower."""


@dataclass(frozen=True)
class Hardware:
    """One device (or this machine's processor) and its rates."""

    name: str
    label: str
    bfloat16: float
    """Dense peak, FLOP/s."""
    float32: float
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    source: str
    utilisation: float = UTILISATION
    is_cpu: bool = False

    def rate(self, dtype: str) -> float:
        """FLOP/s that matrix products in `dtype` are assumed to reach."""
        return self.utilisation * (self.float32 if dtype == "float32" else self.bfloat16)


GB = 1e9
HARDWARE: Mapping[str, Hardware] = {
    h.name: h
    for h in (
        Hardware("h200", "NVIDIA H200 SXM", 989e12, 67e12, 141 * GB, 4.8e12, "NVIDIA H200 data sheet (dense: half of the figure with sparsity)"),
        Hardware("h100", "NVIDIA H100 SXM", 989e12, 67e12, 80 * GB, 3.35e12, "NVIDIA H100 data sheet (dense: half of the figure with sparsity)"),
        Hardware("a100", "NVIDIA A100 80 GB SXM", 312e12, 19.5e12, 80 * GB, 2.039e12, "NVIDIA A100 data sheet"),
        Hardware("a100-40", "NVIDIA A100 40 GB", 312e12, 19.5e12, 40 * GB, 1.555e12, "NVIDIA A100 data sheet"),
        Hardware("l4", "NVIDIA L4", 121e12, 30.3e12, 24 * GB, 300e9, "NVIDIA L4 data sheet (dense: half of the figure with sparsity)"),
        Hardware("rtx4090", "NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 24 * GB, 1.008e12, "NVIDIA Ada GPU architecture white paper"),
    )
}  # fmt: skip


def hardware(name: str, *, flops: float | None = None) -> Hardware:
    """Hardware by name; `cpu` is this machine's processor, its rate measured here or given as `flops`.

    Raises:
        RequestError: no such name.
    """
    short = name.strip().lower()
    if short == "cpu":
        return this_processor(flops)
    if short not in HARDWARE:
        raise RequestError(
            f"no hardware {name[:40]!r}; there is {', '.join(HARDWARE)} and cpu (this machine)."
        )
    return HARDWARE[short]


def this_processor(flops: float | None = None) -> Hardware:
    """This machine's processor; its float32 rate is that of a matrix product, measured unless given."""
    measured = flops is None
    rate = _matmul_rate() if flops is None else flops
    source = "a matrix product, measured here" if measured else "given by --flops"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", f"this machine, {_threads()} threads", rate, rate, memory, 20e9, source, 0.6, True)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _matmul_rate(seconds: float = 0.3) -> float:
    """FLOP/s of a 1,024 × 2,048 × 2,048 product in float32, the best of as many as fit in the time."""
    import torch

    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 2048 * 2048 / best
