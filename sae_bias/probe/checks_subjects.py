"""Whose score moves, and is it the subject or its wording? Decomposition against neutral subjects, and the nuisances.

    bias = [s(human) - s(neutral)] + [s(neutral) - s(AI)]        human bonus + AI penalty, exactly, template by template

Nuisances: subject length in tokens, "an" against "a", the prompt's log-likelihood under the model. The adjusted figure is the
intercept of the primary figure on their human - AI differences (OLS); its interval is the two-way clustered sandwich, had by giving
`clustered_mean` the pseudo-values b_0 + n·e_i·[(X'X)⁻¹x_i]_0, whose mean is b_0 and whose residuals are the influences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.models.forward import Final, log_sum_exp
from sae_bias.models.model import Model
from sae_bias.models.reads import Asked, Reader, Spot, read_together
from sae_bias.models.tree import common_prefix
from sae_bias.probe.reading import PlanReader, PromptIds, Reading, ReadingPlan
from sae_bias.probe.result import ProbeResult
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.clustered import Clustered, clustered_mean


# ── levels against neutral subjects
@dataclass(frozen=True, eq=False)
class Decomposition(Framed):
    """How much of the bias is an AI penalty and how much a human bonus."""

    frame: pd.DataFrame
    """A row a subject: kind (human | ai | neutral), score and the levels of both word lists, with intervals over templates."""
    bias: Clustered
    ai_penalty: Clustered
    """s(neutral) - s(AI)."""
    human_bonus: Clustered
    """s(human) - s(neutral)."""
    neutral: tuple[str, ...]

    def plot(self) -> Figure:
        """Score of every subject with its interval."""
        from sae_bias.figures.probe import levels

        return levels(self.frame)

    def __repr__(self) -> str:
        parts = " + ".join(
            f"{name} {c.mean:+.4f} [{c.ci_low:+.4f}, {c.ci_high:+.4f}]"
            for name, c in (("human bonus", self.human_bonus), ("AI penalty", self.ai_penalty))
        )
        return f"Decomposition: bias {self.bias.mean:+.4f} = {parts} (neutral: {', '.join(self.neutral)})"


def ask_decomposition(model: Model, pairs: PromptPairs, result: ProbeResult) -> Asked[Decomposition]:
    """Scores and levels of human, AI and neutral subjects (a dog, a company, a calculator, a child, a nonce noun).

    Each pair is compared with the mean of the neutral subjects in its own template, so the two parts add up to the bias.

    Args:
        result: of these pairs, run with `levels=True`.

    Raises:
        RequestError: the pairs have no neutral subjects, or a template lacks them.
    """
    if not pairs.neutral_prompts:
        raise RequestError(
            "these pairs have no neutral subjects; add `neutral:` to the file, such as a dog and a company."
        )
    human = {p.template: model.encode(p.human) for p in reversed(pairs)}
    prompts = []
    for n in pairs.neutral_prompts:
        ids = model.encode(n.text)
        prompts.append(PromptIds(n.text, tuple(ids), common_prefix(ids, human.get(n.template, ids))))
    words = [w.tokens for w in result.vocabulary.kept]
    plan = ReadingPlan(model, prompts, words, normalise=True, softcap=result.probe.softcap)
    reader = PlanReader(plan)
    return Asked((reader,), lambda: _decomposition(pairs, result, reader.reading()))


def _decomposition(pairs: PromptPairs, result: ProbeResult, reading: Reading) -> Decomposition:
    templates, entities = result.clusters
    subjects = _subject_scores(pairs, result, reading)
    neutral = subjects[subjects["kind"] == "neutral"]
    lacking = sorted(set(templates) - set(neutral["template"]))
    if lacking:
        raise RequestError(f"template {lacking[0]!r} has no neutral prompt.")
    middle = neutral.groupby("template")["score"].mean().loc[templates].to_numpy()
    rows = []
    for (kind, subject), part in subjects.groupby(["kind", "subject"], sort=False):
        row = {"subject": subject, "kind": kind}
        for column in ("score", "positive", "negative"):
            over = part.groupby("template")[column].mean()
            names = ("ci_low", "ci_high") if column == "score" else (f"{column}_low", f"{column}_high")
            row |= clustered_mean(over.to_numpy(), over.index.tolist()).columns(column, *names)
        rows.append(row)
    return Decomposition(
        pd.DataFrame(rows),
        result.stat,
        clustered_mean(middle - result.score_ai, templates, entities),
        clustered_mean(result.score_human - middle, templates, entities),
        tuple(pairs.neutral),
    )


def _subject_scores(pairs: PromptPairs, result: ProbeResult, reading: Reading) -> pd.DataFrame:
    """Score and levels of each pair's human and AI prompt, then of each neutral one, which is read as the pairs are."""
    assert reading.log_normaliser is not None
    logp = reading.values - reading.log_normaliser[:, None] if result.single_tokens else reading.values
    neutral = pairs.neutral_prompts
    templates = [*result.clusters[0], *result.clusters[0], *(n.template for n in neutral)]
    sides = [("human", result.sides[0])] * result.n_pairs + [("ai", result.sides[1])] * result.n_pairs
    kinds, subjects = zip(*sides, *(("neutral", n.subject) for n in neutral))
    own = result.probe.score_values(reading.values, result.positive)
    levels = np.concatenate([*result.log_probs(), logp])
    return pd.DataFrame(
        {
            "kind": kinds,
            "subject": subjects,
            "template": templates,
            "score": np.concatenate([result.score_human, result.score_ai, own]),
            "positive": levels[:, result.positive].mean(1),
            "negative": levels[:, ~result.positive].mean(1),
        }
    )


# ── nuisances
NUISANCES = ("subject_tokens", "an", "log_likelihood")


@dataclass(frozen=True, eq=False)
class Nuisances(Framed):
    """What else differs between the two prompts of a pair, and the bias with it held equal."""

    frame_field: ClassVar[str] = "table"
    frame: pd.DataFrame
    """A row a pair that counts: each nuisance of both prompts (`_human`, `_ai`), their difference (`_diff`), bias and primary figure."""
    table: pd.DataFrame
    """A row a nuisance: mean difference, correlation with the primary figure (`of`) over pairs, whether it was adjusted for."""
    of: str
    """What is adjusted: difference in differences | bias."""
    primary: Clustered
    adjusted: Clustered
    """The primary figure where every nuisance difference of the pairs (not of their twins) is 0; its `reason` where that cannot be had."""

    def __repr__(self) -> str:
        if self.adjusted.reason and np.isnan(self.adjusted.mean):
            return f"Nuisances: {self.of} {self.primary.mean:+.4f}; not adjusted: {self.adjusted.reason}"
        low, high = self.adjusted.ci
        return f"Nuisances: {self.of} {self.primary.mean:+.4f}, adjusted {self.adjusted.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def ask_nuisances(model: Model, result: ProbeResult) -> Asked[Nuisances]:
    """Subject length in tokens, a/an and prompt log-likelihood of every pair; their correlation with the primary figure; that figure adjusted for them."""
    ids = [(model.encode(p.human), model.encode(p.ai)) for p in result.pairs]
    reader = LikelihoodReader([side for both in ids for side in both])
    return Asked((reader,), lambda: _nuisances(result, ids, reader.values.reshape(-1, 2)))


def _nuisances(
    result: ProbeResult, ids: Sequence[tuple[list[int], list[int]]], logp: Float[np.ndarray, "n_pairs 2"]
) -> Nuisances:
    lengths = [_subject_lengths(human, ai) for human, ai in ids]
    articles = [_articles(p.human, p.ai) for p in result.pairs]
    primary, templates, entities = result.figure_by_pair()
    none = None if result.control is None else np.zeros(result.control.n_pairs)

    def counted(values: np.ndarray) -> np.ndarray:
        """Values of the pairs that the primary figure counts."""
        return result.primary_values((values, none))[0]

    frame = pd.DataFrame({"template": templates, "entity": entities, "bias": counted(result.pair_bias), "primary": primary})  # fmt: skip
    for name, values in zip(NUISANCES, (np.array(lengths, float), np.array(articles, float), logp)):
        frame[f"{name}_human"], frame[f"{name}_ai"] = map(counted, values.T)
        frame[f"{name}_diff"] = frame[f"{name}_human"] - frame[f"{name}_ai"]
    varying = [n for n in NUISANCES if frame[f"{n}_diff"].std(ddof=0) > 1e-12]
    rows = [
        {
            "nuisance": name,
            "human": frame[f"{name}_human"].mean(),
            "ai": frame[f"{name}_ai"].mean(),
            "difference": frame[f"{name}_diff"].mean(),
            "of": result.estimand,
            "correlation": _correlation(frame[f"{name}_diff"], frame["primary"]),
            "adjusted_for": name in varying or bool(frame[f"{name}_diff"].abs().max() == 0),
        }
        for name in NUISANCES
    ]
    adjusted = adjusted_mean(primary, frame[[f"{n}_diff" for n in varying]].to_numpy(), templates, entities)
    return Nuisances(frame, pd.DataFrame(rows), result.estimand, result.primary, adjusted)


def adjusted_mean(
    values: Float[np.ndarray, "n"],
    covariates: Float[np.ndarray, "n k"],
    templates: Sequence[str],
    entities: Sequence[str],
) -> Clustered:
    """Intercept of OLS of `values` on `covariates`, with its two-way clustered interval (module docstring)."""
    x = np.column_stack([np.ones(len(values)), covariates])
    if len(values) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        nan = float("nan")
        why = f"{len(values)} pairs cannot tell {x.shape[1] - 1} nuisances apart"
        sizes = len(values), len(set(templates)), len(set(entities))
        return Clustered(nan, nan, nan, nan, nan, nan, *sizes, reason=why)
    inverse = np.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ values
    influence = len(values) * (values - x @ beta) * (x @ inverse[0])
    return clustered_mean(beta[0] + influence, templates, entities)


class LikelihoodReader(Reader):
    """Σ log p of every token after the first of some sequences, as their positions come in."""

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self.sequences = sequences
        self.positions = [range(len(s) - 1) for s in sequences]
        self.ends, self.starts = [len(s) for s in sequences], [0] * len(sequences)
        self.partners = [None] * len(sequences)
        self.values = np.zeros(len(sequences))

    def take(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        for rows, z in final.blocks():
            norm = log_sum_exp(z)
            spots = [(row, i, self.sequences[i][p + 1]) for row, mine in enumerate(wanted[rows]) for i, p in mine]  # fmt: skip
            row, sequence, token = map(list, zip(*spots))
            np.add.at(self.values, sequence, (z[row, token] - norm[row]).cpu().double().numpy())


def log_likelihoods(
    model: Model, sequences: Sequence[Sequence[int]], *, progress: bool = False
) -> Float[np.ndarray, "n"]:
    """Σ log p of every token after the first, in nats; full logits of a few prompts at a time, never kept."""
    reader = LikelihoodReader(sequences)
    read_together(model, [reader], progress=progress, describe="likelihood of the prompts")
    return reader.values


def _subject_lengths(human: Sequence[int], ai: Sequence[int]) -> tuple[int, int]:
    """Tokens in which two prompts differ: what is left between their common start and end."""
    start = common_prefix(human, ai)
    end = min(common_prefix(human[::-1], ai[::-1]), min(len(human), len(ai)) - start)
    return len(human) - start - end, len(ai) - start - end


def _articles(human: str, ai: str) -> tuple[bool, bool]:
    """Whether each prompt's subject begins with "an" where the other's begins with another word."""
    first = [
        (a, b) for a, b in zip(re.findall(r"\w+", human.lower()), re.findall(r"\w+", ai.lower())) if a != b
    ][:1]
    return (first[0][0] == "an", first[0][1] == "an") if first else (False, False)


def _correlation(x: pd.Series, y: pd.Series) -> float:
    return (
        float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 1e-12 and y.std() > 1e-12 else float("nan")
    )
