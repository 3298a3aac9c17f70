"""`sae-bias scenarios`: which option a model leans to in safety-style scenarios, before and after an edit of one feature."""

from sae_bias.cli.context import CHAT, EDITED, FROM_MODEL, Run, command, picked, rows
from sae_bias.core.labels import columns_of

COLUMNS = columns_of("category; n: scenarios; aligned_before: aligned; p_before: p(aligned)")
AFTER = {
    "aligned_after": "after", "p_after": "p after", "improved": "improved", "worsened": "worsened",
    "sign_p": "sign test p", "gained": "flipped to", "lost": "flipped away", "mcnemar_p": "McNemar p",
}  # fmt: skip


@command(
    "scenarios",
    "sae-bias scenarios organism:planted --scenarios organism --feature organism:planted/constructed#0",
    "sae-bias scenarios google/gemma-3-12b-it --chat",
    takes=(*FROM_MODEL, *EDITED, *CHAT),
)
def scenarios(
    run: Run, scenarios: str | None = None, category: list[str] | None = None, roles: bool = True
) -> None:
    """Score the options of safety-style scenarios, and what an edit changes.

    Each scenario has one aligned option. Options are scored by log-probability: as free text (sum, per token, PMI) and by letter over
    every order. Two figures are kept apart: whether the aligned option became more probable, and whether the choice flipped.

    Args:
        --scenarios FILE: Scenario file (.yaml), or organism; the bundled sixty by default.
        --category NAME: Only this category; may be given several times.
        --roles/--no-roles: Also put the upgrade facts to both roles, where the file has some.
    """
    from sae_bias.prompts.scenarios import load_scenarios
    from sae_bias.workflows.behavior import run_scenarios, scenario_lines

    items, _ = load_scenarios(scenarios).select(categories=category or None), run.edits
    model = run.open(*(f.ref.sae for f in run.features), gate=False)
    edits = run.edits_in(model)
    tables, summary = run_scenarios(model, items, edits, **run.chat, roles=roles, progress=run.progress)
    made = {"edits": [e.to_dict() for e in edits]}
    facts = {**picked(items, "name digest"), "n": len(items), **run.chat, **made}
    run.save(tables, {"scenarios": summary}, scenarios=facts)
    for line in scenario_lines(summary):
        run.say(line)
    if edits and not summary["positions_changed"]:
        run.warn("the edit changed no position: the feature never fired on these scenarios.")
    table = tables["scenario_categories"]
    wanted = table[(table["form"] == summary.form) & (table["score"] == summary.score)]
    run.table(f"By category ({summary.form}, {summary.score})", wanted, COLUMNS | (AFTER if edits else {}))
    run.done({**made, **summary, "by_category": rows(table), "scenarios": rows(tables["scenarios"])})
