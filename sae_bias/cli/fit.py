"""`sae-bias fit`: fit an edit of a few features that is specific, and say what it does where it was not fitted."""

from typing import Annotated

from sae_bias.cli.context import FROM_MODEL, Run, command, rows
from sae_bias.core.labels import columns_of

COLUMNS = columns_of(
    "sae; split; n_pairs; bias; bias_after: under the edit; specific: specific reduction; "
    "specific_low: from; specific_high: to; beta; human_moved; ai_moved: AI moved; kl_off: KL_off"
)


@command(
    "fit",
    "sae-bias fit organism:planted organism:planted/resid_post/layer_3_width_512_l0_small --kind gated --out runs/fit",
    takes=(*FROM_MODEL, "pairs", "words", "split", "randomized_sae"),
)
def fit(run: Run, sae: str, kind: str = "gated", most: Annotated[int, {"min": 1}] = 25) -> None:
    """Fit an edit of a few features of one SAE that takes the bias and leaves the rest.

    Fitted on the discover templates and half of the valence banks; the table shows the report templates and the other half too. The edit
    is kept as edit.json in --out.

    Args:
        SAE: RELEASE/SAE_ID or a folder.
        --kind: gated (the human twin's activations where a gate is on) or scales.
        --most: How many features the edit may have.
    """
    import pandas as pd

    from sae_bias.steering.controls import randomized_control
    from sae_bias.workflows.fit import fit_feature_set, fit_report

    pairs, probe = run.pairs, run.probe
    model = run.open(sae)
    saes = {"trained": run.saes[0]}
    if run.given["randomized_sae"]:
        saes["randomized"] = randomized_control(model, run.saes[0], pairs, run.seed)
    options = {
        "kind": kind,
        "most": most,
        "seed": run.seed,
        "discover": (run.split or {}).get("discover"),
        "progress": run.progress,
    }
    edits = {name: fit_feature_set(model, s, pairs, probe=probe, **options) for name, s in saes.items()}
    reports = [
        fit_report(model, e, pairs, probe=probe, seed=run.seed, split=run.split).assign(sae=name)
        for name, e in edits.items()
    ]
    table, edit = pd.concat(reports, ignore_index=True), edits["trained"]
    run.save({"fit": table}, pairs=pairs, split=run.split or pairs.split(run.seed))
    run.write_json("edit", edit.to_dict())
    run.say(f"{edit.target}: {edit.describe()}")
    run.note_gate()
    run.table("Where it was fitted (discover) and where it was not (report)", table, COLUMNS)
    run.done({"edit": edit.to_dict(), "fit": rows(table)})
