"""`sae-bias resolve`: which SAE a bare feature index means."""

import sys
from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import read_probe
from sae_bias.cli.options import (
    Device,
    Dtype,
    GridFile,
    Json,
    ModelName,
    Out,
    Pairs,
    Quiet,
    Seed,
    WordsFile,
    example,
)
from sae_bias.cli.run_files import run_facts, save_run

COLUMNS = {
    "sae": "SAE",
    "layer": "layer",
    "fit": "fit r",
    "ordered": "ordered",
    "rank": "rank",
    "n_null": "among",
    "p_holm": "Holm p",
    "ai_speech": "AI speech",
    "harm": "badly judged",
    "removed": "bias removed",
    "status": "status",
}
Index = Annotated[
    int, typer.Argument(metavar="INDEX", help="The bare index, such as 2511.", show_default=False)
]
Candidates = Annotated[
    list[str],
    typer.Argument(
        metavar="SAE...",
        help="RELEASE/SAE_ID, an SAE folder, a folder of them, or a whole RELEASE.",
        show_default=False,
    ),
]
Null = Annotated[
    int, typer.Option("--null", min=100, help="Other indices of the same file each fit is ranked among.")
]
Suppress = Annotated[
    bool, typer.Option("--suppress", help="Ablate the survivors on the pairs: the effect breaks a tie.")
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Fetch encoders from the hub without asking, file by file.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "resolve",
        epilog=example(
            "sae-bias resolve organism:planted 0 organism:planted/constructed organism:planted/resid_post/layer_2_width_512_l0_small",
            "sae-bias resolve google/gemma-3-12b-it 2511 saes/resid_post --null 5000",
        ),
    )(resolve)


def resolve(
    model: ModelName,
    index: Index,
    sae: Candidates,
    null: Null = 1000,
    suppress: Suppress = False,
    yes: Yes = False,
    grid: GridFile = None,
    pairs: Pairs = None,
    words: WordsFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Find out which SAE a bare index means, by the published activation table.

    The feature is read from every candidate; its fit is ranked among other features of the same file and corrected over the
    candidates. A candidate that cannot be read is listed with its reason. Of SAEs on the hub, the encoder needs a whole tensor:
    its size is printed and you are asked, file by file.
    """
    with Console(json, quiet) as console:
        from sae_bias.discovery.resolve import SCORE
        from sae_bias.discovery.resolve import resolve_index as find
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_grid, load_pairs

        prompts = load_pairs(pairs) if suppress or pairs is not None else None
        used = load_grid(grid)
        probe = None if prompts is None else read_probe(prompts, words)
        loaded = load_model(model, device=device, dtype=dtype)
        found = find(
            loaded, index, sae, n_null=null, seed=seed, grid=used, pairs=prompts, probe=probe,
            confirm=_asks(yes), progress=console.progress,
        )  # fmt: skip
        if out is not None:
            facts = run_facts(loaded, pairs=prompts, grid=used, seed=seed)
            resolved = None if found.feature is None else str(found.feature)
            save_run(
                out, facts, {"candidates": found.to_frame()}, {"resolved": {"index": index, "feature": resolved, "verdict": found.verdict}},
            )  # fmt: skip
        console.say(f"feature {index}: {found.verdict}")
        console.note(f"fit: {SCORE}; read {found.bytes_read / 1e6:,.1f} MB")
        console.table("Candidates, best fit first", found.to_frame(), COLUMNS)
        for name, table in found.tables.items():
            console.table(
                name, table.reset_index(), {"subject": "subject", **{c: str(c) for c in table.columns}}
            )
        frame = found.to_frame().astype(object)
        console.finish(
            {
                "model": loaded.name,
                "index": index,
                "feature": None if found.feature is None else str(found.feature),
                "verdict": found.verdict,
                "tie_broken": found.tie_broken,
                "score": SCORE,
                "bytes_read": found.bytes_read,
                "candidates": frame.where(frame.notna(), None).to_dict(orient="records"),
                "tables": {name: table.T.to_dict() for name, table in found.tables.items()},
                "out": None if out is None else str(out),
            }
        )


def _asks(yes: bool):
    """Whether to fetch a tensor: --yes, or the person at the terminal; nobody there means no."""

    def confirm(what: str, n_bytes: int) -> bool:
        print(f"{what}: {n_bytes / 1e9:.2f} GB to fetch, of which only slices are kept", file=sys.stderr)
        if yes:
            return True
        return sys.stdin.isatty() and typer.confirm("Fetch it?", err=True)

    return confirm
