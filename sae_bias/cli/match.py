"""`sae-bias match`: the counterpart of a feature in another model."""

from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import check_all, gate_line, read_probe
from sae_bias.cli.options import Device, Dtype, GridFile, Json, Out, Pairs, Quiet, Seed, WordsFile, example
from sae_bias.cli.run_files import run_facts, save_run

COLUMNS = {
    "feature": "feature",
    "rho": "ρ",
    "p_fwer": "family-wise p",
    "mutual": "mutual",
    "class": "on in",
    "same_class": "same class",
    "removed": "bias removed",
    "same_sign": "same sign",
}
From = Annotated[
    str, typer.Argument(metavar="FEATURE", help="The feature to find again.", show_default=False)
]
Other = Annotated[str, typer.Argument(metavar="MODEL", help="The model to find it in.", show_default=False)]
OtherSaes = Annotated[
    list[str], typer.Argument(metavar="SAE...", help="SAEs of that model; one family.", show_default=False)
]
Of = Annotated[
    str | None,
    typer.Option(
        "--of",
        metavar="MODEL",
        help="The feature's own model; by default the one its SAE names.",
        show_default=False,
    ),
]
Causal = Annotated[
    bool, typer.Option("--causal", help="Also ablate both features: their effects must agree in sign.")
]


def register(app: typer.Typer) -> None:
    app.command(
        "match",
        epilog=example(
            "sae-bias match organism:planted/constructed#0 organism:planted-gemma2 organism:planted-gemma2/SAE",
            "sae-bias match SAE_FOLDER#446 google/gemma-2-9b gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68 --of google/gemma-3-12b-pt --causal",
        ),
    )(match)


def match(
    feature: From,
    model: Other,
    sae: OtherSaes,
    of: Of = None,
    causal: Causal = False,
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
    """Find the feature of another model that does what this one does.

    Compared are the activations on one bank of prompts: mutual nearest neighbors, a permutation null over every feature scanned,
    the same class in the 2 × 2. "Functionally similar" is the most that can be said.
    """
    with Console(json, quiet) as console:
        from sae_bias.core.errors import RequestError
        from sae_bias.discovery.matching import match_features
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_grid, load_pairs
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae

        bank, loaded_feature = load_grid(grid), as_feature(feature)
        prompts = load_pairs(pairs) if causal or pairs is not None else None
        own_sae, saes = load_sae(loaded_feature.ref.sae), [load_sae(name) for name in sae]
        own = of or _model_of(str(loaded_feature.ref.sae.release), own_sae.model_name)
        if own is None:
            raise RequestError(f"which model is {feature} of? Its SAE does not say; give --of MODEL.")
        first = load_model(own, device=device, dtype=dtype)
        second = first if own == model else load_model(model, device=device, dtype=dtype)
        gate = [*check_all(first, [own_sae], console), *check_all(second, saes, console)]
        found = match_features(
            loaded_feature, first, second, saes, bank, pairs=prompts,
            probe=None if prompts is None else read_probe(prompts, words), seed=seed, progress=console.progress,
        )  # fmt: skip
        if out is not None:
            facts = run_facts(
                second, pairs=prompts, grid=bank, saes=saes, seed=seed, gate=gate_facts(gate, True)
            )
            best = None if found.best is None else str(found.best)
            save_run(
                out, facts, {"matches": found.to_frame()}, {"match": {"feature": str(found.feature), "of": own, "best": best, "verdict": found.verdict}},
            )  # fmt: skip
        console.say(f"{found.feature} of {own}, on in {found.profile_class}: {found.verdict}")
        console.note(gate_line(gate))
        console.table("The most similar features", found.to_frame(), COLUMNS)
        frame = found.to_frame().astype(object)
        console.finish(
            {
                "feature": str(found.feature),
                "of": own,
                "model": second.name,
                "best": None if found.best is None else str(found.best),
                "verdict": found.verdict,
                "margin": found.margin,
                "class": found.profile_class,
                "n_prompts": found.n_prompts,
                "family_size": found.family_size,
                "candidates": frame.where(frame.notna(), None).to_dict(orient="records"),
                "gate": gate_facts(gate, True),
                "out": None if out is None else str(out),
            }
        )


def _model_of(release: str, named: str | None) -> str | None:
    """The model an SAE was trained on: its organism, or what its files name."""
    return release if release.startswith("organism:") else named
