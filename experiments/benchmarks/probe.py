"""The probe against the plain `model(tokens)` loop over the same prompts, on Gemma 3 270M's shapes with random weights.

    python experiments/benchmarks/probe.py [--prompts N] [--repeats R]

Both read the same evaluation words after the same prompts in one process. The loop runs one prompt at a time and takes the full
logits that `model(tokens)` gives; the probe batches prompts of equal length and unembeds the last position and the words' rows
only. CPU time of this process, the median over repeats after a warm-up. Marks: at least 3 times faster; peak memory at most the
model plus 500 MB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from sae_bias.models.catalog import MODELS
from sae_bias.models.model import Model
from sae_bias.probe.reading import PairReading
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_pairs
from sae_bias.validation.stand_ins import _TOKENIZERS

HUB_ID = "google/gemma-3-270m"
FASTER, MEGABYTES = 3.0, 500


def gemma_3_270m() -> Model:
    """Random weights in the checkpoint's shapes; the tokenizer is a stand-in's, its ids are all below the vocabulary."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=18, hidden_size=640, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        intermediate_size=2048, vocab_size=262_144, max_position_embeddings=32_768, sliding_window=512,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = transformers.Gemma3ForCausalLM(config)
    return Model(hf, _TOKENIZERS["Gemma3ForCausalLM"](MODELS[HUB_ID]), HUB_ID)


def memory_mb(line: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    with open("/proc/self/status") as f:
        return next(int(text.split()[1]) for text in f if text.startswith(line)) / 1024


def forget_peak() -> None:
    """Start the kernel's high-water mark anew, so that what building the model took does not count."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def cpu_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--prompts", type=int, default=560)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    model = gemma_3_270m()
    reading = PairReading(model, load_pairs(), Probe())
    prompts = [list(p.ids) for p in reading.plan.prompts][: given.prompts]
    words = reading.plan.row_ids
    plan = type(reading.plan)(model, reading.plan.prompts[: given.prompts], reading.plan.words)
    forget_peak()
    before = memory_mb("VmRSS")

    def probe() -> torch.Tensor:
        return torch.from_numpy(plan.run().values)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        rows = [model.hf(torch.tensor([ids])).logits[0, -1, words] for ids in prompts]
        return torch.stack(rows).double()

    ours = cpu_seconds(probe, given.repeats)
    above = memory_mb("VmHWM") - before
    theirs = cpu_seconds(plain, given.repeats)
    column = {t: i for i, t in enumerate(words)}
    same = plain()[:, [column[w[0]] for w in plan.words]]
    difference = float((probe() - same).abs().max() / same.abs().max())
    ratio = theirs / ours
    print(
        f"{len(prompts)} prompts, {len(words)} words, vocabulary {model.d_vocab:,}, {torch.get_num_threads()} threads"
    )
    print(f"{'':24}{'CPU s':>10}{'ms a prompt':>14}")
    for name, seconds in (("model(tokens) loop", theirs), ("sae-bias probe", ours)):
        print(f"{name:24}{seconds:>10.2f}{1000 * seconds / len(prompts):>14.2f}")
    print(f"{ratio:.1f} times faster (mark: {FASTER:g}) — {'met' if ratio >= FASTER else 'MISSED'}")
    print(
        f"peak {above:.0f} MB above the model (mark: {MEGABYTES}) — {'met' if above <= MEGABYTES else 'MISSED'}"
    )
    print(f"largest difference of a logit: {difference:.1e} of the largest")


if __name__ == "__main__":
    main()
