"""What two processes save: a 40-cell sweep and the exact effects of 64 features, in this process and shared out; rows of README.md.

    python experiments/benchmarks/workers.py [--workers N] [--repeats R]

Wall-clock seconds, on a quiet machine: one thread a process, the median of the repeats after one warm-up, both taken in turn. Gemma 3 270M
shapes with random weights, as in sweep.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sweep import feature, random_model, random_pairs, random_probe

import sae_bias as sb
from sae_bias.discovery.attribution import exact_ablation, exact_resampling
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.sweep_work import LocalWorkers

CELLS, FEATURES, PAIRS = 40, 64, 24


def tasks() -> dict[str, Callable[[int], Any]]:
    """Each by the number of processes."""
    model, probe, every = random_model(), random_probe(), random_pairs()
    pairs = replace(every, pairs=every.pairs[:PAIRS])
    one = feature(model, pairs, every=True)
    cells = sb.Sweep([sb.Clamp(one, -0.1 * k) for k in range(CELLS)])
    engine = ProbeEngine(model, pairs, probe, sites=[one.site])
    many = [replace(one, w_dec=one.w_dec * (1 + k / FEATURES)) for k in range(FEATURES)]

    def ranking(n: int) -> None:
        exact_ablation(engine, many, workers=n)
        exact_resampling(engine, many, workers=n)

    return {
        f"sweep of {CELLS} cells": lambda n: sb.run_sweep(model, pairs, cells, probe=probe, executor=LocalWorkers(n).run),
        f"exact effects of {FEATURES} features": ranking,
    }  # fmt: skip


def _clocked(run: Callable[[int], Any], n: int) -> float:
    start = time.perf_counter()
    run(n)
    return time.perf_counter() - start


def table(workers: int, repeats: int) -> None:
    found = {name: (run, {1: [], workers: []}) for name, run in tasks().items()}
    for _ in range(repeats + 1):
        for run, times in found.values():
            for n, seconds in times.items():
                seconds.append(_clocked(run, n))
    print(f"| what | 1 process, s | {workers} processes, s | x faster |\n|---|---:|---:|---:|")
    for name, (_, times) in found.items():
        alone, shared = (statistics.median(seconds[1:]) for seconds in times.values())
        print(f"| {name} | {alone:.1f} | {shared:.1f} | {alone / shared:.2f} |")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table(args.workers, args.repeats)


if __name__ == "__main__":
    main()
