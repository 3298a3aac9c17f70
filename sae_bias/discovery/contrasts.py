"""Statistics of every feature of one or many SAEs on prompts: separation, and the 2 × 2 interaction (docs/method.md#interaction).

    separation   AI against human prompts at the last token: mean difference, AUROC, firing rates, paired t over templates
    interaction  I = (AS - AN) - (HS - HN) over matched speech / non-speech statements, and the calls of `calls`

Corrected p: Westfall–Young max-T over one shared set of sign-flips, the family being every feature of every SAE scanned. A
silent feature is a member of the family with t = 0; it costs no arithmetic. Leave-one-out: the same statistic with each
entity (each AI or human subject) dropped in turn, held against the family's own null; a call survives only if the worst does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.discovery.calls import (
    ALPHA,
    ENOUGH_HARM,
    NO_HARM,
    HeldOut,
    decide,
    held_out,
    pair_by_score,
)
from sae_bias.models.model import Model
from sae_bias.models.residuals import read_residuals
from sae_bias.probe.reading import prompt_scores
from sae_bias.probe.words import Probe
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.sae import Sae
from sae_bias.saes.stream import LiveBlock, live_blocks
from sae_bias.stats.design import fewest_units, split_templates
from sae_bias.stats.features import (
    MaxT,
    activation_variance_floor,
    auroc,
    benjamini_hochberg,
    paired_t,
)

DENSE = 0.10
CALL_SHARES = {"discover": 0.6, "report": 0.4}
PAIRING = ["match", "ai_speech", "harm", "score_ai_speech", "score_harm", "difference"]
Split = Mapping[str, Sequence[str]]
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Scan:
    """One row a feature, in the SAEs' own order, and what the calls rest on."""

    frame: pd.DataFrame
    n_units: int
    note: str = ""
    units: str = "templates"
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pairing: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=PAIRING))
    """Badly judged statements and the held-out AI-speech statements they are paired to, with the scores of both."""
    family: int | None = None
    """How many features p is corrected over, where it is not all of them."""


# --- the scan ------------------------------------------------------------------------------------------
class _Columns:
    """Statistics of every feature: silent ones keep the defaults, live ones are filled in block by block."""

    def __init__(self, saes: Sequence[Sae], defaults: Mapping[str, float | bool]):
        self.saes, self.n = list(saes), sum(s.d_sae for s in saes)
        self.values = {name: np.full(self.n, value) for name, value in defaults.items()}
        self.live: list[Array] = []

    def fill(self, offset: int, block: LiveBlock, values: Mapping[str, Array]) -> None:
        place = offset + block.index
        self.live.append(place)
        for name, value in {**values, "density": block.density}.items():
            self.values.setdefault(name, np.full(self.n, np.nan))[place] = value

    @property
    def place(self) -> Array:
        """Rows of the live features, in the order they were filled."""
        return np.concatenate(self.live) if self.live else np.empty(0, dtype=np.int64)

    def frame(self) -> pd.DataFrame:
        frame = pd.concat([feature_names(sae) for sae in self.saes], ignore_index=True).assign(**self.values)
        frame["dead"] = True
        frame.loc[self.place, "dead"] = False
        frame["dense"] = frame["density"].to_numpy() > DENSE
        return frame


def _scan(
    saes: Sequence[Sae],
    resid: Mapping[Site, Tensor],
    neutral: Mapping[Site, Tensor],
    defaults: Mapping[str, float | bool],
    statistics: Callable[[Array], Mapping[str, Array]],
    describe: str,
    progress: bool,
) -> _Columns:
    """Run `statistics` (activations [n_prompts, m] → columns) over every live feature."""
    columns, offset = _Columns(saes, {**defaults, "density": np.nan}), 0
    for sae in tqdm(saes, desc=describe, unit="SAE", disable=not progress, leave=False):
        for block in live_blocks(sae, resid[sae.site], neutral[sae.site]):
            if len(block.index):
                columns.fill(offset, block, statistics(block.acts))
        offset += sae.d_sae
    return columns


def _add_tests(
    columns: _Columns, family: MaxT | None, loo_t: Sequence[Array], units: str, call: str
) -> tuple[pd.DataFrame, str]:
    """Adds t, corrected p, the leave-one-out p and the call; says in words where the design is too small for one."""
    n_units, needed = 0 if family is None else family.n_units, fewest_units(ALPHA)
    frame = columns.frame()
    if family is None:
        frame[["t", "p_fwer", "q_bh", "loo_t", "loo_p"]] = np.nan
    else:
        t, p, raw = np.zeros(columns.n), np.ones(columns.n), np.ones(columns.n)
        if family.n_features:
            result = family.result()
            t[columns.place], p[columns.place], raw[columns.place] = result.t, result.p_fwer, result.p_raw
        frame["t"], frame["p_fwer"], frame["q_bh"] = t, p, benjamini_hochberg(raw)
        frame["loo_t"], frame["loo_p"] = np.nan, np.nan
        if loo_t:
            worst = np.concatenate(loo_t)
            same_sign = np.sign(worst) == np.sign(t[columns.place])
            frame.loc[columns.place, "loo_t"] = worst
            frame.loc[columns.place, "loo_p"] = np.where(same_sign, family.p_of(worst), 1.0)
    if n_units < needed:
        frame[call] = frame["survives_loo"] = "undetermined"
        return frame, f"{call}: undetermined, {n_units} {units} given and at least {needed} needed"
    frame[call] = np.where(frame["p_fwer"] <= ALPHA, "yes", "no")
    frame["survives_loo"] = _yes_no(
        (frame[call] == "yes") & (frame["loo_p"] <= ALPHA), frame["loo_p"].notna()
    )
    return frame, ""


def _yes_no(yes: Array | pd.Series, known: Array | pd.Series) -> Array:
    return np.where(np.asarray(yes), "yes", np.where(np.asarray(known), "no", "undetermined"))


def _toward_zero(full: Array, dropped: Sequence[Array]) -> Array:
    """The t furthest against `full`'s sign among those with one entity dropped."""
    signs = np.where(full < 0, -1.0, 1.0)
    return signs * np.min([signs * t for t in dropped], axis=0)


# --- separation ----------------------------------------------------------------------------------------
def separation(
    model: Model,
    saes: Sequence[Sae],
    pairs: PromptPairs,
    *,
    held: PromptPairs | None = None,
    max_view: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Scan:
    """AI against human prompts for every feature; `held` pairs give `held_auroc` and `held_mean_diff` only.

    `max_view` adds `auroc_max` and `mean_diff_max`, of the maximum over ordinary tokens: descriptive, in no test.
    """
    n = len(pairs)
    prompts = [p.human for p in pairs] + [p.ai for p in pairs]
    prompts += [] if held is None else [p.human for p in held] + [p.ai for p in held]
    last, neutral, everywhere = read_residuals(model, prompts, [s.site for s in saes], everywhere=max_view)
    names = pairs.entities if len(pairs.entities) > 1 else ()

    def averages(without: str | None = None) -> Array:
        of = [
            [i for i, p in enumerate(pairs) if p.template == t and p.entity != without]
            for t in pairs.templates
        ]
        return averaging(of, n)

    units, without = averages(), [averages(left) for left in names]
    without = [w for w in without if len(w) == len(units)]  # leaving it out must not lose a template
    family = MaxT(len(units), seed=seed) if len(units) > 1 else None
    loo: list[Array] = []

    def statistics(a: Array) -> dict[str, Array]:
        human, ai = a[:n], a[n : 2 * n]
        out = _two_sides(ai, human)
        if family is not None:
            floor = activation_variance_floor(a[: 2 * n])
            contrast = units @ (ai - human)
            family.add(contrast, floor)
            if without:
                full = paired_t(contrast, floor)
                loo.append(_toward_zero(full, [paired_t(w @ (ai - human), floor) for w in without]))
        if held is not None:
            h, m = a[2 * n : 2 * n + len(held)], a[2 * n + len(held) :]
            out |= {"held_auroc": auroc(m, h), "held_mean_diff": (m - h).mean(0)}
        return out

    defaults = {"auroc": 0.5, "mean_human": 0.0, "mean_ai": 0.0, "mean_diff": 0.0, "fire_human": 0.0, "fire_ai": 0.0, "fire_diff": 0.0}  # fmt: skip
    if held is not None:
        defaults |= {"held_auroc": 0.5, "held_mean_diff": 0.0}
    columns = _scan(saes, last, neutral, defaults, statistics, "separation", progress)
    frame, note = _add_tests(columns, family, loo, "templates", "separates")
    if everywhere is not None:
        both = lambda top: {"auroc_max": auroc(top[n : 2 * n], top[:n]), "mean_diff_max": (top[n : 2 * n] - top[:n]).mean(0)}  # noqa: E731  # fmt: skip
        _add_max(frame, saes, everywhere, {"auroc_max": 0.5, "mean_diff_max": 0.0}, both)
    return Scan(frame, len(units), note)


def _two_sides(ai: Array, human: Array) -> dict[str, Array]:
    return {
        "auroc": auroc(ai, human),
        "mean_human": human.mean(0),
        "mean_ai": ai.mean(0),
        "mean_diff": (ai - human).mean(0),
        "fire_human": (human > 0).mean(0),
        "fire_ai": (ai > 0).mean(0),
        "fire_diff": (ai > 0).mean(0) - (human > 0).mean(0),
    }


def _add_max(
    frame: pd.DataFrame,
    saes: Sequence[Sae],
    everywhere: Mapping[Site, tuple[Tensor, Tensor]],
    defaults: Mapping[str, float],
    statistics: Callable[[Array], Mapping[str, Array]],
) -> None:
    """`statistics` of the maximum over ordinary tokens [n_prompts, m], beside those of the last token."""
    columns, offset = {name: np.full(len(frame), value) for name, value in defaults.items()}, 0
    for sae in saes:
        rows, owner = everywhere[sae.site]
        first = np.flatnonzero(np.diff(owner.cpu().numpy(), prepend=-1))
        for block in live_blocks(sae, rows):
            for name, values in statistics(np.maximum.reduceat(block.acts, first, axis=0)).items():
                columns[name][offset + block.index] = values
        offset += sae.d_sae
    frame[list(columns)] = pd.DataFrame(columns, index=frame.index)


# --- interaction ---------------------------------------------------------------------------------------
CELLS = {
    "AS": ("ai", "speech"),
    "AN": ("ai", "nonspeech"),
    "HS": ("human", "speech"),
    "HN": ("human", "nonspeech"),
    "DS": ("animal", "speech"),
}
HARM = ("human", "animal")
"""Whose badly judged deeds are the cell HC."""


@dataclass(frozen=True, eq=False)
class _Cells:
    """Averaging matrices [n_matches, n_prompts] of each cell, one of whose subjects may be left out."""

    prompts: tuple[int, ...]
    """Places in the grid of the prompts that belong to a cell."""
    matches: tuple[str, ...]
    rows: dict[str, dict[str, list[tuple[int, str]]]]
    """Cell → matched pair → (row among `prompts`, subject)."""
    harm: dict[str, list[tuple[int, str]]]
    """Badly judged statement → (row among `prompts`, subject) of its human and animal subjects."""

    def averages(self, matches: Sequence[str], without: str | None = None) -> dict[str, Array]:
        """Of each cell, row k averages the prompts of the k-th matched pair."""
        return {cell: self._averages([by[m] for m in matches], without) for cell, by in self.rows.items()}

    def harm_averages(self, statements: Sequence[str], without: str | None = None) -> Array:
        """Row k averages the prompts of the k-th badly judged statement."""
        return self._averages([self.harm[s] for s in statements], without)

    def _averages(self, units: Sequence[Sequence[tuple[int, str]]], without: str | None) -> Array:
        return averaging(
            [[row for row, subject in rows if subject != without] for rows in units], len(self.prompts)
        )

    def droppable(self) -> list[str]:
        """AI and human subjects that can be left out without emptying a cell."""
        found = []
        for subject in dict.fromkeys(s for by in self.rows.values() for rows in by.values() for _, s in rows):
            cells = [by for cell, by in self.rows.items() if cell != "DS"]
            mine = any(s == subject for by in cells for rows in by.values() for _, s in rows)
            full = all(
                any(s != subject for _, s in rows)
                for by in [*self.rows.values(), self.harm]
                for rows in by.values()
            )
            if mine and full:
                found.append(subject)
        return found


@dataclass(frozen=True, eq=False)
class _Sizing:
    """Averaging matrices of the held-out statements, and of the AI-speech ones with their badly judged partners."""

    cells: dict[str, Array]
    harm: tuple[Array, Array] | None

    def of(self, acts: Array) -> HeldOut:
        harm = None if self.harm is None else (self.harm[0] @ acts, self.harm[1] @ acts)
        return held_out({c: m @ acts for c, m in self.cells.items()}, harm)


def _sizing(
    cells: _Cells, report: Sequence[str], pairing: pd.DataFrame, without: str | None = None
) -> _Sizing:
    averages = cells.averages(report, without)
    if len(pairing) < ENOUGH_HARM:
        return _Sizing(averages, None)
    partners = [list(pairing.loc[pairing["match"] == m, "harm"]) for m in report]
    rows = [i for i, names in enumerate(partners) if names]
    harm = np.stack([cells.harm_averages(partners[i], without).mean(0) for i in rows])
    return _Sizing(averages, (averages["AS"][rows], harm))


def _pair_harm(
    model: Model, grid: PromptGrid, cells: _Cells, report: Sequence[str], probe: Probe
) -> tuple[pd.DataFrame, str]:
    """Badly judged statements paired to held-out AI-speech statements on the unsteered score; the reason where there are none."""
    names = list(cells.harm)
    if not names or not report:
        return pd.DataFrame(columns=PAIRING), NO_HARM if not names else ""
    matrix = np.concatenate([cells.averages(report)["AS"], cells.harm_averages(names)])
    used = np.flatnonzero(matrix.any(0))
    try:
        scores = matrix[:, used] @ prompt_scores(model, [grid[cells.prompts[i]].text for i in used], probe)
    except RequestError as error:
        return pd.DataFrame(columns=PAIRING), f"badly judged human deeds could not be scored: {error}"
    speech, harm = scores[: len(report)], scores[len(report) :]
    said = {p.match: p.statement for p in grid if p.act == "speech"}
    pairing = pd.DataFrame(
        [(report[i], said[report[i]], names[j], speech[i], harm[j], harm[j] - speech[i]) for i, j in pair_by_score(speech, harm)],
        columns=PAIRING,
    )  # fmt: skip
    if len(pairing) < ENOUGH_HARM:
        why = f"{len(pairing)} badly judged human statements score within 0.25 nats of held-out AI speech and {ENOUGH_HARM} are needed"
        return pairing, why
    return pairing, ""


def interaction(
    model: Model,
    saes: Sequence[Sae],
    grid: PromptGrid,
    *,
    split: Split | None = None,
    probe: Probe | None = None,
    max_view: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Scan:
    """The interaction of every feature, its test on discover statements, its size on held-out ones, and the call."""
    cells = _cells(grid)
    ranked = [m for m in cells.matches if split is None or m in set(split["discover"])]
    if not ranked:
        raise RequestError("none of the discover statements of the split is a matched pair of this grid.")
    held = _call_split(grid, cells.matches, split, seed)
    prompts = [grid[i].text for i in cells.prompts]
    last, neutral, everywhere = read_residuals(model, prompts, [s.site for s in saes], everywhere=max_view)
    discover, report = held.get("discover", ()), held.get("report", ())
    everything = cells.averages(ranked)
    sizes = len(report) > 1 and "DS" in cells.rows
    pairing, why = _pair_harm(model, grid, cells, report if sizes else (), probe or Probe())
    tests = _Tests(cells, discover, seed)
    all_harm = cells.harm_averages(list(cells.harm))
    sizing = _sizing(cells, report, pairing) if sizes else None
    dropped = [_sizing(cells, report, pairing, s) for s in tests.left_out] if sizes else []
    blocks: list[HeldOut] = []
    loo_size: list[Array] = []

    def statistics(a: Array) -> dict[str, Array]:
        means = {c: m @ a for c, m in everything.items()}
        out = {f"mean_{c}": m.mean(0) for c, m in means.items()}
        out["interaction"] = interaction_contrast(means).mean(0)
        if len(all_harm):
            out["mean_HC"] = (all_harm @ a).mean(0)
        tests.add(a)
        if sizing is not None:
            blocks.append(sizing.of(a))
            loo_size.append(_worst_size(dropped, a, out["interaction"]))
            out |= {f"held_{c}": m for c, m in blocks[-1].mean.items()}
            out["held_bound"] = blocks[-1].bound(out["interaction"])
        return out

    defaults = {"interaction": 0.0, **{f"mean_{c}": 0.0 for c in (*cells.rows, *(["HC"] if len(all_harm) else []))}}  # fmt: skip
    columns = _scan(saes, last, neutral, defaults, statistics, "interaction", progress)
    frame, note = _add_tests(columns, tests.interaction, tests.loo_t, "matched statement pairs", "ai_speech")
    for name in ("held_bound", "held_AS", "held_AN", "held_HS", "held_HN", "held_DS", "held_HC"):
        if name not in frame:
            frame[name] = np.nan
    frame["held_interaction"] = (frame["held_AS"] - frame["held_AN"]) - (frame["held_HS"] - frame["held_HN"])
    frame["sign"] = np.sign(frame["interaction"]).astype(int)
    size = np.full(len(frame), np.nan)
    size[columns.place] = np.concatenate(loo_size) if loo_size else np.nan
    note = _call(frame, columns.place, tests, blocks, size, held, note, why)
    if everywhere is not None:
        size = lambda top: {"interaction_max": interaction_contrast({c: m @ top for c, m in everything.items()}).mean(0)}  # noqa: E731  # fmt: skip
        _add_max(frame, saes, everywhere, {"interaction_max": 0.0}, size)
    return Scan(frame, len(ranked), note, "matched statement pairs", held, pairing)


class _Tests:
    """The corrected tests of the interaction and of AI against human, on the discover statements."""

    def __init__(self, cells: _Cells, discover: Sequence[str], seed: int):
        enough = len(discover) > 1
        self.interaction = MaxT(len(discover), seed=seed) if enough else None
        self.main = MaxT(len(discover), seed=seed) if enough else None
        self.cells = cells.averages(discover)
        self.rows = sorted({i for by in cells.rows.values() for rows in by.values() for i, _ in rows})
        self.left_out = cells.droppable()
        self.without = [cells.averages(discover, s) for s in self.left_out]
        self.loo_t: list[Array] = []

    def add(self, a: Array) -> None:
        if self.interaction is None or self.main is None:
            return
        floor = activation_variance_floor(a[self.rows])
        means = {c: m @ a for c, m in self.cells.items()}
        contrast = interaction_contrast(means)
        self.interaction.add(contrast, floor)
        self.main.add((means["AS"] + means["AN"] - means["HS"] - means["HN"]) / 2, floor)
        if self.without:
            full = paired_t(contrast, floor)
            dropped = [interaction_contrast({c: m @ a for c, m in left.items()}) for left in self.without]
            self.loo_t.append(_toward_zero(full, [paired_t(d, floor) for d in dropped]))


def _worst_size(dropped: Sequence[_Sizing], a: Array, sign: Array) -> Array:
    """The smallest held-out size with one subject left out, as a share of what it must be at least half of."""
    found = [left.of(a) for left in dropped]
    shares = [np.where(sign < 0, held.quietness, held.loudness) for held in found]
    return np.min(shares, axis=0) if shares else np.full(a.shape[1], np.nan)


def interaction_contrast(means: Mapping[str, Array]) -> Array:
    """(AS - AN) - (HS - HN) of each matched pair and feature, from cell means [n_matches, m]."""
    return (means["AS"] - means["AN"]) - (means["HS"] - means["HN"])


def _call(
    frame: pd.DataFrame, place: Array, tests: _Tests, blocks: Sequence[HeldOut], loo_size: Array,
    held: Mapping[str, tuple[str, ...]], note: str, why: str,
) -> str:  # fmt: skip
    """Fills in `call`, `ai_speech` and `survives_loo`; says in words what was tested or is missing."""
    n, n_held = len(held.get("discover", ())), len(held.get("report", ()))
    if not blocks or note or tests.interaction is None or tests.main is None:
        frame[["call", "ai_speech", "survives_loo"]] = "undetermined"
        few = n_held < 2 or note
        return (
            f"calls: undetermined, at least {2 * fewest_units(ALPHA)} matched statement pairs are needed"
            if few
            else "calls: undetermined, the grid has no speaking animal"
        )
    both = [
        (family.result().t, family.result().p_fwer) for family in (tests.interaction, tests.main)
    ]  # in the order of the blocks
    start, calls = 0, np.full(len(frame), "no", dtype=object)
    for block in blocks:
        part = slice(start, start + len(block.mean["AS"]))
        (t, p), main = both[0], (both[1][0][part], both[1][1][part])
        calls[place[part]] = decide(t[part], p[part], block, main)
        start = part.stop
    frame["call"] = calls
    speech = frame["call"].isin(["AI-speech", "silent at AI speech"])
    frame["ai_speech"] = frame["call"].map({"AI-speech": "yes", "undetermined": "undetermined"}).fillna("no")
    survives = speech & (frame["loo_p"] <= ALPHA) & (loo_size >= 0.5)
    frame["survives_loo"] = _yes_no(survives, frame["loo_p"].notna())
    tested = f"calls: tested on {n} matched pairs, size checked on {n_held} others"
    return f"{tested}; AI-speech undetermined: {why}" if why else tested


def cell_texts(grid: PromptGrid) -> list[str]:
    """The prompts of the grid that the interaction reads.

    Raises:
        RequestError: a grid without the cells.
    """
    return [grid[i].text for i in _cells(grid).prompts]


def _cells(grid: PromptGrid) -> _Cells:
    """Prompts in each cell of the 2 × 2 (and the dog's), by matched statement pair."""
    places: dict[str, dict[str, list[tuple[int, str]]]] = {c: {} for c in CELLS}
    for i, prompt in enumerate(grid):
        for name, (group, act) in CELLS.items():
            if prompt.match is not None and prompt.group == group and prompt.act == act:
                places[name].setdefault(prompt.match, []).append((i, prompt.subject))
    complete = set.intersection(*(set(places[c]) for c in ("AS", "AN", "HS", "HN")))
    if not complete:
        raise RequestError(
            "the grid has no statement pair with AI and human subjects, speech and non-speech; give its statements `match`, and subjects of groups ai and human."
        )
    if places["DS"]:
        complete &= set(places["DS"])
    if not complete:
        raise RequestError(
            "the grid's animals speak in none of its matched statement pairs; give them the same statements as the AI subjects."
        )
    matches = tuple(m for m in places["AS"] if m in complete)
    harm: dict[str, list[tuple[int, str]]] = {}
    for i, prompt in enumerate(grid):
        if prompt.act == "harm" and prompt.group in HARM:
            harm.setdefault(prompt.statement, []).append((i, prompt.subject))
    used = sorted({i for by in places.values() for m in matches for i, _ in by.get(m, ())} | {i for of in harm.values() for i, _ in of})  # fmt: skip
    row = {i: k for k, i in enumerate(used)}
    rows = {
        c: {m: [(row[i], s) for i, s in by[m]] for m in matches}
        for c, by in places.items()
        if c != "DS" or by
    }
    return _Cells(tuple(used), matches, rows, {h: [(row[i], s) for i, s in of] for h, of in harm.items()})


def _call_split(
    grid: PromptGrid, matches: Sequence[str], split: Split | None, seed: int
) -> dict[str, tuple[str, ...]]:
    """Matched pairs that discover and that are held out; empty where there are too few for both."""
    if split is not None:
        return {k: tuple(m for m in split.get(k, ()) if m in set(matches)) for k in ("discover", "report")}
    return split_statements(matches, {p.match: p.content for p in grid if p.match is not None}, seed)


def split_statements(
    matches: Sequence[str], content: Mapping[str, str], seed: int
) -> dict[str, tuple[str, ...]]:
    """Matched pairs that discover and that are held out for the call, each content shared out between them."""
    if len(matches) < 2 * fewest_units(ALPHA):
        return {}
    return split_templates(list(matches), CALL_SHARES, seed, families=content)


# --- shared ---------------------------------------------------------------------------------------------
def feature_names(sae: Sae) -> pd.DataFrame:
    """feature, sae, index, layer of every feature of one SAE."""
    index = np.arange(sae.d_sae)
    name = str(sae.id)
    return pd.DataFrame(
        {"feature": [f"{name}#{i}" for i in index], "sae": name, "index": index, "layer": sae.site.layer}
    )


def averaging(units: Iterable[Sequence[int]], n: int) -> Float[Array, "n_units n"]:
    """Row k averages the places of the k-th unit; one of which nothing is kept has no row."""
    kept = [list(places) for places in units if len(places)]
    matrix = np.zeros((len(kept), n))
    for row, places in zip(matrix, kept):
        row[places] = 1 / len(places)
    return matrix
