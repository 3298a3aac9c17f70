"""Which SAE does a bare feature index mean? ("2511", with no layer, width or L0: docs/published.md#feature-search)

The index exists in every candidate, so each candidate's feature is read and put beside the published activation table (docs/published.md#activation-table). The
published ordering fits one live feature in sixty by luck, so a fit is an empirical rank among ≥ 1,000 other indices of the same
file, whose columns come with the same file pages, and is corrected over all candidates named (Holm), read or not:

    p = (1 + others that fit at least as well) / (1 + others)

Where several survive, the table does not identify the feature, and this says so; the effect of suppressing each breaks the tie.
A 65k-wide file is read to less than 2 % (w_enc is stored row by row: one column is one number of every row, and a page of it holds
a thousand neighbors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError, SaeBiasError
from sae_bias.core.site import Site
from sae_bias.discovery.ordering import LEVELS, SUBJECTS, published_fit, published_order, published_rows
from sae_bias.models.model import Model
from sae_bias.models.residuals import last_residuals
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.load import load_grid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import expand_saes, load_sae
from sae_bias.saes.remote import (
    Confirm,
    RemoteTensorFile,
    Span,
    hub_place,
    is_cached,
    open_remote,
    w_enc_file,
)
from sae_bias.saes.sae import Feature, Sae, check_sae
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.features import holm
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine

if TYPE_CHECKING:
    import plotly.graph_objects as go


ALPHA = 0.05
PAGE = 4096
SCORE = "Pearson's r with the published levels 0, 2, 2, 3, 4 (AI) and 0 (human, dog)"
COLUMNS = ["sae", "status", "layer", "d_sae", "fit", "ordered", "rank", "n_null", "n_live", "null_95", "p", "p_holm", "survives", "ai_speech", "harm", "removed", "removed_low", "removed_high", "bytes_read", "bytes_file"]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Resolution:
    """What a bare index is in each candidate SAE, and which of them the published table fits."""

    index: int
    candidates: pd.DataFrame
    """One row a candidate, best fit first; those that could not be read say why in `status`."""
    tables: dict[str, pd.DataFrame] = field(repr=False)
    """SAE → its table: an AI, a human, a dog × the five statements."""
    verdict: str
    feature: FeatureRef | None
    """The feature meant, where the evidence identifies one."""
    tie_broken: bool = False
    """Whether it took the effect of suppression."""

    def to_frame(self) -> pd.DataFrame:
        return self.candidates.copy()

    def table(self, sae: str) -> pd.DataFrame:
        """One candidate's subjects × statements."""
        if sae not in self.tables:
            raise RequestError(
                f"{sae} has no table here; it has {', '.join(self.tables) or 'none: no candidate could be read'}."
            )
        return self.tables[sae].copy()

    @property
    def bytes_read(self) -> int:
        return int(self.candidates["bytes_read"].fillna(0).sum())

    def plot(self) -> go.Figure:
        """Every candidate's fit against its own file's other features."""
        from sae_bias.figures.features import candidates_figure

        return candidates_figure(self.candidates, self.index)

    def __repr__(self) -> str:
        lines = [f"Feature {self.index} in {len(self.candidates)} candidate SAEs: {self.verdict}"]
        for row in self.candidates.to_dict("records"):
            if row["status"] != "read":
                lines.append(f"\n{row['sae']}: {row['status']}")
                continue
            lines.append(
                f"\n{row['sae']} (layer {row['layer']:.0f}): fit {row['fit']:.2f}, rank {row['rank']:.0f} of {row['n_null'] + 1:.0f}, "
                f"Holm p {row['p_holm']:.3g}{', ordered as published' if row['ordered'] else ''}"
            )
            lines.append(self.tables[row["sae"]].round(2).to_string())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(f'Feature {self.index}: {self.verdict}')}</p>" + self.candidates.round(3).to_html(
            escape=True, index=False
        )


@dataclass
class _Candidate:
    """One SAE as far as it could be read."""

    name: str
    status: str = "read"
    sae: Sae | None = None
    spans: list[Span] = field(default_factory=list)
    bytes_read: int = 0
    acts: Float[np.ndarray, "15 n"] | None = None
    place: int = 0
    """Column of `acts` that is the index itself."""
    feature: Feature | None = None
    harm: float = float("nan")
    """Mean activation on human and dog subjects in badly judged statements: the table itself has none."""


def resolve_index(
    model: Model,
    index: int,
    saes: Sequence[Sae | SaeId | str] | Sae | SaeId | str,
    *,
    n_null: int = 1000,
    seed: int = 0,
    grid: PromptGrid | None = None,
    pairs: PromptPairs | None = None,
    probe: Probe | None = None,
    confirm: Confirm | None = None,
    progress: bool = False,
) -> Resolution:
    """Put feature `index` of every candidate beside the published table.

    Args:
        saes: names or folders; a folder of SAE folders stands for all of them. A candidate that cannot be read is listed
            with its reason and the rest go on.
        n_null: how many other indices of the same file each fit is ranked among. The smallest p is 1 / (n_null + 1), so many
            candidates need more.
        pairs: prompt pairs; then, where several candidates survive, each is ablated and the largest effect breaks the tie.
        confirm: asked before a whole w_enc is fetched from the hub (what, bytes) -> bool; None fetches none.

    Raises:
        RequestError: an index that is not a whole number from 0, n_null below 100, no candidates, two with one id.
    """
    ref = FeatureRef(SaeId("candidate", ""), index)  # refuses an index that is none
    if n_null < 100:
        raise RequestError(f"n_null={n_null}: a rank among fewer than 100 others says nothing; give 1000.")
    names = expand_saes(saes)
    grid = load_grid() if grid is None else grid
    prompts = [grid[i].text for i in published_rows(grid)]
    prompts += [p.text for p in grid if p.act == "harm" and p.subject in ("human", "dog")]
    candidates = [_Candidate(str(n.id) if isinstance(n, Sae) else str(n)) for n in names]
    rng = np.random.default_rng(seed)
    for candidate, name in zip(candidates, names):
        _guarded(candidate, lambda c, n=name: _open(c, n, model, ref.index, n_null, rng, confirm))
    _refuse_doubles(candidates)
    layers = {c.sae.site for c in candidates if c.sae is not None and c.status == "read"}
    resid = last_residuals(model, prompts, layers) if layers else {}
    for candidate in tqdm(candidates, desc="resolve", unit="SAE", disable=not progress, leave=False):
        _guarded(candidate, lambda c: _read(c, resid, ref.index))
    frame = _ranked(candidates)
    survivors = [c for c in candidates if c.name in set(frame.loc[frame["survives"], "sae"])]
    verdict, chosen, broken = _verdict(frame, survivors, model, pairs, probe)
    tables = {c.name: _table(c) for c in candidates if c.acts is not None}
    return Resolution(ref.index, frame, tables, verdict, chosen, broken)


def _guarded(candidate: _Candidate, step) -> None:
    """Run a step; a candidate that fails is listed with its reason and the rest go on."""
    if candidate.status != "read":
        return
    try:
        step(candidate)
    except SaeBiasError as error:
        candidate.status = " ".join(str(error).split())


def _refuse_doubles(candidates: Sequence[_Candidate]) -> None:
    names = [c.name for c in candidates]
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise RequestError(f"{doubled[0]} is given twice; each candidate counts once.")


# --- reading ---------------------------------------------------------------------------------------------------
def _open(
    candidate: _Candidate, name: Sae | SaeId | str, model: Model, index: int, n_null: int, rng: np.random.Generator,
    confirm: Confirm | None,
) -> None:  # fmt: skip
    place = None if isinstance(name, Sae) or Path(str(name)).expanduser().is_dir() else hub_place(str(name))
    sae = open_remote(place) if place is not None and not is_cached(place) else load_sae(name)
    candidate.sae, candidate.name = sae, str(sae.id)
    check_sae(model, sae)
    if index >= sae.d_sae:
        candidate.status = f"index {index:,} is beyond its width ({sae.d_sae:,})"
        return
    candidate.spans = null_spans(sae, index, n_null, rng)
    remote = _remote(sae)
    if remote is not None and (found := w_enc_file(sae)) is not None:
        n = 4 * sae.d_in * sae.d_sae
        refuse = lambda what, size: False  # noqa: E731
        if not remote.fetch_columns(found[1], candidate.spans, confirm or refuse):
            candidate.status = (
                f"its encoder is on the hub and was not fetched (about {n / 1e9:.1f} GB; needs a yes)"
            )
        candidate.bytes_read = remote.bytes_read


def null_spans(sae: Sae, index: int, n_null: int, rng: np.random.Generator) -> list[Span]:
    """Column spans to read: the file page the index lies in, then random pages until there are `n_null` others."""
    if not sae.reduces_to_one_row or sae.d_sae <= n_null + 1:
        return [(0, sae.d_sae)]
    width, shift = PAGE // 4, 0
    if (found := w_enc_file(sae)) is not None:
        slot = found[0].file.slots[found[1]]
        item = {torch.float64: 8, torch.float32: 4}.get(slot.torch_dtype or torch.float32, 2)
        width = PAGE // item
        shift = -(slot.offset // item) % width  # columns before the first whole page of row 0
    pages = [(max(0, a), min(a + width, sae.d_sae)) for a in range(shift - width if shift else 0, sae.d_sae, width)]  # fmt: skip
    own = next(page for page in pages if page[0] <= index < page[1])
    spans, others = [own], own[1] - own[0] - 1
    rest = [page for page in pages if page != own]
    for i in rng.permutation(len(rest)):
        if others >= n_null:
            break
        spans.append(rest[i])
        others += rest[i][1] - rest[i][0]
    return spans


def _read(candidate: _Candidate, resid: dict[Site, Tensor], index: int) -> None:
    sae = candidate.sae
    assert sae is not None
    x = resid[sae.site]
    before = _rows_bytes(sae, candidate.spans)
    blocks = []
    if sae.reduces_to_one_row:
        for start, stop in candidate.spans:
            w_enc, b_enc, threshold = (t.to(x.device) for t in sae.columns(start, stop))
            h = torch.addmm(b_enc, x, w_enc)
            blocks.append(torch.where(h > threshold, h, 0.0))
            if start <= index < stop:
                i = index - start
                (w_dec,) = sae.W_dec_rows([index])
                candidate.feature = Feature(
                    FeatureRef(sae.id, index), w_enc[:, i].cpu().contiguous(), w_dec, b_enc[i].cpu(), threshold[i].cpu(), sae.site
                )  # fmt: skip
    else:
        blocks.append(sae.encode(x))
        candidate.feature = sae.feature(index)
    acts = torch.cat(blocks, dim=1).cpu().double().numpy()
    candidate.acts, harm = acts[: len(SUBJECTS) * len(LEVELS)], acts[len(SUBJECTS) * len(LEVELS) :]
    columns = np.concatenate([np.arange(a, b) for a, b in candidate.spans])
    candidate.place = int(np.flatnonzero(columns == index)[0])
    candidate.harm = float(harm[:, candidate.place].mean()) if len(harm) else np.nan
    remote = _remote(sae)
    candidate.bytes_read = remote.bytes_read if remote is not None else before


def _rows_bytes(sae: Sae, spans: Sequence[Span]) -> int:
    """Bytes that reading the spans and one decoder row takes; the whole file where it is in memory or compressed."""
    found = w_enc_file(sae)
    if found is None or any(s.member is not None for s in found[0].file.slots.values()):
        return sae.path.stat().st_size if sae.path is not None else 0
    file = found[0].file
    item = {
        n: torch.empty(0, dtype=s.torch_dtype).element_size() for n, s in file.slots.items() if s.torch_dtype
    }
    names, n = found[0].names, sum(b - a for a, b in spans)
    total = n * sae.d_in * item[names["w_enc"]] + sae.d_in * item[names["w_dec"]]
    return total + n * sum(item[names[v]] for v in ("b_enc", "threshold") if v in names)


def _remote(sae: Sae) -> RemoteTensorFile | None:
    found = w_enc_file(sae)
    file = found[0].file if found is not None else None
    return file if isinstance(file, RemoteTensorFile) else None


# --- judging ---------------------------------------------------------------------------------------------------
def _ranked(candidates: Sequence[_Candidate]) -> pd.DataFrame:
    rows = []
    for c in candidates:
        row = dict.fromkeys(COLUMNS, np.nan) | {"sae": c.name, "status": c.status, "ordered": False, "bytes_read": c.bytes_read}  # fmt: skip
        if c.sae is not None:
            row |= {"layer": c.sae.site.layer, "d_sae": c.sae.d_sae, "bytes_file": _file_bytes(c.sae)}
        if c.acts is not None and c.status == "read":
            fits = published_fit(c.acts)
            own, others = float(fits[c.place]), np.delete(fits, c.place)
            better = int((others >= own - 1e-12).sum())
            row |= {
                "fit": own,
                "ordered": bool(published_order(c.acts[:, c.place])[0]),
                "rank": better + 1,
                "n_null": len(others),
                "n_live": int((np.delete(c.acts, c.place, axis=1).max(0) > 0).sum()),
                "null_95": float(np.quantile(others, 0.95)) if len(others) else np.nan,
                "p": (1 + better) / (1 + len(others)),
                "ai_speech": float(c.acts[1 : len(LEVELS), c.place].mean()),
                "harm": c.harm,
            }
        rows.append(row)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    read = frame["p"].notna()  # one that could not be read may be the one meant: it counts in the correction
    frame["p_holm"] = np.where(read, holm(frame["p"].fillna(1.0).to_numpy(dtype=float)), np.nan)
    frame["survives"] = (frame["p_holm"] <= ALPHA).to_numpy()
    return frame.sort_values(["p", "fit"], ascending=[True, False], na_position="last", ignore_index=True)


def _file_bytes(sae: Sae) -> float:
    found = w_enc_file(sae)
    return (
        float(found[0].file.size)
        if found is not None
        else float(sae.path.stat().st_size)
        if sae.path
        else np.nan
    )


def _verdict(
    frame: pd.DataFrame, survivors: list[_Candidate], model: Model, pairs: PromptPairs | None, probe: Probe | None
) -> tuple[str, FeatureRef | None, bool]:  # fmt: skip
    n_read, n_named = int(frame["fit"].notna().sum()), len(frame)
    of = "" if n_read == n_named else f" of the {n_read} of {n_named} that could be read"
    if not n_read:
        return "no candidate could be read", None, False
    effects = _suppressed(frame, survivors, model, pairs, probe) if pairs is not None and survivors else {}
    if len(survivors) == 1:
        only = survivors[0].feature
        assert only is not None
        said = (
            f"{only.ref}: the only candidate{of} the published table fits (Holm p ≤ {ALPHA} over {n_named})"
        )
        return f"{said}{_harm_words(frame, str(only.ref.sae))}", only.ref, False
    if not survivors:
        floor = float((1 / (1 + frame["n_null"])).min())
        if n_named * floor > ALPHA:
            needed = int(np.ceil(n_named / ALPHA))
            return f"not identifiable: {n_named} candidates need n_null ≥ {needed:,} for any to survive correction", None, False  # fmt: skip
        return f"none of the candidates{of} fits the published table better than chance", None, False
    several = f"not identifiable from the table: {len(survivors)} candidates{of} survive"
    if not effects:
        return f"{several}; give pairs, and the effect of suppression breaks the tie", None, False
    order = sorted(effects, key=lambda name: effects[name][0].mean(), reverse=True)
    (best, clusters), (second, _) = effects[order[0]], effects[order[1]]
    difference = clustered_mean(best - second, *clusters)
    if difference.call != "positive":
        small = " (the design is too small for a call)" if difference.call == "undetermined" else ""
        return f"{several}, and their suppression does not tell them apart{small}", None, False
    ref = next(c.feature.ref for c in survivors if c.name == order[0] and c.feature is not None)
    return (
        f"{several}; suppressing {ref} removes most ({best.mean():+.3f} nats, the next {second.mean():+.3f})"
        f"{_harm_words(frame, str(ref.sae))}",
        ref,
        True,
    )


def _harm_words(frame: pd.DataFrame, sae: str) -> str:
    """Whether the candidate fires at badly judged human deeds too, which the published table cannot tell."""
    row = frame[frame["sae"] == sae].iloc[0]
    if np.isnan(row["harm"]):
        return "; the grid has no badly judged human deeds, so it may follow bad verdicts and not AI speech"
    figures = f"{row['harm']:.2f} at badly judged human deeds, {row['ai_speech']:.2f} at AI speech"
    return f"; {figures}" + (": it may follow bad verdicts" if row["harm"] >= row["ai_speech"] / 2 else "")


def _suppressed(
    frame: pd.DataFrame, survivors: list[_Candidate], model: Model, pairs: PromptPairs, probe: Probe | None
) -> dict[str, tuple[np.ndarray, tuple[list[str], list[str]]]]:  # fmt: skip
    """What ablating each survivor removes of each pair's primary figure; written into the frame with its interval."""
    engine = ProbeEngine(model, pairs, probe or default_probe(pairs), controls=True)
    base, templates, entities = engine.base.figure_by_pair()
    out = {}
    for candidate in survivors:
        assert candidate.feature is not None
        removed = base - engine.run([Ablate(candidate.feature)])[0].figure_by_pair()[0]
        stat = clustered_mean(removed, templates, entities)
        frame.loc[frame["sae"] == candidate.name, ["removed", "removed_low", "removed_high"]] = [
            stat.mean,
            *stat.ci,
        ]
        out[candidate.name] = (removed, (templates, entities))
    return out


def _table(candidate: _Candidate) -> pd.DataFrame:
    assert candidate.acts is not None
    values = candidate.acts[:, candidate.place].reshape(len(SUBJECTS), len(LEVELS))
    return pd.DataFrame(
        values, index=pd.Index(SUBJECTS, name="subject"), columns=pd.Index(list(LEVELS), name="statement")
    )
