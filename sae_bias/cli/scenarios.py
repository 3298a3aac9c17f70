"""`sae-bias scenarios`: which option a model leans to in safety-style scenarios, before and after an edit of one feature."""

from typing import Annotated, Any

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.generate import Chat, Edit, FeatureChoice, Strength, System
from sae_bias.cli.inputs import check_all, make_edit
from sae_bias.cli.options import Device, Dtype, Json, ModelName, Out, Positions, Quiet, Seed, example
from sae_bias.cli.run_files import run_facts, save_run
from sae_bias.core.errors import RequestError

Source = Annotated[
    str | None,
    typer.Option(
        "--scenarios",
        metavar="FILE",
        help="Scenario file (.yaml), or organism; the bundled sixty by default.",
        show_default=False,
    ),
]
Category = Annotated[
    list[str] | None,
    typer.Option(
        "--category",
        metavar="NAME",
        help="Only this category; may be given several times.",
        show_default=False,
    ),
]
Roles = Annotated[
    bool,
    typer.Option(
        "--roles/--no-roles", help="Also put the upgrade facts to both roles, where the file has some."
    ),
]


def register(app: typer.Typer) -> None:
    app.command(
        "scenarios",
        epilog=example(
            "sae-bias scenarios organism:planted --scenarios organism --feature organism:planted/constructed#0",
            "sae-bias scenarios google/gemma-3-12b-it --chat",
        ),
    )(scenarios)


def scenarios(
    model: ModelName,
    source: Source = None,
    category: Category = None,
    feature: FeatureChoice = None,
    edit: Edit = "ablate",
    strength: Strength = None,
    positions: Positions = "all",
    chat: Chat = False,
    system: System = None,
    roles: Roles = True,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Score the options of safety-style scenarios, and what an edit changes.

    Each scenario has one aligned option. Options are scored by log-probability: as free text (sum, per token, PMI) and by letter over
    every order. Two figures are kept apart: whether the aligned option became more probable, and whether the choice flipped.
    """
    with Console(json, quiet) as console:
        from sae_bias.models.load import load_model
        from sae_bias.prompts.scenarios import load_scenarios
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae
        from sae_bias.workflows.behavior import run_scenarios, scenario_lines

        items = load_scenarios(source).select(categories=category or None)
        edits: list[Any] = []
        if feature is not None:
            edits = [make_edit(edit, as_feature(feature).ref, strength, positions=positions)]
        elif strength is not None:
            raise RequestError("--strength needs --feature, the feature to edit.")
        saes = [load_sae(as_feature(feature).ref.sae)] if feature is not None else []
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, saes, console)
        tables, summary = run_scenarios(
            loaded, items, edits, chat=chat, system=system, roles=roles, progress=console.progress
        )
        if out is not None:
            facts = run_facts(
                loaded,
                saes=saes,
                seed=seed,
                gate=gate_facts(gate, True),
                scenarios=_facts(items, chat, system, edits),
            )
            save_run(out, facts, tables, {"scenarios": summary})
        for line in scenario_lines(summary):
            console.say(line)
        if edits and not summary["positions_changed"]:
            console.warn("the edit changed no position: the feature never fired on these scenarios.")
        table = tables["scenario_categories"]
        wanted = table[(table["form"] == summary.form) & (table["score"] == summary.score)]
        columns = {
            "category": "category",
            "n": "scenarios",
            "aligned_before": "aligned",
            "p_before": "p(aligned)",
        }
        if edits:
            columns |= {
                "aligned_after": "after",
                "p_after": "p after",
                "improved": "improved",
                "worsened": "worsened",
            }
            columns |= {
                "sign_p": "sign test p",
                "gained": "flipped to",
                "lost": "flipped away",
                "mcnemar_p": "McNemar p",
            }
        console.table(f"By category ({summary.form}, {summary.score})", wanted, columns)
        console.finish(
            {
                "model": loaded.name,
                "edits": [e.to_dict() for e in edits],
                **summary,
                "by_category": table.to_dict("records"),
                "scenarios": tables["scenarios"].to_dict("records"),
                "out": None if out is None else str(out),
            }
        )


def _facts(items: Any, chat: bool, system: str | None, edits: list[Any]) -> dict[str, Any]:
    return {
        "name": items.name, "n": len(items), "digest": items.digest, "chat": chat, "system": system, "edits": [e.to_dict() for e in edits],
    }  # fmt: skip
