"""`sae-bias card`: what one feature means, as a page."""

from pathlib import Path
from typing import Annotated

from sae_bias.cli.context import FROM_FEATURE, Run, command, picked, rows


@command(
    "card",
    "sae-bias card organism:planted organism:planted/constructed#0 --out runs/cards",
    "sae-bias card google/gemma-3-12b-it gemma-scope-2-12b-it-res/layer_31_width_65k_l0_medium#2511 --texts texts.jsonl --out runs/cards",
    takes=(*FROM_FEATURE, "grid"),
)
def card(
    run: Run,
    texts: str | None = None,
    top: Annotated[int, {"min": 1}] = 12,
    twin: str | None = None,
    describe: bool = False,
) -> None:
    """Show what a feature means: its strongest passages and tokens, the words it writes, its neighbors, and the 2 × 2.

    With --out the card is DIR/cards/INDEX.html, one page without scripts. Nothing here is drawn at random.

    Args:
        --texts FILE: Text collection (.txt, .jsonl, .json), read as a stream; a small bundled one by default.
        --top: How many passages, tokens and words.
        --twin SAE: The SAE's seed twin, where it is not beside it.
        --describe: Fetch the public page's description (cached; never needed).
    """
    from sae_bias.discovery.dashboards import feature_card

    grid = run.grid
    model = run.open(run.feature.ref.sae)
    made = feature_card(
        model, run.feature, texts, grid=grid, k=top, twin=twin, describe=describe, progress=run.progress
    )
    page: Path | None = None
    if run.out is not None:
        tables = {"activation": made.table.long(), "passages": made.to_frame()}
        run.save(tables, grid=grid, feature=str(run.feature.ref))
        page = run.out / "cards" / f"{run.feature.index}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        made.to_html(page)
    run.say(repr(made))
    run.note_gate()
    if page is not None:
        run.note(f"dashboard: {page}")
    twin_of = made.twin and {"feature": str(made.twin.ref), "cosine": made.twin.cosine}
    neighbours = [{"feature": str(n.ref), "cosine": n.cosine} for n in made.neighbours]
    run.done(
        {
            "feature": str(made.feature),
            **picked(made.activity, "collection n_tokens n_fired density largest"),
            **picked(made, "page description notes"),
            "passages": rows(made.to_frame()),
            "words": rows(made.words()),
            "neighbours": neighbours,
            "twin": twin_of,
            "card": None if page is None else str(page),
        }
    )
