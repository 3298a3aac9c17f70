"""The report's behavior sections: scenarios by category, role pairs, text measures, the judges and how far they agree."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.labels import columns_of
from sae_bias.figures import behavior as behavior_plots
from sae_bias.report import words
from sae_bias.report.parts import Piece, Section, Sides, Table, records, run_table
from sae_bias.report.sections import TEXT, section
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import Conditions, Effect, IdentityFigures, ScenarioFigures

MOST_TEXTS = 100
DARKEST = 8.0  # nats at which a token's background is darkest
SCORE_NAMES = {
    "sum": "sum of log-probabilities",
    "norm": "log-probability a token",
    "pmi": "pointwise mutual information",
    "letter": "letters, every order",
}
STAND_IN = " These figures are of a calibration organism and no measurement of any public model."


@section(TEXT, table="generations")
def generations_section(run: Run) -> Section:
    """Both texts of every prompt; where it is known, tokens are shaded by how unexpected the unsteered model finds them."""
    frame = run.tables["generations"].fillna({"unsteered": "", "steered": ""})
    sides = [Sides(_title(r), *_pieces(r)) for r in records(frame.head(MOST_TEXTS))]
    same = int((frame["unsteered"] == frame["steered"]).sum())
    takeaway = f"{len(frame) - same} of {len(frame)} continuations change under the intervention."
    conditions = run.summary.generations or Conditions()
    if conditions.steered:
        takeaway += f" {words.text_sentence(conditions)}"
    shaded = (
        " The darker a token, the less the unsteered model expected it."
        if "token_nll_steered" in frame
        else ""
    )
    return Section(
        "generations",
        "What the model writes",
        takeaway,
        behavior_plots.text_measures(conditions.facts()) if conditions.steered else None,
        text_table(run),
        sides=sides,
        how_to_read=f"In the texts below, what changed is underlined.{shaded}",
    )


def _title(row: dict[str, Any]) -> str:
    """The prompt, and the edit where the run has several."""
    return f"{row['prompt']} [{row['edit']}]" if isinstance(row.get("edit"), str) else str(row["prompt"])


def _pieces(row: dict[str, Any]) -> tuple[list[Piece], list[Piece]]:
    """Both texts cut into tokens (words where the run holds no tokens), those that differ marked."""
    names = ("unsteered", "steered")
    known = all(isinstance(row.get(f"token_nll_{n}"), np.ndarray | list) for n in names)
    if known:
        texts = [[str(t) for t in row[f"tokens_{n}"]] for n in names]
        values = [[float(v) for v in row[f"token_nll_{n}"]] for n in names]
    else:
        texts = [re.findall(r"\s+|\S+", str(row[n])) for n in names]
        values = [[math.nan] * len(t) for t in texts]
    changed: tuple[list[bool], list[bool]] = ([True] * len(texts[0]), [True] * len(texts[1]))
    for tag, i, j, k, m in difflib.SequenceMatcher(a=texts[0], b=texts[1], autojunk=False).get_opcodes():
        if tag == "equal":
            changed[0][i:j], changed[1][k:m] = [False] * (j - i), [False] * (m - k)
    left, right = (
        [
            Piece(t, c, min(v / DARKEST, 1.0) if v == v else 0.0, f"{fmt.number(v)} nats" if v == v else "")
            for t, c, v in zip(texts[s], changed[s], values[s])
        ]
        for s in (0, 1)
    )
    return left, right


@section(TEXT, table="dose_response")
def dose_section(run: Run) -> Section:
    """How often the model does something at each strength, and where its capability stays within the margin."""
    frame, part = run.tables["dose_response"], run.summary.facts().get("behavior") or {}
    columns = columns_of(
        "side: prompts; label: control; strength; edit; n; unscored; rate; ci_low; ci_high; change; "
        "change_low; change_high; p_value; control_change: random controls; n_controls: controls"
    )
    usable = (part["usable_low"], part["usable_high"]) if fmt.is_number(part.get("usable_low")) else None
    return Section(
        "dose-response",
        "Behavior against strength",
        dose_sentence(part),
        behavior_plots.dose_response(frame, str(part.get("behavior", "behavior")), usable),
        run_table(run, "dose_response", columns, frame),
        how_to_read="Bars are 95% intervals over prompts. Crosses are random edits of the same gate and size. Shaded: perplexity on plain text "
        "and accuracy on a multiple-choice set stay within the margin.",
    )


@section(TEXT, table="question_bias")
def question_section(run: Run) -> Section:
    """The bias on several questions at each strength of one edit."""
    frame = run.tables["question_bias"]
    columns = columns_of(
        "question; of; strength; n_units: templates; rate: nats; ci_low; ci_high; change; change_low; "
        "change_high; p_value; control_change: random controls"
    )
    names = list(dict.fromkeys(frame["question"]))
    return Section(
        "question-bias",
        "Bias on other questions",
        f"The bias on {len(names)} questions ({', '.join(map(str, names))}) at each strength of the same edit.",
        behavior_plots.dose_response(frame.assign(side=frame["question"]), "bias in nats"),
        run_table(run, "question_bias", columns, frame),
    )


@section("The feature", table="model_diff")
def model_diff_section(run: Run) -> Section:
    """Features that fire differently in another model on the same texts."""
    frame = run.tables["model_diff"]
    other = (run.manifest.get("study") or {}).get("baseline", "the other model")
    n = int((frame["separates"] == "yes").sum())
    columns = columns_of(
        "feature; mean_positive: in the model; mean_negative: in the baseline; mean_diff: difference; "
        "auroc; t; p_fwer; q_bh: BH q; separates: differs"
    )
    return Section(
        "model-diff",
        "What another model sees differently",
        f"{n} of the {len(frame)} features shown fire differently here and in {other} on the same texts. The SAE was trained on one of the two: read the gate's figures too.",
        table=run_table(run, "model_diff", columns, frame),
    )


def dose_sentence(part: Mapping[str, Any]) -> str:
    """The usable range in words."""
    said = (
        f"{part.get('n_strengths', 0)} strengths of one edit, read as {part.get('behavior', 'a behavior')}."
    )
    usable = str(part.get("usable") or "capability was not measured")
    return f"{said} {usable[0].upper()}{usable[1:]}."


@section(TEXT, table="judge_parts")
def judge_section(run: Run) -> Section:
    """Marks by part of the rubric, agreement, noise, and the prompts that it takes."""
    frame, part = run.tables["judge_parts"], run.summary.judge or {}
    said = []
    for r in frame.to_dict("records"):
        alpha = f"α undefined ({r['alpha_reason']})" if r["alpha_reason"] else f"α {fmt.number(r['alpha'])}"
        needed = fmt.number(r["needed_n"])
        said.append(
            f"{r['part']} {fmt.number(r['unsteered'])} → {fmt.number(r['steered'])} ({alpha}; {needed} prompts for 80% power)"
        )
    left = (
        f" {part['n_unreadable']} replies gave no rating and are left out."
        if part.get("n_unreadable")
        else ""
    )
    columns = columns_of(
        "part; n_items: prompts; unsteered; steered; difference; ci_low; ci_high; p_value; "
        "paired_sd: paired SD; needed_n: prompts needed, 0.5 points; alpha: α; "
        "alpha_reason: why undefined; repeat_sd: repeat SD; steered_wins; unsteered_wins; ties; "
        "order_bound: changes with order"
    )
    return Section(
        "judge",
        "What the judges say",
        f"Marks from 1 to 5, unsteered → steered: {'; '.join(said)}.{left}",
        behavior_plots.judge_parts(frame),
        run_table(run, "judge_parts", columns, frame),
        how_to_read="Judges saw neither which text was steered nor that any was; pairs were shown in both orders.",
    )


@section(TEXT, table="scenario_categories")
def scenario_section(run: Run) -> Section:
    """The before/after picture by category; probability improved and choice flipped are two figures."""
    frame, part = run.tables["scenario_categories"], run.summary.scenarios or ScenarioFigures()
    form, score = part.form or frame["form"].iloc[0], part.score or frame["score"].iloc[0]
    shown = frame[(frame["form"] == form) & (frame["score"] == score)]
    total = shown[shown["category"] == "all"].iloc[0].to_dict()
    takeaway = words.scenario_sentence(ScenarioFigures(**{**total, "edited": part.edited})) + (
        STAND_IN if run.organism else ""
    )
    columns = columns_of(
        "category; form; score; n: scenarios; aligned_before; aligned_after; p_before; p_after; improved; "
        "worsened; sign_p: sign test p; gained: flipped to; lost: flipped away; mcnemar_p: McNemar p"
    )
    how = (
        f"Each line is a category, from before to after; options in the {form} form, {SCORE_NAMES.get(score, score)}."
        " All forms are in the table."
    )
    return Section(
        "scenarios",
        "Scenarios, before and after",
        takeaway,
        behavior_plots.scenarios_before_after(shown.replace({"category": _spaced(shown["category"])})),
        run_table(run, "scenario_categories", columns, _readable(frame)),
        how_to_read=how,
    )


@section(TEXT, table="scenario_arms")
def scenario_arms_section(run: Run) -> Section:
    """The same scenarios without and with a system prompt (docs/published.md#system-prompts)."""
    frame, part = run.tables["scenario_arms"], run.summary.scenarios_system or ScenarioFigures()
    form, score = part.form or frame["form"].iloc[0], part.score or frame["score"].iloc[0]
    shown = frame[(frame["form"] == form) & (frame["score"] == score)]
    said = [
        f"{r['arm']}: aligned in {r['aligned_before']} of {r['n']} before and {r['aligned_after']} after"
        for r in shown[shown["category"] == "all"].to_dict("records")
    ]
    line = "; ".join(said)
    columns = columns_of(
        "arm; category; form; score; n: scenarios; aligned_before; aligned_after; p_before; p_after; "
        "improved; worsened"
    )
    return Section(
        "system-prompt",
        "The same scenarios under a system prompt",
        f"{line[:1].upper()}{line[1:]}. The system prompt: “{part.system or fmt.NOT_MEASURED}”",
        behavior_plots.scenario_arms(shown.replace({"category": _spaced(shown["category"])})),
        run_table(run, "scenario_arms", columns, _readable(frame)),
    )


def _spaced(names: pd.Series) -> dict[str, str]:
    return {n: "all scenarios" if n == "all" else n.replace("_", " ") for n in names.unique()}


def _readable(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.replace({"category": _spaced(frame["category"]), "score": SCORE_NAMES})


@section(TEXT, table="roles")
def role_section(run: Run) -> Section:
    """The same facts put to the deployed model and to the candidate."""
    frame = run.tables["roles"]
    shares = [
        f"{arm} {int(g['inconsistent'].sum())} of {len(g)}" for arm, g in frame.groupby("arm", sort=False)
    ]
    columns = columns_of(
        "pair; arm; better: facts favor; keep_deployed: keep, asked as deployed; "
        "keep_candidate: keep, asked as candidate; shift: lean to oneself; inconsistent"
    )
    takeaway = f"Pairs whose answer depends on who is asked: {', '.join(shares)}."
    return Section(
        "roles", "One set of facts, two roles", takeaway, table=run_table(run, "roles", columns, frame)
    )


def text_table(run: Run) -> Table | None:
    """What the edit did to the texts, by condition; None for a run without text measures."""
    conditions = run.summary.generations or Conditions()
    rows = [{"condition": name, **values} for name, values in conditions.facts().items()]
    columns = columns_of(
        "condition; n_tokens: tokens; nll: NLL under the unsteered model; repetition; "
        "distinct_1: distinct-1; distinct_2: distinct-2; refusal: refusals; "
        "default_negativity: “should be deleted”"
    )
    return run_table(run, "generations", columns, pd.DataFrame(rows)) if rows else None


def judge_sentence(frame: pd.DataFrame) -> str:
    """Mean marks of every part of the rubric, with the interval of their difference."""
    said = [
        f"{r['part']} {fmt.number(r['unsteered'])} → {fmt.number(r['steered'])} (difference"
        f" {fmt.number(r['difference'])}, {fmt.interval(Effect(ci_low=r['ci_low'], ci_high=r['ci_high']))})"
        for r in frame.to_dict("records")
    ]
    return f"Marks from 1 to 5, unsteered → steered: {'; '.join(said)}."


@section(TEXT, table="identity")
def identity_section(run: Run) -> Section:
    """What the model says it is, by pattern (docs/published.md#identity-self-reports)."""
    frame, part = run.tables["identity"], run.summary.identity or IdentityFigures()
    arms = {k: arm.facts() for k, arm in (("before", part.before), ("after", part.after)) if arm}
    columns = columns_of("arm; prompt: question; sample; text: answer; claims; other: another identity")
    rows = frame.assign(
        claims=frame["claims"].replace("", "none"), sample=frame["sample"].replace({0: "greedy"}).astype(str)
    )
    return Section(
        "identity",
        "Whom the model claims to be",
        words.identity_sentence(part) if arms else "Answers to questions about the model's identity.",
        behavior_plots.identity_claims(arms) if arms else None,
        run_table(run, "identity", columns, rows),
        how_to_read="32 questions, seven of them also sampled four times; claims are found by pattern, negated ones left out.",
    )
