"""Causal effects beside a ranking: predicted for every feature, exact for the first ones, and how well the one told the other.

    predicted   attribution (reference 0) and integrated gradients from the human twin
    exact       ablation, and resampling to the human twin's value; a carrier shows both

Effects are of the primary figure: the difference in differences where the pairs have mundane twins, else the bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.text import bracket, signed
from sae_bias.discovery.attribution import (
    Agreement,
    ablation_effects,
    attribution,
    attribution_agreement,
    carriers,
    resampling_effects,
)
from sae_bias.discovery.integrated import COLUMNS, Paths, parts_sentence
from sae_bias.saes.sae import Sae
from sae_bias.steering.engine import ProbeEngine

PREDICTED = {"attribution": "attribution", "integrated": "integrated gradients"}
EXACT = ("ablation", "resampling")
FORETOLD = ["predictor", "exact", "rho", "slope", "slope_low", "slope_high", "n"]


@dataclass(frozen=True, eq=False)
class Effects:
    """What was measured beside the columns of a ranking."""

    note: str
    parts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    """One row an SAE and part: what any edit after the subject, its features and its error could remove (`integrated.Paths.parts`)."""
    predictions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=FORETOLD))
    """predictor, exact, rho, slope with its interval, n: how well each predicted each exact effect."""
    agreement: Agreement | None = None
    """Of attribution with exact ablation."""


def predict_effects(
    frame: pd.DataFrame, engine: ProbeEngine, saes: Sequence[Sae], *, split: str = ""
) -> Effects:
    """Adds `attribution` and `integrated` to every feature of `frame`, and says where the bias lies; `split` names the engine's templates."""
    paths, found, parts = Paths(engine), [], []
    for sae in saes:
        own = pd.DataFrame(
            {"attribution": attribution(engine, sae)}, index=[f"{sae.id}#{i}" for i in range(sae.d_sae)]
        )
        own["integrated"] = np.nan
        if paths.matched:
            ig = paths.integrated_gradients(sae)
            own["integrated"] = ig.features
            parts.append(paths.parts(sae, ig))
        found.append(own)
    values = pd.concat(found).reindex(frame["feature"])
    for column in PREDICTED:
        frame[column] = values[column].to_numpy()
    base = engine.base
    of = " ".join(filter(None, (str(base.primary.n_templates), split, "templates")))
    note = f"unsteered {base.estimand} {base.primary.mean:+.4f} on {of}"
    if not parts:
        return Effects(
            f"{note}; integrated gradients not measured: the two prompts of no pair share an ending"
        )
    said = [parts_sentence(p) for p in parts[:1]] + ([f"and {len(parts) - 1} more SAEs"] if parts[1:] else [])
    return Effects("; ".join([note, *said]), pd.concat(parts, ignore_index=True))


def first_by_prediction(frame: pd.DataFrame, k: int) -> list[int]:
    """The k features of largest predicted effect, whichever of the two predicts it: a silent feature has no attribution."""
    size = frame[list(PREDICTED)].abs().max(axis=1)
    return list(size.sort_values(ascending=False, kind="stable").index[:k])


def measure_effects(
    frame: pd.DataFrame,
    engine: ProbeEngine,
    first: Iterable[int],
    predicted: Effects,
    *,
    workers: int = 1,
    progress: bool = False,
) -> Effects:
    """Adds exact `ablation` and `resampling` with their intervals, and `carrier`, for the rows `first`; the others stay NaN and undetermined."""
    rows, base = list(dict.fromkeys(first)), engine.base.primary.mean
    names, options = list(frame.loc[rows, "feature"]), {"workers": workers, "progress": progress}
    exact = {"ablation": ablation_effects(engine, names, **options), "resampling": resampling_effects(engine, names, **options)}  # fmt: skip
    for name, found in exact.items():
        frame[[name, f"{name}_low", f"{name}_high"]] = np.nan
        for row, effect in zip(rows, found):
            if effect is not None:
                frame.loc[row, [name, f"{name}_low", f"{name}_high"]] = [effect.mean, *effect.ci]
    frame["carrier"] = "undetermined"
    frame.loc[rows, "carrier"] = carriers(exact["ablation"], exact["resampling"], base)
    told = {(p, e): attribution_agreement(frame.loc[rows, p].to_numpy(), frame.loc[rows, e].to_numpy(), base) for p in PREDICTED for e in EXACT}  # fmt: skip
    table = pd.DataFrame(
        [(PREDICTED[p], e, a.rho, a.slope, a.slope_low, a.slope_high, a.n) for (p, e), a in told.items()],
        columns=FORETOLD,
    )
    counts = frame.loc[rows, "carrier"].value_counts()
    note = (
        f"{predicted.note}; {len(rows)} features ablated and resampled exactly, the rest not measured;"
        f" exact ablation on attribution: {told['attribution', 'ablation']};"
        f" exact resampling on integrated gradients: {told['integrated', 'resampling']};"
        f" carriers {counts.get('carrier', 0)}, damage {counts.get('damage', 0)} (ablation without a resampling effect)"
    )
    return Effects(note, predicted.parts, table, told["attribution", "ablation"])


CARRIES = {
    "carrier": "a carrier: ablation and resampling both move the figure",
    "damage": "damage: ablation moves the figure, taking over the human value does not",
    "resampling only": "taking over the human value moves the figure, ablation does not",
    "no": "neither effect is both told from 0 and over 0.5% of the figure",
    "undetermined": "whether it is a carrier is undetermined: too few templates or entities, too wide an interval, or resampling not measured",
}


def effect_sentence(row: Mapping[str, Any] | pd.Series) -> str:
    """The exact effects of one feature of a ranking, in words with their figures."""
    ends = [[float(row.get(f"{name}{end}", np.nan)) for end in ("", "_low", "_high")] for name in EXACT]
    shown = ", ".join(
        f"{name} removes {signed(value)} nats{f' {bracket(low, high)}' if low == low else ''}"
        for name, (value, low, high) in zip(EXACT, ends)
        if value == value
    )
    return f"Exactly: {shown} ({CARRIES[str(row.get('carrier', 'undetermined'))]})." if shown else ""


def add_shares(frame: pd.DataFrame, base: float) -> None:
    """Each effect as a share of the unsteered figure, where there is one."""
    if base:
        for column in [c for c in (*PREDICTED, *EXACT) if c in frame]:
            frame[f"{column}_share"] = frame[column] / base
