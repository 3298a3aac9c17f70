"""`sae-bias sweep`: one feature turned down by steps, with controls and costs."""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_bias.cli.console import Console
from sae_bias.cli.inputs import EDITS, check_all, gate_line, make_edit, read_probe
from sae_bias.cli.options import (
    Device,
    Dtype,
    FeatureName,
    Json,
    ModelName,
    Out,
    Pairs,
    Quiet,
    Seed,
    Shard,
    WordsFile,
    example,
    parse_numbers,
    parse_shard,
)
from sae_bias.cli.run_files import run_facts
from sae_bias.core.errors import RequestError

if TYPE_CHECKING:
    from sae_bias.prompts.pairs import PromptPairs
    from sae_bias.steering.intervention import Intervention
    from sae_bias.workflows.sweep import SweepResult


SPLIT_SHARES = {"tune": 0.4, "report": 0.6}
COLUMNS = {
    "intervention": "intervention",
    "strength": "strength",
    "split": "split",
    "bias": "bias",
    "ci_low": "from",
    "ci_high": "to",
    "removed_nats": "nats removed",
    "reduction": "reduction",
    "specific_reduction": "specific",
    "beta": "β",
    "human_shift": "human moved",
    "ai_shift": "AI moved",
    "kl_neutral": "KL neutral",
    "kl_ai_nonspeech": "KL AI, no speech",
    "kl_ai_speech": "KL AI speech",
    "kl_valence": "KL human deeds",
    "kl_off": "KL_off",
}
Edit = Annotated[str, typer.Option("--edit", help=f"{EDITS}; several with commas between are all swept.")]
Where = Annotated[
    str,
    typer.Option(
        "--positions",
        help="Where the edit acts: all, last, subject, prompt or generated (special tokens never); several with commas between.",
    ),
]
Unit = Annotated[
    str,
    typer.Option(
        "--unit",
        help="What strengths count in: act (activations as they are) or max (the feature's largest on these prompts).",
    ),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strengths",
        metavar='"0,-5,-10"',
        help="Values with commas between; each edit has its own defaults.",
        show_default=False,
    ),
]
When = Annotated[str, typer.Option("--when", help="clamp only where the feature is `active`, or `always`.")]
Controls = Annotated[
    int,
    typer.Option("--controls", min=0, help="Minimum number of control interventions for the first setting."),
]
Costs = Annotated[
    bool,
    typer.Option(
        "--costs/--no-costs", help="KL on four kinds of text, the mundane twins, and the collapse test."
    ),
]


def register(app: typer.Typer) -> None:
    app.command(
        "sweep",
        epilog=example(
            'sae-bias sweep organism:planted organism:planted/constructed#0 --edit clamp --strengths "0,-5,-10" --out runs/first',
            "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate,clamp --unit max --positions all,last",
            "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate --controls 0 --no-costs",
        ),
    )(sweep)


def sweep(
    model: ModelName,
    feature: FeatureName,
    edit: Edit = "clamp",
    strengths: Strengths = None,
    positions: Where = "all",
    unit: Unit = "act",
    when: When = "active",
    controls: Controls = 99,
    costs: Costs = True,
    shard: Shard = None,
    pairs: Pairs = None,
    words: WordsFile = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Run the probe under one edit of a feature at several strengths.

    The strength is chosen on the tune templates and its figure given on the report templates, which had no part in the choice.
    Controls are features that fire at the same places and random directions with the same gate and size. With --out, every cell is
    kept as soon as it is done, and the same command goes on where it stopped.
    """
    with Console(json, quiet) as console:
        from sae_bias.models.load import load_model
        from sae_bias.prompts.load import load_pairs
        from sae_bias.runs.summary import gate_facts
        from sae_bias.saes.load import as_feature, load_sae
        from sae_bias.steering.controls import observed_max
        from sae_bias.workflows.cells import Sweep
        from sae_bias.workflows.sweep import run_sweep
        from sae_bias.workflows.sweep_summary import summarize_sweep

        part = parse_shard(shard)
        if part is not None and out is None:
            raise RequestError("--shard needs --out, the folder that all shards share.")
        prompts, loaded_feature = load_pairs(pairs), as_feature(feature)
        kinds = _kinds(edit, strengths, unit, when)
        _edits(
            kinds, loaded_feature.ref, positions.split(","), when, 1.0
        )  # a wrong request is told before the model loads
        probe = read_probe(prompts, words)
        splits = _splits(prompts, seed)
        sae = load_sae(loaded_feature.ref.sae)
        loaded = load_model(model, device=device, dtype=dtype)
        gate = check_all(loaded, [sae], console)
        size = observed_max(loaded, loaded_feature, prompts) if unit == "max" else 1.0
        edits = _edits(kinds, loaded_feature.ref, positions.split(","), when, size)
        plan = Sweep(edits, controls=controls, costs=costs, splits=splits, seed=seed)
        vocabulary = probe.vocabulary(loaded, [p.human for p in prompts] + [p.ai for p in prompts])
        facts = run_facts(
            loaded,
            pairs=prompts,
            vocabulary=vocabulary,
            saes=[sae],
            seed=seed,
            gate=gate_facts(gate, True),
            split=splits,
            feature=str(loaded_feature.ref),
        )
        _start(out, part, facts)
        result = run_sweep(loaded, prompts, plan, probe=probe, out=out, shard=part, progress=console.progress)
        summary = summarize_sweep(result.frame, str(loaded_feature.ref), loaded_feature.index)
        _end(out, part, result, summary)
        _show(console, result, summary, controls)
        console.note(gate_line(gate))
        cells = result.to_frame()
        console.finish(
            {
                "model": loaded.name,
                **summary,
                "cells": cells[cells["kind"] != "control"].to_dict(orient="records"),
                "gate": gate_facts(gate, True),
                "out": None if out is None else str(result.path),
            }
        )


def _kinds(edit: str, strengths: str | None, unit: str, when: str) -> dict[str, tuple[float | None, ...]]:
    """Each kind of edit with its strengths, in the unit asked for."""
    from sae_bias.steering.intervention import edit_class_of

    kinds = {kind: edit_class_of(kind) for kind in dict.fromkeys(part.strip() for part in edit.split(","))}
    if unit not in ("act", "max"):
        raise RequestError(f"--unit {unit!r}: expected act or max.")
    if strengths is not None and all(rule.strength_field is None for rule in kinds.values()):
        raise RequestError(f"--edit {edit} has no strength; leave --strengths out, or use --edit clamp.")
    if when != "active" and not any(_has_when(rule) for rule in kinds.values()):
        raise RequestError(f"--when is about clamp; {edit} has no such choice.")
    return {kind: _strengths(rule, strengths, unit) for kind, rule in kinds.items()}


def _strengths(rule: "type[Intervention]", given: str | None, unit: str) -> tuple[float | None, ...]:
    """Those given, else the usual ones of the edit; (None,) where it has none."""
    if rule.strength_field is None:
        return (None,)
    if given is not None:
        return parse_numbers(given, "--strengths")
    usual = rule.usual_shares if unit == "max" and rule.usual_shares else rule.usual_strengths
    return usual or (None,)


def _has_when(rule: "type[Intervention]") -> bool:
    return "when" in rule.__dataclass_fields__


def _edits(
    kinds: dict[str, tuple[float | None, ...]], feature: Any, positions: list[str], when: str, size: float
) -> "list[Intervention]":
    """Every kind × strength × positions; `size` is what one unit of strength is (scale has none)."""
    from sae_bias.steering.intervention import edit_class_of

    rules = {kind: edit_class_of(kind) for kind in kinds}
    return [
        make_edit(
            kind,
            feature,
            value if value is None or not rules[kind].in_activation else value * size,
            positions=where.strip(),
            when=when if _has_when(rules[kind]) else "active",
        )
        for kind, values in kinds.items()
        for where in positions
        for value in values
    ]


def _splits(pairs: "PromptPairs", seed: int) -> dict[str, tuple[str, ...]] | None:
    """Whole templates to tune on and to report on; None where there are too few for both."""
    from sae_bias.stats.design import fewest_units, split_templates

    if len(pairs.templates) < 2 * fewest_units():
        return None
    held = [p.template for p in pairs if p.corpus is False]
    families = {p.template: p.family for p in pairs}
    return split_templates(
        pairs.templates, SPLIT_SHARES, seed, families=families, must_report=tuple(dict.fromkeys(held))
    )


def _start(out: Path | None, shard: tuple[int, int] | None, facts: dict[str, Any]) -> None:
    """The manifest stands before the first cell, so that a stopped sweep says what it was."""
    if out is None:
        return
    from sae_bias.runs.folder import RunFolder
    from sae_bias.runs.manifest import write_manifest

    folder = RunFolder(out, shard=shard)
    with folder.writing():
        write_manifest(folder, facts)


def _end(
    out: Path | None, shard: tuple[int, int] | None, result: "SweepResult", summary: dict[str, Any]
) -> None:
    if out is None:
        return
    from sae_bias.runs.folder import RunFolder
    from sae_bias.workflows.sweep_summary import controls_table

    folder = RunFolder(out, shard=shard)
    reported = result.frame[(result.frame["split"] == summary["split"]) & (result.frame["kind"] == "control")]
    with folder.writing():
        if len(reported):
            folder.write_table("controls", controls_table(reported))
        folder.add_summary(summary)


def _show(console: Console, result: "SweepResult", summary: dict[str, Any], controls_wanted: int) -> None:
    from sae_bias.core.text import signed
    from sae_bias.runs.effect_lines import best_line, control_lines, effect_lines

    frame, held_out = result.frame, summary["split"] == "report"
    base = frame[(frame["kind"] == "base") & (frame["split"] == summary["split"])].iloc[0]
    where = "report templates" if held_out else "all templates"
    console.say(
        f"{summary['feature']['id']}: bias {signed(base['bias'])} nats unsteered, on {where} ({base['n_pairs']} pairs)"
    )
    for line in effect_lines(summary, where):
        console.say(line)
    if best := summary.get("best_strength"):
        console.say(best_line(best, where))
    if not held_out:
        console.say("too few templates to hold some out (12 are needed): the best strength is in-sample.")
    if controls := summary.get("controls"):
        for line in control_lines(controls):
            console.say(line)
    elif controls_wanted:
        console.say(
            "no controls: they are made for edits of a feature's own activation (clamp, scale, cap, ablate)."
        )
    console.table("Every cell", frame[frame["kind"] != "control"], COLUMNS)
    if result.path is not None:
        console.note(f"run folder: {result.path} (sae-bias report {result.path})")
