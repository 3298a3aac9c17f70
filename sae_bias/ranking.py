"""Ranking every feature of one or many SAEs by how it tells AI from human prompts, and by what it does to the bias.

    separation   mean difference, paired t over templates, AUROC and firing-rate difference, AI against human, last token
    interaction  I = (AS - AN) - (HS - HN) over matched speech / non-speech statements (METHOD §2)
    attribution  predicted bias removed by ablation, one backward pass for all features
    ablation     exact bias removed, for the features attribution puts first

Ranking always ranks, on every prompt it is given. *Calls* are another matter: they are corrected over the whole family scanned
(Westfall–Young max-T over one shared set of sign-flips), `ai_speech` also needs held-out statements, and where the design is too
small a call reads "undetermined" and says how many units it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.activations import capture_layers, check_site, plan_batches
from sae_bias.attribution import attribution, exact_ablation
from sae_bias.bundled import load_texts
from sae_bias.engine import ProbeEngine
from sae_bias.errors import RequestError
from sae_bias.model import Model
from sae_bias.probe import Probe, default_probe
from sae_bias.prompts import PromptGrid, PromptPairs
from sae_bias.sae import FeatureRef, Sae, SaeId, load_sae
from sae_bias.stats_design import fewest_units, split_templates
from sae_bias.stats_features import (
    MaxT,
    activation_variance_floor,
    auroc,
    benjamini_hochberg,
    lower_bound_min,
)
from sae_bias.streaming import acts_blocks

if TYPE_CHECKING:
    import plotly.graph_objects as go

BY = ("separation", "interaction", "attribution", "ablation")
ALPHA = 0.05
DENSE = 0.10
CALL_SHARES = {"discover": 0.6, "report": 0.4}
Split = Mapping[str, Sequence[str]]


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

    def top(self, k: int) -> list[FeatureRef]:
        """The first k features."""
        return [FeatureRef.parse(name) for name in self.frame["feature"].head(k)]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def called(self, call: str) -> list[FeatureRef]:
        """Features of which the call ("separates", "ai_speech") says yes."""
        if call not in self.frame:
            raise RequestError(f"a ranking by {self.by} makes no call {call!r}.")
        return [FeatureRef.parse(name) for name in self.frame.loc[self.frame[call] == "yes", "feature"]]

    def plot(self) -> go.Figure:
        """The first features as a bar chart."""
        from sae_bias.plots import ranked_features

        return ranked_features(self.frame)

    def __repr__(self) -> str:
        head = f"Ranking by {self.by}: {self.family_size:,} features, {self.n_units} {self.units}"
        note = f"\n  {self.note}" if self.note else ""
        return f"{head}{note}\n{self.frame.head(10).round(4).to_string(index=False)}"

    def _repr_html_(self) -> str:
        from html import escape

        return (
            f"<p>{escape(f'By {self.by}: {self.family_size:,} features, {self.n_units} {self.units}. {self.note}')}</p>"
            + self.frame.head(20).round(4).to_html(escape=True, index=False)
        )


def rank_features(
    model: Model,
    sae: Sae | SaeId | str | Sequence[Sae | SaeId | str],
    prompts: PromptPairs | PromptGrid,
    *,
    by: str = "separation",
    probe: Probe | None = None,
    split: Split | None = None,
    top_k: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Ranking:
    """Rank every feature of `sae` (or of several, as one family).

    Args:
        prompts: pairs for separation, attribution and ablation; a grid with `match` for interaction.
        by: "separation" sorts by AUROC (AI above human, last token), ties by mean difference AI - human; "interaction" by I;
            "attribution" and "ablation" by bias removed (B_0 - B_s), with `probe`.
        split: {"discover": units, "report": units}; ranks on discover and makes calls with report held out. Without it,
            everything is ranked on all units and calls use a split of their own (60 / 40).
        top_k: how many features "ablation" checks exactly, in the order attribution puts them.

    Raises:
        RequestError: an SAE of another width or layer, two SAEs with one id, prompts of the wrong kind.
    """
    if by not in BY:
        raise RequestError(f"by={by!r}; expected one of {', '.join(BY)}.")
    saes = _load_all(model, sae)
    if by == "interaction":
        if not isinstance(prompts, PromptGrid):
            raise RequestError(
                'by="interaction" needs a grid (load_grid()), whose speech and non-speech statements are matched.'
            )
        return _by_interaction(model, saes, prompts, split, seed, progress)
    if not isinstance(prompts, PromptPairs):
        raise RequestError(f"by={by!r} needs pairs (load_pairs()), not a {type(prompts).__name__}.")
    if split is not None:
        prompts = prompts.select(templates=tuple(split["discover"]))
    if by == "separation":
        return _by_separation(model, saes, prompts, seed, progress)
    return _by_effect(model, saes, prompts, probe or default_probe(prompts), by, top_k, progress)


def _load_all(model: Model, sae: Sae | SaeId | str | Sequence[Sae | SaeId | str]) -> list[Sae]:
    given = list(sae) if isinstance(sae, (list, tuple)) else [sae]
    saes = [s if isinstance(s, Sae) else load_sae(s) for s in given]  # type: ignore[arg-type]
    if not saes:
        raise RequestError("there is no SAE to rank.")
    seen: set[str] = set()
    for s in saes:
        check_site(model, s.site)
        if s.d_in != model.d_model:
            raise RequestError(
                f"{s.id} has d_in {s.d_in}, but {model.name} has d_model {model.d_model}: it belongs to another model."
            )
        if str(s.id) in seen:
            raise RequestError(f"{s.id} is given twice; each SAE belongs to the family once.")
        seen.add(str(s.id))
    return saes


# --- separation ----------------------------------------------------------------------------------------


def _by_separation(model: Model, saes: list[Sae], pairs: PromptPairs, seed: int, progress: bool) -> Ranking:
    resid = _last_residuals(model, [p.human for p in pairs] + [p.ai for p in pairs], saes)
    n = len(pairs)
    unit_rows = _rows_of([p.template for p in pairs])
    family = MaxT(len(unit_rows), seed=seed) if len(unit_rows) > 1 else None
    parts: list[pd.DataFrame] = []
    for sae in tqdm(saes, desc="separation", unit="SAE", disable=not progress, leave=False):
        for start, acts, _ in acts_blocks(sae, resid[sae.site.layer]):
            a = acts.double().cpu().numpy()
            human, ai = a[:n], a[n:]
            contrast = _means(ai - human, unit_rows)
            if family is not None:
                family.add(contrast, activation_variance_floor(a))
            parts.append(
                _names(sae, start, a.shape[1]).assign(
                    auroc=auroc(ai, human),
                    mean_human=human.mean(0),
                    mean_ai=ai.mean(0),
                    mean_diff=(ai - human).mean(0),
                    fire_human=(human > 0).mean(0),
                    fire_ai=(ai > 0).mean(0),
                    dead=(a <= 0).all(0),
                )
            )
    frame = pd.concat(parts, ignore_index=True)
    note = _add_tests(frame, family, len(unit_rows), "templates", "separates")
    frame["density"] = _densities(model, saes)
    frame["dense"] = frame["density"] > DENSE
    frame = frame.sort_values(["auroc", "mean_diff"], ascending=False, kind="stable", ignore_index=True)
    return Ranking("separation", frame, len(frame), len(unit_rows), "templates", note)


def _add_tests(frame: pd.DataFrame, family: MaxT | None, n_units: int, units: str, call: str) -> str:
    """Adds t, corrected p and the call; says in words where the design is too small for one."""
    needed = fewest_units(ALPHA)
    if family is None:
        frame["t"] = frame["p_fwer"] = frame["q_bh"] = np.nan
    else:
        result = family.result()
        frame["t"], frame["p_fwer"], frame["q_bh"] = result.t, result.p_fwer, benjamini_hochberg(result.p_raw)
    if family is None or n_units < needed:
        frame[call] = "undetermined"
        return f"{call}: undetermined, {n_units} {units} given and at least {needed} needed"
    frame[call] = np.where(frame["p_fwer"] <= ALPHA, "yes", "no")
    return ""


# --- interaction ---------------------------------------------------------------------------------------

CELLS = {
    "AS": ("ai", "speech"),
    "AN": ("ai", "nonspeech"),
    "HS": ("human", "speech"),
    "HN": ("human", "nonspeech"),
    "DS": ("animal", "speech"),
}


def _by_interaction(
    model: Model, saes: list[Sae], grid: PromptGrid, split: Split | None, seed: int, progress: bool
) -> Ranking:
    cells = _cells(grid)
    matches = list(cells["AS"])
    ranked = matches if split is None else [m for m in matches if m in set(split["discover"])]
    held = _call_split(grid, matches, split, seed)
    has_dog = bool(cells["DS"])
    resid = _last_residuals(model, [p.text for p in grid], saes)
    discover = [ranked.index(m) for m in held["discover"]] if held else []
    family = MaxT(len(discover), seed=seed) if len(discover) > 1 else None
    parts: list[pd.DataFrame] = []
    for sae in tqdm(saes, desc="interaction", unit="SAE", disable=not progress, leave=False):
        for start, acts, _ in acts_blocks(sae, resid[sae.site.layer]):
            a = acts.double().cpu().numpy()
            mean = {c: _cell_means(a, cells[c], ranked) for c in CELLS if cells[c]}
            contrast = (mean["AS"] - mean["AN"]) - (mean["HS"] - mean["HN"])
            if family is not None:
                family.add(contrast[discover], activation_variance_floor(a))
            part = _names(sae, start, a.shape[1]).assign(
                interaction=contrast.mean(0),
                **{f"mean_{c}": m.mean(0) for c, m in mean.items()},
                dead=(a <= 0).all(0),
            )
            part["held_bound"], part["held_AS"] = _held_out(
                a, cells, held["report"] if held and has_dog else ()
            )
            parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    note = _call_ai_speech(frame, family, held, has_dog)
    frame["density"] = _densities(model, saes)
    frame["dense"] = frame["density"] > DENSE
    frame = frame.sort_values("interaction", ascending=False, kind="stable", ignore_index=True)
    return Ranking("interaction", frame, len(frame), len(ranked), "matched statement pairs", note, held)


def _cells(grid: PromptGrid) -> dict[str, dict[str, list[int]]]:
    """Rows of the grid in each cell of the 2 × 2 (and the dog's), by matched statement pair."""
    cells: dict[str, dict[str, list[int]]] = {c: {} for c in CELLS}
    for i, prompt in enumerate(grid):
        for name, (group, act) in CELLS.items():
            if prompt.match is not None and prompt.group == group and prompt.act == act:
                cells[name].setdefault(prompt.match, []).append(i)
    four = [set(cells[c]) for c in ("AS", "AN", "HS", "HN")]
    complete = set.intersection(*four)
    if not complete:
        raise RequestError(
            "the grid has no statement pair with AI and human subjects, speech and non-speech; give its statements `match`, and subjects of groups ai and human."
        )
    if cells["DS"]:
        complete &= set(cells["DS"])
    return {c: {m: rows for m, rows in by.items() if m in complete} for c, by in cells.items()}


def _call_split(
    grid: PromptGrid, matches: list[str], split: Split | None, seed: int
) -> dict[str, tuple[str, ...]]:
    """Matched pairs that discover and that are held out; empty where there are too few for both."""
    if split is not None:
        return {k: tuple(m for m in split[k] if m in set(matches)) for k in ("discover", "report")}
    if len(matches) < 2 * fewest_units(ALPHA):
        return {}
    content = {p.match: p.content for p in grid if p.match is not None}
    return split_templates(matches, CALL_SHARES, seed, families=content)


def _held_out(
    a: np.ndarray, cells: dict[str, dict[str, list[int]]], report: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Lower 95 % bound of min(AS - AN, AS - HS, AS - DS) on held-out pairs, and mean AS there."""
    if len(report) < 2:
        nan = np.full(a.shape[1], np.nan)
        return nan, nan
    mean = {c: _cell_means(a, cells[c], list(report)) for c in CELLS}
    bound = lower_bound_min([mean["AS"] - mean[c] for c in ("AN", "HS", "DS")])
    return bound, mean["AS"].mean(0)


def _call_ai_speech(
    frame: pd.DataFrame, family: MaxT | None, held: dict[str, tuple[str, ...]], has_dog: bool
) -> str:
    needed = 2 * fewest_units(ALPHA)
    n = len(held.get("discover", ()))
    note = _add_tests(frame, family, n, "matched statement pairs", "ai_speech")
    if not has_dog or len(held.get("report", ())) < 2 or note:
        frame["ai_speech"] = "undetermined"
        why = (
            "the grid has no speaking animal"
            if not has_dog
            else f"at least {needed} matched statement pairs are needed"
        )
        return f"ai_speech: undetermined, {why}"
    called = (
        (frame["p_fwer"] <= ALPHA)
        & (frame["interaction"] > 0)
        & (frame["held_AS"] > 0)
        & (frame["held_bound"] >= frame["held_AS"] / 2)
    )
    frame["ai_speech"] = np.where(called, "yes", "no")
    return f"ai_speech: tested on {n} matched pairs, size checked on {len(held['report'])} others"


def _cell_means(
    a: np.ndarray, cell: dict[str, list[int]], matches: list[str]
) -> Float[np.ndarray, "n_matches f"]:
    return np.stack([a[cell[m]].mean(0) for m in matches])


# --- attribution and ablation --------------------------------------------------------------------------


def _by_effect(
    model: Model, saes: list[Sae], pairs: PromptPairs, probe: Probe, by: str, top_k: int, progress: bool
) -> Ranking:
    engine = ProbeEngine(model, pairs, probe)
    frame = pd.concat(
        [_names(sae, 0, sae.d_sae).assign(attribution=attribution(engine, sae)) for sae in saes],
        ignore_index=True,
    ).sort_values("attribution", ascending=False, kind="stable", ignore_index=True)
    note = f"unsteered bias {engine.base.bias:+.4f}"
    if by == "ablation":
        first = frame["attribution"].abs().sort_values(ascending=False, kind="stable").index[:top_k]
        frame["ablation"] = np.nan
        frame.loc[first, "ablation"] = exact_ablation(
            engine, list(frame.loc[first, "feature"]), progress=progress
        )
        frame = frame.sort_values(
            "ablation", ascending=False, kind="stable", na_position="last", ignore_index=True
        )
        note += f"; the {len(first)} features of largest |attribution| ablated exactly, the rest not measured"
    if engine.base.bias:
        for column in [c for c in ("attribution", "ablation") if c in frame]:
            frame[f"{column}_share"] = frame[column] / engine.base.bias
    return Ranking(by, frame, len(frame), len(pairs.templates), "templates", note)


# --- shared --------------------------------------------------------------------------------------------


def _last_residuals(model: Model, prompts: Sequence[str], saes: Sequence[Sae]) -> dict[int, Tensor]:
    """Float32 last-token residuals [n_prompts, d_model] at every layer the SAEs sit at, in one pass."""
    layers = sorted({s.site.layer for s in saes})
    out = {layer: torch.empty(len(prompts), model.d_model, device=model.device) for layer in layers}
    for batch in plan_batches([model.encode(p) for p in prompts], model.device):
        for layer, x in capture_layers(model, batch.tokens, layers).items():
            out[layer][list(batch.index)] = x[:, -1].float().to(model.device)
    for layer, x in out.items():
        bad = ~torch.isfinite(x).all(-1)
        if bool(bad.any()):
            raise RequestError(
                f"{model.name} has NaN or infinite residuals at layer {layer} on {prompts[int(bad.nonzero()[0])]!r}."
            )
    return out


@torch.no_grad()
def _densities(model: Model, saes: Sequence[Sae]) -> np.ndarray:
    """Share of ordinary tokens of the bundled neutral text on which each feature fires."""
    layers = sorted({s.site.layer for s in saes})
    special = torch.tensor(sorted(model.special_ids), device=model.device)
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in plan_batches([model.encode(t) for t in load_texts("neutral")], model.device):
        ordinary = ~torch.isin(batch.tokens, special)
        for layer, x in capture_layers(model, batch.tokens, layers).items():
            kept[layer].append(x[ordinary.to(x.device)].float())
    resid = {layer: torch.cat(parts).to(model.device) for layer, parts in kept.items()}
    rates = [
        (acts > 0).double().mean(0).cpu().numpy()
        for sae in saes
        for _, acts, _ in acts_blocks(sae, resid[sae.site.layer])
    ]
    return np.concatenate(rates)


def _names(sae: Sae, start: int, n: int) -> pd.DataFrame:
    index = np.arange(start, start + n)
    return pd.DataFrame(
        {
            "feature": [f"{sae.id}#{i}" for i in index],
            "sae": str(sae.id),
            "index": index,
            "layer": sae.site.layer,
        }
    )


def _rows_of(labels: Sequence[str]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(label, []).append(i)
    return list(rows.values())


def _means(values: np.ndarray, rows: list[list[int]]) -> Float[np.ndarray, "n_units f"]:
    return np.stack([values[r].mean(0) for r in rows])
