"""Which features fire on one list of texts and not on the other (`Contrast`), for every feature of one or many SAEs.

A text gives one number a feature: its activation at the last token, or the mean or maximum over its ordinary tokens, or whether it
fires on any. Of these: AUROC (positive above negative), mean difference, and a test whose unit is the group, or the text where no
groups are given:

    paired      t of the groups' mean differences; sign-flips of whole groups
    unpaired    t = d / (s √(1/n₁ + 1/n₀)) with the pooled s; labels permuted over whole groups

Corrected p: Westfall–Young max-T over one shared set of flips or permutations (all, where there are few) [Westfall & Young 1993]; q by Benjamini–Hochberg. The
family is every feature that fires on at least `min_texts` texts: a label-blind prefilter. Selecting and testing on the same texts
inflates AUROC, so each feature's AUROC on a seeded 60 % of the units stands beside that on the held-out 40 %, and the note gives the
held-out AUROC of the feature that the 60 % alone would have chosen, beside that of a bag of words.

How texts become numbers: `text_reading`.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.discovery.contrasts import ALPHA, Scan, feature_names
from sae_bias.discovery.text_reading import ENTRY, REDUCE, WIDE, Buckets, Live, check_lengths, read_texts
from sae_bias.models.model import Model
from sae_bias.prompts.contrast import Contrast, SameTexts
from sae_bias.saes.sae import Sae
from sae_bias.stats.features import FLOOR_SHARE, auroc, benjamini_hochberg, sign_matrix, sparse_auroc

N_DRAWS = 2_000
HELD_OUT = 0.4
DRAW_BYTES = 40_000_000
"""Of the matrix of draws, a byte a unit: fewer draws where there are very many units."""
BLOCK_BYTES = 32 * 2**20
FLOAT32_UNITS = 64
"""From so many units on draws are random ones and the null's differences are float32 products."""
Array = np.ndarray


def scan_contrast(
    model: Model,
    saes: Sequence[Sae],
    contrast: Contrast,
    *,
    reduce: str = "last",
    chat: bool = False,
    min_texts: int = 2,
    all_of: Sequence[str] = (),
    none_of: Sequence[str] = (),
    baseline: Model | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Scan:
    """Statistics of every feature on the contrast's texts.

    Args:
        reduce: "last", "mean", "max" (over ordinary tokens) or "any" (1 where the feature fires on some ordinary token).
        chat: texts as user turns of the model's chat template.
        min_texts: features that fire on fewer texts, whichever side, are left out of the family and of the table's tests.
        all_of, none_of: keep features that fire on every text of these sets and on none of those; a set is "positive", "negative"
            or the name of a group.
        baseline: the model that reads the negative texts, where it is another one (a base model against its instruct model).

    Raises:
        RequestError: an unknown `reduce` or set, texts beyond the model's context (all are named), fewer than two units a side.
    """
    if reduce not in REDUCE:
        raise RequestError(f"reduce={reduce!r}; expected one of {', '.join(REDUCE)}.")
    sets = [_members(contrast, names) for names in (all_of, none_of)]
    design = _Design.of(contrast, seed)
    check_lengths((model, baseline or model), contrast, chat)
    frames = [_statistics(Live.of(np.empty(0, ENTRY), 0), design, contrast, min_texts, sets)]
    with tempfile.TemporaryDirectory(prefix="sae-bias-") as folder:
        entry = WIDE if model.dtype == torch.float64 else ENTRY
        buckets = Buckets(Path(folder), sum(s.d_sae for s in saes), len(contrast), entry)
        lengths, in_bytes = read_texts(
            (model, baseline or model), saes, contrast, reduce, chat, buckets, progress
        )
        for start in tqdm(buckets.starts(), desc="contrast", unit="block", disable=not progress, leave=False):
            frames.append(_statistics(buckets.read(start), design, contrast, min_texts, sets))
    statistics = pd.concat([f for f in frames if len(f)] or frames, ignore_index=True)
    frame = pd.concat([feature_names(sae) for sae in saes], ignore_index=True)
    frame = frame.join(statistics.set_index("place")).pipe(_silent, len(contrast))
    design.correct(frame)
    said = ""
    if all_of or none_of:
        frame = frame[frame["in_sets"]].reset_index(drop=True)
        said = f"features that fire on all of {_said(all_of)} and on none of {_said(none_of)}: {len(frame)}"
    frame = frame.drop(columns="in_sets")
    notes = said, _note(frame, contrast, design, lengths), design.undetermined, _bytes_note(contrast, in_bytes)  # fmt: skip
    note = "; ".join(filter(None, notes))
    return Scan(frame, design.n_units, note, units=design.units, family=design.family)


def first_chosen(frame: pd.DataFrame) -> pd.DataFrame:
    """The features of a contrast's table that fire, in the order in which the units that discover choose them; nothing held out is looked at."""
    by = ["auroc_discover", "mean_diff_discover"]
    return frame[~frame["dead"]].sort_values(by, ascending=False, kind="stable")


# --- statistics ----------------------------------------------------------------------------------------
@dataclass(eq=False)
class _Design:
    """The units, their sides, and the shared draws under the null."""

    unit_of: Int[Array, "n_texts"]
    side: Bool[Array, "n_texts"]
    paired: bool
    held: Bool[Array, "n_texts"]
    draws: Int[Array, "draws n_units"]
    """Signs of the units under the null, the observed ones (unpaired: sides) first."""
    maxima: Float[Array, "draws"]
    units: str
    """What they are called."""
    family: int = 0

    @classmethod
    def of(cls, contrast: Contrast, seed: int) -> _Design:
        names = list(dict.fromkeys(contrast.units))
        place = {name: i for i, name in enumerate(names)}
        unit_of = np.array([place[u] for u in contrast.units])
        side = np.arange(len(contrast)) < len(contrast.positive)
        rng = np.random.default_rng(seed)
        n_draws = int(np.clip(DRAW_BYTES / len(names), 200, N_DRAWS))
        label = np.zeros(len(names), dtype=bool)
        label[unit_of[side]] = True
        if contrast.paired:
            n_sides = (len(names), len(names))
            signs = (
                np.ones((1, len(names)))
                if len(names) < 2
                else sign_matrix(len(names), n_flips=n_draws, seed=seed, dtype=np.int8)
            )
        else:
            n_sides = (int(label.sum()), int((~label).sum()))
            observed = np.where(label, 1, -1).astype(np.int8)
            signs = _assignments(observed, n_draws, rng)
        if min(n_sides) < 2:
            raise RequestError(
                f"{contrast.name!r} has {n_sides[0]} positive and {n_sides[1]} negative units; a test needs at least 2 on each side."
            )
        held = np.zeros(len(names), dtype=bool)
        kinds = (
            [np.arange(len(names))] if contrast.paired else [np.flatnonzero(label), np.flatnonzero(~label)]
        )
        for kind in kinds:
            held[rng.permutation(kind)[: max(1, round(HELD_OUT * len(kind)))]] = True
        units = "paired groups" if contrast.paired else "texts" if contrast.groups is None else "groups"
        return cls(
            unit_of, side, contrast.paired, held[unit_of], signs.astype(np.int8, copy=False), np.full(len(signs), -np.inf), units
        )  # fmt: skip

    @property
    def n_units(self) -> int:
        return int(self.unit_of.max()) + 1

    def test(self, live: Live) -> tuple[Array, Array]:
        """(t, raw p) of each feature; raises the maxima under the null."""
        t, n_texts = np.empty(len(live.features)), len(self.unit_of)
        floor = FLOOR_SHARE**2 * live.sums(live.value**2) / n_texts
        for where, part in live.parts(max(1, BLOCK_BYTES // (8 * self.n_units))):
            t[where] = self._test(self._unit_values(part), floor[where])
        self.family += len(t)
        df = self.n_units - (1 if self.paired else 2)
        return t, np.minimum(1.0, 2 * stdtr(df, -np.abs(t)))

    def _test(self, values: Float[Array, "n_units m"], floor: Float[Array, "m"]) -> Float[Array, "m"]:
        observed = self._differences(self._observed(), values)
        mean, square = values.mean(0), (values**2).mean(0)
        spread = square if self.paired else square - mean**2
        if self.n_units >= FLOAT32_UNITS:
            # no draw repeats the observed sides here, so no tie hangs on rounding; the mean does not change a difference of sides
            values = (values if self.paired else values - mean).astype(np.float32)
        step = max(1, min(256, DRAW_BYTES // (4 * self.n_units)))
        for start in range(0, len(self.draws), step):
            rows = slice(start, start + step)
            null = np.abs(self._t(self._differences(self.draws[rows], values), spread, floor))
            self.maxima[rows] = np.maximum(self.maxima[rows], null.max(1, initial=0.0))
        t = self._t(observed, spread, floor)[0]
        self.maxima[0] = max(self.maxima[0], np.abs(t).max(initial=0.0))
        return t

    def _observed(self) -> Int[Array, "1 n_units"]:
        return np.ones((1, self.n_units)) if self.paired else self.draws[:1]

    def _differences(
        self, signs: Int[Array, "draws n_units"], values: Float[Array, "n_units m"]
    ) -> Float[Array, "draws m"]:
        """Mean of the flipped values; unpaired, mean of the units of sign + less that of the others (float32 values sum to 0)."""
        n = self.n_units
        if self.paired:
            return (signs.astype(values.dtype) @ values).astype(np.float64) / n
        n1 = int((signs[0] > 0).sum())
        if values.dtype == np.float32:
            return (signs.astype(np.float32) @ values).astype(np.float64) * (1 / n1 + 1 / (n - n1)) / 2
        return np.where(signs > 0, 1 / n1, -1 / (n - n1)) @ values

    def _unit_values(self, live: Live) -> Float[Array, "n_units m"]:
        """Mean of each unit's texts; paired, of its positive ones less that of its negative ones."""
        sign = np.where(self.side, 1, -1) if self.paired else np.ones(len(self.side))
        alike = self.unit_of * 2 + (self.side if self.paired else 0)
        weight = (sign / np.bincount(alike)[alike])[live.text]
        shape = (self.n_units, len(live.features))
        place = self.unit_of[live.text] * shape[1] + live.column
        return np.bincount(place, live.value * weight, shape[0] * shape[1]).reshape(shape)

    def _t(self, difference: Float[Array, "draws m"], spread: Array, floor: Array) -> Float[Array, "draws m"]:
        """t of mean differences. The total sum of squares does not change under a draw, so the difference alone decides.

        spread: mean square (paired) or variance of the units' values.
        """
        n = self.n_units
        if self.paired:
            variance = np.maximum((spread - difference**2) / (n - 1), floor / n)
        else:
            n1 = int((self.draws[0] > 0).sum())
            n0 = n - n1
            within = (spread * n - difference**2 * n1 * n0 / n) / (n - 2)
            variance = np.maximum(within, floor) * (1 / n1 + 1 / n0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(difference == 0, 0.0, difference / np.sqrt(np.maximum(variance, 0)))

    def correct(self, frame: pd.DataFrame) -> None:
        """p_fwer and q_bh over the family; features outside it have neither."""
        tested = frame["t"].notna().to_numpy()
        ordered = np.sort(self.maxima)
        t = np.abs(frame.loc[tested, "t"].to_numpy())
        reached = len(ordered) - np.searchsorted(ordered, t - 1e-9 * t)
        frame.loc[tested, "p_fwer"] = np.maximum(reached, 1) / len(ordered)
        frame.loc[tested, "q_bh"] = benjamini_hochberg(frame.loc[tested, "p_value"].to_numpy())
        frame["separates"] = np.where(frame["p_fwer"] <= ALPHA, "yes", "no")
        if self.undetermined:
            frame["separates"] = "undetermined"

    @property
    def undetermined(self) -> str:
        """Why no call can be made: so few units that no p reaches ALPHA, whatever the activations; empty where one can."""
        n1 = int((self.draws[0] > 0).sum())
        n0 = self.n_units - n1
        if self.n_units >= FLOAT32_UNITS:
            return ""
        smallest = 2 / 2**self.n_units if self.paired else (1 + (n1 == n0)) / math.comb(self.n_units, n1)
        few = f"{self.n_units} {self.units}" if self.paired else f"{n1} and {n0} {self.units}"
        return f"separates: undetermined, {few} give no p below {smallest:.2g}" if smallest > ALPHA else ""


def _assignments(observed: Int[Array, "n_units"], n: int, rng: np.random.Generator) -> Int[Array, "draws n_units"]:  # fmt: skip
    """The sides as observed, and every other assignment of them where there are at most n in all, else n random ones."""
    size, first = len(observed), np.flatnonzero(observed > 0)
    if size >= FLOAT32_UNITS or math.comb(size, len(first)) > n:
        drawn = np.repeat(observed[None], n + 1, axis=0)
        for row in drawn[1:]:
            row[:] = rng.permutation(observed)
        return drawn
    every = np.array(list(combinations(range(size), len(first))))
    others = every[(every != first).any(1)]
    signs = np.full((1 + len(others), size), -1, dtype=np.int8)
    signs[0, first] = 1
    np.put_along_axis(signs[1:], others, 1, axis=1)
    return signs


def _statistics(
    live: Live, design: _Design, contrast: Contrast, min_texts: int, sets: Sequence[Array]
) -> pd.DataFrame:
    side, held, n = design.side, design.held, len(live.features)
    on, fires = side[live.text], live.value > 0
    tested = live.sums(fires) >= min_texts
    t, p = np.full(n, np.nan), np.full(n, np.nan)
    if tested.any():
        t[tested], p[tested] = design.test(live.some(tested))
    n_pos, n_neg = len(contrast.positive), len(contrast.negative)
    means = [live.sums(live.value * on) / n_pos, live.sums(live.value * ~on) / n_neg]
    in_sets = [live.sums(fires & np.isin(live.text, members)) for members in sets]
    chosen = ~design.held[live.text]
    shares = [chosen & on, side & ~design.held], [chosen & ~on, ~side & ~design.held]
    discover = [live.sums(live.value * entries) / texts.sum() for entries, texts in shares]
    return pd.DataFrame(
        {
            "place": live.features,
            "auroc": _auroc(live, side, np.ones_like(side)),
            "auroc_discover": _auroc(live, side, ~held),
            "auroc_held_out": _auroc(live, side, held),
            "mean_positive": means[0],
            "mean_negative": means[1],
            "mean_diff": means[0] - means[1],
            "mean_diff_discover": discover[0] - discover[1],
            "fire_positive": live.sums(fires & on) / n_pos,
            "fire_negative": live.sums(fires & ~on) / n_neg,
            "t": t,
            "p_value": p,
            "p_fwer": np.nan,
            "q_bh": np.nan,
            "in_sets": (in_sets[0] == len(np.unique(sets[0]))) & (in_sets[1] == 0),
        }
    )


def _auroc(live: Live, side: Bool[Array, "n_texts"], keep: Bool[Array, "n_texts"]) -> Float[Array, "m"]:
    """AUROC on the texts kept."""
    kept = keep[live.text]
    column, text, value = live.column[kept], live.text[kept], live.value[kept]
    n_pos, n_neg = int((side & keep).sum()), int((~side & keep).sum())
    return sparse_auroc(column, value, side[text], len(live.features), n_pos, n_neg)


def _silent(frame: pd.DataFrame, n_texts: int) -> pd.DataFrame:
    """Features that fire on no text: AUROC one half, means 0, in no test."""
    frame["dead"] = frame["auroc"].isna()
    halves = ["auroc", "auroc_discover", "auroc_held_out"]
    frame[halves] = frame[halves].fillna(0.5)
    zeros = ["mean_positive", "mean_negative", "mean_diff", "mean_diff_discover", "fire_positive", "fire_negative"]  # fmt: skip
    frame[zeros] = frame[zeros].fillna(0.0)
    frame["in_sets"] = frame["in_sets"].eq(True)
    return frame


def _members(contrast: Contrast, names: Sequence[str]) -> Int[Array, "k"]:
    """Texts of the named sets."""
    n, found = len(contrast.positive), []
    for name in names:
        rows = {"positive": list(range(n)), "negative": list(range(n, len(contrast)))}.get(
            name, [i for i, g in enumerate(contrast.groups or ()) if g == name]
        )
        if not rows:
            raise RequestError(
                f"{contrast.name!r} has no set {name!r}; sets are positive, negative and the groups."
            )
        found += rows
    return np.array(found, dtype=np.int64)


# --- what is said of the texts -------------------------------------------------------------------------
def _note(frame: pd.DataFrame, contrast: Contrast, design: _Design, lengths: Array) -> str:
    said = contrast.facts()
    if len(first := first_chosen(frame).head(1)):
        best = first.iloc[0]
        said.append(
            f"chosen on {1 - HELD_OUT:.0%} of the {design.units}, {best['feature']} has AUROC {best['auroc_discover']:.2f} there and "
            f"{best['auroc_held_out']:.2f} on the others"
        )
    if not isinstance(contrast, SameTexts):
        words = bag_of_words_auroc(contrast, design.held)
        length = float(auroc(lengths[design.side][:, None], lengths[~design.side][:, None])[0])
        said.append(
            f"held out, a bag of words has {words:.2f}; the number of tokens alone has AUROC {length:.2f}"
        )
    said.append(f"{design.family:,} features tested")
    return "; ".join(said)


def _bytes_note(contrast: Contrast, in_bytes: Bool[Array, "n_texts"]) -> str:
    """Says which texts the tokenizer turns into bytes: their activations are of pieces of letters."""
    if not in_bytes.any():
        return ""
    first = contrast.texts[int(in_bytes.argmax())][:40]
    return f"texts that are mostly bytes, because the tokenizer has no tokens for their script: {int(in_bytes.sum())}, such as {first!r}"


def bag_of_words_auroc(contrast: Contrast, held: Bool[Array, "n_texts"]) -> float:
    """AUROC of naive Bayes on lower-case words (add-one smoothing), fitted on the texts not held out, read on those held out."""
    side = np.arange(len(contrast)) < len(contrast.positive)
    counts = [Counter[str](), Counter[str]()]
    for text, positive, out in zip(contrast.texts, side, held):
        if not out:
            counts[int(positive)].update(text.lower().split())
    vocabulary = len(counts[0] | counts[1]) + 1
    totals = [sum(c.values()) + vocabulary for c in counts]
    weight = {
        w: np.log((counts[1][w] + 1) / totals[1]) - np.log((counts[0][w] + 1) / totals[0])
        for w in counts[0] | counts[1]
    }
    words = (text.lower().split() for text in contrast.texts)
    score = np.array([sum(weight.get(w, 0.0) for w in text) / max(1, len(text)) for text in words])[:, None]
    return float(auroc(score[side & held], score[~side & held])[0])


def _said(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
