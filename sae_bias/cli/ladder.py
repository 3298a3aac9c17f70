"""`sae-bias ladder`: what one feature does to the bias, and how much any edit at its place could do."""

from typing import Annotated

from sae_bias.cli.context import FROM_FEATURE, Run, command, parse_numbers, rows
from sae_bias.core.labels import columns_of

COLUMNS = columns_of(
    "rung: effect of; effect: nats; ci_low: low; ci_high: high; share_of_bias: of the bias; "
    "share_of_ceiling: of its upper bound; meaning: what it is"
)


@command(
    "ladder",
    "sae-bias ladder organism:planted organism:planted/constructed#0",
    "sae-bias ladder organism:planted organism:planted/constructed#0 --layers 1,2,3 --out runs/ladder",
    takes=(*FROM_FEATURE, "pairs", "words", "score"),
)
def ladder(run: Run, layers: str | None = None, single_positions: Annotated[int, {"min": 0}] = 8) -> None:
    """Analyze what a feature causes: upper bound, necessity, sufficiency, the SAE's error, direct and indirect effect.

    The upper bound (activation patching) is what replacing the whole residual after the subject does; necessity is ablation, and its share of the upper bound;
    sufficiency sets the feature to its AI value in the human prompts. Nothing here is drawn at random.

    Args:
        --layers I,J,…: Layers at which the upper bound is measured; nine over the depth by default.
        --single-positions: How many single positions from the end.
    """
    from sae_bias.discovery.causal import causal_ladder as climb

    pairs, feature, probe = run.pairs, run.feature, run.probe
    at = None if layers is None else [int(n) for n in parse_numbers(layers, "--layers")]
    model = run.open(feature.ref.sae)
    result = climb(model, feature, pairs, probe, layers=at, positions=single_positions, progress=run.progress)
    tables = {"ladder": result.to_frame(), "ceilings": result.ceilings, "direct_words": result.words}
    figures = {"feature": str(result.feature), "layer": result.layer, "bias": result.base.bias}
    feature = str(result.feature)
    run.save(tables, {"ladder": figures}, pairs=pairs, vocabulary=result.base.vocabulary, feature=feature)
    run.say(
        f"{result.feature}: unsteered bias {result.base.bias:+.3f} nats over {result.base.n_pairs} pairs; ablation removes "
        f"{result['necessity']:+.3f}, any edit after the subject at layer {result.layer} could remove {result['ceiling']:+.3f}"
    )
    run.note_gate()
    run.table("The causal analysis", result.to_frame(), COLUMNS)
    if result.note:
        run.note(result.note)
    found = {"rungs": result.to_frame(), "ceilings": result.ceilings, "words": result.words}
    run.done({**figures, **{name: rows(table) for name, table in found.items()}, "note": result.note or None})
