"""A rehearsal at full size: the exact shapes of public models with random weights, through every step that is long at that size.

    python experiments/benchmarks/full_size.py                                        # Gemma 3 270M's shapes, on a CPU
    python experiments/benchmarks/full_size.py --shape gemma-3-12b --shape gemma-2-9b # bfloat16, on a GPU of 80 GB or more

Weights are made on the device; nothing is downloaded. For each shape: the probe (280 pairs, levels), the separation of every feature of
SAEs of several widths held on the device, a sweep of 21 strengths at one layer, one index resolved over SAE files, and generation
with and without the edit. Printed for each: seconds on the wall, peak memory above the weights, and the ratio to its floor:

    probe, sweep   plain Hugging Face passes of the same prompts, as many layers of them as no exact method can leave out
    ranking        the bare product of the same residuals with the encoder
    generation     unsteered generation

"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import sae_bias as sb
from sae_bias.discovery.resolve import resolve_index
from sae_bias.models.catalog import MODELS
from sae_bias.models.forward import forward_with_grad, plan_batches
from sae_bias.models.model import Model
from sae_bias.saes.sae import Columns, Sae, SaeInfo
from sae_bias.validation.stand_ins import _TOKENIZERS
from sae_bias.workflows.plan_shapes import ModelShape, model_shape

LIVE = 100  # features that fire at a token, about
N_STRENGTHS, NEW_TOKENS, N_GENERATED = 21, 40, 16
TFLOPS = (
    770e12  # what one H200 reaches on large bfloat16 products; the floor in seconds is stated at this rate
)


@dataclass(frozen=True)
class Rehearsal:
    """A public checkpoint whose shapes are used, the sweep's layer, and the SAEs' widths."""

    hub_id: str
    layer: int
    widths: tuple[int, ...]
    file_width: int


SHAPES = {
    "270m": Rehearsal("google/gemma-3-270m", 12, (16_384, 65_536), 16_384),
    "gemma-3-12b": Rehearsal("google/gemma-3-12b-it", 31, (16_384, 65_536, 262_144), 65_536),
    "gemma-2-9b": Rehearsal("google/gemma-2-9b", 20, (16_384, 131_072), 16_384),
}


# ── what is measured on ─────────────────────────────────────────────────────────────────────────────────────


def random_model(rehearsal: Rehearsal, device: str) -> Model:
    """The checkpoint's shapes with random weights made on the device, bfloat16 on a GPU."""
    shape = model_shape(rehearsal.hub_id)
    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.n_layers, "hidden_size": shape.d_model, "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv, "head_dim": shape.d_head, "intermediate_size": shape.d_mlp,
        "vocab_size": shape.d_vocab, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if shape.softcap:
        config: Any = transformers.Gemma2Config(**sizes, query_pre_attn_scalar=shape.d_head)
        kind: Any = transformers.Gemma2ForCausalLM
    else:
        config = transformers.Gemma3TextConfig(
            **sizes, query_pre_attn_scalar=shape.d_head, sliding_window=1024
        )
        kind = transformers.Gemma3ForCausalLM
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            hf = kind(config)
    finally:
        torch.set_default_dtype(before)
    hf.generation_config.eos_token_id = None
    tokenizer = _TOKENIZERS["Gemma3ForCausalLM"](MODELS["google/gemma-3-270m"])
    return sb.load_model(hf, tokenizer=tokenizer)


@dataclass(eq=False)
class OnDevice:
    """A random SAE's tensors, held on the device in float32."""

    w_enc: Tensor
    w_dec: Tensor
    threshold: Tensor

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.w_enc.shape[1]

    def columns(self, start: int, stop: int) -> Columns:
        zeros = torch.zeros(stop - start, device=self.w_enc.device)
        return Columns(self.w_enc[:, start:stop], zeros, self.threshold[start:stop])

    def decoder_rows(self, indices: Sequence[int]) -> Tensor:
        return self.w_dec[torch.as_tensor(list(indices), device=self.w_dec.device)]

    def b_dec(self) -> Tensor:
        return torch.zeros(self.d_in, device=self.w_dec.device)


def random_sae(model: Model, layer: int, width: int, resid: Tensor) -> Sae:
    """About LIVE features fire at a token of `resid` [n, d_model]."""
    generator = torch.Generator(model.device).manual_seed(width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=model.device) / model.d_model**0.5

    w_enc, x = normal(model.d_model, width), resid.to(model.device)
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - LIVE / width)).item()
    norm = float(x.norm(dim=-1).mean()) / model.d_model**0.5
    encoder = OnDevice(
        w_enc, normal(width, model.d_model), torch.full((width,), z * norm, device=model.device)
    )
    return Sae(sb.SaeId("random", f"layer_{layer}_width_{width}"), encoder, SaeInfo(sb.Site(layer)))


def firing_feature(model: Model, layer: int, resid: Sequence[Tensor]) -> sb.Feature:
    """A feature that fires in every prompt."""
    generator = torch.Generator().manual_seed(2)
    w_enc, w_dec = (torch.randn(model.d_model, generator=generator) / model.d_model**0.5 for _ in range(2))
    threshold = min(float((r[1:] @ w_enc).max()) for r in resid)
    threshold -= 1e-3 * abs(threshold)
    ref = sb.FeatureRef(sb.SaeId("random", "every"), 0)
    scale = float(torch.cat(list(resid)).norm(dim=-1).median())
    return sb.Feature(
        ref, w_enc, 0.02 * scale * w_dec, torch.tensor(0.0), torch.tensor(max(threshold, 0.0)), sb.Site(layer)
    )


def write_files(root: Path, layer: int, d_model: int, width: int, n: int = 4) -> Path:
    """SAE files in the Gemma Scope 2 layout, their tensors holes in the file: the reads are real, the numbers zero."""
    shapes = {"w_enc": [d_model, width], "b_enc": [width], "threshold": [width], "b_dec": [d_model], "w_dec": [width, d_model]}  # fmt: skip
    header, at = {}, 0
    for name, size in shapes.items():
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [at, at + 4 * int(np.prod(size))]}
        at += 4 * int(np.prod(size))
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    for k in range(n):
        folder = root / f"layer_{layer}_width_{width // 1024}k_l0_{k}"
        folder.mkdir(parents=True)
        with (folder / "params.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + at)
    return root


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────


def _status(line: str) -> float:
    with open("/proc/self/status") as f:
        return next(int(text.split()[1]) for text in f if text.startswith(line)) * 1024.0


class Meter:
    """Seconds on the wall (the median of repeats after one warm-up) and peak bytes above the weights."""

    def __init__(self, device: torch.device, repeats: int):
        self.cuda, self.repeats = device.type == "cuda", repeats
        self.weights = torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def _start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")

    def _peak(self) -> float:
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.weights

    def __call__(self, run: Callable[[], Any], *, warm: bool = True) -> tuple[float, float]:
        if warm:
            run()
        times = []
        self._start()
        for _ in range(self.repeats):
            start = time.perf_counter()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times), self._peak()


@dataclass(frozen=True)
class Row:
    step: str
    seconds: float
    peak: float
    floor: float | None
    note: str = ""

    def line(self) -> str:
        ratio = "" if not self.floor else f"{self.seconds / self.floor:.2f}"
        return f"| {self.step} | {self.seconds:.2f} | {self.peak / 1e9:.2f} | {ratio} | {self.note} |"


def rehearse(rehearsal: Rehearsal, device: str, repeats: int, folder: Path, n_pairs: int) -> list[Row]:
    model, shape, layer = random_model(rehearsal, device), model_shape(rehearsal.hub_id), rehearsal.layer
    pairs = sb.load_pairs()
    pairs = pairs.select(templates=pairs.templates[: max(2, n_pairs // 8)])
    meter = Meter(model.device, repeats)
    texts = [t for p in pairs for t in (p.human, p.ai)]
    batches = plan_batches([model.encode(t) for t in texts], model.device)
    tokens = sum(b.tokens.numel() for b in batches)
    print(f"{rehearsal.hub_id}: {model!r}\n{len(texts)} prompts of {tokens / len(texts):.1f} tokens")

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            forward_with_grad(model, batch.tokens)

    one, one_peak = meter(plain)
    flops = shape.flops(tokens, shape.n_layers, tokens / len(texts))
    rows = [Row("plain passes of the layers", one, one_peak, None, f"{flops / one / 1e12:.2g} TFLOP/s")]
    seconds, peak = meter(lambda: sb.run_probe(model, pairs, levels=True))
    rows.append(Row("probe with levels", seconds, peak, one))
    resid = sb.residuals(model, texts[:64], layer, positions="all")
    rows += [_ranking(model, shape, layer, width, pairs, resid, meter) for width in rehearsal.widths]
    feature = firing_feature(model, layer, sb.residuals(model, texts, layer, positions="all"))
    rows.append(_sweep(model, shape, layer, pairs, feature, meter, one, flops))
    root = write_files(folder / "candidates", layer, shape.d_model, rehearsal.file_width)
    seconds, peak = meter(lambda: resolve_index(model, 2511, str(root)))
    rows.append(Row(f"resolve over 4 files of {rehearsal.file_width:,}", seconds, peak, None))
    plainly, _ = meter(lambda: sb.generate(model, texts[:N_GENERATED], max_new_tokens=NEW_TOKENS))
    edits = [sb.Clamp(feature, -1.0)]
    seconds, peak = meter(
        lambda: sb.generate(model, texts[:N_GENERATED], interventions=edits, max_new_tokens=NEW_TOKENS)
    )
    rate = N_GENERATED * NEW_TOKENS / seconds
    rows.append(Row("generation, steered", seconds, peak, plainly, f"{rate:.0f} tokens/s"))
    return rows


def _ranking(
    model: Model, shape: ModelShape, layer: int, width: int, pairs: sb.PromptPairs, resid: Sequence[Tensor], meter: Meter
) -> Row:  # fmt: skip
    sae = random_sae(model, layer, width, torch.cat([r[1:] for r in resid]))
    x = torch.randn(2 * len(pairs), shape.d_model, device=model.device)

    def product() -> None:
        for start in range(0, width, 8192):
            columns = sae.columns(start, min(start + 8192, width))
            torch.addmm(columns.b_enc, x, columns.w_enc)

    floor, _ = meter(product)
    seconds, peak = meter(lambda: sb.rank_features(model, sae, pairs, by="separation"))
    return Row(f"ranking {width:,} features", seconds, peak, None, f"bare product {floor:.3f} s")


def _sweep(
    model: Model, shape: ModelShape, layer: int, pairs: sb.PromptPairs, feature: sb.Feature, meter: Meter, one: float, flops: float
) -> Row:  # fmt: skip
    sweep = sb.Sweep([sb.Clamp(feature, -0.5 * k) for k in range(N_STRENGTHS)])
    share = (layer + 1 + N_STRENGTHS * (shape.n_layers - layer - 1)) / shape.n_layers
    seconds, peak = meter(lambda: sb.run_sweep(model, pairs, sweep))
    note = f"floor {share:.2f} passes; {flops * share / TFLOPS:.2g} s at {TFLOPS / 1e12:.0f} TFLOP/s"
    return Row(f"sweep of {N_STRENGTHS} strengths at layer {layer}", seconds, peak, share * one, note)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="270m on a CPU by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=280, help="fewer for a short look")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(given.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    for shape in given.shape or ["270m"]:
        folder = Path(tempfile.mkdtemp())
        try:
            rows = rehearse(SHAPES[shape], given.device, given.repeats, folder, given.pairs)
        finally:
            shutil.rmtree(folder)
        print(
            f"\n{shape} on {name}\n\n| step | seconds | peak above the weights, GB | × floor | |\n|---|---:|---:|---:|---|"
        )
        print("\n".join(row.line() for row in rows) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
