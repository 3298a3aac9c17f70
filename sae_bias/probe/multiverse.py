"""The figure under every defensible choice: stems × scores × halves of the word lists × subjects left out.

A specification curve (Simonsohn, Simmons & Nelson 2020, "Specification curve analysis"): the primary figure of each specification with
its interval, beside the 95 % that random words give under the same one. Nothing is run again but the stems.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.probe.random_words import random_differences
from sae_bias.probe.result import ProbeResult
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.components import variance_components

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCORES = ("mean_logit", "logodds")  # both in nats


@dataclass(frozen=True, eq=False)
class Multiverse:
    """Every specification, and what they say together."""

    frame: pd.DataFrame = field(repr=False)
    """stem, score, words, left_out, n_pairs, estimate, ci_low, ci_high, p_value, null_low, null_high, null_p."""
    of: str
    """What is estimated: difference in differences | bias."""
    headline: float
    """The figure that the headline gives."""

    @property
    def median(self) -> float:
        return float(self.frame["estimate"].median())

    @property
    def same_sign(self) -> float:
        """Share of specifications with the headline's sign."""
        return float((np.sign(self.frame["estimate"]) == np.sign(self.headline)).mean())

    @property
    def outside_null(self) -> float:
        """Share of specifications beyond what 95 % of random word lists give; NaN where no random words were read."""
        known = self.frame.dropna(subset=["null_low"])
        if known.empty:
            return float("nan")
        outside = (known["estimate"] < known["null_low"]) | (known["estimate"] > known["null_high"])
        return float(outside.mean())

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def plot(self) -> go.Figure:
        """The specification curve."""
        from sae_bias.figures.probe import specification_curve

        return specification_curve(self.frame, self.of)

    def __str__(self) -> str:
        null = self.outside_null
        beyond = "" if null != null else f"; {100 * null:.0f}% beyond 95% of random word lists"
        return (
            f"{len(self.frame)} specifications: median {self.median:+.3f}, {100 * self.same_sign:.0f}% with the headline's"
            f" sign{beyond}"
        )


def multiverse(results: Mapping[str, ProbeResult], *, n_random: int = 200, seed: int = 0) -> Multiverse:
    """The specifications of `results`, one result a stem; the first is the headline's."""
    first = next(iter(results.values()))
    rows: list[dict[str, Any]] = []
    for stem, result in results.items():
        for score in SCORES if result.single_tokens else ("logodds",):
            scored = result.rescored(score)
            for words, part in _halves(scored):
                rows += [
                    {"stem": stem, "score": score, "words": words, **row}
                    for row in _left_out(part, n_random, seed)
                ]
    return Multiverse(pd.DataFrame(rows), first.estimand, first.primary.mean)


def _halves(result: ProbeResult) -> Iterator[tuple[str, ProbeResult]]:
    """All words; the words in odd places of each list, in even places, the first halves, the second halves."""
    yield "all words", result
    sides = [[w.word for w in result.vocabulary.kept if w.positive is side] for side in (True, False)]
    if min(map(len, sides)) < 2:
        return
    cut = [len(side) // 2 for side in sides]
    for name, part in (
        ("odd places", [side[::2] for side in sides]),
        ("even places", [side[1::2] for side in sides]),
        ("first halves", [side[:n] for side, n in zip(sides, cut)]),
        ("second halves", [side[n:] for side, n in zip(sides, cut)]),
    ):
        yield name, result.select_words([w for side in part for w in side])


def _left_out(result: ProbeResult, n_random: int, seed: int) -> Iterator[dict[str, Any]]:
    """The figure with every subject pair, and without each in turn."""
    values, templates, entities = result.figure_by_pair()
    null = None
    if result.random_words is not None and len(result.random_words.words) >= 2 * len(result.vocabulary.kept):
        null, *_ = result.primary_values(random_differences(result, n_random, seed))
    labels = np.array(entities)
    for name in ("none", *(dict.fromkeys(entities) if len(set(entities)) > 2 else ())):
        keep = labels != name if name != "none" else np.ones(len(labels), dtype=bool)
        at = np.flatnonzero(keep)
        stat = clustered_mean(values[at], [templates[i] for i in at], [entities[i] for i in at])
        row = {"left_out": name, "n_pairs": len(at), **stat.columns("estimate", p="p_value")}
        yield row | _beside_null(stat.mean, None if null is None else null[:, at].mean(1))


def _beside_null(estimate: float, draws: np.ndarray | None) -> dict[str, float]:
    if draws is None:
        return dict.fromkeys(("null_low", "null_high", "null_p"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    p = (1 + int((np.abs(draws) >= abs(estimate)).sum())) / (1 + len(draws))
    return {"null_low": float(low), "null_high": float(high), "null_p": p}


def stem_table(results: Mapping[str, ProbeResult]) -> pd.DataFrame:
    """The bias, and the primary figure, under each stem."""
    rows = []
    for stem, result in results.items():
        rows.append(
            {
                "stem": stem,
                **result.stat.columns("bias", p="p_value"),
                "of": result.estimand,
                **result.primary.columns("primary", "primary_low", "primary_high", "primary_p"),
                "n_words": len(result.vocabulary.kept),
                "left_out": ", ".join(w.word for w in result.vocabulary.excluded),
            }
        )
    return pd.DataFrame(rows)


def stem_sentence(stems: pd.DataFrame) -> str:
    """That the sign hangs on the stem, where it does for the primary figure or for the bias; else nothing."""
    said = []
    for column, name in (("primary", str(stems["of"].iloc[0])), ("bias", "bias")):
        if (column == "bias" and name == stems["of"].iloc[0]) or stems[column].min() * stems[
            column
        ].max() >= 0:
            continue
        each = ", ".join(f"{v:+.2f} after {s!r}" for s, v in zip(stems["stem"], stems[column]))
        said.append(f"the sign of the {name} hangs on the stem: {each}")
    return "; ".join(said)


def sources_of_variance(results: Mapping[str, ProbeResult]) -> pd.DataFrame:
    """How much of the spread lies between templates, entities, stems and words (crossed random effects; mean_logit).

    Of every template, entity, stem and word its part of the primary figure: ± (human - AI), scaled so that their mean is the figure.

    Raises:
        RequestError: the pairs are not every template with every entity once, or words are several tokens.
    """
    parts = []
    words = set.intersection(*({w.word for w in r.vocabulary.kept} for r in results.values()))
    for result in results.values():
        result = result.select_words([w.word for w in result.vocabulary.kept if w.word in words])
        if not result.single_tokens:
            raise RequestError("the table of variance needs single-token words.")
        positive = result.positive
        weight = np.where(positive, len(positive) / positive.sum(), -len(positive) / (~positive).sum())
        own = (result.values_human - result.values_ai) * weight
        control = result.control
        twins = None if control is None else ((control.values_human - control.values_ai) * weight).T
        values, templates, entities = result.primary_values((own.T, twins))
        parts.append(_cube(values, templates, entities))
    return variance_components(np.stack(parts), ["stems", "words", "templates", "entities"])


def _cube(values: np.ndarray, templates: list[str], entities: list[str]) -> np.ndarray:
    """[n_words, n_templates, n_entities] of a crossed design.

    Raises:
        RequestError: a cell is empty or filled twice.
    """
    t, e = ({name: i for i, name in enumerate(dict.fromkeys(labels))} for labels in (templates, entities))
    cells = [(t[a], e[b]) for a, b in zip(templates, entities)]
    if len(cells) != len(t) * len(e) or len(set(cells)) != len(cells):
        raise RequestError(
            f"{len(cells)} pairs of {len(t)} templates and {len(e)} entities are not crossed: no table of variance."
        )
    cube = np.empty((len(values), len(t), len(e)))
    for column, (i, j) in enumerate(cells):
        cube[:, i, j] = values[:, column]
    return cube
