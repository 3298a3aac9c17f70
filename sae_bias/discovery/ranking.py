"""Ranking every feature of one or many SAEs by how it tells AI from human prompts, and by what it does to the bias.

    separation   mean difference, paired t over templates, AUROC and firing-rate difference, AI against human, last token
    interaction  I = (AS - AN) - (HS - HN) over matched speech / non-speech statements, by size; the sign is a column
    attribution  predicted bias removed by ablation, one backward pass for all features
    ablation     exact bias removed, for the features attribution puts first

Ranking always ranks, on every prompt it is given. *Calls* are another matter: they are corrected over the whole family scanned
(Westfall–Young max-T over one shared set of sign-flips), `call` also needs held-out statements (`calls`), `causal_ai_speech` also
an exact ablation that beats its controls, and where the design is too small a call reads "undetermined" and says what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.discovery.attribution import (
    Agreement,
    attribution,
    attribution_agreement,
    carriers,
    cumulative_ablation,
    exact_ablation,
    exact_resampling,
)
from sae_bias.discovery.calls import CALLS as SPEECH_CALLS
from sae_bias.discovery.contrasts import ALPHA, PAIRING, Scan, Split, interaction, separation
from sae_bias.discovery.text_contrasts import ContrastScan, scan_contrast
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

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
class Ranking:
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

    def top(self, k: int) -> list[FeatureRef]:
        """The first k features."""
        return [FeatureRef.parse(name) for name in self.frame["feature"].head(k)]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def called(self, call: str) -> list[FeatureRef]:
        """Features called so: "separates", "ai_speech", "causal_ai_speech", or a value of `call` such as "negative judgement"."""
        if call in SPEECH_CALLS and "call" in self.frame:
            return [FeatureRef.parse(name) for name in self.frame.loc[self.frame["call"] == call, "feature"]]
        if call == "call" or call not in self.frame:
            raise RequestError(f"a ranking by {self.by} makes no call {call!r}.")
        return [FeatureRef.parse(name) for name in self.frame.loc[self.frame[call] == "yes", "feature"]]

    def plot(self) -> go.Figure:
        """What the ranking sorts by, for every feature, the calls in color."""
        from sae_bias.figures.features import ranking_figure

        return ranking_figure(self.frame, self.by)

    def __repr__(self) -> str:
        head = f"Ranking by {self.by}: {self.family_size:,} features, {self.n_units} {self.units}"
        note = f"\n  {self.note}" if self.note else ""
        return f"{head}{note}\n{self._short(10).round(4).to_string(index=False)}"

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<p>{escape(f'By {self.by}: {self.family_size:,} features, {self.n_units} {self.units}. {self.note}')}</p>"
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
    top_k: int = 64,
    controls: int = 0,
    max_view: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Ranking:
    """Rank every feature of `sae` (or of several, as one family, in one pass of the prompts).

    Args:
        prompts: pairs for separation, attribution and ablation; a grid with `match` for interaction; or two lists of texts
            (`Contrast`), ranked by AUROC, positive above negative (docs/method.md#contrast-sets).
        reduce, chat, all_of, none_of: of a `Contrast`: what a text's tokens give ("last", "mean", "max" or "any"), whether texts are
            user turns, and sets ("positive", "negative" or a group) on all or none of whose texts a feature must fire.
        by: "separation" sorts by AUROC (AI above human, last token), ties by mean difference AI - human; "interaction" by |I|;
            "attribution" and "ablation" by bias removed (B_0 - B_s), with `probe`.
        probe: evaluation words and score; the grid's badly judged statements are paired to AI speech by it too.
        pairs, grid: the other kind of prompts, where one table should carry all statistics and calls: with `grid`, a ranking
            of pairs also has the interaction and `ai_speech`; with `pairs`, one of the grid also has the separation.
        split: {"discover": units, "report": units}; ranks on discover and makes calls with report held out. Without it,
            everything is ranked on all units and calls use a split of their own (60 / 40).
        top_k: how many features "ablation" checks exactly, in the order attribution puts them (and those called AI-speech).
        controls: with "ablation" and `grid`: how many controls the ablation of a feature called AI-speech must beat to be
            called causal (99 for a p of 0.01).
        max_view: adds the maximum over ordinary tokens as a descriptive second view; in no test.

    Raises:
        RequestError: an SAE of another width or layer, two SAEs with one id, prompts of the wrong kind.
    """
    if by not in BY:
        raise RequestError(f"by={by!r}; expected one of {', '.join(BY)}.")
    saes = load_saes(model, sae)
    if isinstance(prompts, Contrast):
        scan = scan_contrast(
            model,
            saes,
            prompts,
            reduce=reduce,
            chat=chat,
            all_of=all_of,
            none_of=none_of,
            seed=seed,
            progress=progress,
        )
        return _of_contrast(scan, saes)
    if (reduce, chat, all_of, none_of) != ("last", False, (), ()):
        raise RequestError(
            "reduce, chat, all_of and none_of are for a Contrast; pairs and grids are read at the last token."
        )
    on_grid = by == "interaction"
    if on_grid and not isinstance(prompts, PromptGrid):
        raise RequestError(
            'by="interaction" needs a grid (load_grid()), whose speech and non-speech statements are matched.'
        )
    if not on_grid and not isinstance(prompts, PromptPairs):
        raise RequestError(f"by={by!r} needs pairs (load_pairs()), not a {type(prompts).__name__}.")
    grid = prompts if isinstance(prompts, PromptGrid) else grid
    pairs = prompts if isinstance(prompts, PromptPairs) else pairs
    scans: dict[str, Scan] = {}
    held: PromptPairs | None = None
    options = {"seed": seed, "max_view": max_view, "progress": progress}
    if pairs is not None:
        mine = split if not on_grid or split is None or _shares(pairs.templates, split) else None
        held = _pick(pairs, mine, "report") if mine and mine.get("report") else None
        pairs = _pick(pairs, mine, "discover")
        scans["separation"] = separation(model, saes, pairs, held=held, **options)  # type: ignore[arg-type]
    if grid is not None:
        mine = split if on_grid or split is None or _shares({p.match for p in grid}, split) else None
        scans["interaction"] = interaction(model, saes, grid, split=mine, probe=probe, **options)  # type: ignore[arg-type]
    frame = _merge(scans, first="interaction" if on_grid else "separation")
    _add_calls(frame, "interaction" in scans)
    notes = [scan.note for scan in scans.values()]
    agreement = joint = None
    if by in ("attribution", "ablation"):
        assert pairs is not None
        engine = ProbeEngine(model, pairs, probe or default_probe(pairs), sites=[sae.site for sae in saes])
        more, agreement = _add_effects(frame, engine, saes, by, top_k, progress)
        notes.append(more)
        if by == "ablation":
            if controls:
                _call_causal(frame, engine, controls, seed)
            joint = _joint(frame, engine if held is None else ProbeEngine(model, held, engine.base.probe))
            joint["split"] = "all" if split is None else "discover" if held is None else "report"
    by_size = np.abs if on_grid else None
    frame = frame.sort_values(SORT[by], ascending=False, kind="stable", na_position="last", ignore_index=True, key=by_size)  # fmt: skip
    _add_families(frame, saes)
    frame["split"] = "all" if split is None else "discover"
    main = scans["interaction" if on_grid else "separation"]
    return Ranking(
        by,
        frame,
        len(frame),
        main.n_units,
        "matched statement pairs" if on_grid else "templates",
        "; ".join(note for note in notes if note),
        main.held or scans.get("interaction", main).held,
        agreement,
        joint,
        scans["interaction"].pairing if "interaction" in scans else pd.DataFrame(columns=PAIRING),
    )


def _of_contrast(scan: ContrastScan, saes: Sequence[Sae]) -> Ranking:
    frame = scan.frame.sort_values(SORT["contrast"], ascending=False, kind="stable", ignore_index=True)
    _add_families(frame, saes)
    return Ranking("contrast", frame, len(frame), scan.n_units, scan.units, scan.note)


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


def _pick(pairs: PromptPairs, split: Split | None, name: str) -> PromptPairs:
    return pairs if split is None else pairs.select(templates=tuple(split[name]))


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


# --- attribution, ablation, and what may be called causal -----------------------------------------------
def _add_effects(
    frame: pd.DataFrame, engine: ProbeEngine, saes: Sequence[Sae], by: str, top_k: int, progress: bool
) -> tuple[str, Agreement | None]:
    frame["attribution"] = np.concatenate([attribution(engine, sae) for sae in saes])
    frame["dead"] &= frame["attribution"] == 0  # silent at the last token, yet read elsewhere
    bias, note, agreement = engine.base.bias, f"unsteered bias {engine.base.bias:+.4f}", None
    if by == "ablation":
        order = frame["attribution"].abs().sort_values(ascending=False, kind="stable").index[:top_k]
        first = list(dict.fromkeys([*order, *frame.index[frame["ai_speech"] == "yes"][:top_k]]))
        names = list(frame.loc[first, "feature"])
        frame["ablation"] = frame["resampling"] = np.nan
        frame.loc[first, "ablation"] = exact_ablation(engine, names, progress=progress)
        frame.loc[first, "resampling"] = exact_resampling(engine, names, progress=progress)
        frame["carrier"] = carriers(frame["ablation"], frame["resampling"], bias)
        agreement = attribution_agreement(
            frame.loc[first, "attribution"].to_numpy(), frame.loc[first, "ablation"].to_numpy(), bias
        )
        note += f"; {len(first)} features ablated exactly (those of largest |attribution|), the rest not measured; {agreement}"
        found = frame.loc[first, "carrier"].value_counts()
        note += f"; carriers {found.get('carrier', 0)}, damage {found.get('damage', 0)} (ablation without a resampling effect)"
    if bias:
        for column in [c for c in ("attribution", "ablation") if c in frame]:
            frame[f"{column}_share"] = frame[column] / bias
    return note, agreement


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
