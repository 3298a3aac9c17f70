"""`sae-bias ladder`: what one feature does to the bias, and how much any edit at its place could do."""

from typing import Annotated

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
    Score,
    Seed,
    WordsFile,
    example,
    parse_numbers,
)
from sae_bias.cli.run_files import run_facts, save_run

COLUMNS = {
    "rung": "rung",
    "effect": "nats",
    "ci_low": "low",
    "ci_high": "high",
    "share_of_bias": "of the bias",
    "share_of_ceiling": "of its ceiling",
    "meaning": "what it is",
}
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="I,J,…",
        help="Layers at which the ceiling is measured; nine over the depth by default.",
        show_default=False,
    ),
]
Single = Annotated[
    int, typer.Option("--single-positions", min=0, help="How many single positions from the end.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "ladder",
        epilog=example(
            "sae-bias ladder organism:planted organism:planted/constructed#0",
            "sae-bias ladder organism:planted organism:planted/constructed#0 --layers 1,2,3 --out runs/ladder",
        ),
    )(ladder)


def ladder(
    model: ModelName,
    feature: FeatureName,
    pairs: Pairs = None,
    words: WordsFile = None,
    score: Score = "mean_logit",
    layers: Layers = None,
    single_positions: Single = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Climb the causal ladder of a feature: ceiling, necessity, sufficiency, the SAE's error, direct and mediated.

    The ceiling is what replacing the whole residual after the subject does; necessity is ablation, and its share of the ceiling;
    sufficiency sets the feature to its AI value in the human prompts. Nothing here is drawn at random.
    """
    with Console(json, quiet) as console:
        from sae_bias.discovery.causal import causal_ladder as climb
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_pairs
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae

        prompts, loaded_feature = load_pairs(pairs), as_feature(feature)
        probe = read_probe(prompts, words, score)
        at = None if layers is None else [int(n) for n in parse_numbers(layers, "--layers")]
        sae = load_sae(loaded_feature.ref.sae)
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, [sae], console)
        result = climb(
            loaded, loaded_feature, prompts, probe, layers=at, positions=single_positions, progress=console.progress
        )  # fmt: skip
        if out is not None:
            facts = run_facts(
                loaded, pairs=prompts, vocabulary=result.base.vocabulary, saes=[sae], seed=seed, gate=gate_facts(gate, True),
                feature=str(result.feature),
            )  # fmt: skip
            tables = {"ladder": result.to_frame(), "ceilings": result.ceilings, "direct_words": result.words}
            save_run(
                out,
                facts,
                tables,
                {"ladder": {"feature": str(result.feature), "layer": result.layer, "bias": result.base.bias}},
            )
        console.say(
            f"{result.feature}: unsteered bias {result.base.bias:+.3f} nats over {result.base.n_pairs} pairs; ablation removes "
            f"{result['necessity']:+.3f}, any edit after the subject at layer {result.layer} could remove {result['ceiling']:+.3f}"
        )
        console.note(gate_line(gate))
        console.table("The causal ladder", result.to_frame(), COLUMNS)
        if result.note:
            console.note(result.note)
        console.finish(
            {
                "model": loaded.name,
                "feature": str(result.feature),
                "bias": result.base.bias,
                "layer": result.layer,
                "rungs": result.to_frame().to_dict(orient="records"),
                "ceilings": result.ceilings.astype(object)
                .where(result.ceilings.notna(), None)
                .to_dict(orient="records"),
                "words": result.words.to_dict(orient="records"),
                "note": result.note or None,
                "gate": gate_facts(gate, True),
                "out": None if out is None else str(out),
            }
        )
