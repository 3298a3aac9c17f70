"""What the probe, its checks, scenarios and exact ablation cost, against the least that any exact method computes; the rows of README.md.

    python experiments/benchmarks/shared.py [--model FOLDER] [--repeats R] [--parts N] [--old TREE] [--sae NAME] [--workers]

With `--parts N` every repeat is of another N-th of the templates and scenarios, and the medians are of parts; `--workers` adds the table of
workers.py. All of it for one paste, on a quiet machine: `shared.py --parts 10 --workers [--sae NAME]`, about eight minutes.

    floor = layers over the distinct prefixes + full logits of the distinct positions whose law is read

Ablation (with --sae: the first 64 features that fire on the prompts) runs the lower layers once, and for each feature the layers above it
over the distinct prefixes of the prompts in which it fires.

Both parts of the floor are timed on this machine: plain decoder passes of 32 tokens, 4,096 at a time, and one bare matrix product with the
unembedding, 128 rows at a time, each multiplied by its count (counted from the token ids, not from what the code ran). CPU seconds of
this process (`time.process_time`, one thread), the median of the repeats after a warm-up of the first steps, everything taken in
turn. `--old` names a checkout of an earlier version, which runs the same steps in a process of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch

import sae_bias as sb
from sae_bias.discovery.attribution import exact_ablation
from sae_bias.measures.continuations import Phrasing, make_asks
from sae_bias.measures.scenarios import score_scenarios
from sae_bias.models.model import Model
from sae_bias.probe.checks import run_checks
from sae_bias.probe.run import run_probe
from sae_bias.prompts.load import load_pairs
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.steering.engine import ProbeEngine

Ids = tuple[int, ...]


def distinct(sequences: Iterable[Sequence[int]]) -> int:
    """Distinct prefixes."""
    return len({hash(tuple(s[: k + 1])) for s in set(map(tuple, sequences)) for k in range(len(s))})


def ids_of(model: Model, *pairs: Any) -> list[Ids]:
    return [tuple(model.encode(t)) for group in pairs for p in group for t in (p.human, p.ai)]


def probe_counts(model: Model, pairs: Any) -> tuple[int, int]:
    """(distinct prefixes, positions whose whole law is read) of the probe with its twins."""
    read = ids_of(model, pairs, pairs.controls())
    return distinct(read), len(set(read))


def check_counts(model: Model, pairs: Any) -> tuple[int, int]:
    """Of the checks beside the probe: other stems, forced choices, neutral subjects, words of several tokens, likelihoods."""
    stems = [s for s in pairs.stems if s != pairs[0].stem] + [c.stem for c in pairs.choices]
    other = [
        ids for stem in stems for q in (pairs.with_stem(stem),) for ids in ids_of(model, q, q.controls())
    ]
    other += [tuple(model.encode(n.text)) for n in pairs.neutral_prompts]
    own = ids_of(model, pairs, pairs.controls())
    words = sb.Probe().with_options(score="logodds").vocabulary(model, [pairs[0].human]).kept
    pieces = {w.tokens[:j] for w in words for j in range(1, len(w.tokens))}
    several = [(*ids, *piece) for ids in own for piece in pieces] if pieces else []
    laws = set(other) | set(several) | (set(own) if pieces else set())
    laws |= {s[: k + 1] for s in ids_of(model, pairs) for k in range(len(s) - 1)}
    return distinct([*other, *several, *ids_of(model, pairs)]), len(laws)


def scenario_counts(model: Model, scenarios: Any) -> tuple[int, int]:
    asks = make_asks(Phrasing(model), scenarios)
    read = {(*a.prompt, *c[:k]) for a in asks for c in a.continuations for k in range(len(c))}
    return distinct(read), len(read)


@torch.no_grad()
def firing(model: Model, pairs: Any, name: str, k: int = 64) -> dict[Any, list[Ids]]:
    """The first k features that fire on some of the prompts, and the prompts they fire in."""
    sae, ids = sb.load_sae(name), ids_of(model, pairs)
    resid = sb.residuals(model, ids, sae.site, positions="all")
    where = torch.stack([(sae.encode(x)[[t not in model.special_ids for t in s]] > 0).any(0) for x, s in zip(resid, ids)])  # fmt: skip
    found = torch.nonzero(where.any(0)).flatten()[:k].tolist()
    return {sb.load_feature(f"{name}#{i}"): [s for s, fires in zip(ids, where[:, i]) if fires] for i in found}


def ablation_counts(model: Model, pairs: Any, found: dict[Any, list[Ids]]) -> tuple[float, int]:
    """Passes of all layers in tokens: the prompts once, and what lies above each feature; no law is read."""
    above = [(model.n_layers - f.site.layer - 1) / model.n_layers * distinct(hit) for f, hit in found.items()]
    return distinct(ids_of(model, pairs)) + sum(above), 0


def steps(
    model: Model, pairs: Any, scenarios: Any, found: dict[Any, list[Ids]]
) -> dict[str, Callable[[], Any]]:
    """What is timed; the checks take the probe's result as it is."""

    def ablation() -> Any:
        engine = ProbeEngine(model, pairs, sb.Probe(), sites=[f.site for f in found][:1])
        return exact_ablation(engine, list(found))

    known = cache(lambda: run_probe(model, pairs, random_words=True))
    return {
        "probe": lambda: run_probe(model, pairs),
        "checks": lambda: run_checks(model, pairs, base=known()),
        "scenarios": lambda: score_scenarios(model, scenarios),
        **({"ablation": ablation} if found else {}),
    }


@torch.no_grad()
def unit_costs(model: Model) -> tuple[float, float]:
    """CPU seconds of a token through all layers, and of a row of full logits."""
    tokens = torch.randint(10, model.d_vocab - 10, (128, 32))
    rows, w = torch.randn(128, model.d_model), model.w_unembed.float()
    token = seconds(lambda: model.base(input_ids=tokens, use_cache=False), 3) / tokens.numel()
    return token, seconds(lambda: rows @ w.T, 5) / len(rows)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds after one warm-up."""
    run()
    return statistics.median(timed(run) for _ in range(repeats))


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Of each step and repeat: CPU seconds, distinct prefixes, laws read, floor."""
    model, every, scenarios = sb.load_model(args.model), load_pairs(), load_scenarios()
    found: dict[str, list[list[float]]] = {}
    for k in range(args.repeats):
        part = slice(k % args.parts, None, args.parts)
        pairs, some = every.select(templates=every.templates[part]), scenarios[part]
        features = firing(model, pairs, args.sae) if args.sae else {}
        counts = {
            "probe": lambda pairs=pairs: probe_counts(model, pairs),
            "checks": lambda pairs=pairs: check_counts(model, pairs),
            "scenarios": lambda some=some: scenario_counts(model, some),
            "ablation": lambda pairs=pairs, features=features: ablation_counts(model, pairs, features),
        }
        runs = {name: run for name, run in steps(model, pairs, some, features).items() if name in args.steps}
        if not k or args.parts > 1:
            run_probe(model, pairs, random_words=True)  # a warm-up: texts are tokenized, pages are there
        token, row = unit_costs(model)
        for name, run in runs.items():
            seconds_taken = timed(run)
            n, rows = counts[name]()
            found.setdefault(name, []).append([seconds_taken, n, rows, n * token + rows * row])
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", default="gemma-3-270m-q4")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--steps", nargs="*", default=["probe", "checks", "scenarios", "ablation"])
    options.add_argument(
        "--parts", type=int, default=1, help="every repeat is of another N-th of the templates and scenarios"
    )
    options.add_argument("--sae", help="time the exact ablation of its features too")
    options.add_argument("--workers", action="store_true", help="and the table of workers.py")
    options.add_argument("--old", help="a checkout of an earlier version")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    torch.set_num_threads(1)
    ours = measure(args)
    if args.json:
        print(json.dumps(ours))
        return
    old: dict[str, list[list[float]]] = {}
    if args.old:
        command = [sys.executable, __file__, "--json", "--model", args.model, "--repeats", str(args.repeats), "--parts", str(args.parts), *(["--sae", args.sae] if args.sae else []), "--steps", *args.steps]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": args.old}, capture_output=True, text=True, check=True)  # fmt: skip
        old = json.loads(done.stdout.splitlines()[-1])
    print("| step | distinct prefixes | laws read | floor CPU s | CPU s | x floor | before | x faster |\n|---|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for name, repeats in ours.items():
        taken, n, rows, floor = (statistics.median(v) for v in zip(*repeats))
        ratio = statistics.median(r[0] / r[3] for r in repeats)
        before = statistics.median(r[0] for r in old[name]) if name in old else float("nan")
        print(f"| {name} | {n:,.0f} | {rows:,.0f} | {floor:.1f} | {taken:.1f} | {ratio:.2f} | {before:.1f} | {before / taken:.2f} |")  # fmt: skip
    if args.workers:
        import workers

        workers.table(2, args.repeats)


if __name__ == "__main__":
    main()
