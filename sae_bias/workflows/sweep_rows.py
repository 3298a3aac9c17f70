"""A sweep's table from its cells: one row a cell and split, every figure from the cells' scores and facts alone.

The primary figure is B_0 - B_s in nats (`removed_nats`; positive = less bias), for the bias and, where pairs have mundane twins, for the
difference in differences (`did_removed_nats`). Ratios (`reduction`, `specific_reduction`) stand beside them and are NaN where the
unsteered bias is not distinguishable from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of
from sae_bias.measures.collapse import collapse_test
from sae_bias.prompts.texts import COST_TEXTS
from sae_bias.stats.clustered import clustered_mean
from sae_bias.stats.reduction import fieller_reduction
from sae_bias.steering.intervention import edit_class

NAN = float("nan")
Clusters = tuple[list[str], list[str]]


@dataclass(frozen=True)
class _Scores:
    """A cell's columns and facts, read once: pandas copies a frame's facts at every selection of it."""

    bias: np.ndarray
    human: np.ndarray
    ai: np.ndarray
    did: np.ndarray
    """Bias less the mundane twin's; NaN where a pair has none."""
    facts: Mapping[Any, Any]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Self:
        bias, human, ai = (frame[name].to_numpy() for name in ("bias", "score_human", "score_ai"))
        return cls(bias, human, ai, twin_difference(frame), frame.attrs)


def cell_rows(
    listed: Sequence[Mapping[str, Any]],
    cells: Mapping[str, pd.DataFrame],
    splits: Mapping[str, Sequence[str]],
    *,
    costs: bool,
) -> pd.DataFrame:
    """One row a cell and split; the first listed cell is the base."""
    base = cells[listed[0]["cell"]]
    labels = base["template"].to_numpy(), base["entity"].to_numpy()
    keep = {split: np.isin(labels[0], list(templates)) for split, templates in splits.items()}
    for split, rows in keep.items():
        if not rows.any():
            raise RequestError(f"split {split!r} holds none of the pairs' templates.")
    clusters = {split: (labels[0][rows].tolist(), labels[1][rows].tolist()) for split, rows in keep.items()}
    then, table = _Scores.of(base), []
    for cell in listed:
        now = _Scores.of(cells[cell["cell"]])
        table += [_row(cell, split, now, then, rows, clusters[split], costs) for split, rows in keep.items()]
    return pd.DataFrame(table)


def _row(
    cell: Mapping[str, Any], split: str, now: _Scores, then: _Scores, keep: np.ndarray, clusters: Clusters, costs: bool
) -> dict[str, Any]:  # fmt: skip
    strength = NAN if cell["strength"] is None else float(cell["strength"])
    row = {
        **{name: cell[name] for name in ("cell", "intervention", "feature")},
        "strength": strength, "positions": cell["positions"], "split": split, "n_pairs": int(keep.sum()),
        **_effect(now, then, keep, clusters),
        **{name: cell[name] for name in ("rule", "kind", "label")},
        "outside_observed": _outside(cell["intervention"], strength, now.facts.get("max_act")),
    }  # fmt: skip
    if costs:
        row |= _did_columns(now, then, keep, clusters)
        row |= _collapse_columns(now, then, keep, clusters)
        row |= _cost_columns(now.facts, row["beta"])
    row["positions_changed"] = now.facts.get("positions_changed", 0)
    return row


def _effect(after: _Scores, before: _Scores, keep: np.ndarray, clusters: Clusters) -> dict[str, Any]:
    """What the edit did to the bias, and how far it moved each side's scores."""
    now, then = after.bias[keep], before.bias[keep]
    stat, reduction = clustered_mean(now, *clusters), fieller_reduction(then, now, *clusters)
    wrong = now > then if then.mean() > 0 else now < then
    human, ai = after.human - before.human, after.ai - before.ai
    change = reduction.change
    return {
        "bias": stat.mean, "ci_low": stat.ci_low, "ci_high": stat.ci_high,
        "change": float((now - then).mean()), "mean_abs_change": float(np.abs(now - then).mean()),
        "removed_nats": change.mean, "removed_nats_low": change.ci_low, "removed_nats_high": change.ci_high,
        "human_shift": float(human[keep].mean()), "ai_shift": float(ai[keep].mean()), "wrong_way_share": float(wrong.mean()),
        "reduction": reduction.estimate, "red_low": reduction.ci_low, "red_high": reduction.ci_high, "red_reason": reduction.reason,
        "overshoot": reduction.overshoot,
    }  # fmt: skip


def _outside(intervention: str, strength: float, observed: float | None) -> bool:
    """Whether an activation is set to a value the feature was not seen to take."""
    edit = edit_class(intervention)
    sets = edit is not None and edit.sets_activation and np.isfinite(strength)
    return bool(sets and not 0 <= strength <= (observed or 0.0))


def _did_columns(now: _Scores, then: _Scores, keep: np.ndarray, clusters: Clusters) -> dict[str, float]:
    """The difference in differences, bias less the mundane twin's, and how much of it the edit removed, in nats and as a share."""
    names = (
        "did", "did_removed_nats", "did_removed_nats_low", "did_removed_nats_high", "did_reduction", "did_red_low", "did_red_high",
    )  # fmt: skip
    before, after, labels = _with_twins(now, then, keep, clusters)
    if not len(before):
        return dict.fromkeys(names, NAN)
    r = fieller_reduction(before, after, *labels)
    return dict(zip(names, (float(after.mean()), r.change.mean, *r.change.ci, r.estimate, *r.ci)))


def twin_difference(frame: pd.DataFrame) -> np.ndarray:
    """Bias of each pair less its mundane twin's; NaN where it has none."""
    twins = frame.attrs.get("twins")
    if not isinstance(twins, Sequence) or len(twins) != len(frame):
        return np.full(len(frame), NAN)
    return frame["bias"].to_numpy(float) - np.array([NAN if t is None else t for t in twins], dtype=float)


def _collapse_columns(now: _Scores, then: _Scores, keep: np.ndarray, clusters: Clusters) -> dict[str, Any]:
    """β and the specific reduction of one split's bias, and of its difference in differences beside it; NaN where the banks were not run."""
    bank_before, bank_after = then.facts.get("bank"), now.facts.get("bank")
    if bank_before is None or bank_after is None:
        return dict.fromkeys([*COLLAPSE_COLUMNS, *DID_COLUMNS], NAN) | {"specific_reason": "not measured"}
    banks = np.array(bank_before), np.array(bank_after)
    test = collapse_test(then.bias[keep], now.bias[keep], clusters, *banks)
    s = test.specific
    changed = (test.changed_share[b] for b in ("other", "ai"))
    values = (s.estimate, s.ci_low, s.ci_high, s.beta, s.beta_other, s.beta_ai, *changed)
    found: dict[str, Any] = dict(zip(COLLAPSE_COLUMNS, values)) | dict.fromkeys(DID_COLUMNS, NAN)
    before, after, labels = _with_twins(now, then, keep, clusters)
    if len(before):
        did = collapse_test(before, after, labels, *banks).specific
        found |= dict(zip(DID_COLUMNS, (did.estimate, did.ci_low, did.ci_high)))
    return found | {"specific_reason": s.reason}


def _with_twins(
    now: _Scores, then: _Scores, keep: np.ndarray, clusters: Clusters
) -> tuple[np.ndarray, np.ndarray, Clusters]:
    """Differences in differences before and after of the pairs that have a twin, with their clusters."""
    before, after = then.did[keep], now.did[keep]
    known = np.isfinite(before) & np.isfinite(after)
    templates, entities = (np.array(c)[known].tolist() for c in clusters)
    return before[known], after[known], (templates, entities)


DID_COLUMNS = ["did_specific_reduction", "did_spec_low", "did_spec_high"]
COLLAPSE_COLUMNS = list(columns_of("specific_reduction; spec_low; spec_high; beta; beta_other; beta_ai; bank_changed_other; bank_changed_ai"))  # fmt: skip
_COSTS = ("kl", "kl_p95", "kl_last", "kl_off", "nll", "fired")
COST_COLUMNS = [*(f"{name}_{kind}" for name in _COSTS for kind in COST_TEXTS), "kl_off", "kl_off_p95"]


def _cost_columns(facts: Mapping[Any, Any], beta: float) -> dict[str, float]:
    """Every cost; the worst KL; the cost of a frontier, max(worst KL, 1 - β); and whether β is undefined, so that the cost is of KL alone."""
    found = {key: NAN if facts.get(key) is None else float(facts[key]) for key in COST_COLUMNS}
    known = [
        v for k, v in found.items() if k in ("kl_off", *(f"kl_{kind}" for kind in COST_TEXTS)) and v == v
    ]
    worst = max(known, default=NAN)
    lost = worst if np.isnan(beta) else 1 - beta
    return found | {
        "kl_worst": worst,
        "cost": NAN if np.isnan(worst) else max(worst, lost),
        "cost_without_beta": bool(np.isnan(beta) and not np.isnan(worst)),
    }
