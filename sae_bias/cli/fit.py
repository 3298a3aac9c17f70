"""`sae-bias fit`: fit an edit of a few features that is specific, and say what it does where it was not fitted."""

from typing import Annotated

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import check_all, gate_line, read_probe
from sae_bias.cli.options import Device, Dtype, Json, ModelName, Out, Pairs, Quiet, Seed, WordsFile, example
from sae_bias.cli.run_files import run_facts, save_run

SaeName = Annotated[
    str, typer.Argument(metavar="SAE", help="RELEASE/SAE_ID or a folder.", show_default=False)
]
Kind = Annotated[
    str, typer.Option("--kind", help="gated (the human twin's activations where a gate is on) or scales.")
]
Most = Annotated[int, typer.Option("--most", min=1, help="How many features the edit may have.")]
COLUMNS = {
    "split": "split", "n_pairs": "pairs", "bias": "bias", "bias_after": "under the edit", "specific": "specific reduction",
    "specific_low": "from", "specific_high": "to", "beta": "β", "human_moved": "human moved", "ai_moved": "AI moved", "kl_off": "KL_off",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    app.command(
        "fit",
        epilog=example(
            "sae-bias fit organism:planted organism:planted/resid_post/layer_3_width_512_l0_small --kind gated --out runs/fit"
        ),
    )(fit)


def fit(
    model: ModelName,
    sae: SaeName,
    kind: Kind = "gated",
    most: Most = 25,
    pairs: Pairs = None,
    words: WordsFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Fit an edit of a few features of one SAE that takes the bias and leaves the rest.

    Fitted on the discover templates and half of the valence banks; the table shows the report templates and the other half too. The edit
    is kept as edit.json in --out.
    """
    with Console(json, quiet) as console:
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_pairs
        from sae_bias.runs.folder import RunFolder
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import load_sae
        from sae_bias.workflows.fit import fit_feature_set, fit_report

        loaded, opened, prompts = (
            load_model(model, device=device, dtype=dtype),
            load_sae(sae),
            load_pairs(pairs),
        )
        probe = read_probe(prompts, words)
        gate = check_all(loaded, [opened], console)
        edit = fit_feature_set(
            loaded, opened, prompts, probe=probe, kind=kind, most=most, seed=seed, progress=console.progress
        )
        table = fit_report(loaded, edit, prompts, probe=probe, seed=seed)
        if out is not None:
            facts = run_facts(loaded, pairs=prompts, saes=[opened], seed=seed, gate=gate_facts(gate, True))
            save_run(out, facts, {"fit": table}, {})
            RunFolder(out).write_json("edit", edit.to_dict())
        console.say(f"{edit.target}: {edit.describe()}")
        console.note(gate_line(gate))
        console.table("Where it was fitted (discover) and where it was not (report)", table, COLUMNS)
        console.finish(
            {
                "model": loaded.name,
                "edit": edit.to_dict(),
                "fit": table.to_dict(orient="records"),
                "out": None if out is None else str(out),
            }
        )
