"""Ranking every feature of one or many SAEs by how it tells AI from human prompts, and by what it does to the bias.

    separation   mean difference, paired t over templates, AUROC and firing-rate difference, AI against human, last token
    interaction  I = (AS - AN) - (HS - HN) over matched speech / non-speech statements, by size; the sign is a column
    attribution  predicted bias removed by ablation, one backward pass for all features; integrated gradients beside it
    ablation     exact bias removed, for the features of largest predicted effect

Ranking always ranks, on every prompt it is given. *Calls* are another matter: they are corrected over the whole family scanned
(Westfall–Young max-T over one shared set of sign-flips), `call` also needs held-out statements (`calls`), `causal_ai_speech` also
an exact ablation that beats its controls, and where the design is too small a call reads "undetermined" and says what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.discovery.attribution import Agreement, cumulative_ablation
from sae_bias.discovery.calls import CALLS as SPEECH_CALLS
from sae_bias.discovery.contrasts import ALPHA, PAIRING, Scan, Split, interaction, separation
from sae_bias.discovery.effects import (
    FORETOLD,
    Effects,
    add_shares,
    first_by_prediction,
    measure_effects,
    predict_effects,
)
from sae_bias.discovery.integrated import COLUMNS as PARTS
from sae_bias.discovery.text_contrasts import scan_contrast
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.contrast import Contrast
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import load_sae
from sae_bias.saes.neighbors import MOST, decoder_directions, decoder_families, nearest_rows, twins_among
from sae_bias.saes.sae import Sae, check_sae
from sae_bias.stats.features import holm
from sae_bias.steering.banks import BankEngine, specific_reductions
from sae_bias.steering.controls import control_edits, control_test
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine

BY = ("separation", "interaction", "attribution", "ablation")
MOST_TWINS = 32
MOST_CAUSAL = 8
MOST_JOINT = 10
SORT = {
    "separation": ["auroc", "mean_diff"],
    "interaction": ["interaction"],
    "attribution": ["attribution"],
    "ablation": ["ablation"],
    "contrast": ["auroc", "mean_diff"],
}


@dataclass(frozen=True, eq=False)
class Ranking(Framed):
    """Every feature scanned, best first, with the statistics it was ranked by."""

    by: str
    frame: pd.DataFrame
    """One row a feature; columns depend on `by`."""
    family_size: int
    """How many features the corrected p-values are corrected over."""
    n_units: int
    """Independent units: templates, or matched statement pairs."""
    units: str
    note: str = ""
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Units that discovered and units that were held out for the call."""
    agreement: Agreement | None = None
    """How well attribution predicted exact ablation, where both were measured."""
    cumulative: pd.DataFrame | None = None
    """By "ablation": joint ablation of the first 1, 2, … features (k, feature, bias, change, reduction with its interval,
    split); a trained SAE splits a concept, so one feature alone says little. On the report split where one is held out."""

    pairing: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=PAIRING))
    """Badly judged statements and the held-out AI-speech statements they are paired to, with the scores of both."""
    parts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=PARTS))
    """Where effects were measured: what any edit after the subject, the SAE's features and its error could remove."""
    predictions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=FORETOLD))
    """How well attribution and integrated gradients predicted the exact effects: rank correlation, slope with its interval, n."""

    templates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Templates of the pairs that discovered, and those held out; empty where all were ranked on."""

    def top(self, k: int) -> list[FeatureRef]:
        """The first k features, with the split of templates they were found under."""
        refs = (FeatureRef.parse(name) for name in self.frame["feature"].head(k))
        return [replace(ref, split=self.templates or None) for ref in refs]

    def called(self, call: str) -> list[FeatureRef]:
        """Features called so: "separates", "ai_speech", "causal_ai_speech", or a value of `call` such as "negative judgement"."""
        if call in SPEECH_CALLS and "call" in self.frame:
            return [FeatureRef.parse(name) for name in self.frame.loc[self.frame["call"] == call, "feature"]]
        if call == "call" or call not in self.frame:
            raise RequestError(f"a ranking by {self.by} makes no call {call!r}.")
        return [FeatureRef.parse(name) for name in self.frame.loc[self.frame[call] == "yes", "feature"]]

    def plot(self) -> Figure:
        """What the ranking sorts by, for every feature, the calls in color."""
        from sae_bias.figures.features import ranking_figure

        return ranking_figure(self.frame, self.by)

    def __repr__(self) -> str:
        head = f"Ranking by {self.by}: {len(self.frame):,} features, {self.n_units} {self.units}"
        note = f"\n  {self.note}" if self.note else ""
        return f"{head}{note}\n{self._short(10).round(4).to_string(index=False)}"

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<p>{escape(f'By {self.by}: {len(self.frame):,} features, {self.n_units} {self.units}. {self.note}')}</p>"
            + self._short(20).round(4).to_html(escape=True, index=False)
        )

    def _short(self, k: int) -> pd.DataFrame:
        """The first rows with the columns a person reads first."""
        wanted = ["feature", *SORT[self.by], "attribution", "t", "p_fwer", "separates", "call", "causal_ai_speech", "survives_loo", "density", "family_size"]  # fmt: skip
        return self.frame.head(k)[[c for c in dict.fromkeys(wanted) if c in self.frame]]


def rank_features(
    model: Model,
    sae: Sae | SaeId | str | Sequence[Sae | SaeId | str],
    prompts: PromptPairs | PromptGrid | Contrast,
    *,
    by: str = "separation",
    reduce: str = "last",
    chat: bool = False,
    all_of: Sequence[str] = (),
    none_of: Sequence[str] = (),
    probe: Probe | None = None,
    pairs: PromptPairs | None = None,
    grid: PromptGrid | None = None,
    split: Split | None = None,
    effects: bool = False,
    effects_of: str = "primary",
    top_k: int = 64,
    controls: int = 0,
    max_view: bool = False,
    seed: int = 0,
    workers: int = 1,
    progress: bool = False,
) -> Ranking:
    """Rank every feature of `sae` (or of several, as one family, in one pass of the prompts).

    Args:
        prompts: pairs for separation, attribution and ablation; a grid with `match` for interaction; or two lists of texts
            (`Contrast`), ranked by AUROC, positive above negative (docs/method.md#contrast-sets).
        reduce, chat, all_of, none_of: of a `Contrast`: what a text's tokens give ("last", "mean", "max" or "any"), whether texts are
            user turns, and sets ("positive", "negative" or a group) on all or none of whose texts a feature must fire.
        by: "separation" sorts by AUROC (AI above human, last token), ties by mean difference AI - human; "interaction" by |I|;
            "attribution" and "ablation" by what they remove of the primary figure (B_0 - B_s), with `probe`.
        probe: evaluation words and score; the grid's badly judged statements are paired to AI speech by it too.
        pairs, grid: the other kind of prompts, where one table should carry all statistics and calls.
        split: {"discover": units, "report": units}, such as `pairs.split()`: ranks on discover, with report held out. Without it
            everything is ranked on all units and calls use a split of their own (60 / 40).
        effects: by "interaction" with `pairs`: also predict every feature's effect, and measure that of the first `top_k` exactly.
        effects_of: "primary" (the difference in differences where the pairs have mundane twins) or "bias", twins or not.
        top_k: how many features are ablated and resampled exactly (beside those called AI-speech).
        controls: with "ablation" and `grid`: how many controls a feature called AI-speech must beat to be called causal.
        max_view: adds the maximum over ordinary tokens as a descriptive second view; in no test.
        workers: processes of this machine that the exact effects are shared out over (Linux, a model on the CPU).

    Raises:
        RequestError: an SAE of another width or layer, two SAEs with one id, prompts of the wrong kind.
    """
    of_pairs = probe, pairs, grid, split, effects or None, controls or None, max_view or None
    _check_request(by, prompts, (reduce, chat, tuple(all_of), tuple(none_of)), of_pairs)
    if effects_of != "primary" and pairs is None and not isinstance(prompts, PromptPairs):
        raise RequestError(
            "effects_of is for pairs; a ranking of a grid or of texts alone measures no effects."
        )
    saes = load_saes(model, sae)
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    if isinstance(prompts, Contrast):
        return of_contrast(scan_contrast(model, saes, prompts, reduce=reduce, chat=chat, all_of=all_of, none_of=none_of, **options), saes)  # fmt: skip
    pairs, grid = (prompts, grid) if isinstance(prompts, PromptPairs) else (pairs, prompts)  # type: ignore[assignment]
    pairs = None if pairs is None else pairs.effects_of(effects_of)
    work = _Work(model, saes, by, pairs, grid, probe, split, {**options, "max_view": max_view})
    return work.ranking(effects, top_k, controls, workers)


def _check_request(by: str, prompts: object, of_contrast: tuple, of_pairs: tuple) -> None:
    if by not in BY:
        raise RequestError(f"by={by!r}; expected one of {', '.join(BY)}.")
    if isinstance(prompts, Contrast):
        if by != "separation" or any(given is not None for given in of_pairs):
            raise RequestError(
                "a contrast is ranked by AUROC; another by, and probe, pairs, grid, split, effects, controls and max_view, are for pairs and grids."
            )
        return
    if of_contrast != ("last", False, (), ()):
        raise RequestError(
            "reduce, chat, all_of and none_of are for a Contrast; pairs and grids are read at the last token."
        )
    if by == "interaction" and not isinstance(prompts, PromptGrid):
        raise RequestError(
            'by="interaction" needs a grid (load_grid()), whose speech and non-speech statements are matched.'
        )
    if by != "interaction" and not isinstance(prompts, PromptPairs):
        raise RequestError(f"by={by!r} needs pairs (load_pairs()), not a {type(prompts).__name__}.")


@dataclass(frozen=True, eq=False)
class _Work:
    """One ranking of pairs, of a grid, or of both."""

    model: Model
    saes: Sequence[Sae]
    by: str
    pairs: PromptPairs | None
    grid: PromptGrid | None
    probe: Probe | None
    split: Split | None
    options: dict[str, Any]

    @property
    def templates(self) -> dict[str, tuple[str, ...]]:
        """The split, where it is one of these pairs' templates."""
        mine = self.pairs is not None and self.split is not None and _shares(self.pairs.templates, self.split)
        return {k: tuple(v) for k, v in (self.split or {}).items()} if mine else {}

    @property
    def main(self) -> str:
        return "interaction" if self.by == "interaction" else "separation"

    def of_pairs(self, name: str) -> PromptPairs | None:
        """The pairs of one part of the split: all of them to discover on, none to report on, where it names no templates of theirs."""
        assert self.pairs is not None
        if self.split is None or (self.by == "interaction" and not self.templates):
            return self.pairs if name == "discover" else None
        templates = tuple(self.split.get(name, ()))
        return self.pairs.select(templates=templates) if templates or name == "discover" else None

    def scans(self) -> dict[str, Scan]:
        scans: dict[str, Scan] = {}
        if self.pairs is not None:
            discover, held = self.of_pairs("discover"), self.of_pairs("report")
            assert discover is not None
            scans["separation"] = separation(self.model, self.saes, discover, held=held, **self.options)
        if self.grid is not None:
            scans["interaction"] = interaction(self.model, self.saes, self.grid, split=self._of_grid(), probe=self.probe, **self.options)  # fmt: skip
        return scans

    def _of_grid(self) -> Split | None:
        """The split, where it is one of the grid's statements."""
        named = self.grid is not None and self.split is not None
        return self.split if named and _shares({p.match for p in self.grid}, self.split) else None  # type: ignore[union-attr,arg-type]

    def ranking(self, effects: bool, top_k: int, controls: int, workers: int) -> Ranking:
        scans, joint, found = self.scans(), None, None
        frame = _merge(scans, first=self.main)
        _add_calls(frame, "interaction" in scans)
        if self.by in ("attribution", "ablation") or (effects and self.pairs is not None):
            found, joint = self._effects(frame, top_k, controls, workers)
        by_size = np.abs if self.by == "interaction" else None
        frame = frame.sort_values(SORT[self.by], ascending=False, kind="stable", na_position="last", ignore_index=True, key=by_size)  # fmt: skip
        _add_families(frame, self.saes)
        apart = self.templates if self.by != "interaction" else self._of_grid()
        frame["split"] = "discover" if apart else "all"
        main, grid_scan = scans[self.main], scans.get("interaction", scans[self.main])
        notes = [*(scan.note for scan in scans.values()), *([found.note] if found else [])]
        return Ranking(
            self.by, frame, len(frame), main.n_units, main.units,
            "; ".join(note for note in notes if note), main.held or grid_scan.held, found.agreement if found else None, joint,
            grid_scan.pairing, *((found.parts, found.predictions) if found else ()), templates=self.templates,
        )  # fmt: skip

    def _effects(
        self, frame: pd.DataFrame, top_k: int, controls: int, workers: int
    ) -> tuple[Effects, pd.DataFrame | None]:
        """Effects on the pairs that discover; the joint ablation curve on those of report."""
        pairs, held = self.of_pairs("discover"), self.of_pairs("report")
        assert pairs is not None
        sites = [sae.site for sae in self.saes]
        engine = ProbeEngine(
            self.model, pairs, self.probe or default_probe(pairs), controls=True, sites=sites
        )
        split = "" if pairs is self.pairs else "discover"
        found, joint = predict_effects(frame, engine, self.saes, split=split), None
        frame["dead"] &= frame["attribution"] == 0  # silent at the last token, yet read elsewhere
        if self.by != "attribution":
            called = list(frame.index[frame["ai_speech"] == "yes"][:top_k])
            first = first_by_prediction(frame, top_k)
            if self.by == "interaction":
                first = list(frame["interaction"].abs().nlargest(top_k).index)
            found = measure_effects(
                frame, engine, [*first, *called], found, workers=workers, progress=self.options["progress"]
            )
        if self.by == "ablation":
            if controls:
                _call_causal(frame, engine, controls, self.options["seed"])
            joint = _joint(
                frame,
                engine if held is None else ProbeEngine(self.model, held, engine.base.probe, controls=True),
            )
            joint["split"] = "all" if self.split is None else "discover" if held is None else "report"
        add_shares(frame, engine.base.primary.mean)
        return found, joint


def of_contrast(scan: Scan, saes: Sequence[Sae]) -> Ranking:
    """The ranking of a contrast's scan, by AUROC."""
    frame = scan.frame.sort_values(SORT["contrast"], ascending=False, kind="stable", ignore_index=True)
    _add_families(frame, saes)
    return Ranking("contrast", frame, scan.family or 0, scan.n_units, scan.units, scan.note)


def load_saes(model: Model, sae: Sae | SaeId | str | Sequence[Sae | SaeId | str]) -> list[Sae]:
    """The SAEs of one family, each of which fits the model.

    Raises:
        RequestError: none given, one of another width or layer, one given twice.
    """
    given = list(sae) if isinstance(sae, (list, tuple)) else [sae]
    saes = [s if isinstance(s, Sae) else load_sae(s) for s in given]  # type: ignore[arg-type]
    if not saes:
        raise RequestError("there is no SAE to rank.")
    seen: set[str] = set()
    for s in saes:
        check_sae(model, s)
        if str(s.id) in seen:
            raise RequestError(f"{s.id} is given twice; each SAE belongs to the family once.")
        seen.add(str(s.id))
    return saes


# --- which prompts discover ----------------------------------------------------------------------------
def _shares(units: Iterable[str | None], split: Split) -> bool:
    """Whether the split names some of these units: a split of templates says nothing about statements."""
    return bool(set(split.get("discover", ())) & set(units))


# --- one table -----------------------------------------------------------------------------------------
def _merge(scans: Mapping[str, Scan], first: str) -> pd.DataFrame:
    """The scans side by side; where both test, the second's test columns carry its name."""
    frame = scans[first].frame
    for name, scan in scans.items():
        if name == first:
            continue
        shared = [c for c in scan.frame if c in frame and c not in ("feature", "sae", "index", "layer", "dead", "density", "dense")]  # fmt: skip
        other = scan.frame.rename(columns={c: f"{c}_{name}" for c in shared})
        for column in other.columns.difference(frame.columns, sort=False):
            frame[column] = other[column].to_numpy()
        frame["dead"] &= other["dead"].to_numpy()
        frame["density"] = frame["density"].fillna(other["density"])
        frame["dense"] |= other["dense"].to_numpy()
    return frame


def _add_calls(frame: pd.DataFrame, with_grid: bool) -> None:
    """Calls this ranking has no evidence for read `undetermined`; nothing is causal before its ablation is measured."""
    if not with_grid:
        frame["call"] = frame["ai_speech"] = "undetermined"
    frame["causal_ai_speech"] = np.where(frame["ai_speech"] == "no", "no", "undetermined")


def _add_families(frame: pd.DataFrame, saes: Sequence[Sae]) -> None:
    """Decoder-cosine families and seed twins of the features ranked first that fire at all."""
    by_name = {str(s.id): s for s in saes}
    for column, value in (("family", ""), ("family_size", np.nan), ("twin", ""), ("twin_cosine", np.nan)):
        frame[column] = value
    first = frame.index[~frame["dead"]][:MOST]
    if not len(first):
        return
    refs = [FeatureRef.parse(name) for name in frame.loc[first, "feature"]]
    heads = decoder_families(decoder_directions(by_name, refs))
    names = frame.loc[first, "feature"].to_numpy()
    frame.loc[first, "family"] = names[heads]
    frame.loc[first, "family_size"] = np.bincount(heads, minlength=len(heads))[heads].astype(float)
    twins = twins_among(saes)
    for i, ref in [(i, ref) for i, ref in zip(first, refs) if str(ref.sae) in twins][:MOST_TWINS]:
        row = by_name[str(ref.sae)].W_dec_rows([ref.index])[0]
        (near,) = nearest_rows(twins[str(ref.sae)], row, 1)
        frame.loc[i, "twin"], frame.loc[i, "twin_cosine"] = str(near.ref), near.cosine


# --- what may be called causal -----------------------------------------------------------------------
def _joint(frame: pd.DataFrame, engine: ProbeEngine) -> pd.DataFrame:
    """The cumulative joint ablation curve of the features whose own ablation removes most."""
    first = frame.dropna(subset=["ablation"]).nlargest(MOST_JOINT, "ablation")
    return cumulative_ablation(engine, list(first.loc[first["ablation"] > 0, "feature"]))


def _call_causal(frame: pd.DataFrame, engine: ProbeEngine, n: int, seed: int) -> None:
    """`causal_ai_speech`: of the features called AI-speech, those whose ablation beats its controls (docs/method.md#controls).

    p is Holm-corrected over the features tested: as many, by ablation, as `n` controls can decide, at most `MOST_CAUSAL`.
    """
    frame["control_p"] = frame["control_p_matched"] = frame["control_p_random"] = frame["specific"] = np.nan
    called = frame[(frame["ai_speech"] == "yes") & frame["ablation"].notna()]
    tested = called.nlargest(min(MOST_CAUSAL, max(1, int(ALPHA * (n + 1)))), "ablation")
    family = [FeatureRef.parse(name) for name in called["feature"]]
    banks = BankEngine(engine.model, engine.base.probe)
    found = {}
    for place, name in tested["feature"].items():
        edit = Ablate(FeatureRef.parse(name))
        controls = control_edits(engine.model, edit, engine.reading.pairs, n, seed, family=family)
        own, *others = specific_reductions(engine, banks, [[edit], *([e] for e, _ in controls)])
        found[place] = control_test(float(own), others, [kind for _, kind in controls])
    for (place, test), p in zip(found.items(), holm([test.p for test in found.values()])):
        frame.loc[place, ["control_p", "control_p_matched", "control_p_random", "specific"]] = [p, test.p_matched, test.p_random, test.candidate]  # fmt: skip
        verdict = test.verdict
        frame.loc[place, "causal_ai_speech"] = "no" if verdict == "yes" and p > ALPHA else verdict
