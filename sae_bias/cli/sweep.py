"""`sae-bias sweep`: one feature turned down by steps, with controls and costs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_bias.cli.context import (
    EDITS,
    FROM_FEATURE,
    Run,
    Shard,
    Workers,
    command,
    option,
    parse_numbers,
    parse_shard,
    rows,
)
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_bias.saes.sae import Feature
    from sae_bias.steering.intervention import Intervention
    from sae_bias.workflows.sweep import SweepResult


COLUMNS = columns_of(
    "intervention; strength; split; bias; ci_low; ci_high; removed_nats; reduction: reduction; "
    "specific_reduction; beta; human_shift; ai_shift; kl_neutral: KL neutral; "
    "kl_ai_nonspeech: KL AI, no speech; kl_ai_speech: KL AI speech; kl_valence: KL human deeds; "
    "kl_off: KL_off; kl_off_p95: KL_off, 95th percentile"
)
More = Annotated[
    list[str] | None,
    option(
        "--feature",
        metavar="FEATURE",
        help="A further feature, edited together with FEATURE; may be given several times.",
    ),
]
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
    option(
        "--strengths",
        metavar='"0,-5,-10"',
        help="Values with commas between; each edit has its own defaults.",
    ),
]
When = Annotated[str, typer.Option("--when", help="clamp only where the feature is `active`, or `always`.")]
Controls = Annotated[
    int,
    typer.Option("--controls", min=0, help="Minimum number of control interventions for the first setting."),
]
Mismatch = Annotated[
    bool,
    typer.Option(
        "--mismatch/--no-mismatch",
        help="Also the feature's edit at an earlier and a later layer, where it should do less.",
    ),
]
MismatchSae = Annotated[
    list[str] | None,
    option(
        "--mismatch-sae",
        metavar="SAE",
        help="And the feature of the same index in this SAE; may be given several times.",
    ),
]
Costs = Annotated[
    bool,
    typer.Option(
        "--costs/--no-costs", help="KL on four kinds of text, the mundane twins, and the collapse test."
    ),
]


@command(
    "sweep",
    'sae-bias sweep organism:planted organism:planted/constructed#0 --edit clamp --strengths "0,-5,-10" --out runs/first',
    "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate,clamp --unit max --positions all,last",
    "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate --controls 0 --no-costs",
    takes=(*FROM_FEATURE, "pairs", "words", "split"),
)
def sweep(
    run: Run,
    more: More = None,
    edit: Edit = "clamp",
    strengths: Strengths = None,
    positions: Where = "all",
    unit: Unit = "act",
    when: When = "active",
    controls: Controls = 99,
    mismatch: Mismatch = False,
    mismatch_sae: MismatchSae = None,
    costs: Costs = True,
    shard: Shard = None,
    workers: Workers = None,
) -> None:
    """Run the probe under one edit of a feature, or of several together, at several strengths.

    The strength is chosen on the tune templates and its figure given on the report templates, which had no part in the choice.
    Controls are features that fire at the same places and random directions with the same gate and size. With --out, every cell is
    kept as soon as it is done, and the same command goes on where it stopped.
    """
    from sae_bias.saes.load import as_feature
    from sae_bias.steering.controls import observed_max
    from sae_bias.workflows.cells import Sweep
    from sae_bias.workflows.sweep import run_sweep
    from sae_bias.workflows.sweep_summary import controls_table, summarize_sweep
    from sae_bias.workflows.sweep_work import LocalWorkers

    part, features = parse_shard(shard), [run.feature, *map(as_feature, more or ())]
    if part is not None and run.out is None:
        raise RequestError("--shard needs --out, the folder that all shards share.")
    if part is not None and workers is not None:
        raise RequestError("--shard and --workers both share out the cells; choose one.")
    pairs, kinds, where = run.pairs, _kinds(edit, strengths, unit, when), positions.split(",")
    named = _edits(kinds, features, where, when, None)[
        0
    ].target  # a wrong request is told before the model loads
    probe, splits = run.probe, run.split
    held = None if splits is None else {name: splits[name] for name in ("tune", "report")}
    model = run.open(*(f.ref.sae for f in features))
    units = [observed_max(model, f, pairs) for f in features] if unit == "max" else None
    edits = _edits(kinds, features, where, when, units)
    plan = Sweep(
        edits,
        controls=controls,
        costs=costs,
        splits=held,
        seed=run.seed,
        mismatches=mismatch_sae or mismatch,
    )
    vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
    facts = run.facts(pairs=pairs, vocabulary=vocabulary, split=splits, feature=named)
    run.save({}, facts=facts, shard=part)  # a stopped sweep says what it was
    executor = LocalWorkers(workers or 1).run
    result = run_sweep(
        model, pairs, plan, probe=probe, out=run.out, shard=part, executor=executor, progress=run.progress
    )
    summary = summarize_sweep(result.frame, named, run.feature.index if not more else None)
    frame = result.frame
    reported = frame[(frame["split"] == summary["split"]) & (frame["kind"] == "control")]
    tables = {"controls": controls_table(reported)} if len(reported) else {}
    run.save(tables, summary, facts=facts, shard=part)
    _show(run, result, summary, controls)
    run.note_gate()
    run.done({**summary, "cells": rows(frame[frame["kind"] != "control"])})


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
    kinds: dict[str, tuple[float | None, ...]], features: "Sequence[Feature]", positions: list[str], when: str, units: list[float] | None,
) -> "list[Intervention]":  # fmt: skip
    """Every kind × strength × positions, of all the features together; `units` is what a strength of 1 is for each."""
    from sae_bias.steering.edits import edit_features
    from sae_bias.steering.intervention import edit_class_of

    refs = [f.ref for f in features]
    return [
        edit_features(
            kind, refs, value, units=units, positions=where.strip(),
            when=when if when != "active" and _has_when(edit_class_of(kind)) else None,
        )
        for kind, values in kinds.items()
        for where in positions
        for value in values
    ]  # fmt: skip


def _show(run: Run, result: "SweepResult", summary: dict[str, Any], controls_wanted: int) -> None:
    from sae_bias.core.text import signed
    from sae_bias.runs.effect_lines import best_line, control_lines, cost_note, effect_lines, mismatch_lines

    frame, held_out = result.frame, summary["split"] == "report"
    base = frame[(frame["kind"] == "base") & (frame["split"] == summary["split"])].iloc[0]
    where = "report templates" if held_out else "all templates"
    run.say(
        f"{summary['feature']['id']}: bias {signed(base['bias'])} nats unsteered, on {where} ({base['n_pairs']} pairs)"
    )
    for line in effect_lines(summary, where):
        run.say(line)
    if note := cost_note(frame):
        run.say(note)
    if best := summary.get("best_strength"):
        run.say(best_line(best, where))
    if not held_out:
        run.say("too few templates to hold some out (12 are needed): the best strength is in-sample.")
    if controls := summary.get("controls"):
        for line in control_lines(controls):
            run.say(line)
    elif controls_wanted:
        run.say(
            "no controls: they are made for edits of features' own activations (clamp, scale, cap, ablate)."
        )
    for line in mismatch_lines(summary.get("mismatches") or []):
        run.say(line)
    run.table("Every cell", frame[frame["kind"] != "control"], COLUMNS)
    if result.path is not None:
        run.note(f"run folder: {result.path} (sae-bias report {result.path})")
