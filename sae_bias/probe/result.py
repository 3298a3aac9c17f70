"""The bias probe: does the model evaluate the same words and deeds more harshly when an AI is their subject?

    s(x)  = mean over positive words of z_w - mean over negative words of z_w      (z: next-token logits at the last token)
    bias  = s(human) - s(AI)                                                        (positive: the AI is judged worse; nats)

Logits, log-probabilities and centered logits give the same s, because one constant a position cancels. `logodds` compares the
odds of the whole sets (log-sum-exp), `auroc` ranks them. The interval and p are two-way clustered over templates and entities
(docs/method.md#dependence-between-pairs): 280 pairs are 35 templates × 8 entities, not 280 samples.

A probe's result as one file: numbers as numpy arrays, everything else as JSON text inside it; no pickle.

NAME/values_human, NAME/values_ai, NAME/log_normaliser    float64, bit for bit
facts                                                      UTF-8 JSON: pairs, probe, vocabulary, model (NAME: result, control)
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pydantic import TypeAdapter

from sae_bias.core.errors import RequestError
from sae_bias.core.files import writing_whole
from sae_bias.core.result import Figure
from sae_bias.probe.estimates import Change, ControlDifference, Mass, word_mass
from sae_bias.probe.random_words import RandomWords
from sae_bias.probe.words import Probe, Vocabulary, WordTokens
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.stats.clustered import Clustered, EffectSizes, SignFlip, clustered_mean, effect_sizes, sign_flip
from sae_bias.stats.reduction import Reduction, fieller_reduction


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Word scores of every pair, and the bias they add up to."""

    pairs: PromptPairs
    probe: Probe
    vocabulary: Vocabulary
    values_human: Float[np.ndarray, "n_pairs n_words"]
    """Score of each kept word after the human prompt (logits, or log-probabilities where words are several tokens)."""
    values_ai: Float[np.ndarray, "n_pairs n_words"]
    model_name: str
    log_normaliser: Float[np.ndarray, "n_pairs 2"] | None = None
    """log Σ exp of the logits after the human and the AI prompt, where levels were asked for."""
    control: ProbeResult | None = None
    """The same pairs with mundane content, where asked for."""
    ranks: Int[np.ndarray, "n_pairs 2 n_words"] | None = None
    """Place of each kept word (its first token) among the whole vocabulary after both prompts, where levels were asked for."""
    random_words: RandomWords | None = field(default=None, repr=False)
    """Other words of the vocabulary, read in the same pass where asked for; not saved."""

    @cached_property
    def positive(self) -> np.ndarray:
        return np.array([w.positive for w in self.vocabulary.kept])

    @cached_property
    def score_human(self) -> Float[np.ndarray, "n_pairs"]:
        return self.probe.score_values(self.values_human, self.positive)

    @cached_property
    def score_ai(self) -> Float[np.ndarray, "n_pairs"]:
        return self.probe.score_values(self.values_ai, self.positive)

    @cached_property
    def pair_bias(self) -> Float[np.ndarray, "n_pairs"]:
        """s(human) - s(AI) of each pair."""
        return self.score_human - self.score_ai

    @cached_property
    def stat(self) -> Clustered:
        """Mean bias with its two-way clustered interval and p (docs/method.md#dependence-between-pairs)."""
        return clustered_mean(self.pair_bias, *self.clusters)

    @property
    def clusters(self) -> tuple[list[str], list[str]]:
        """Template and entity of each pair."""
        return [p.template for p in self.pairs], [p.entity for p in self.pairs]

    @property
    def bias(self) -> float:
        """Mean of s(human) - s(AI) in nats (for auroc: in probability); positive means the AI is judged worse."""
        return self.stat.mean

    @property
    def ci(self) -> tuple[float, float]:
        """95 % interval of the bias; NaN where the design has fewer than two templates or entities."""
        return self.stat.ci

    @property
    def p_value(self) -> float:
        return self.stat.p_value

    @property
    def n_pairs(self) -> int:
        return len(self.pairs)

    # --- the primary figure: beyond mundane content, where the pairs have mundane twins ---

    @property
    def estimand(self) -> str:
        """What the primary figure is: difference in differences | bias."""
        return "bias" if self.control is None else "difference in differences"

    @property
    def primary(self) -> Clustered:
        """The difference in differences where the pairs have mundane twins, else the bias."""
        return self.stat if self.control is None else self.did.stat

    @cached_property
    def did(self) -> ControlDifference:
        """bias(survival) - bias(mundane) over the pairs that have a mundane twin.

        Raises:
            RequestError: the pairs have no mundane twins, or the probe ran without them.
        """
        if self.control is None:
            raise RequestError(
                "there is no mundane control; run_probe(..., controls=True) on pairs that have one."
            )
        values, templates, entities = self.figure_by_pair()
        stat = clustered_mean(values, templates, entities)
        return ControlDifference(stat, values, tuple(templates), self.n_pairs - len(values))

    def figure_by_pair(self) -> tuple[Float[np.ndarray, "n"], list[str], list[str]]:
        """The primary figure of each pair, with its template and entity."""
        return self.primary_values((self.pair_bias, None if self.control is None else self.control.pair_bias))

    def primary_values(
        self,
        differences: tuple[Float[np.ndarray, "*draws n_pairs"], Float[np.ndarray, "*draws n_twins"] | None],
    ) -> tuple[Float[np.ndarray, "*draws n"], list[str], list[str]]:
        """From s(human) - s(AI) of the pairs and of their twins: the primary figure pair by pair, with template and entity.

        Pairs without a twin are left out where others have one.
        """
        own, twins = differences
        if self.control is None or twins is None:
            return own, *self.clusters
        both = [(i, at) for i, at in enumerate(self.pairs.twin_places(self.control.pairs)) if at is not None]
        keep, of = (list(side) for side in zip(*both))
        templates, entities = ([labels[i] for i in keep] for labels in self.clusters)
        return own[..., keep] - twins[..., of], templates, entities

    @property
    def mass(self) -> Mass:
        """How much of the next-token probability the evaluation words hold, and where they rank.

        Raises:
            RequestError: the normalizer was not kept; run_probe(..., levels=True) keeps it.
        """
        return word_mass(self.vocabulary.kept, np.concatenate(self.log_probs()), self.ranks)

    # --- beside the primary interval ---

    def effect_sizes(self) -> EffectSizes:
        """Mean, template-level d_z and the share of templates above 0 of the bias."""
        return effect_sizes(self.pair_bias, self.clusters[0])

    def sign_flips(self, *, primary: bool = False) -> dict[str, SignFlip]:
        """Sign-flip tests of the bias (or of the primary figure) over templates and over entities, each with its label.

        p is NaN with fewer than two clusters.
        """
        out = {}
        values, *labels = self.figure_by_pair() if primary else (self.pair_bias, *self.clusters)
        for over, clusters in zip(("templates", "entities"), labels):
            test = sign_flip(values, clusters, over=over)
            out[over] = test if test.n_clusters > 1 else replace(test, p_value=float("nan"))
        return out

    def difference_in_differences(self) -> ControlDifference:
        """`did`."""
        return self.did

    @property
    def single_tokens(self) -> bool:
        """Whether every word read is one token: then `values_*` are logits, otherwise log-probabilities."""
        return all(w.single for w in self.vocabulary.kept)

    def log_probs(self) -> tuple[Float[np.ndarray, "n_pairs n_words"], Float[np.ndarray, "n_pairs n_words"]]:
        """Log-probability of each word after the human and after the AI prompt.

        Raises:
            RequestError: the normalizer was not kept; run_probe(..., levels=True) keeps it.
        """
        if not self.single_tokens:
            return self.values_human, self.values_ai
        if self.log_normaliser is None:
            raise RequestError(
                "levels need the normalizer of the logits; run_probe(..., levels=True) keeps it."
            )
        return self.values_human - self.log_normaliser[:, :1], self.values_ai - self.log_normaliser[:, 1:]

    def levels(self) -> pd.DataFrame:
        """Mean log-probability of the positive words alone and of the negative alone, per subject, with its interval.

        One row a side and subject, and one for their difference (first - second). Unlike s, levels are not free of the
        normalizer, so they need `run_probe(..., levels=True)`.
        """
        human, ai = self.log_probs()
        rows = []
        for words, mark in (("positive", self.positive), ("negative", ~self.positive)):
            first, second = human[:, mark].mean(1), ai[:, mark].mean(1)
            label = f"{self.sides[0]} - {self.sides[1]}"
            for subject, values in ((self.sides[0], first), (self.sides[1], second), (label, first - second)):
                stat = clustered_mean(values, *self.clusters)
                rows.append({"words": words, "subject": subject, **stat.columns("level")})
        return pd.DataFrame(rows)

    # --- the same run, read otherwise ---

    @property
    def sides(self) -> tuple[str, str]:
        """What the two subjects are called: bias = s(first) - s(second)."""
        return self.pairs.sides

    def select_words(self, words: Sequence[str]) -> ProbeResult:
        """The result read with some of its words only; nothing is run again.

        Raises:
            RequestError: a word that was not read, or a side left without words.
        """
        wanted, kept = set(words), self.vocabulary.kept
        unknown = wanted - {w.word for w in kept}
        if unknown:
            raise RequestError(f"{sorted(unknown)[0]!r} was not read in this result.")
        keep = [i for i, w in enumerate(kept) if w.word in wanted]
        if len({kept[i].positive for i in keep}) < 2:
            raise RequestError("a selection of words must leave a positive and a negative one.")
        left_out = tuple(
            replace(w, reason="not selected") if not w.reason and w.word not in wanted else w
            for w in self.vocabulary.words
        )
        return replace(
            self,
            vocabulary=Vocabulary(left_out),
            values_human=self.values_human[:, keep],
            values_ai=self.values_ai[:, keep],
            ranks=None if self.ranks is None else self.ranks[..., keep],
            control=None if self.control is None else self.control.select_words(words),
        )

    def rescored(self, score: str) -> ProbeResult:
        """The same words under another score; nothing is run again.

        Raises:
            RequestError: mean_logit where a word is several tokens.
        """
        if score == "mean_logit" and not self.single_tokens:
            raise RequestError("mean_logit needs single-token words; select_words() the single ones first.")
        once = self.vocabulary.once.kept
        if score == "logodds" and len(once) < len(self.positive):
            return self.select_words([w.word for w in once]).rescored(score)
        control = None if self.control is None else self.control.rescored(score)
        return replace(self, probe=self.probe.with_options(score=score), control=control)

    def save(self, path: str | Path) -> Path:
        """Write everything to one .npz file (no pickle), whole or not at all; `ProbeResult.load` gives it back without loss."""
        path, facts, arrays = Path(path), dict[str, Any](format=FORMAT), dict[str, np.ndarray]()
        for name, part in (("result", self), ("control", self.control)):
            if part is not None:
                facts[name] = part._facts()
                arrays |= {f"{name}/{a}": v for a in _ARRAYS if (v := getattr(part, a)) is not None}
        text = json.dumps(facts, ensure_ascii=False).encode()
        with writing_whole(path) as partial, open(partial, "wb") as f:
            np.savez_compressed(f, allow_pickle=False, facts=np.frombuffer(text, dtype=np.uint8), **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """A result that `save` wrote.

        Raises:
            RequestError: no such file, damaged, or not one of ours.
        """
        path = Path(path)
        if not path.is_file():
            raise RequestError(f"there is no probe result {path}; give a file that ProbeResult.save wrote.")
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > _MOST_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes().decode())
                if facts["format"] != FORMAT:
                    raise KeyError(facts["format"])
                return _result(facts, arrays, "result")
        except _DAMAGE as error:
            raise RequestError(
                f"{path} is not a probe result of this version ({type(error).__name__}: {str(error)[:120]})."
            ) from error

    def _facts(self) -> dict[str, Any]:
        pairs = asdict(self.pairs)
        pairs["neutral"] = pairs.pop("neutral_prompts")
        words = [asdict(w) for w in self.vocabulary.words]
        return {"model": self.model_name, "pairs": pairs, "probe": asdict(self.probe), "vocabulary": words}

    def select(self, templates: Sequence[str]) -> ProbeResult:
        """The result on some templates only."""
        wanted = set(templates)
        keep = [i for i, p in enumerate(self.pairs) if p.template in wanted]
        if not keep:
            raise RequestError(f"none of the templates {sorted(wanted)[:3]} is in this result.")
        control = None if self.control is None else self.control._select_those(wanted)
        arrays: dict[str, Any] = {a: v[keep] for a in _ARRAYS if (v := getattr(self, a)) is not None}
        pairs = self.pairs.select(templates=templates)
        return replace(self, pairs=pairs, control=control, random_words=None, **arrays)

    def _select_those(self, wanted: set[str]) -> ProbeResult | None:
        """The wanted templates that are here; None where none is."""
        here = wanted & set(self.pairs.templates)
        return self.select(sorted(here)) if here else None

    def reduction_from(self, base: ProbeResult) -> Reduction:
        """B_0 - B_s and R = 1 - B_s/B_0 of the primary figure, with Fieller's interval; positive means less bias than in `base`.

        The primary figure is the difference in differences where both results have mundane twins, else the bias.
        """
        self._check_same(base)
        if self.control is None or base.control is None:
            return fieller_reduction(base.pair_bias, self.pair_bias, *self.clusters)
        return fieller_reduction(base.did.values, *self.figure_by_pair())

    def __sub__(self, base: ProbeResult) -> Change:
        """Change of the bias from `base` to this result."""
        self._check_same(base)
        change = self.pair_bias - base.pair_bias
        return Change(clustered_mean(change, *self.clusters), change)

    def _check_same(self, base: ProbeResult) -> None:
        if self.pairs.digest != base.pairs.digest:
            raise RequestError("the two results are of different pairs; compare results of the same prompts.")
        if self.vocabulary.kept != base.vocabulary.kept or self.probe != base.probe:
            raise RequestError("the two results read different words or scores; use one probe for both.")

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: prompts, template, entity, family, score of each subject, bias."""
        frame = self.pairs.to_frame()[["human", "ai", "template", "entity", "family"]].copy()
        frame = frame.assign(score_human=self.score_human, score_ai=self.score_ai, bias=self.pair_bias)
        if self.control is not None:
            places = self.pairs.twin_places(self.control.pairs)
            frame["control_bias"] = [np.nan if at is None else self.control.pair_bias[at] for at in places]
        return frame

    def words(self) -> pd.DataFrame:
        """One row a word: its mean score after human and AI prompts, and what it adds to the bias under mean_logit.

        Scores are log-probabilities, as of levels: a constant that a position adds to all of its logits moves single words, if not their
        sum. Logits where the normalizer was not kept.
        """
        known = self.log_normaliser is not None or not self.single_tokens
        human, ai = self.log_probs() if known else (self.values_human, self.values_ai)
        difference = (human - ai).mean(0)
        sign = np.where(self.positive, 1 / self.positive.sum(), -1 / (~self.positive).sum())
        return pd.DataFrame(
            {
                "word": [w.word for w in self.vocabulary.kept],
                "side": np.where(self.positive, "positive", "negative"),
                "n_tokens": [len(w.tokens) for w in self.vocabulary.kept],
                "human": human.mean(0),
                "ai": ai.mean(0),
                "diff": difference,
                "contribution": difference * sign,
            }
        )

    def plot(self) -> Figure:
        """Bias of each template with the overall interval."""
        from sae_bias.figures.probe import bias_by_template

        figure = bias_by_template(
            self.to_frame(), {"mean": self.bias, "ci_low": self.ci[0], "ci_high": self.ci[1]}
        )
        if self.sides != ("human", "AI"):
            first, second = (escape(side) for side in self.sides)
            figure.update_xaxes(title_text=f"bias = {first} − {second} (right of 0: {second} judged worse)")
        return figure

    def __repr__(self) -> str:
        label = "" if self.sides == ("human", "AI") else f" ({self.sides[0]} − {self.sides[1]})"
        size = (
            f"{self.n_pairs} pairs ({self.stat.n_templates} templates × {self.stat.n_entities} entities), "
            f"score={self.probe.score}"
        )
        figures = [f"bias{label} {_figure(self.stat)}"]
        if self.control is not None:
            figures = [f"difference in differences {_figure(self.did.stat)}", *figures]
        lines = [f"ProbeResult({self.model_name}): {figures[0]}, {size}", *(f"  {f}" for f in figures[1:])]
        if self.stat.reason:
            lines.append(f"  no interval: {self.stat.reason}")
        if self.vocabulary.excluded:
            lines.append(
                "  left out: " + ", ".join(f"{w.word} ({w.reason})" for w in self.vocabulary.excluded)
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>" + self.to_frame().head(8).to_html(
            escape=True, float_format="{:.3f}".format
        )


def _figure(stat: Clustered) -> str:
    return f"{stat.mean:+.4f} [{stat.ci_low:.4f}, {stat.ci_high:.4f}], p = {stat.p_value:.2g}"


FORMAT = "sae-bias probe result 1"
_MOST_BYTES = 1 << 30
_DAMAGE = (
    KeyError, ValueError, TypeError, OSError, EOFError, AttributeError, IndexError, RuntimeError, OverflowError, MemoryError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_ARRAYS = ("values_human", "values_ai", "log_normaliser", "ranks")


def _result(facts: dict[str, Any], arrays: Any, name: str) -> ProbeResult:
    own = facts[name]
    pairs = _pairs(own["pairs"])
    words = Vocabulary(tuple(WordTokens(**w | {"tokens": tuple(w["tokens"])}) for w in own["vocabulary"]))
    n, k = len(pairs), len(words.kept)
    arrays_of: dict[str, Any] = {
        a: _numbers(arrays, f"{name}/{a}", shape, np.int64 if a == "ranks" else np.float64)
        for a, shape in zip(_ARRAYS, ((n, k), (n, k), (n, 2), (n, 2, k)))
        if f"{name}/{a}" in arrays.files or a.startswith("values")
    }
    control = _result(facts, arrays, "control") if name == "result" and "control" in facts else None
    return ProbeResult(
        pairs, _probe(own["probe"]), words, model_name=own["model"], control=control, **arrays_of
    )


def _numbers(arrays: Any, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """One array of the file, of the shape its pairs and words ask for, finite."""
    values = arrays[name]
    if values.dtype != dtype or values.shape != shape:
        raise ValueError(
            f"{name} is {values.dtype} {list(values.shape)}; expected {np.dtype(dtype)} {list(shape)}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return values


def _pairs(own: dict[str, Any]) -> PromptPairs:
    return TypeAdapter(PromptPairs).validate_python({"neutral_prompts": own.pop("neutral"), **own})


def _probe(own: dict[str, Any]) -> Probe:
    bundled = own.pop("bundled")
    probe = Probe(**own)
    object.__setattr__(probe, "bundled", bundled)
    return probe
