"""`sae-bias sweep`: one feature turned down by steps, with controls and costs."""

from typing import TYPE_CHECKING, Annotated, Any

from sae_bias.cli.context import (
    FROM_FEATURE,
    Run,
    command,
    parse_numbers,
    rows,
)
from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of

if TYPE_CHECKING:
    from sae_bias.runs.summary import Summary
    from sae_bias.steering.intervention import Intervention
    from sae_bias.workflows.sweep import SweepResult


COLUMNS = columns_of(
    "intervention; strength; split; bias; ci_low; ci_high; removed_nats; reduction: reduction; "
    "specific_reduction; beta; human_shift; ai_shift; kl_worst: worst KL; kl_off: KL_off"
)


@command(
    "sweep",
    'sae-bias sweep organism:planted organism:planted/constructed#0 --edit clamp --strengths "0,-5,-10" --out runs/first',
    "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate,clamp --unit max --positions all,last",
    "sae-bias sweep organism:planted organism:planted/constructed#0 --edit ablate --controls 0 --no-costs",
    takes=(*FROM_FEATURE, "pairs", "words", "split", "shard"),
)
def sweep(
    run: Run,
    features: list[str] | None = None,
    edit: str = "clamp",
    strengths: str | None = None,
    positions: str = "all",
    unit: str = "act",
    when: str = "active",
    controls: Annotated[int, {"min": 0}] = 99,
    mismatch: bool = False,
    mismatch_sae: list[str] | None = None,
    costs: bool = True,
    workers: Annotated[int | None, {"min": 1}] = None,
) -> None:
    """Run the probe under one edit of a feature, or of several together, at several strengths.

    The strength is chosen on the tune templates and its figure given on the report templates, which had no part in the choice.
    Controls are features that fire at the same places and random directions with the same gate and size. With --out, every cell is
    kept as soon as it is done, and the same command goes on where it stopped.

    Args:
        --feature FEATURE: A further feature, edited together with FEATURE; may be given several times.
        --edit: ablate, scale, clamp, cap, mean, steer, project_out, or one that a plugin brings; several with commas between are all swept.
        --strengths "0,-5,-10": Values with commas between; each edit has its own defaults.
        --positions: Where the edit acts: all, last, subject, prompt or generated (special tokens never); several with commas between.
        --unit: What strengths count in: act (activations as they are) or max (the feature's largest on these prompts).
        --when: clamp only where the feature is `active`, or `always`.
        --controls: Minimum number of control interventions for the first setting.
        --mismatch/--no-mismatch: Also the feature's edit at an earlier and a later layer, where it should do less.
        --mismatch-sae SAE: And the feature of the same index in this SAE; may be given several times.
        --costs/--no-costs: KL on four kinds of text, the mundane twins, and the collapse test.
        --workers: Processes for exact effects and the sweep's cells: on this machine's CPU they share one copy of the weights, a thread each.
    """
    from sae_bias.saes.load import as_feature
    from sae_bias.steering.controls import observed_max
    from sae_bias.steering.edits import edit_features
    from sae_bias.workflows.cells import Sweep
    from sae_bias.workflows.sweep import run_sweep
    from sae_bias.workflows.sweep_summary import controls_table, summarize_sweep
    from sae_bias.workflows.sweep_work import LocalWorkers

    shard, further = run.shard, features or ()
    edited = [run.feature, *map(as_feature, further)]
    if shard is not None and run.out is None:
        raise RequestError("--shard needs --out, the folder that all shards share.")
    if shard is not None and workers is not None:
        raise RequestError("--shard and --workers both share out the cells; choose one.")
    pairs, kinds, refs = run.pairs, _kinds(edit, strengths, unit, when), [f.ref for f in edited]

    def built(units: list[float] | None) -> "list[Intervention]":
        """Every kind × positions × strength, of all the features together; `units` is what a strength of 1 is for each."""
        return [
            edit_features(kind, refs, value, units=units, positions=where.strip(), when=always)
            for kind, (values, always) in kinds.items()
            for where in positions.split(",")
            for value in values
        ]

    named = built(None)[0].target  # a wrong request is told before the model loads
    probe, splits = run.probe, run.split
    held = None if splits is None else {name: splits[name] for name in ("tune", "report")}
    model = run.open(*(f.ref.sae for f in edited))
    units = [observed_max(model, f, pairs) for f in edited] if unit == "max" else None
    options: dict[str, Any] = {"controls": controls, "costs": costs, "mismatches": mismatch_sae or mismatch}
    plan = Sweep(built(units), splits=held, seed=run.seed, **options)
    vocabulary = probe.vocabulary(model, [p.human for p in pairs] + [p.ai for p in pairs])
    facts = run.facts(pairs=pairs, vocabulary=vocabulary, split=splits, feature=named)
    run.save({}, facts=facts, shard=shard)  # a stopped sweep says what it was
    executor = LocalWorkers(workers or 1).run
    result = run_sweep(
        model, pairs, plan, probe=probe, out=run.out, shard=shard, executor=executor, progress=run.progress
    )
    summary = summarize_sweep(result.frame, named, run.feature.index if not further else None)
    frame = result.frame
    reported = frame[(frame["split"] == summary.split) & (frame["kind"] == "control")]
    tables = {"controls": controls_table(reported)} if len(reported) else {}
    run.save(tables, summary.facts(), facts=facts, shard=shard)
    _show(run, result, summary, controls)
    run.note_gate()
    run.done({**summary, "cells": rows(frame[frame["kind"] != "control"])})


def _kinds(
    edit: str, strengths: str | None, unit: str, when: str
) -> "dict[str, tuple[tuple[float | None, ...], str | None]]":
    """Each kind of edit with its strengths, in the unit asked for, and its --when where it has one and that is not the usual."""
    from sae_bias.steering.intervention import edit_class_of

    kinds = {kind: edit_class_of(kind) for kind in dict.fromkeys(part.strip() for part in edit.split(","))}
    timed = {kind for kind, rule in kinds.items() if "when" in rule.__dataclass_fields__}
    if unit not in ("act", "max"):
        raise RequestError(f"--unit {unit!r}: expected act or max.")
    if strengths is not None and all(rule.strength_field is None for rule in kinds.values()):
        raise RequestError(f"--edit {edit} has no strength; leave --strengths out, or use --edit clamp.")
    if when != "active" and not timed:
        raise RequestError(f"--when is about clamp; {edit} has no such choice.")
    found = {}
    for kind, rule in kinds.items():
        usual = rule.usual_shares if unit == "max" and rule.usual_shares else rule.usual_strengths
        values = usual or (None,) if strengths is None else parse_numbers(strengths, "--strengths")
        always = when if when != "active" and kind in timed else None
        found[kind] = ((None,) if rule.strength_field is None else values, always)
    return found


def _show(run: Run, result: "SweepResult", summary: "Summary", controls_wanted: int) -> None:
    from sae_bias.core.text import signed
    from sae_bias.runs.effect_lines import best_line, control_lines, cost_note, effect_lines, mismatch_lines

    frame, held_out = result.frame, summary.split == "report"
    base = frame[(frame["kind"] == "base") & (frame["split"] == summary.split)].iloc[0]
    where = "report templates" if held_out else "all templates"
    run.say(
        f"{summary.feature and summary.feature.id}: bias {signed(base['bias'])} nats unsteered, on {where} ({base['n_pairs']} pairs)"
    )
    lines = [*effect_lines(summary, where), *filter(None, [cost_note(frame)])]
    if summary.best_strength is not None:
        lines.append(best_line(summary.best_strength, where))
    if not held_out:
        lines.append("too few templates to hold some out (12 are needed): the best strength is in-sample.")
    if summary.controls is not None:
        lines += control_lines(summary.controls)
    elif controls_wanted:
        lines.append(
            "no controls: they are made for edits of features' own activations (clamp, scale, cap, ablate)."
        )
    for line in [*lines, *mismatch_lines(summary.mismatches)]:
        run.say(line)
    run.table("Every cell", frame[frame["kind"] != "control"], COLUMNS)
    if result.path is not None:
        run.note(f"run folder: {result.path} (sae-bias report {result.path})")
