"""`sae-bias resolve`: which SAE a bare feature index means."""

import sys
from typing import Annotated

import typer

from sae_bias.cli.context import FROM_MODEL, Run, command, rows
from sae_bias.core.labels import columns_of

COLUMNS = columns_of(
    "sae; layer; fit: fit r; ordered; rank; n_null: among; p_holm: Holm p; ai_speech: AI speech; "
    "harm: badly judged; removed: nats removed; status"
)
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


@command(
    "resolve",
    "sae-bias resolve organism:planted 0 organism:planted/constructed organism:planted/resid_post/layer_2_width_512_l0_small",
    "sae-bias resolve google/gemma-3-12b-it 2511 saes/resid_post --null 5000",
    takes=(*FROM_MODEL, "grid", "pairs", "words"),
)
def resolve(
    run: Run, index: Index, sae: Candidates, null: Null = 1000, suppress: Suppress = False, yes: Yes = False
) -> None:
    """Find out which SAE a bare index means, by the published activation table.

    The feature is read from every candidate; its fit is ranked among other features of the same file and corrected over the
    candidates. A candidate that cannot be read is listed with its reason. Of SAEs on the hub, the encoder needs a whole tensor:
    its size is printed and you are asked, file by file.
    """
    from sae_bias.discovery.resolve import SCORE, resolve_index

    pairs = run.pairs if suppress or run.given["pairs"] is not None else None
    grid, probe = run.grid, None if pairs is None else run.probe
    model = run.open(gate=False)
    found = resolve_index(
        model, index, sae, n_null=null, seed=run.seed, grid=grid, pairs=pairs, probe=probe, confirm=_asks(yes), progress=run.progress
    )  # fmt: skip
    named = None if found.feature is None else str(found.feature)
    figures = {"index": index, "feature": named, "verdict": found.verdict}
    run.save({"candidates": found.to_frame()}, {"resolved": figures}, pairs=pairs, grid=grid)
    run.say(f"feature {index}: {found.verdict}")
    run.note(f"fit: {SCORE}; read {found.bytes_read / 1e6:,.1f} MB")
    run.table("Candidates, best fit first", found.to_frame(), COLUMNS)
    for name, table in found.tables.items():
        run.table(name, table.reset_index(), {"subject": "subject", **{c: str(c) for c in table.columns}})
    run.done(
        {
            **figures,
            "tie_broken": found.tie_broken,
            "score": SCORE,
            "bytes_read": found.bytes_read,
            "candidates": rows(found.to_frame()),
            "tables": {name: table.T.to_dict() for name, table in found.tables.items()},
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
