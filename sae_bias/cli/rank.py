"""`sae-bias rank`: which features tell AI from human prompts, answer to AI speech, or carry the bias."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import check_all, gate_line, read_probe
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
from sae_bias.core.errors import RequestError

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
    "causal_ai_speech": "causal",
    "survives_loo": "one left out",
    "family_size": "family",
    "fire_ai": "fires, AI",
    "fire_human": "fires, human",
    "density": "density",
}
JOINT = {
    "k": "first k",
    "feature": "with",
    "bias": "bias left",
    "reduction": "removed",
    "red_low": "low",
    "red_high": "high",
}
SaeNames = Annotated[
    list[str],
    typer.Argument(
        metavar="SAE...",
        help="RELEASE/SAE_ID, a local SAE folder, or a folder of them; several are one family.",
        show_default=False,
    ),
]
By = Annotated[str, typer.Option("--by", help="separation, interaction, attribution or ablation.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many features to print.")]
Exact = Annotated[
    int, typer.Option("--exact", min=1, help="How many features --by ablation ablates exactly.")
]
Controls = Annotated[
    int,
    typer.Option(
        "--controls",
        min=0,
        help="With --by ablation: number of controls for the causality test (e.g. 99; off by default).",
    ),
]
MaxView = Annotated[
    bool, typer.Option("--max-view", help="Also show the maximum over ordinary tokens; in no test.")
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
    controls: Controls = 0,
    max_view: MaxView = False,
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
        from sae_bias.discovery.ranking import BY, rank_features
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_grid, load_pairs
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import expand_saes, load_sae

        if by not in BY:
            raise RequestError(f"--by {by!r}: expected one of {', '.join(BY)}.")
        on_grid = by == "interaction"
        prompts: Any = load_grid(grid) if on_grid else load_pairs(pairs)
        probe = None if on_grid else read_probe(prompts, words)
        other: dict[str, Any] = (
            {} if on_grid or not (grid is not None or controls) else {"grid": load_grid(grid)}
        )
        saes = [load_sae(name) for name in expand_saes(sae)]
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, saes, console)
        ranking = rank_features(
            loaded, saes, prompts, by=by, probe=probe, **other, top_k=exact, controls=controls, max_view=max_view,
            seed=seed, progress=console.progress,
        )  # fmt: skip
        if out is not None:
            used = {"grid": prompts} if on_grid else {"pairs": prompts, **other}
            tables = {"ranking": _with_all(ranking.to_frame())}
            tables |= {} if ranking.cumulative is None else {"cumulative": ranking.cumulative}
            facts = run_facts(loaded, **used, saes=saes, seed=seed, gate=gate_facts(gate, True), by=by)
            save_run(out, facts, tables, {})
        first = ranking.to_frame().head(top)
        console.say(
            f"{ranking.family_size:,} features by {by}, {ranking.n_units} {ranking.units}; first: {first['feature'].iloc[0]}"
        )
        if ranking.note:
            console.say(ranking.note)
        console.note(gate_line(gate))
        console.table(f"The first {len(first)}", first, COLUMNS)
        if ranking.cumulative is not None:
            console.table("Ablated together", ranking.cumulative, JOINT)
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
                "cumulative": None
                if ranking.cumulative is None
                else ranking.cumulative.to_dict(orient="records"),
                "gate": gate_facts(gate, True),
                "out": None if out is None else str(out),
            }
        )


def _with_all(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table with the columns a report draws; what this ranking did not measure is missing, not zero."""
    absent = [c for c in ("auroc", "interaction") if c not in frame]
    return frame.assign(**dict.fromkeys(absent, float("nan")))
