"""`sae-bias compare`: the feature against its baselines at equal KL."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import check_all, gate_line, read_probe
from sae_bias.cli.options import (
    Device,
    Dtype,
    FeatureName,
    Json,
    ModelName,
    Out,
    Pairs,
    Quiet,
    Seed,
    WordsFile,
    example,
    parse_numbers,
)
from sae_bias.cli.run_files import run_facts

if TYPE_CHECKING:
    from typing import Any

    import pandas as pd

    from sae_bias.workflows.compare import Comparison


Shares = Annotated[
    str,
    typer.Option(
        "--shares",
        metavar='"0.5,1,2"',
        help="Share of each method's part that is taken out, with commas between.",
    ),
]
Levels = Annotated[
    str,
    typer.Option(
        "--kl", metavar='"0.01,0.1"', help="Costs to compare at: the larger of KL in nats a token and 1 − β."
    ),
]


def register(app: typer.Typer) -> None:
    app.command(
        "compare",
        epilog=example(
            "sae-bias compare organism:planted organism:planted/constructed#0",
            'sae-bias compare organism:planted organism:planted/constructed#0 --shares "0.5,1" --out runs/compare',
        ),
    )(compare)


def compare(
    model: ModelName,
    feature: FeatureName,
    shares: Shares = "0.25,0.5,0.75,1,1.5,2,3",
    kl: Levels = "0.01,0.03,0.1,0.3",
    pairs: Pairs = None,
    words: WordsFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Take out the feature, and each baseline, by steps: how much bias goes at the same cost?

    Baselines: difference of means (with and without massive dimensions, and at other layers), a ridge probe's direction, a
    subspace of the paired differences, random directions and subspaces, matched controls, the opposite sign; each at all positions
    and at the last token alone. Directions are found on discover templates, strengths chosen on tune, every figure is of report.
    """
    with Console(json, quiet) as console:
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_pairs
        from sae_bias.saes.load import as_feature, load_sae
        from sae_bias.workflows.compare import NOT_REACHED, table_in_words
        from sae_bias.workflows.compare import compare_methods as run_compare

        prompts, loaded_feature = load_pairs(pairs), as_feature(feature)
        steps, levels = parse_numbers(shares, "--shares"), parse_numbers(kl, "--kl")
        probe = read_probe(prompts, words)
        sae = load_sae(loaded_feature.ref.sae)
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, [sae], console)
        if out is not None:
            _start(
                out, run_facts(loaded, pairs=prompts, saes=[sae], seed=seed, feature=str(loaded_feature.ref))
            )
        result = run_compare(
            loaded, loaded_feature, prompts, probe, shares=steps, kl_levels=levels, seed=seed,
            out=None if out is None else Path(out) / "compare", progress=console.progress,
        )  # fmt: skip
        if out is not None:
            _end(out, result, str(loaded_feature.ref))
        shown, columns = table_in_words(result.table)
        console.table("Share of the bias removed at equal cost, on templates held out", shown, columns)
        console.say(NOT_REACHED)
        for line in _headline(result.table):
            console.say(line)
        console.say(repr(result.ridge))
        console.note(gate_line(gate))
        console.finish(
            {
                "model": loaded.name,
                "feature": str(loaded_feature.ref),
                "methods": result.table.to_dict(orient="records"),
                "ridge": result.ridge.frame.to_dict(orient="records"),
                "out": None if out is None else str(out),
            }
        )


def _headline(table: "pd.DataFrame") -> list[str]:
    """The feature's own figures at its tuned strength, or why it has none."""
    from sae_bias.core.text import bracket, number, percent, signed

    own = table[table["kind"] == "candidate"]
    return [
        f"{r.method}: no strength: {r.undefined}"
        if r.undefined
        else f"{r.method}: specific reduction {percent(r.specific_reduction)} {bracket(r.spec_low, r.spec_high, share=True)}, "
        f"β {number(r.beta)}, human scores moved by {signed(r.human_shift)} nats, AI scores by {signed(r.ai_shift)}"
        for r in own.itertuples()
    ]


def _start(out: Path, facts: "dict[str, Any]") -> None:
    from sae_bias.runs.folder import RunFolder
    from sae_bias.runs.manifest import write_manifest

    folder = RunFolder(out)
    with folder.writing():
        write_manifest(folder, facts)


def _end(out: Path, result: "Comparison", feature: str) -> None:
    from sae_bias.runs.folder import RunFolder

    folder = RunFolder(out)
    with folder.writing():
        folder.write_table("compare", result.table)
        folder.write_table("compare_curves", result.frame)
        folder.write_table("ridge", result.ridge.frame)
        folder.add_summary({"compare": {"feature": feature}})
