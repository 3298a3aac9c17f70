"""What two processes save: a 40-cell sweep and the exact effects of 64 features, in this process and shared out; rows of README.md.

    python experiments/benchmarks/workers.py [--workers N] [--repeats R]

Wall-clock seconds need a quiet machine. CPU seconds of the longest way through (this process, and the busiest of the processes it waits
for) do not: they say how evenly the work is shared. One thread a process, the median of the repeats after one warm-up, both taken in turn.
Gemma 3 270M shapes with random weights, as in sweep.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sweep import feature, random_model, random_pairs, random_probe

import sae_bias as sb
from sae_bias.discovery.attribution import exact_ablation, exact_resampling
from sae_bias.models import workers as processes
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.sweep_work import LocalWorkers

CELLS, FEATURES, PAIRS = 40, 64, 24
NOTES = Path(tempfile.mkdtemp())
_one = processes._one


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


def _noted(i: int) -> Any:
    """One item of work in a process of its own, which notes the CPU seconds it has used so far."""
    result = _one(i)
    (NOTES / str(os.getpid())).write_text(str(time.process_time()))
    return result


def _clocked(run: Callable[[int], Any], n: int) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of this process with those of the busiest process it waits for."""
    for note in NOTES.iterdir():
        note.unlink()
    wall, cpu = time.perf_counter(), time.process_time()
    run(n)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu + max((float(note.read_text()) for note in NOTES.iterdir()), default=0.0)


def table(workers: int, repeats: int) -> None:
    processes._one = _noted
    found = {name: (run, {1: [], workers: []}) for name, run in tasks().items()}
    for _ in range(repeats + 1):
        for run, times in found.values():
            for n, seconds in times.items():
                seconds.append(_clocked(run, n))
    print(f"| what | clock | 1 process, s | {workers} processes, s | x faster |\n|---|---|---:|---:|---:|")
    for name, (_, times) in found.items():
        for i, what in enumerate(("wall", "CPU, longest way")):
            alone, shared = (statistics.median(t[i] for t in v[1:]) for v in times.values())
            print(f"| {name} | {what} | {alone:.1f} | {shared:.1f} | {alone / shared:.2f} |")


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
