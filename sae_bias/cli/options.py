"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from sae_bias.core.errors import RequestError

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or organism:planted.", show_default=False),
]
FeatureName = Annotated[
    str,
    typer.Argument(
        metavar="FEATURE", help="RELEASE/SAE_ID#INDEX, or path/to/sae_folder#INDEX.", show_default=False
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else on standard output.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder to write to.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the headline: no tables, no progress.")]
Pairs = Annotated[
    str | None,
    typer.Option(
        "--pairs",
        metavar="FILE",
        help="Pairs file (.yaml, .csv, .jsonl) or a bundled name (treatment, survival-2, gender …); the bundled 280 by default.",
        show_default=False,
    ),
]
WordsFile = Annotated[
    str | None,
    typer.Option(
        "--words",
        metavar="FILE",
        help="YAML file with lists `positive` and `negative`; the bundled words by default.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="How accelerate spreads a model too large for one device, such as auto; --device is then not used.",
        show_default=False,
    ),
]
Score = Annotated[str, typer.Option("--score", help="mean_logit, logodds or auroc.")]
GridFile = Annotated[
    str | None,
    typer.Option(
        "--grid", metavar="FILE", help="Grid file; the bundled grid by default.", show_default=False
    ),
]
Positions = Annotated[
    str,
    typer.Option(
        "--positions",
        help="Where the edit acts: all, last, subject, prompt or generated (special tokens never).",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Run every N-th cell, from the I-th; join with `sae-bias merge`.",
        show_default=False,
    ),
]


def example(*lines: str) -> str:
    """A command's epilog: its example lines."""
    return "Example: " + "\n\nor: ".join(lines)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`2/4` as (2, 4)."""
    if text is None:
        return None
    i, mark, n = text.partition("/")
    if not (mark and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise RequestError(f"--shard {text!r}: expected I/N with 1 ≤ I ≤ N, such as 1/4.")
    return int(i), int(n)


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """`"0,-5,-10"` as numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip()) or _none_given(option)
    except ValueError:
        raise RequestError(
            f'{option} {text!r}: expected numbers with commas between, such as "0,-5,-10".'
        ) from None


def _none_given(option: str) -> tuple[float, ...]:
    raise RequestError(f'{option} holds no number; expected e.g. "0,-5,-10".')
