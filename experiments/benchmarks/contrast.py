"""Ranking a contrast of many texts against a wide SAE: time against the forward pass plus the bare product, and memory against the number of texts.

    python experiments/benchmarks/contrast.py [--model organism:planted] [--texts 10000] [--tokens 128] [--width 65536] [--repeats 3]
    python experiments/benchmarks/contrast.py --texts 100000 --tokens 16 --width 4096 --repeats 0      # memory only

- floor: the tokens, the layers up to the SAE over every batch, and x · W_enc of every token's residual in tiles that stay in the processor's cache; nothing
  kept or tested.
- ranking: `rank_features(model, sae, contrast, reduce="mean")`, from the SAE's file. Mark: at most 1.3 times the floor (processor time).
- memory: a process's peak, the model included, with --texts and with a quarter of them (a process each). Mark: the same within a tenth.

The SAE is random, with thresholds for about 100 live features a token; texts are the bundled neutral ones joined and cut to --tokens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import sae_bias as sb
from sae_bias.models.residuals import text_batches
from sae_bias.prompts.texts import load_texts
from sae_bias.saes.stream import COLUMNS, TILE_ROWS

LIVE = 100


def make_texts(model: sb.Model, n: int, tokens: int) -> list[str]:
    """n different texts of about so many tokens."""
    rng, words = np.random.default_rng(0), [w for t in load_texts("neutral") for w in t.split()]
    per_word = len(model.encode(" ".join(words))) / len(words)
    length, found = max(1, round(tokens / per_word) - 1), {}
    while len(found) < n:
        found[" ".join(rng.choice(words, length))] = None
    return list(found)


def make_sae(folder: Path, model: sb.Model, layer: int, width: int, texts: list[str]) -> Path:
    """A random SAE in the Gemma Scope 2 layout; thresholds leave about LIVE features on."""
    torch.manual_seed(0)
    d = model.d_model
    w = torch.randn(d, width) / d**0.5
    x = torch.cat(
        [
            b.resid[layer][b.ordinary]
            for b in text_batches(model, [model.encode(t) for t in texts[:8]], [layer])
        ]
    )
    threshold = torch.quantile((x @ w)[:64], 1 - LIVE / width, dim=0).clamp(min=0).contiguous()
    place = folder / "resid_post" / f"layer_{layer}_width_{width}_l0_medium"
    place.mkdir(parents=True)
    tensors = {
        "w_enc": w,
        "w_dec": w.T.contiguous(),
        "b_enc": torch.zeros(width),
        "b_dec": torch.zeros(d),
        "threshold": threshold,
    }
    save_file(tensors, place / "params.safetensors")
    return place


def floor(model: sb.Model, sae: sb.Sae, texts: list[str]) -> float:
    """Processor seconds of the forward pass and the product alone."""
    start = time.process_time()
    ids = [model.encode(t) for t in texts]
    waiting: list[torch.Tensor] = []
    for batch in text_batches(model, ids, [sae.site.layer]):
        waiting.append(batch.resid[sae.site.layer][batch.ordinary])
        if sum(x.numel() for x in waiting) * 4 > 128 << 20:
            product(sae, torch.cat(waiting))
            waiting = []
    if waiting:
        product(sae, torch.cat(waiting))
    return time.process_time() - start


@torch.no_grad()
def product(sae: sb.Sae, x: torch.Tensor) -> None:
    tile = torch.empty(TILE_ROWS, COLUMNS)
    for at in range(0, sae.d_sae, COLUMNS):
        w_enc = sae.encoder.columns(at, min(at + COLUMNS, sae.d_sae)).w_enc.contiguous()
        for row in range(0, len(x), TILE_ROWS):
            part = x[row : row + TILE_ROWS]
            torch.mm(part, w_enc, out=tile[: len(part), : w_enc.shape[1]] if len(part) == TILE_ROWS else None)


def ranking(model: sb.Model, sae: sb.Sae, texts: list[str]) -> float:
    contrast = sb.Contrast(texts[: len(texts) // 2], texts[len(texts) // 2 :])
    model._encoded[1].clear()
    start = time.process_time()
    sb.rank_features(model, sae, contrast, reduce="mean")
    return time.process_time() - start


def peak_of(args: argparse.Namespace, n: int, folder: Path) -> float:
    """Peak MB of a process of its own, the loaded model included."""
    command = [
        sys.executable,
        __file__,
        "--model",
        args.model,
        "--texts",
        str(n),
        "--tokens",
        str(args.tokens),
        "--memory",
        str(folder),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="organism:planted")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = sb.load_model(args.model)
    texts = make_texts(model, args.texts, args.tokens)
    if args.memory:
        ranking(model, sb.load_sae(args.memory), texts)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory(prefix="sae-bias-") as temporary:
        folder = make_sae(Path(temporary), model, model.n_layers // 2, args.width, texts)
        sae = sb.load_sae(folder)
        lengths = [len(model.encode(t)) for t in texts[:64]]
        print(
            f"{args.model}: {len(texts)} texts of {np.mean(lengths):.0f} tokens, {sae.d_sae:,} features, d_model {model.d_model}, {torch.get_num_threads()} threads"
        )
        if args.repeats:
            pairs = [(floor(model, sae, texts), ranking(model, sae, texts)) for _ in range(args.repeats)]
            low, high = (statistics.median(x) for x in zip(*pairs))
            print(f"floor {low:.2f} s, ranking {high:.2f} s: {high / low:.2f}x (mark 1.3)", flush=True)
        whole, quarter = peak_of(args, args.texts, folder), peak_of(args, max(8, args.texts // 4), folder)
        print(f"peak of the process: {whole:.0f} MB, with a quarter of the texts {quarter:.0f} MB")


if __name__ == "__main__":
    main()
