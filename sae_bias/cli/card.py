"""`sae-bias card`: what one feature means, as a page."""

from pathlib import Path
from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import check_all, gate_line
from sae_bias.cli.options import (
    Device,
    Dtype,
    FeatureName,
    GridFile,
    Json,
    ModelName,
    Out,
    Quiet,
    Seed,
    example,
)
from sae_bias.cli.run_files import run_facts, save_run

TextFile = Annotated[
    str | None,
    typer.Option(
        "--texts",
        metavar="FILE",
        help="Text collection (.txt, .jsonl, .json), read as a stream; a small bundled one by default.",
        show_default=False,
    ),
]
Twin = Annotated[
    str | None,
    typer.Option(
        "--twin", metavar="SAE", help="The SAE's seed twin, where it is not beside it.", show_default=False
    ),
]
Describe = Annotated[
    bool, typer.Option("--describe", help="Fetch the public page's description (cached; never needed).")
]
Most = Annotated[int, typer.Option("--top", min=1, help="How many passages, tokens and words.")]


def register(app: typer.Typer) -> None:
    app.command(
        "card",
        epilog=example(
            "sae-bias card organism:planted organism:planted/constructed#0 --out runs/cards",
            "sae-bias card google/gemma-3-12b-it gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium#2511 --texts texts.jsonl --out runs/cards",
        ),
    )(card)


def card(
    model: ModelName,
    feature: FeatureName,
    texts: TextFile = None,
    grid: GridFile = None,
    top: Most = 12,
    twin: Twin = None,
    describe: Describe = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Show what a feature means: its strongest passages and tokens, the words it writes, its neighbors, and the 2 × 2.

    With --out the card is DIR/cards/INDEX.html, one page without scripts. Nothing here is drawn at random.
    """
    with Console(json, quiet) as console:
        from sae_bias.discovery.dashboards import feature_card
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_grid
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae

        loaded_feature, prompts = as_feature(feature), load_grid(grid)
        sae = load_sae(loaded_feature.ref.sae)
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, [sae], console)
        made = feature_card(
            loaded, loaded_feature, texts, grid=prompts, k=top, twin=twin, describe=describe, progress=console.progress
        )  # fmt: skip
        page: Path | None = None
        if out is not None:
            facts = run_facts(
                loaded,
                grid=prompts,
                saes=[sae],
                seed=seed,
                gate=gate_facts(gate, True),
                feature=str(loaded_feature.ref),
            )
            save_run(out, facts, {"activation": made.table.long(), "passages": made.to_frame()}, {})
            page = out / "cards" / f"{loaded_feature.index}.html"
            page.parent.mkdir(parents=True, exist_ok=True)
            made.to_html(page)
        console.say(repr(made))
        console.note(gate_line(gate))
        if page is not None:
            console.note(f"card: {page}")
        a = made.activity
        console.finish(
            {
                "model": loaded.name,
                "feature": str(made.feature),
                "collection": a.collection,
                "n_tokens": a.n_tokens,
                "n_fired": a.n_fired,
                "density": a.density,
                "largest": a.largest,
                "passages": made.to_frame().to_dict(orient="records"),
                "words": made.words().to_dict(orient="records"),
                "neighbours": [{"feature": str(n.ref), "cosine": n.cosine} for n in made.neighbours],
                "twin": None
                if made.twin is None
                else {"feature": str(made.twin.ref), "cosine": made.twin.cosine},
                "page": made.page,
                "description": made.description,
                "notes": list(made.notes),
                "out": None if page is None else str(page),
            }
        )
