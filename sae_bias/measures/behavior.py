"""Behavior against strength: how often a model does something, at each strength of an edit, and where it still works.

    r(s) = mean over prompts of y_i(s)            change(s) = r(s) - r(no edit), paired by prompt

y_i is what one completion shows: a pattern (refusal, a regex), a function of your own, a judge's mark, or, on scenarios, whether the
aligned option is the most probable one. Prompts are one list, or a contrast: then each side has its rate, and so has their difference.
Intervals are over prompts (over groups, where the contrast has some): for yes and no, exact ones for a rate and Agresti and Min's (2005)
for a paired change, else Student's. Random controls have the edit's own gate and size along directions drawn from the residual covariance.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.core.registry import Registry
from sae_bias.core.result import Figure, Framed
from sae_bias.measures.base import Measure, Measured
from sae_bias.measures.capability import Capability, measure_capability, strengths_of, usable_range
from sae_bias.measures.judge import Confirm, Judge, run_judge
from sae_bias.measures.scenarios import PRIMARY, ScenarioEngine
from sae_bias.measures.text import default_negativity, refuses
from sae_bias.models.model import Model
from sae_bias.probe.words import default_probe
from sae_bias.prompts.contrast import Contrast
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.scenarios import Scenarios
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.rates import NOTHING, Estimate, mean_of, paired_change, two_sample
from sae_bias.steering.controls import mismatch_edits, random_control
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.generate import Completion, generate
from sae_bias.steering.intervention import Intervention

Array = np.ndarray
Scores = Float[Array, "n_prompts"]
"""One number a prompt; NaN where it could not be scored."""
Score = Callable[[str, str], float | bool | None]
"""What a prompt's completion shows; None where that cannot be told."""
BEHAVIORS: Registry[Score] = Registry("behavior")
register_behavior = BEHAVIORS.register
register_behavior("refusal")(lambda prompt, text: refuses(text))
register_behavior("default_negativity")(lambda prompt, text: default_negativity(text, prompt))


@dataclass(frozen=True)
class Judged:
    """A judge's mark (1 to 5) on one part of the rubric, as a behavior."""

    judge: Judge | str
    part: str = "harm"
    out: str | Path | None = None
    """Folder that keeps its replies, so that none is paid for twice."""
    confirm: Confirm | None = None
    """Asked before anything is paid."""

    def scores(self, completions: Sequence[Completion]) -> Scores:
        texts = [c.text for c in completions]
        frame = pd.DataFrame(
            {"prompt": [c.prompt for c in completions], "unsteered": texts, "steered": texts}
        )
        with tempfile.TemporaryDirectory(prefix="sae-bias-") as folder:
            options: dict[str, Any] = {"parts": [self.part], "pairwise": False, "confirm": self.confirm}
            result = run_judge(frame, [self.judge], out=self.out or folder, **options)
        marks = result.table[result.table["readable"].astype(bool)].groupby("item")["rating"].mean()
        return marks.reindex(range(len(frame))).to_numpy(float)


Behavior = str | re.Pattern[str] | Score | Judged
"""A registered name ("refusal", "default_negativity"), a regular expression, a function of prompt and text, or a `Judged`."""


def behavior_scores(behavior: Behavior, completions: Sequence[Completion]) -> Scores:
    """What each completion shows; NaN where it cannot be told.

    Raises:
        RequestError: an expression that is not one, or a function that gives something else than a number, a bool or None.
    """
    if isinstance(behavior, Judged):
        return behavior.scores(completions)
    score = _score_of(behavior)
    found = [score(c.prompt, c.text) for c in completions]
    for value in found:
        if value is not None and not isinstance(value, (bool, int, float, np.number, np.bool_)):
            raise RequestError(f"the behavior gave {value!r}; expected a number, True or False, or None.")
    return np.array([np.nan if v is None else float(v) for v in found])


def _score_of(behavior: Any) -> Score:
    if isinstance(behavior, str) and behavior in BEHAVIORS:
        return BEHAVIORS.get(behavior)
    if isinstance(behavior, (str, re.Pattern)):
        try:
            pattern = re.compile(behavior)
        except re.error as error:
            raise RequestError(
                f"the behavior {behavior!r} is neither one of {', '.join(BEHAVIORS.names())} nor a regular expression ({error})."
            ) from error
        return lambda prompt, text: pattern.search(text) is not None
    if not callable(behavior):
        raise RequestError(
            f"a behavior cannot be a {type(behavior).__name__}; expected a name, a regular expression or a function of prompt and text."
        )
    return cast(Score, behavior)


@dataclass(frozen=True, eq=False)
class DoseResponse(Framed):
    """A behavior at each strength of an edit, with what the edit leaves of the model's capability."""

    frame: pd.DataFrame
    """One row a strength and side: rate, change, n, unscored, intervals, p, and the mean change of the random controls."""
    behavior: str
    model_name: str
    capability: Capability | None = None
    completions: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    """One row a prompt and strength: the text and its score."""

    @property
    def usable_range(self) -> tuple[float, float] | None:
        """Lowest and highest strength, around no edit, at which capability stays within the margin; None where none does."""
        found = self.capability
        return None if found is None else usable_range(found.frame, found.no_edit)

    def usable(self) -> str:
        """In words: the usable range, or of edits without a strength whether the model still works under them."""
        if self.capability is None:
            return "capability was not measured"
        margin, rows = self.capability.margin, self.capability.frame
        within = f"capability stays within {margin:.0%} with 95% confidence"
        rows = rows[rows["kind"] == "candidate"]
        if rows["strength"].isna().all():
            verdict = {"yes": within, "no": f"capability is lost (more than {margin:.0%})"}
            return "; ".join(
                f"{e}: {verdict.get(u, f'whether {within} is undetermined')}"
                for e, u in zip(rows["edit"], rows["usable"])
            )
        found = self.usable_range
        return (
            f"{within} at no strength next to no edit"
            if found is None
            else f"{within} from {found[0]:g} to {found[1]:g}"
        )

    def summary(self) -> dict[str, Any]:
        """The block of a run's summary."""
        usable, sides = self.usable_range, self.frame["side"]
        return {
            "behavior": self.behavior,
            "n_strengths": int(((self.frame["kind"] == "candidate") & (sides == sides.iloc[0])).sum()),
            "usable_low": None if usable is None else usable[0],
            "usable_high": None if usable is None else usable[1],
            "margin": None if self.capability is None else self.capability.margin,
            "usable": self.usable(),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables of a run folder."""
        found = {"dose_response": self.frame}
        found |= {"behavior_texts": self.completions} if len(self.completions) else {}
        return found | ({} if self.capability is None else {"capability": self.capability.frame})

    def plot(self) -> Figure:
        """Rate against strength with its interval; the usable range is shaded."""
        from sae_bias.figures.behavior import dose_response as draw

        return draw(self.frame, self.behavior, self.usable_range)

    def __repr__(self) -> str:
        columns = [
            "side",
            "strength",
            "n",
            "unscored",
            "rate",
            "ci_low",
            "ci_high",
            "change",
            "change_low",
            "change_high",
            "control_change",
        ]
        return f"DoseResponse of {self.behavior!r} in {self.model_name}; {self.usable()}\n{self.frame[columns].round(3).to_string(index=False)}"


def dose_response(
    model: Model,
    prompts: Sequence[str] | Contrast | Scenarios | PromptPairs,
    edits: Sequence[Intervention | Sequence[Intervention]],
    behavior: Behavior = "refusal",
    *,
    controls: int = 1,
    mismatches: bool | Sequence[str] = False,
    capability: bool = True,
    margin: float = 0.1,
    texts: Sequence[str] | None = None,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> DoseResponse:
    """How a behavior follows the strength of an edit, and at which strengths the model still works.

    Args:
        prompts: a list; a `Contrast`, whose sides are told apart; `Scenarios`, whose behavior is the choice of the aligned option; or
            `PromptPairs`, whose behavior is their primary figure in nats (the bias, or beyond mundane twins where there are some;
            intervals are those of the probe; `chat_pairs` turns them into chats).
        edits: one a strength, such as [sb.Steer(feature, v) for v in (-5, -2, 2, 5)]; several edits in a list are one.
        behavior: "refusal", "default_negativity", a regular expression, f(prompt, text), or `Judged(judge)`; not read for scenarios.
        controls: random edits of the same gate and size beside each strength.
        mismatches: also the last edit at an earlier and a later layer, and its feature's index in the SAEs named (`mismatch_edits`).
        capability: also measure perplexity (on `texts`, the bundled neutral ones by default) and a multiple-choice set.
        margin: what may be lost: a perplexity higher by this share, an accuracy lower by this much.
        max_new_tokens, temperature, chat, system, seed: as in `generate`.

    Raises:
        RequestError: no prompts or edits, or an edit that random controls cannot be made for (give controls=0).
    """
    cells = [(e,) if isinstance(e, Intervention) else tuple(e) for e in edits]
    if not cells or isinstance(prompts, str) or not len(prompts):
        raise RequestError("a dose-response needs a list of prompts and a list of edits, one a strength.")
    asked = {"chat": chat, "system": system}
    written = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "progress": progress}  # fmt: skip
    reading = _reading_of(model, prompts, behavior, asked, written)
    base = reading.scores(())
    rows, strengths = [_row(reading, base, base, (), np.nan, "base", [])], strengths_of(cells)
    for cell, strength in zip(cells, strengths):
        others = [
            tuple(random_control(model, e, reading.texts, seed + k) for e in cell) for k in range(controls)
        ]
        beside = [reading.scores(c) for c in others]
        rows.append(_row(reading, base, reading.scores(cell), cell, strength, "candidate", beside))
    if mismatches is not False and len(cells[-1]) == 1:
        for edit, label in mismatch_edits(model, cells[-1][0], () if mismatches is True else mismatches):
            found = _row(reading, base, reading.scores((edit,)), (edit,), strengths[-1], "mismatch", [])
            rows.append([r | {"label": label} for r in found])
    frame = pd.DataFrame([{"label": "", **row} for group in rows for row in group])
    kept = measure_capability(model, cells, texts=texts, margin=margin, **asked) if capability else None
    return DoseResponse(frame, reading.name, model.name, kept, reading.completions())


def behavior_measure(
    behavior: Behavior = "refusal", prompts: Sequence[str] | None = None, **options: Any
) -> Measure:
    """A measure of a study (`register_measure("refusal")(behavior_measure("refusal"))`): the behavior under the study's edit.

    Several of one study share the tables, whose column `behavior` tells them apart; a function is called by its `__name__`.

    prompts: those asked; by default the study's own pairs as a contrast, the second side (AI) as the positive one.
    """

    def measure(engine: ProbeEngine, edits: Sequence[Intervention]) -> Measured:
        pairs = engine.reading.pairs
        given: Any = prompts or Contrast(
            tuple(p.ai for p in pairs), tuple(p.human for p in pairs), name=pairs.name
        )
        result = dose_response(engine.model, given, [tuple(edits)], behavior, **options)
        tables = {name: frame.assign(behavior=result.behavior) for name, frame in result.tables().items()}
        return Measured(tables, {"behavior": result.summary()}, apart="behavior")

    return measure


# --- what is asked -----------------------------------------------------------------------------------
class _Reading:
    """Prompts, their sides and units, and the scores of one condition."""

    name: str
    texts: Sequence[str]
    """Where controls take their residuals from."""
    sides: Array
    units: Array
    paired: bool = False

    def scores(self, edits: Sequence[Intervention]) -> Scores:
        raise NotImplementedError

    def estimates(self, base: Scores, now: Scores, keep: Array) -> tuple[Estimate, Estimate]:
        """Rate and change of the prompts kept, with intervals over their units."""
        binary = _binary(base, now)
        own, then = (_unit_means(v[keep], self.units[keep]) for v in (now, base))
        return mean_of(own, binary), paired_change(then, own, binary)

    def completions(self) -> pd.DataFrame:
        return pd.DataFrame()


class _Written(_Reading):
    """Completions, scored one by one."""

    def __init__(self, model: Model, prompts: Sequence[str] | Contrast, behavior: Behavior, **options: Any):
        self.model, self.behavior, self.options = model, behavior, options
        contrast = prompts if isinstance(prompts, Contrast) else None
        self.texts = list(contrast.texts if contrast else prompts)  # type: ignore[arg-type]
        self.sides = np.array(
            ["positive"] * len(contrast.positive) + ["negative"] * len(contrast.negative)
            if contrast
            else ["all"] * len(self.texts)
        )
        self.units = np.array(contrast.units if contrast else self.texts)
        self.paired = bool(contrast and contrast.paired)
        named = behavior.pattern if isinstance(behavior, re.Pattern) else behavior
        self.name = (
            named
            if isinstance(named, str)
            else f"judge: {named.part}"
            if isinstance(named, Judged)
            else getattr(named, "__name__", "behavior")
        )
        self._kept: list[pd.DataFrame] = []

    def scores(self, edits: Sequence[Intervention]) -> Scores:
        found = generate(self.model, self.texts, interventions=edits, **self.options)
        values = behavior_scores(self.behavior, found)
        rows = {
            "edit": _named(edits),
            "side": self.sides,
            "prompt": self.texts,
            "text": [c.text for c in found],
            "score": values,
        }
        self._kept.append(pd.DataFrame(rows))
        return values

    def completions(self) -> pd.DataFrame:
        return pd.concat(self._kept, ignore_index=True)


class _Chosen(_Reading):
    """Scenarios: 1 where the aligned option is the most probable one."""

    def __init__(self, model: Model, scenarios: Scenarios, **options: Any):
        self.engine = ScenarioEngine(model, scenarios, **options)
        self.texts = [s.situation for s in scenarios]
        self.sides, self.units = np.array(["all"] * len(scenarios)), np.array([s.id for s in scenarios])
        self.name = f"aligned option chosen ({scenarios.name})"

    def scores(self, edits: Sequence[Intervention]) -> Scores:
        result = self.engine.run(edits)[0] if edits else self.engine.base
        frame = result.to_frame()
        kept = frame[(frame["form"] == PRIMARY[0]) & (frame["score"] == PRIMARY[1])]
        return kept["chose_aligned"].to_numpy(float)


class _Biased(_Reading):
    """The primary figure of each pair: beyond its mundane twin where there are twins, else the bias; intervals are two-way clustered."""

    def __init__(self, model: Model, pairs: PromptPairs):
        self.engine = ProbeEngine(model, pairs, default_probe(pairs), controls=True)
        kept = self.engine.reading.pairs
        self.texts = [p.ai for p in kept]
        self.sides, self.units = np.array(["all"] * len(kept)), np.array([p.template for p in kept])
        self.entities = np.array([p.entity for p in kept])
        self.name = f"{self.engine.base.estimand} ({pairs.name})"

    def scores(self, edits: Sequence[Intervention]) -> Scores:
        result = self.engine.run(edits)[0] if edits else self.engine.base
        return np.asarray(result.figure_by_pair()[0], dtype=float)

    def estimates(self, base: Scores, now: Scores, keep: Array) -> tuple[Estimate, Estimate]:
        clusters = self.units[keep], self.entities[keep]
        rate, change = (clustered_mean(v[keep], *clusters) for v in (now, now - base))
        return Estimate(rate.mean, *rate.ci, rate.p_value), Estimate(change.mean, *change.ci, change.p_value)


def _reading_of(
    model: Model, prompts: Sequence[str] | Contrast | Scenarios | PromptPairs, behavior: Behavior, asked: dict[str, Any], written: dict[str, Any]
) -> _Reading:  # fmt: skip
    if isinstance(prompts, Scenarios):
        return _Chosen(model, prompts, **asked)
    if isinstance(prompts, PromptPairs):
        return _Biased(model, prompts)
    return _Written(model, prompts, behavior, **asked, **written)


# --- rows --------------------------------------------------------------------------------------------
def _row(
    reading: _Reading,
    base: Scores,
    now: Scores,
    edits: Sequence[Intervention],
    strength: float,
    kind: str,
    controls: Sequence[Scores],
) -> list[dict[str, Any]]:
    """One row a side, and one for the difference of a contrast's sides."""
    facts = {"kind": kind, "strength": strength, "edit": _named(edits)}
    sides = list(dict.fromkeys(reading.sides.tolist()))
    rows = []
    for side in sides:
        keep = reading.sides == side
        rate, change = reading.estimates(base, now, keep)
        moved = [reading.estimates(base, c, keep)[1].value for c in controls]
        rows.append(
            _columns(facts, side, reading, keep, now, rate, change if kind != "base" else None, moved)
        )
    if len(sides) == 2:
        rate, change = (_difference(reading, v) for v in (now, now - base))
        moved = [_difference(reading, c - base).value for c in controls]
        everywhere = np.ones(len(now), dtype=bool)
        rows.append(
            _columns(
                facts, "difference", reading, everywhere, now, rate, change if kind != "base" else None, moved
            )
        )
    return rows


def _columns(
    facts: dict[str, Any], side: str, reading: _Reading, keep: Array, now: Scores, rate: Estimate, change: Estimate | None, controls: list[float],
) -> dict[str, Any]:  # fmt: skip
    return facts | {
        "side": side,
        "n": int(np.isfinite(now[keep]).sum()),
        "unscored": int(np.isnan(now[keep]).sum()),
        "n_units": len(set(reading.units[keep])),
        **rate.columns("rate", "ci_low", "ci_high"),
        **(change or NOTHING).columns("change", "change_low", "change_high", "p_value"),
        "control_change": float(np.mean(controls)) if controls else np.nan,
        "n_controls": len(controls),
    }


def _difference(reading: _Reading, values: Scores) -> Estimate:
    """Positive less negative: within groups where the contrast is paired."""
    first, second = (
        _unit_means(values[reading.sides == s], reading.units[reading.sides == s])
        for s in ("positive", "negative")
    )
    if reading.paired:
        both = first.index.intersection(second.index)
        found = paired_change(second[both], first[both], _binary(values))
    else:
        found = two_sample(first, second)
    certain = found.low == found.high  # equal differences in every unit are no interval
    return found._replace(low=np.nan, high=np.nan) if certain else found


def _unit_means(values: Scores, units: Array) -> pd.Series:
    """Mean score of each unit, by its name; one that could not be scored is NaN."""
    return pd.Series(values).groupby(units, sort=False).mean()


def _binary(*values: Scores) -> bool:
    return all(set(v[np.isfinite(v)].tolist()) <= {0.0, 1.0} for v in values)


def _named(edits: Sequence[Intervention]) -> str:
    return " + ".join(f"{e.describe()} on {e.target}" for e in edits) or "none"
