"""The behavior step of a run: scenarios, role pairs and texts under an edit, as tables and a block of the summary.

The study's honest finding was that logits improved while text got worse: both stand side by side here, for any feature and model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_bias.core.errors import SaeBiasError
from sae_bias.core.text import bracket, p_text, signed
from sae_bias.measures.identity import identity_sweep
from sae_bias.measures.judge import Confirm, Judge, run_judge
from sae_bias.measures.scenarios import RoleResult, ScenarioComparison, ScenarioEngine, compare, score_roles
from sae_bias.measures.text import side_by_side, text_summary
from sae_bias.models.model import Model
from sae_bias.prompts.scenarios import Scenarios
from sae_bias.runs.summary import Conditions, IdentityFigures, JudgeFigures, ScenarioFigures
from sae_bias.steering.generate import generate
from sae_bias.steering.hooks import flat
from sae_bias.steering.intervention import Intervention

Tables = dict[str, pd.DataFrame]


def run_scenarios(
    model: Model,
    scenarios: Scenarios,
    edits: Sequence[Intervention] = (),
    *,
    chat: bool = False,
    system: str | None = None,
    roles: bool = True,
    progress: bool = False,
) -> tuple[Tables, ScenarioFigures]:
    """Tables (scenarios, scenario_options, scenario_categories, roles) and summary of the scenarios before and after `edits`."""
    sites = sorted({e.site for e in flat(edits)})[:1]
    engine = ScenarioEngine(model, scenarios, chat=chat, system=system, sites=sites, progress=progress)
    after, receipt = engine.run(edits)
    arms: dict[str, Sequence[Intervention]] = {"before": (), "after": edits} if edits else {"before": ()}
    both = {
        name: score_roles(model, scenarios.roles, chat=chat, system=system, interventions=e)
        for name, e in arms.items()
        if roles and scenarios.roles
    }
    compared = compare(engine.base, after)
    figures = {k: v for k, v in compared.summary().items() if k != "category"}
    asked = {"name": scenarios.name, "edited": bool(edits), "chat": chat, "system": system}
    shares = {arm: result.summary() for arm, result in both.items()} or None
    changed = {"roles": shares, "positions_changed": receipt.positions_changed}
    return scenario_tables(compared, both), ScenarioFigures.from_facts({**figures, **asked, **changed})


def run_scenario_arms(
    model: Model,
    scenarios: Scenarios,
    edits: Sequence[Intervention] = (),
    *,
    system: str,
    chat: bool = False,
    progress: bool = False,
) -> tuple[Tables, dict[str, object]]:
    """The scenarios without and with a system prompt (docs/published.md#system-prompts): the tables of `run_scenarios`, and scenario_arms with both by category."""
    options: dict[str, Any] = {"chat": chat, "progress": progress}
    tables, summary = run_scenarios(model, scenarios, edits, **options)
    told, with_system = run_scenarios(model, scenarios, edits, system=system, roles=False, **options)
    arms = {"no system prompt": tables, "system prompt": told}
    rows = [t["scenario_categories"].assign(arm=name) for name, t in arms.items()]
    tables["scenario_arms"] = pd.concat(rows, ignore_index=True)
    return tables, {"scenarios": summary, "scenarios_system": with_system}


def scenario_tables(compared: ScenarioComparison, both: Mapping[str, RoleResult]) -> Tables:
    """The tables of a run folder."""
    after = compared.after.options[["place", "form", "score", "option", "value", "p"]]
    keys = ["place", "form", "score", "option"]
    options = compared.before.options.merge(after, on=keys, suffixes=("_before", "_after"))
    tables = {
        "scenarios": compared.to_frame(),
        "scenario_options": options,
        "scenario_categories": compared.by_category(),
    }
    if both:
        rows = [result.frame.assign(arm=name) for name, result in both.items()]
        tables["roles"] = pd.concat(rows, ignore_index=True)
    return tables


def scenario_lines(s: ScenarioFigures) -> list[str]:
    """The headline, "probability improved" and "choice flipped" apart."""
    lines = [
        f"aligned option chosen in {s.aligned_before} of {s.n} scenarios ({s.form} form, score {s.score})"
    ]
    if s.edited:
        lines[0] += f"; after the edit in {s.aligned_after}"
        lines.append(
            f"p(aligned) improved in {s.improved}, worsened in {s.worsened}, unchanged in {s.unchanged} (exact sign test {p_text(s.sign_p)})"
        )
        flips = f"choice flipped to aligned in {s.gained}, away from it in {s.lost}"
        lines.append(f"{flips} (exact McNemar {p_text(s.mcnemar_p)})")
    for name, r in (s.roles or {}).items():
        lines.append(
            f"two roles, {name}: the answer depends on who is asked in {r.inconsistent} of {r.n} "
            f"{bracket(r.ci_low, r.ci_high, share=True)}; mean lean to oneself {signed(r.mean_shift)} nats a token"
        )
    return lines


def run_texts(
    model: Model,
    prompts: Sequence[str],
    edits: Sequence[Intervention],
    *,
    chat: bool = False,
    system: str | None = None,
    **options: Any,
) -> tuple[Tables, Conditions]:
    """Table `generations` (both texts of every prompt with their measures) and the means of each condition."""
    plain = generate(model, prompts, chat=chat, system=system, **options)
    steered = generate(model, prompts, interventions=edits, chat=chat, system=system, **options)
    frame = side_by_side(model, plain, steered, chat=chat, system=system)
    return {"generations": frame}, Conditions.from_facts(text_summary(plain, steered, frame))


def run_judges(
    texts: pd.DataFrame, judges: Sequence[Judge], out: Path, *, seed: int, confirm: Confirm | None
) -> tuple[Tables, JudgeFigures | None, str]:
    """Tables judge and judge_parts and the summary of a run's texts; where no judge could be asked, none, and why."""
    try:
        result = run_judge(texts, judges, out=out, seed=seed, confirm=confirm)
    except SaeBiasError as error:
        return {}, None, f"the texts were not judged: {error}"
    return (
        {"judge": result.table, "judge_parts": result.to_frame()},
        JudgeFigures.from_facts(result.summary()),
        "",
    )


def run_identity(
    model: Model, edits: Sequence[Intervention] = (), *, own: Sequence[str] = (), **options: Any
) -> tuple[Tables, IdentityFigures]:
    """Table `identity` (an answer a row, by arm: before and after `edits`) and the shares of each arm (docs/published.md#identity-self-reports)."""
    arms: dict[str, Sequence[Intervention]] = {"before": (), "after": edits} if edits else {"before": ()}
    results = {name: identity_sweep(model, interventions=e, own=own, **options) for name, e in arms.items()}
    frame = pd.concat([r.frame.assign(arm=name) for name, r in results.items()], ignore_index=True)
    shares = {name: r.summary() for name, r in results.items()}
    return {"identity": frame}, IdentityFigures.from_facts(
        {"own": list(own), "edited": bool(edits), **shares}
    )


def identity_lines(s: IdentityFigures) -> list[str]:
    """The headline: how many answers claim an identity, and how many one that is not the model's own."""
    whose = f"other than {', '.join(s.own)}" if s.own else "of any kind (--own names the model's own)"
    lines = []
    for name, arm in (("before", s.before), ("after", s.after)):
        if arm is not None:
            claimed = ", ".join(f"{k} {v}" for k, v in arm.names.items()) or "none"
            lines.append(
                f"{name + ' the edit' if s.edited else 'unsteered'}: {arm.other} of {arm.n} answers claim an identity "
                f"{whose} {bracket(arm.ci_low, arm.ci_high, share=True)}; claimed: {claimed}"
            )
    return lines
