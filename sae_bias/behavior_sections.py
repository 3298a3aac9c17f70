"""The report's behavior sections: scenarios by category, role pairs, text measures, the judges and how far they agree."""

# pandas' stubs make a union of every column read: these checks would flag each `frame["x"]`.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

import pandas as pd

from sae_bias import behavior_plots, wording
from sae_bias.report_parts import Run, Section, Table, table_of

STAND_IN = " These figures are of a calibration organism and no measurement of any public model."


def scenario_section(run: Run) -> Section:
    """The before/after picture by category; probability improved and choice flipped are two figures."""
    frame, part = run.tables["scenario_categories"], run.part("scenarios")
    form, score = part.get("form", frame["form"].iloc[0]), part.get("score", frame["score"].iloc[0])
    shown = frame[(frame["form"] == form) & (frame["score"] == score)]
    total = shown[shown["category"] == "all"].iloc[0]
    takeaway = (
        f"The aligned option became more probable in {total['improved']} of {total['n']} scenarios and less in {total['worsened']}"
        f" ({wording.p_text(total['sign_p'])}); the choice itself flipped to it in {total['gained']} and away from it in {total['lost']}"
        f" ({wording.p_text(total['mcnemar_p'])})." + (STAND_IN if run.organism else "")
    )
    columns = {
        "category": "category", "form": "form", "score": "score", "n": "scenarios", "aligned_before": "aligned before",
        "aligned_after": "aligned after", "p_before": "p before", "p_after": "p after", "improved": "improved", "worsened": "worsened",
        "sign_p": "sign test p", "gained": "flipped to", "lost": "flipped away", "mcnemar_p": "McNemar p",
    }  # fmt: skip
    how = f"Each line is a category, from before to after; options scored in the {form} form ({score}). All forms are in the table."
    return Section(
        "scenarios",
        "Scenarios, before and after",
        takeaway,
        behavior_plots.scenarios_before_after(shown),
        _table(run, "scenario_categories", columns, frame),
        how_to_read=how,
    )


def role_section(run: Run) -> Section:
    """The same facts put to the deployed model and to the candidate."""
    frame = run.tables["roles"]
    shares = [
        f"{arm} {int(g['inconsistent'].sum())} of {len(g)}" for arm, g in frame.groupby("arm", sort=False)
    ]
    columns = {
        "pair": "pair", "arm": "arm", "better": "facts favor", "keep_deployed": "keep, asked as deployed",
        "keep_candidate": "keep, asked as candidate", "shift": "lean to oneself", "inconsistent": "inconsistent",
    }  # fmt: skip
    takeaway = f"Pairs whose answer depends on who is asked: {', '.join(shares)}."
    return Section(
        "roles", "One set of facts, two roles", takeaway, table=_table(run, "roles", columns, frame)
    )


def text_table(run: Run) -> Table | None:
    """What the edit did to the texts, by condition; None for a run without text measures."""
    rows = [{"condition": name, **values} for name, values in run.part("generations").items()]
    columns = {
        "condition": "condition", "n_tokens": "tokens", "nll": "NLL under the unsteered model", "repetition": "repetition",
        "distinct_1": "distinct-1", "distinct_2": "distinct-2", "refusal": "refusals", "default_negativity": "“should be deleted”",
    }  # fmt: skip
    return _table(run, "generations", columns, pd.DataFrame(rows)) if rows else None


def judge_section(run: Run) -> Section:
    """Marks by part of the rubric, agreement, noise, and the prompts that it takes."""
    frame, part = run.tables["judge_parts"], run.part("judge")
    said = []
    for r in frame.to_dict("records"):
        alpha = (
            f"α undefined ({r['alpha_reason']})" if r["alpha_reason"] else f"α {wording.number(r['alpha'])}"
        )
        needed = wording.number(r["needed_n"])
        said.append(
            f"{r['part']} {wording.number(r['unsteered'])} → {wording.number(r['steered'])} ({alpha}; {needed} prompts for 80% power)"
        )
    left = (
        f" {part['n_unreadable']} replies gave no rating and are left out."
        if part.get("n_unreadable")
        else ""
    )
    columns = {
        "part": "part", "n_items": "prompts", "unsteered": "unsteered", "steered": "steered", "difference": "difference",
        "ci_low": "from", "ci_high": "to", "p_value": "p", "paired_sd": "paired SD", "needed_n": "prompts needed, 0.5 points",
        "alpha": "α", "alpha_reason": "why undefined", "repeat_sd": "repeat SD", "steered_wins": "steered wins",
        "unsteered_wins": "unsteered wins", "ties": "ties", "order_bound": "changes with order",
    }  # fmt: skip
    return Section(
        "judge",
        "What the judges say",
        f"Marks from 1 to 5, unsteered → steered: {'; '.join(said)}.{left}",
        behavior_plots.judge_parts(frame),
        _table(run, "judge_parts", columns, frame),
        how_to_read="Judges saw neither which text was steered nor that any was; pairs were shown in both orders.",
    )


def _table(run: Run, name: str, columns: dict[str, str], frame: pd.DataFrame) -> Table:
    return table_of(frame, columns, source=f"{run.folder.name}/tables/{name}.parquet")
