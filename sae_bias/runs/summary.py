"""A study's figures as plain values, and as a few plain lines: what goes into summary.json and onto the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sae_bias.core.text import COST_KINDS, bracket, number, p_text, signed
from sae_bias.discovery.calls import TESTED, call_sentence
from sae_bias.measures.fidelity import Fidelity
from sae_bias.probe.result import ProbeResult
from sae_bias.runs.effect_lines import best_line, control_lines, effect_lines
from sae_bias.saes.ids import FeatureRef
from sae_bias.stats.clustered import Clustered, effect_sizes


def choose_feature(ranking: pd.DataFrame) -> FeatureRef | None:
    """Of the features called AI-speech, or else silent at AI speech, the one whose exact ablation removes most, or None."""
    for call in ("AI-speech", "silent at AI speech"):
        called = ranking[(ranking["call"] == call) & ranking["ablation"].notna()]
        if len(called):
            best = int(called["ablation"].to_numpy().argmax())
            return FeatureRef.parse(str(called["feature"].iloc[best]))
    return None


def chosen_facts(ranking: pd.DataFrame, chosen: FeatureRef | None) -> dict[str, Any]:
    """The chosen feature, how it is called, why it was chosen and what was tested of it."""
    if chosen is None:
        found = ranking["call"].value_counts().drop(["no"], errors="ignore")
        others = (
            f"; called otherwise: {', '.join(f'{call} {n:,}' for call, n in found.items())}"
            if len(found)
            else ""
        )
        why = f"no feature passed the AI-speech test: a corrected interaction and its size on held-out statements{others}"
        return {"id": None, "index": None, "called": "none", "why": why}
    row = ranking[ranking["feature"] == str(chosen)].iloc[0]
    why = f"largest exact ablation effect on the discover split among the features called {row['call']}"
    called = "ai_speech" if row["call"] == "AI-speech" else "silent"
    return {
        "id": str(chosen),
        "index": chosen.index,
        "called": called,
        "why": why,
        "tested": call_sentence(row),
    }


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
        if row.call == "AI-speech":
            reason = f"called AI-speech, but its ablation removes less ({row.ablation:+.3f})"
        elif row.call != "no":
            reason = f"{row.call}: {TESTED[row.call].removeprefix('undetermined: ')}"
        elif row.p_fwer > 0.05:
            reason = f"its interaction is not significant over the family (p = {row.p_fwer:.2g})"
        elif row.interaction <= 0:
            reason = (
                "its interaction is negative, and it is not silent enough at AI speech on held-out statements"
            )
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
    lines += effect_lines(summary, "report templates")
    lines.append(
        "cost in KL, nats a token: "
        + ", ".join(
            f"{COST_KINDS.get(kind, kind)} {number(c['kl_mean'])}" for kind, c in summary["costs"].items()
        )
    )
    lines.append(best_line(summary["best_strength"], "report templates"))
    return lines + control_lines(summary.get("controls") or {})


def _interval(part: Mapping[str, Any], *, share: bool = False) -> str:
    low, high = (float("nan") if part[k] is None else part[k] for k in ("ci_low", "ci_high"))
    return bracket(low, high, share=share)


def _p(part: Mapping[str, Any]) -> str:
    return p_text(float("nan") if part["p_value"] is None else part["p_value"])
