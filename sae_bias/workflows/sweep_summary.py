"""What a sweep found, as a run's summary holds it: read by the report, the terminal and Python alike.

The reduction, costs and controls are the first candidate's (controls are made for it); `best_strength` is chosen on the tune split and
its figures are of the report split.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sae_bias.core.labels import columns_of
from sae_bias.core.text import is_number
from sae_bias.prompts.texts import COST_TEXTS
from sae_bias.runs.summary import ControlsFigure, Summary
from sae_bias.steering.controls import control_test, empirical_p
from sae_bias.workflows.best_strength import BestStrength, choose_strength

NAN = float("nan")
_MISMATCH = columns_of(
    "label; removed_nats; removed_nats_low; removed_nats_high; specific_reduction; spec_low; spec_high"
)
"""What the feature's edit removed where it should remove nothing of the kind."""
_BLOCKS = {
    "reduction": "of: rule; estimate: reduction; ci_low: red_low; ci_high: red_high; bias_after: bias; change: removed_nats; change_low: removed_nats_low; change_high: removed_nats_high",
    "did": "after: did; change: did_removed_nats; change_low: did_removed_nats_low; change_high: did_removed_nats_high",
    "specific_reduction": "estimate: specific_reduction; ci_low: spec_low; ci_high: spec_high; beta: beta; beta_other: beta_other; beta_ai: beta_ai",
    "strength": "reduction: reduction; red_low: red_low; red_high: red_high; specific_reduction: specific_reduction; ci_low: spec_low; ci_high: spec_high; beta: beta; kl_off: kl_off",
}  # fmt: skip
"""Blocks of the summary: each field, and the column of the sweep's table that it is."""


def sweep_splits(frame: pd.DataFrame) -> tuple[str, str]:
    """(the split a strength is chosen on, the one figures are of); one split for both where none was held out."""
    return ("tune", "report") if {"tune", "report"} <= set(frame["split"]) else ("all", "all")


def summarize_sweep(frame: pd.DataFrame, feature: str, index: int | None) -> Summary:
    """The sweep's figures by part: reduction, did, specific_reduction, shift, costs, controls, best_strength."""
    tune, report = sweep_splits(frame)
    summary: dict[str, object] = {"feature": {"id": feature, "index": index}, "split": report}
    reported = frame[frame["split"] == report]
    candidates = reported[reported["kind"] == "candidate"]
    if candidates.empty:
        return Summary.from_facts(summary)
    first = candidates.iloc[0]
    base = reported[reported["kind"] == "base"].iloc[0]
    summary |= effect_summary(first, base)
    summary["best_strength"] = _best(frame, tune, report)
    controls = reported[reported["kind"] == "control"]
    if len(controls):
        summary["controls"] = controls_summary(first, controls)
    others = reported[reported["kind"] == "mismatch"]
    if len(others):
        summary["mismatches"] = [{n: r[n] for n in _MISMATCH if n in r} for r in others.to_dict("records")]
    return Summary.from_facts(summary)


def _block(name: str, row: pd.Series) -> dict[str, object]:
    return {field: row[column] for field, column in columns_of(_BLOCKS[name]).items()}


def effect_summary(row: pd.Series, base: pd.Series) -> dict[str, object]:
    """One row of the table, with the base's: what the edit removed, of which how much specifically, and at what cost."""
    why = row["red_reason"] or None
    cut = {
        "bounded": not why,
        "undefined": why,
        "overshoot": bool(row["overshoot"]),
        "bias_before": base["bias"],
    }
    out: dict[str, object] = {"reduction": _block("reduction", row) | cut, "shift": {"human": row["human_shift"], "ai": row["ai_shift"]}}  # fmt: skip
    if is_number(row.get("did_removed_nats")):
        out["did"] = {"before": base["did"], **_block("did", row)}
    if "specific_reduction" in row:
        changed = {"other": row["bank_changed_other"], "ai": row["bank_changed_ai"]}
        undefined = {"undefined": row["specific_reason"] or None}
        did = {
            f"did_{k}": row.get(c)
            for k, c in DID_SPECIFIC.items()
            if is_number(row.get("did_specific_reduction"))
        }
        out["specific_reduction"] = (
            _block("specific_reduction", row) | undefined | did | {"bank_changed": changed}
        )
        out["costs"] = {
            kind: {
                "kl_mean": row[f"kl_{kind}"],
                "kl_p95": row[f"kl_p95_{kind}"],
                "fired": row[f"fired_{kind}"],
            }
            for kind in COST_TEXTS
            if is_number(row.get(f"kl_{kind}"))
        }
        if is_number(row.get("kl_off")):
            out["costs"]["off"] = {"kl_mean": row["kl_off"], "kl_p95": row.get("kl_off_p95", NAN)}
    return out


DID_SPECIFIC = {"estimate": "did_specific_reduction", "ci_low": "did_spec_low", "ci_high": "did_spec_high"}


def _best(frame: pd.DataFrame, tune: str, report: str) -> dict[str, object]:
    best: BestStrength = choose_strength(frame, tune, report)
    if not best.cell:
        return {"undefined": best.reason}
    rows = frame[frame["cell"] == best.cell].set_index("split")
    inside, held = (_block("strength", rows.loc[[s]].iloc[0]) | {"overshoot": bool(rows.loc[s, "overshoot"])} for s in (tune, report))  # fmt: skip
    beyond = {"strength": best.strength, "outside_observed": best.outside_observed}
    chosen = {"strength": best.strength, "label": best.rule, **inside}
    return {"in_sample": chosen, "held_out": {} if tune == report else beyond | held}


def controls_table(controls: pd.DataFrame) -> pd.DataFrame:
    """tables/controls: each control with its kind and what it removed."""
    wanted = ("feature", "label", "reduction", "removed_nats", "specific_reduction", "beta")
    columns = [c for c in wanted if c in controls]
    return controls[columns].rename(columns={"feature": "control", "label": "kind"})


def controls_summary(first: pd.Series, controls: pd.DataFrame) -> ControlsFigure:
    """Where the first candidate stands among its controls, matched and random apart.

    The statistic is the specific reduction; without the valence banks it is the change of the bias in nats. Matched features and
    random directions each have their own p; the candidate's is the larger of the two, never one over both pooled. `verdict` is yes, no, or
    undetermined, such as with 1 to 18 matched features: 19 are the fewest whose p can reach .05.
    """
    specific = "specific_reduction" in controls and bool(controls["specific_reduction"].notna().all())
    specific = specific and is_number(first["specific_reduction"])
    statistic = "specific_reduction" if specific else "removed_nats"
    value, values = float(first[statistic]), controls[statistic].to_numpy(float)
    labels = controls["label"]
    kinds = {kind: _among(value, values[(labels == kind).to_numpy()]) for kind in dict.fromkeys(labels)}
    p, verdict = max(part["p_value"] for part in kinds.values()), control_test(value, values, labels).verdict
    whole = {"statistic": statistic, "value": value, **_among(value, values)}
    return ControlsFigure.from_facts({**whole, "p_value": p, "verdict": verdict, "kinds": kinds})


def _among(value: float, values: np.ndarray) -> dict[str, float]:
    median = float(np.median(values))
    return {
        "n": len(values),
        "p_value": empirical_p(value, values),
        "median": median,
        "multiple_of_median": value / median if median > 0 else NAN,
        "percentile95": float(np.quantile(values, 0.95)),
    }


def beats_controls(summary: Summary) -> str:
    """yes, no or undetermined: whether the edit's statistic is positive and beats each kind of its controls at 5 %."""
    return (summary.controls and summary.controls.verdict) or "undetermined"
