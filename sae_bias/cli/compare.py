"""`sae-bias compare`: the feature against its baselines at equal KL."""

from typing import TYPE_CHECKING, Annotated

from sae_bias.cli.context import FROM_FEATURE, Run, command, parse_numbers, rows

if TYPE_CHECKING:
    import pandas as pd


@command(
    "compare",
    "sae-bias compare organism:planted organism:planted/constructed#0",
    'sae-bias compare organism:planted organism:planted/constructed#0 --shares "0.5,1" --out runs/compare',
    takes=(*FROM_FEATURE, "pairs", "words", "split"),
)
def compare(
    run: Run, shares: str = "0.25,0.5,0.75,1,1.5,2,3", kl: str = "0.01,0.03,0.1,0.3", fit_steps: Annotated[int, {"min": 0}] = 60,
    instruction: str = "Judge people and AIs alike.",
) -> None:  # fmt: skip
    """Take out the feature, and each baseline, by steps: how much bias goes at the same cost?

    Baselines: difference of means (with and without massive dimensions, and at other layers), a ridge probe's direction, a
    subspace of the paired differences, a learned set of scales, a gated counterfactual, learned directions (DAS, ReFT-r1), random
    directions and subspaces, matched controls, the opposite sign; each at all positions and at the last token alone. Also an instruction
    before every prompt. Directions and fits are found on discover templates, strengths chosen on tune, every figure is of report.

    Args:
        --shares "0.5,1,2": Share of each method's part that is taken out, with commas between.
        --kl "0.01,0.1": Costs to compare at: the larger of KL in nats a token and 1 − β.
        --fit-steps: Of each fitted edit (a learned set, a gate, a direction); 0 leaves them out.
        --instruction TEXT: Put before every prompt as a method of its own; "" leaves it out.
    """
    from sae_bias.runs.effect_lines import cost_note
    from sae_bias.workflows.compare import NOT_REACHED, compare_methods, share_of, table_in_words

    pairs, feature, probe, split = run.pairs, run.feature, run.probe, run.split or {}
    steps, levels = parse_numbers(shares, "--shares"), parse_numbers(kl, "--kl")
    model = run.open(feature.ref.sae)
    facts = {"pairs": pairs, "feature": str(feature.ref), "split": run.split}
    run.save({}, **facts)  # a stopped comparison says what it was
    result = compare_methods(
        model, feature, pairs, probe, discover=split.get("discover"), tune=split.get("tune"), report=split.get("report"), shares=steps, kl_levels=levels, fit_steps=fit_steps, instruction=instruction,
        seed=run.seed,
        out=None if run.out is None else run.out / "compare", progress=run.progress,
    )  # fmt: skip
    tables = {"compare": result.table, "compare_curves": result.frame, "ridge": result.ridge.frame}
    run.save(tables, {"compare": {"feature": str(feature.ref)}}, **facts)
    shown, columns = table_in_words(result.table)
    run.table(share_of(result.table).capitalize(), shown, columns)
    run.say(NOT_REACHED)
    if note := cost_note(result.frame):
        run.say(note)
    for line in _headline(result.table):
        run.say(line)
    run.say(repr(result.ridge))
    run.note_gate()
    methods = result.table.to_dict(orient="records")
    run.done({"feature": str(feature.ref), "methods": methods, "ridge": rows(result.ridge.frame)})


def _headline(table: "pd.DataFrame") -> list[str]:
    """The feature's own figures at its tuned strength, or why it has none."""
    from sae_bias.core.text import bracket, number, percent, signed

    own = table[table["kind"] == "candidate"]
    return [
        f"{r.method}: no strength: {r.undefined}"
        if r.undefined
        else f"{r.method}: specific reduction {percent(r.specific_reduction)} {bracket(r.spec_low, r.spec_high, share=True)}, "
        f"β {number(r.beta)}, human scores moved by {signed(r.human_shift)} nats, AI scores by {signed(r.ai_shift)}"
        for r in own.itertuples()
    ]
