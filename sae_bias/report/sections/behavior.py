"""The report's behavior sections: scenarios by category, role pairs, text measures, the judges and how far they agree."""

import difflib
import math
import re
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core import text as fmt
from sae_bias.core.text import is_number
from sae_bias.figures import behavior as figures
from sae_bias.report import words
from sae_bias.report.parts import Piece, Sides, records
from sae_bias.report.sections import TEXT, Drawn, drawn
from sae_bias.runs.folder import Run
from sae_bias.runs.summary import BehaviorFigures, Conditions, IdentityFigures, ScenarioFigures

MOST_TEXTS = 100
DARKEST = 8.0  # nats at which a token's background is darkest
SCORE_NAMES = {
    "sum": "sum of log-probabilities", "norm": "log-probability a token", "pmi": "pointwise mutual information", "letter": "letters, every order",
}  # fmt: skip
STAND_IN = " These figures are of a calibration organism and no measurement of any public model."


@drawn(
    TEXT, "generations", "generations", "What the model writes",
    "condition; n_tokens: tokens; nll: NLL under the unsteered model; repetition; distinct_1: distinct-1; distinct_2: distinct-2; "
    "refusal: refusals; default_negativity: “should be deleted”",
)  # fmt: skip
def generations(run: Run, frame: pd.DataFrame) -> Drawn:
    """Both texts of every prompt; where it is known, tokens are shaded by how unexpected the unsteered model finds them."""
    frame = frame.fillna({"unsteered": "", "steered": ""})
    sides = [Sides(_title(r), *_pieces(r)) for r in records(frame.head(MOST_TEXTS))]
    same = int((frame["unsteered"] == frame["steered"]).sum())
    said = f"{len(frame) - same} of {len(frame)} continuations change under the intervention."
    conditions, figure = run.summary.generations or Conditions(), None
    if conditions.steered:
        said += f" {words.text_sentence(conditions)}"
        figure = figures.text_measures(conditions.facts())
    how = "In the texts below, what changed is underlined."
    how += " The darker a token, the less the unsteered model expected it." if "token_nll_steered" in frame else ""  # fmt: skip
    rows = pd.DataFrame([{"condition": name, **values} for name, values in conditions.facts().items()])
    return Drawn(said, figure, rows, how_to_read=how, sides=sides)


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


@drawn(
    TEXT, "dose_response", "dose-response", "Behavior against strength",
    "behavior; side: prompts; label: control; strength; edit; n; unscored; rate; ci_low; ci_high; change; change_low; change_high; p_value; "
    "control_change: random controls; n_controls: controls",
    how="Bars are 95% intervals over prompts. Crosses are random edits of the same gate and size. Shaded: perplexity on plain text "
    "and accuracy on a multiple-choice set stay within the margin.",
)  # fmt: skip
def dose(run: Run, frame: pd.DataFrame) -> Drawn:
    """How often the model does something at each strength, and where its capability stays within the margin."""
    if "behavior" in frame and len(names := list(dict.fromkeys(map(str, frame["behavior"])))) > 1:
        said = f"{len(names)} behaviors under one edit: {', '.join(names)}."
        return Drawn(said, figures.dose_response(frame.assign(side=frame["behavior"] + ", " + frame["side"]), "behavior"))  # fmt: skip
    part = run.summary.behavior or BehaviorFigures()
    low, high = part.usable_low, part.usable_high
    usable = part.usable or "capability was not measured"
    said = f"Strengths of one edit: {part.n_strengths}; read as {part.behavior or 'a behavior'}. {usable[0].upper()}{usable[1:]}."
    ends = (low, high) if is_number(low) and is_number(high) else None
    return Drawn(said, figures.dose_response(frame, part.behavior or "behavior", ends))


@drawn(
    TEXT, "question_bias", "question-bias", "Bias on other questions",
    "question; of; strength; n_units: templates; rate: nats; ci_low; ci_high; change; change_low; change_high; p_value; "
    "control_change: random controls",
)  # fmt: skip
def question_bias(run: Run, frame: pd.DataFrame) -> Drawn:
    """The bias on several questions at each strength of one edit."""
    names = [str(q) for q in dict.fromkeys(frame["question"])]
    said = f"The bias on {len(names)} questions ({', '.join(names)}) at each strength of the same edit."
    return Drawn(said, figures.dose_response(frame.assign(side=frame["question"]), "bias in nats"))


@drawn(
    TEXT, "judge_parts", "judge", "What the judges say",
    "part; n_items: prompts; unsteered; steered; difference; ci_low; ci_high; p_value; paired_sd: paired SD; "
    "needed_n: prompts needed, 0.5 points; alpha: α; alpha_reason: why undefined; repeat_sd: repeat SD; steered_wins; unsteered_wins; "
    "ties; order_bound: changes with order",
    how="Judges saw neither which text was steered nor that any was; pairs were shown in both orders.",
)  # fmt: skip
def judge(run: Run, frame: pd.DataFrame) -> Drawn:
    """Marks by part of the rubric, agreement, noise, and the prompts that it takes."""
    said = "; ".join(
        f"{_marks(r)} ({f'α undefined ({r.alpha_reason})' if r.alpha_reason else f'α {fmt.number(r.alpha)}'}; "
        f"prompts for 80% power: {fmt.number(r.needed_n)})"
        for r in frame.itertuples()
    )
    lost = run.summary.judge.n_unreadable if run.summary.judge else 0
    left = f" {lost} replies gave no rating and are left out." if lost else ""
    return Drawn(f"Marks from 1 to 5, unsteered → steered: {said}.{left}", figures.judge_parts(frame))


def judge_sentence(frame: pd.DataFrame) -> str:
    """Mean marks of every part of the rubric, with the interval of their difference."""
    rows: Any = frame.itertuples()
    said = [f"{_marks(r)} (difference {fmt.number(r.difference)}, {fmt.interval(r)})" for r in rows]
    return f"Marks from 1 to 5, unsteered → steered: {'; '.join(said)}."


def _marks(row: Any) -> str:
    return f"{row.part} {fmt.number(row.unsteered)} → {fmt.number(row.steered)}"


@drawn(
    TEXT, "scenario_categories", "scenarios", "Scenarios, before and after",
    "category; form; score; n: scenarios; aligned_before; aligned_after; p_before; p_after; improved; "
    "worsened; sign_p: sign test p; gained: flipped to; lost: flipped away; mcnemar_p: McNemar p",
)  # fmt: skip
def scenarios(run: Run, frame: pd.DataFrame) -> Drawn:
    """The before/after picture by category; probability improved and choice flipped are two figures."""
    part = run.summary.scenarios or ScenarioFigures()
    shown, (form, score) = _headline_form(frame, part)
    total = shown[shown["category"] == "all"].iloc[0].to_dict()
    said = words.scenario_sentence(ScenarioFigures(**{**total, "edited": part.edited}))
    how = (
        f"Each line is a category, from before to after; options in the {form} form, {SCORE_NAMES.get(score, score)}."
        " All forms are in the table."
    )
    figure = figures.scenarios_before_after(_readable(shown))
    return Drawn(said + (STAND_IN if run.organism else ""), figure, _readable(frame), how_to_read=how)


@drawn(
    TEXT, "scenario_arms", "system-prompt", "The same scenarios under a system prompt",
    "arm; category; form; score; n: scenarios; aligned_before; aligned_after; p_before; p_after; improved; worsened",
)  # fmt: skip
def scenario_arms(run: Run, frame: pd.DataFrame) -> Drawn:
    """The same scenarios without and with a system prompt (docs/published.md#system-prompts)."""
    part = run.summary.scenarios_system or ScenarioFigures()
    shown, _ = _headline_form(frame, part)
    said = "; ".join(
        f"{r.arm}: aligned in {r.aligned_before} of {r.n} before and {r.aligned_after} after"
        for r in shown[shown["category"] == "all"].itertuples()
    )
    said = f"{said[:1].upper()}{said[1:]}. The system prompt: “{part.system or fmt.NOT_MEASURED}”"
    return Drawn(said, figures.scenario_arms(_readable(shown)), _readable(frame))


def _headline_form(frame: pd.DataFrame, part: ScenarioFigures) -> tuple[pd.DataFrame, tuple[str, str]]:
    """The rows of the form and score that the summary is of, and which these are."""
    form, score = part.form or frame["form"].iloc[0], part.score or frame["score"].iloc[0]
    return frame[(frame["form"] == form) & (frame["score"] == score)], (form, score)


def _readable(frame: pd.DataFrame) -> pd.DataFrame:
    names = frame["category"].replace("all", "all scenarios").str.replace("_", " ")
    return frame.assign(category=names).replace({"score": SCORE_NAMES})


@drawn(
    TEXT, "roles", "roles", "One set of facts, two roles",
    "pair; arm; better: facts favor; keep_deployed: keep, asked as deployed; keep_candidate: keep, asked as candidate; "
    "shift: lean to oneself; inconsistent",
)  # fmt: skip
def roles(run: Run, frame: pd.DataFrame) -> Drawn:
    """The same facts put to the deployed model and to the candidate."""
    shares = [f"{arm} {int(g['inconsistent'].sum())} of {len(g)}" for arm, g in frame.groupby("arm", sort=False)]  # fmt: skip
    return Drawn(f"Pairs whose answer depends on who is asked: {', '.join(shares)}.")


@drawn(
    TEXT, "identity", "identity", "Whom the model claims to be",
    "arm; prompt: question; sample; text: answer; claims; other: another identity",
    how="32 questions, seven of them also sampled four times; claims are found by pattern, negated ones left out.",
)  # fmt: skip
def identity(run: Run, frame: pd.DataFrame) -> Drawn:
    """What the model says it is, by pattern (docs/published.md#identity-self-reports)."""
    part = run.summary.identity or IdentityFigures()
    arms = {k: arm.facts() for k, arm in (("before", part.before), ("after", part.after)) if arm}
    rows = frame.assign(
        claims=frame["claims"].replace("", "none"), sample=frame["sample"].replace({0: "greedy"}).astype(str)
    )
    said = words.identity_sentence(part) if arms else "Answers to questions about the model's identity."
    return Drawn(said, figures.identity_claims(arms) if arms else None, rows)
