"""A study's figures as plain values, and as a few plain lines: what goes into summary.json and onto the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.text import TEXT_KINDS, bracket, number, p_text, percent, signed
from sae_bias.measures.fidelity import Fidelity
from sae_bias.probe.result import ProbeResult
from sae_bias.saes.ids import FeatureRef
from sae_bias.stats.clustered import Clustered, effect_sizes
from sae_bias.stats.reduction import Reduction


def choose_feature(ranking: pd.DataFrame) -> FeatureRef | None:
    """The AI-speech feature whose exact ablation removes most, or None."""
    called = ranking[(ranking["ai_speech"] == "yes") & ranking["ablation"].notna()]
    if called.empty:
        return None
    best = int(called["ablation"].to_numpy().argmax())
    return FeatureRef.parse(str(called["feature"].iloc[best]))


def rejected_candidates(
    ranking: pd.DataFrame, tried: Sequence[str], chosen: FeatureRef | None
) -> pd.DataFrame:
    """Every candidate that was looked at and not chosen, with the reason."""
    looked = set(tried) | set(ranking.head(20)["feature"]) | set(ranking.nlargest(20, "auroc")["feature"])
    rows = []
    row: Any
    for row in ranking[ranking["feature"].isin(looked)].itertuples():
        if str(row.feature) == str(chosen):
            continue
        if row.ai_speech == "yes":
            reason = f"called AI-speech, but its ablation removes less ({row.ablation:+.3f})"
        elif row.ai_speech == "undetermined":
            reason = "undetermined: too few matched statements"
        elif row.p_fwer > 0.05:
            reason = f"its interaction is not significant over the family (p = {row.p_fwer:.2g})"
        elif row.interaction <= 0:
            reason = "its interaction has the wrong sign"
        else:
            reason = "significant interaction, but too small a part of its activation on held-out statements"
        rows.append(
            {
                "feature": row.feature,
                "auroc": row.auroc,
                "interaction": row.interaction,
                "ablation": row.ablation,
                "reason": reason,
            }
        )
    return pd.DataFrame(rows, columns=["feature", "auroc", "interaction", "ablation", "reason"])


def bias_summary(base: ProbeResult) -> dict[str, Any]:
    out: dict[str, Any] = {
        "sides": base.sides,
        "bias": _clustered_facts(base.stat, base.pair_bias, base.clusters[0]),
    }
    if base.control is not None:
        out["control_bias"] = _clustered_facts(
            base.control.stat, base.control.pair_bias, base.control.clusters[0]
        )
        difference = base.difference_in_differences()
        out["difference_in_differences"] = _clustered_facts(
            difference.stat, difference.values, difference.templates
        )
    return out


def _clustered_facts(stat: Clustered, values: np.ndarray, templates: Sequence[str]) -> dict[str, Any]:
    sizes = effect_sizes(values, templates)
    return {
        "mean": stat.mean, "ci_low": stat.ci_low, "ci_high": stat.ci_high, "p_value": stat.p_value, "df": stat.df, "n_pairs": stat.n,
        "n_templates": stat.n_templates, "n_entities": stat.n_entities, "reason": stat.reason or None,
        "d_z": sizes.d_z, "share_templates_positive": sizes.share_positive,
    }  # fmt: skip


def reduction_summary(r: Reduction) -> dict[str, Any]:
    return {
        "estimate": r.estimate, "ci_low": r.ci_low, "ci_high": r.ci_high, "bounded": r.bounded, "overshoot": r.overshoot,
        "bias_before": r.base_bias, "bias_after": r.after_bias, "change": r.change.mean, "change_low": r.change.ci_low, "change_high": r.change.ci_high,
    }  # fmt: skip


def gate_facts(found: Sequence[Fidelity], gate: bool, logits: float | None = None) -> dict[str, Any]:
    """The gate as a manifest holds it; without an SAE only the logits were compared."""
    if not gate:
        return {"status": "skipped"}
    if not found and logits is not None:
        return {"status": "passed", "logits_max_rel_error": logits}
    if not found:
        return {"status": "not needed"}
    worst = found[0]
    return {
        "status": "warned" if any(f.warnings for f in found) else "passed",
        "residual_max_rel_error": float(np.nanmax([f.residual_max_rel_error for f in found] + [0.0])),
        "fvu": worst.fvu, "l0": worst.l0, "label_l0": worst.label_l0,
        "saes": [{"sae": f.sae, "fvu": f.fvu, "l0": f.l0, "label_l0": f.label_l0, "warnings": list(f.warnings)} for f in found],
    }  # fmt: skip


def headline(summary: Mapping[str, Any]) -> list[str]:
    """A study's summary in a few plain lines."""
    bias, worse = summary["bias"], (summary.get("sides") or ("human", "AI"))[1]
    lines = [
        f"bias {signed(bias['mean'])} nats {_interval(bias)}, {_p(bias)}, {bias['n_pairs']} pairs = {bias['n_templates']} templates × "
        f"{bias['n_entities']} entities (positive: {worse} judged worse)"
    ]
    if control := summary.get("control_bias"):
        lines.append(
            f"the same pairs with mundane content: {signed(control['mean'])} nats {_interval(control)}"
        )
    feature = summary.get("feature")
    if feature is None:
        return lines
    if not feature["id"]:
        return [*lines, f"no feature is called AI-speech: {feature['why']}"]
    lines.append(f"feature {feature['id']}: {feature['why']}")
    if "reduction" not in summary:  # one shard: its cells alone
        return lines
    cut, specific, costs = summary["reduction"], summary["specific_reduction"], summary["costs"]
    lines.append(
        f"ablated, on report templates: bias {signed(cut['bias_before'])} → {signed(cut['bias_after'])}, reduction "
        f"{percent(cut['estimate'])} {_interval(cut, share=True)}, specific {percent(specific['estimate'])} (β {number(specific['beta'])})"
    )
    lines.append(
        "cost in KL, nats a token: "
        + ", ".join(f"{TEXT_KINDS.get(kind, kind)} {number(c['kl_mean'])}" for kind, c in costs.items())
    )
    controls = summary["controls"]
    if controls["n"]:
        lines.append(
            f"{controls['n']} controls: median {percent(controls['median'])}, 95th percentile {percent(controls['percentile95'])}, {_p(controls)}"
        )
    return lines


def _interval(part: Mapping[str, Any], *, share: bool = False) -> str:
    low, high = (float("nan") if part[k] is None else part[k] for k in ("ci_low", "ci_high"))
    return bracket(low, high, share=share)


def _p(part: Mapping[str, Any]) -> str:
    return p_text(float("nan") if part["p_value"] is None else part["p_value"])
