"""What an edit leaves of a model's capability: perplexity on plain text, and a small multiple-choice set.

    perplexity ratio = exp(mean over texts of NLL_edited - NLL, nats a token)
    an answer is right where log p(right | question) is the largest of the four

A strength is *usable* where both stay within the margin m with 95 % confidence: the upper bound of the NLL's change is at most log(1 + m), and
the lower bound of the accuracy's change at least -m. It is not where an estimate itself is beyond the margin, and undetermined between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.measures.continuations import Ask, Continuations, Phrasing
from sae_bias.models.model import Model
from sae_bias.probe.checks_subjects import log_likelihoods
from sae_bias.prompts.files import bundled_yaml
from sae_bias.prompts.texts import load_texts
from sae_bias.stats.rates import mean_of, paired_change
from sae_bias.steering.hooks import intervene
from sae_bias.steering.intervention import Intervention, rules_of


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; the answers are never listed, so their order does not matter."""

    text: str
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Capability:
    """One row a strength: nll (nats a token), perplexity_ratio, accuracy, their changes with intervals, usable (yes, no, undetermined)."""

    frame: pd.DataFrame
    margin: float
    no_edit: float = 0.0
    """The strength that is no edit."""


def load_questions() -> tuple[Question, ...]:
    """The bundled forty."""
    found = bundled_yaml("capability.yaml")["questions"]
    return tuple(Question(q["ask"], q["right"], tuple(q["wrong"])) for q in found)


def measure_capability(
    model: Model,
    cells: Sequence[Sequence[Intervention]],
    *,
    texts: Sequence[str] | None = None,
    questions: Sequence[Question] | None = None,
    margin: float = 0.1,
    chat: bool = False,
    system: str | None = None,
) -> Capability:
    """Perplexity and accuracy without edits and under each of `cells`.

    Args:
        texts: those of the perplexity (plain, whatever `chat`); the bundled neutral ones by default.
        questions: the multiple-choice set; the bundled one by default. Those that the tokenizer cannot read are left out.
        chat, system: how the questions reach the model.

    Raises:
        RequestError: a margin that is not positive, a text the model's tokenizer cannot read.
    """
    if not margin > 0:
        raise RequestError(f"margin={margin!r}: expected a positive share, such as 0.1.")
    texts = load_texts("neutral") if texts is None else list(texts)
    questions = load_questions() if questions is None else questions
    asks = _asks(Phrasing(model, chat=chat, system=system), questions)
    rows = []
    base: tuple[pd.Series, pd.Series] | None = None
    for edits, strength in zip(((), *cells), (math.nan, *strengths_of(cells))):
        with intervene(model, *edits):
            nll, right = pd.Series(text_nll(model, texts)), pd.Series(_right(model, asks))
        base = base or (nll, right)
        rows.append(_row(edits, strength, nll, right, base, margin))
    no_edit = next((e.parts[0].does_nothing for cell in cells for e in cell), 0.0)
    return Capability(pd.DataFrame(rows), margin, no_edit)


def text_nll(model: Model, texts: Sequence[str]) -> Float[np.ndarray, "n_texts"]:
    """Mean NLL of each text's tokens after its first, nats a token, under whatever is open on `model`."""
    ids = [model.encode(t) for t in texts]
    total = -log_likelihoods(model, ids)
    return np.array([value / (len(s) - 1) if len(s) > 1 else np.nan for value, s in zip(total, ids)])


def usable_range(frame: pd.DataFrame, no_edit: float = 0.0) -> tuple[float, float] | None:
    """The lowest and highest of the usable strengths that follow each other from no edit (0; 1 for scale, without end for cap) on either side."""
    rows = frame[frame["strength"].notna() & (frame["kind"] != "base")].sort_values("strength")
    below, above = rows[rows["strength"] <= no_edit], rows[rows["strength"] >= no_edit]
    reached: list[float] = []
    for outwards in (below.iloc[::-1], above):
        lost = (outwards["usable"] != "yes").to_numpy()
        reached += outwards["strength"].iloc[: lost.argmax() if lost.any() else None].tolist()
    return (min(reached), max(reached)) if reached else None


def strengths_of(cells: Sequence[Sequence[Intervention]]) -> list[float]:
    """The strength of each cell, NaN for one without; beside others that have one, a projection taken out whole has its share, 1."""
    found = [c[0].strength if len(c) == 1 else math.nan for c in cells]
    if all(map(math.isnan, found)):
        return found
    return [getattr(c[0].parts[0], "share", v) if len(c) == 1 else v for c, v in zip(cells, found)]


def _asks(phrasing: Phrasing, questions: Sequence[Question]) -> list[Ask]:
    """The questions that the model's tokenizer can read; a toy model reads none of the bundled ones."""
    asks = []
    for i, q in enumerate(questions):
        with suppress(RequestError):
            asked = phrasing.ask(f"Question: {q.text}\n", "Answer:", (q.right, *q.wrong))
            asks.append(Ask((i, "free", ()), *asked))
    return asks


def _right(model: Model, asks: Sequence[Ask]) -> np.ndarray:
    read = Continuations(asks).read(model) if asks else []
    return np.array([float(values.argmax() == 0 and (values == values[0]).sum() == 1) for values in read])


def _row(
    edits: Sequence[Intervention], strength: float, nll: pd.Series, right: pd.Series, base: tuple[pd.Series, pd.Series], margin: float
) -> dict[str, object]:  # fmt: skip
    more, accuracy = paired_change(base[0], nll, False), mean_of(right, True)
    change = paired_change(base[1], right, True)
    within = more.high <= math.log1p(margin) and change.low >= -margin
    beyond = more.value > math.log1p(margin) or change.value < -margin
    return {
        "kind": "candidate" if edits else "base",
        "strength": strength,
        "edit": rules_of(edits),
        "nll": float(nll.mean()),
        "perplexity_ratio": math.exp(min(more.value, 700.0)),
        "ratio_low": math.exp(min(more.low, 700.0)),
        "ratio_high": math.exp(min(more.high, 700.0)),
        **accuracy.columns("accuracy", "accuracy_low", "accuracy_high"),
        **change.columns("accuracy_change", "change_low", "change_high"),
        "n_texts": int(nll.notna().sum()),
        "n_questions": len(right),
        "usable": ("yes" if within else "no" if beyond else "undetermined") if edits else "yes",
    }
