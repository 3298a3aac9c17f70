"""Two Ray workers pinned to one core each, against one such worker, on the same sweep; prints the ratio.

    python experiments/benchmarks/scaling.py [--cells 108]

Each worker is the one CPU of a Ray node of its own (a raylet in processes pinned to one core), with a copy of a model in the shapes of
Gemma 3 270M and a vocabulary of 4,096. Timed on the wall, from the moment every worker has its model until the last cell is back: each
worker's own pass of the layers below the site is in it. Needs two idle cores; takes some minutes. Mark: 1.7. Where the cores are not idle, the
CPU seconds of the busiest worker say how evenly the cells were shared.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import sae_bias as sb
from sae_bias.integrations.ray import Cluster, _Job, _Pool, _Worker
from sae_bias.workflows.sweep_work import Group, Results, Work

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
import sweep as shapes
from ray_nodes import nodes

MARK = 1.7
shapes.VOCAB, shapes.N_PAIRS = 4096, 28


def save_model(folder: Path) -> Path:
    """The benchmark's random model as a folder that every worker loads."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=shapes.VOCAB, hidden_size=shapes.D_MODEL, num_hidden_layers=shapes.N_LAYERS, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, intermediate_size=2048, query_pre_attn_scalar=256, sliding_window=512,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    shapes._tokenizer().save_pretrained(folder)
    return folder


class Clocked(_Worker):
    """A worker that tells the CPU seconds it has used."""

    def cpu(self) -> float:
        return time.process_time()


class Timed:
    """An executor that starts its workers first and times what they then do, on the wall and in CPU seconds of the busiest."""

    def __init__(self, address: str, workers: int):
        self.cluster, self.workers = Cluster(address, workers), workers
        self.seconds = self.busiest = 0.0

    def run(self, work: Work, groups: Sequence[Group]) -> Results:
        import ray

        with self.cluster.connected():
            pool = _Pool(ray, self.cluster, _Job.of(work))
            pool.actor = ray.remote(num_cpus=pool.cpus, max_restarts=0)(Clocked)
            for _ in range(self.workers):
                pool.start()
            for call in list(pool.busy):
                ray.get(call)
                pool.idle.append(pool.busy.pop(call)[0])
            actors = list(pool.idle)
            before = [ray.get(a.cpu.remote()) for a in actors]
            start = time.perf_counter()
            yield from pool.run(groups)
            self.seconds = time.perf_counter() - start
            self.busiest = max(ray.get(a.cpu.remote()) - b for a, b in zip(actors, before))
            pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=108)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", nargs=2, default=["0", "1"], metavar="CORE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = sb.load_model(save_model(Path(folder) / "model"))
        pairs, probe = shapes.random_pairs(), shapes.random_probe()
        feature = shapes.feature(model, pairs, every=True)
        sweep = sb.Sweep([sb.Clamp(feature, -0.5 * k) for k in range(given.cells)])
        seconds: dict[int, list[float]] = {1: [], 2: []}
        busiest: dict[int, list[float]] = {1: [], 2: []}
        with nodes(2, cores=tuple(given.cores)) as cluster:
            for _ in range(given.repeats):
                for n in (1, 2):
                    timed = Timed(cluster.address, n)
                    sb.run_sweep(model, pairs, sweep, probe=probe, executor=timed.run)
                    seconds[n].append(timed.seconds)
                    busiest[n].append(timed.busiest)
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    cpu, shared = (statistics.median(busiest[n]) for n in (1, 2))
    print(f"{given.cells} cells of {2 * len(pairs)} prompts, the median of {given.repeats}: one worker {one:.1f} s, two workers {two:.1f} s")  # fmt: skip
    print(f"ratio {one / two:.2f} (mark: {MARK}) — {'met' if one / two >= MARK else 'MISSED'}")
    print(f"CPU seconds of the busiest worker, which other programs on the cores do not change: {cpu:.1f} and {shared:.1f}, ratio {cpu / shared:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
