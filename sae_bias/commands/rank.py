"""`sae-bias rank`: which features tell AI from human prompts, answer to AI speech, or carry the bias."""

from typing import TYPE_CHECKING, Annotated

import typer

from sae_bias.commands.console import Console
from sae_bias.commands.inputs import check_all, gate_line, read_probe
from sae_bias.commands.options import (
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
from sae_bias.commands.run_files import run_facts, save_run
from sae_bias.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "feature": "feature",
    "auroc": "AUROC",
    "mean_diff": "AI - human",
    "interaction": "interaction",
    "attribution": "attributed",
    "ablation": "ablated",
    "t": "t",
    "p_fwer": "family-wise p",
    "separates": "separates",
    "ai_speech": "AI-speech",
    "fire_ai": "fires, AI",
    "fire_human": "fires, human",
    "density": "density",
}

SaeNames = Annotated[
    list[str],
    typer.Argument(
        metavar="SAE...",
        help="RELEASE/SAE_ID, or a local SAE folder; several are one family.",
        show_default=False,
    ),
]
By = Annotated[str, typer.Option("--by", help="separation, interaction, attribution or ablation.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many features to print.")]
Exact = Annotated[
    int, typer.Option("--exact", min=1, help="How many features --by ablation ablates exactly.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "rank",
        epilog=example(
            "sae-bias rank organism:planted organism:planted/constructed --by interaction",
            "sae-bias rank organism:planted organism:planted/resid_post/layer_2_width_512_l0_small --by attribution --top 5",
        ),
    )(rank)


def rank(
    model: ModelName,
    sae: SaeNames,
    by: By = "separation",
    top: Top = 10,
    exact: Exact = 64,
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
    """Rank every feature of one or several SAEs.

    separation: how well a feature tells AI from human prompts (easy, because the words differ). interaction: whether it answers to
    AI speech more than AI and speech alone explain, on the matched grid. attribution: the bias its ablation should remove, from one
    backward pass. ablation: the bias it does remove. p is corrected over every feature scanned; too small a design reads
    "undetermined".
    """
    with Console(json, quiet) as console:
        from sae_bias.model import load_model
        from sae_bias.prompts import load_grid, load_pairs
        from sae_bias.ranking import BY, rank_features
        from sae_bias.sae import load_sae
        from sae_bias.study import _gate_facts as gate_facts

        if by not in BY:
            raise RequestError(f"--by {by!r}: expected one of {', '.join(BY)}.")
        on_grid = by == "interaction"
        prompts = load_grid(grid) if on_grid else load_pairs(pairs)
        probe = None if on_grid else read_probe(prompts, words)  # type: ignore[arg-type]
        saes = [load_sae(name) for name in sae]
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, saes, console)
        ranking = rank_features(
            loaded, saes, prompts, by=by, probe=probe, top_k=exact, seed=seed, progress=console.progress
        )
        if out is not None:
            used = {"grid": prompts} if on_grid else {"pairs": prompts}
            facts = run_facts(loaded, **used, saes=saes, seed=seed, gate=gate_facts(gate, True), by=by)
            save_run(out, facts, {"ranking": _with_all(ranking.to_frame())}, {})
        first = ranking.to_frame().head(top)
        console.say(
            f"{ranking.family_size:,} features by {by}, {ranking.n_units} {ranking.units}; first: {first['feature'].iloc[0]}"
        )
        if ranking.note:
            console.say(ranking.note)
        console.note(gate_line(gate))
        console.table(f"The first {len(first)}", first, COLUMNS)
        console.finish(
            {
                "model": loaded.name,
                "saes": [str(s.id) for s in saes],
                "by": by,
                "family_size": ranking.family_size,
                "n_units": ranking.n_units,
                "units": ranking.units,
                "note": ranking.note or None,
                "features": first.to_dict(orient="records"),
                "gate": gate_facts(gate, True),
                "out": None if out is None else str(out),
            }
        )


def _with_all(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table with the columns a report draws; what this ranking did not measure is missing, not zero."""
    absent = [c for c in ("auroc", "interaction") if c not in frame]
    return frame.assign(**dict.fromkeys(absent, float("nan")))
