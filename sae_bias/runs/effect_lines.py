"""What an edit did, in a few plain lines for the terminal: nats first, shares where they are defined, then SR, β and who moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_bias.core.text import bracket, is_number, number, p_text, percent, signed


def effect_lines(summary: Mapping[str, Any], where: str) -> list[str]:
    """A sweep's summary as the terminal says it: nats first, shares where they are defined, then SR, β and who moved."""
    cut = summary.get("reduction")
    if not cut:
        return []
    lines = [
        f"{cut['of']}: bias {_move(cut['bias_before'], cut['bias_after'])} nats, removed {_nats(cut)}, on {where}"
    ]
    if did := summary.get("did"):
        lines.append(
            f"difference in differences {_move(did['before'], did['after'])} nats, removed {_nats(did)}"
        )
    share = f"undefined: {cut['undefined']}" if cut.get("undefined") else _share(cut)
    over = " (the bias is turned round)" if cut.get("overshoot") else ""
    lines.append(f"reduction {share}{over}")
    if specific := summary.get("specific_reduction"):
        lines.append(
            f"specific reduction {_specific(specific)}{_did(specific)}, β {number(specific['beta'])}"
        )
        changed = specific["bank_changed"]
        lines.append(
            f"the edit changed {percent(changed['other'])} of the bank without AI and {percent(changed['ai'])} of the bank of AI subjects"
        )
    shift = summary["shift"]
    lines.append(f"human scores moved by {signed(shift['human'])} nats, AI scores by {signed(shift['ai'])}")
    return lines


def best_line(best: Mapping[str, Any], where: str) -> str:
    """The strength chosen on tune with its held-out figures, or why there is none."""
    if why := best.get("undefined"):
        return f"best strength undefined: {why}"
    inside, held = best["in_sample"], best["held_out"] or best["in_sample"]
    chosen_on = "tune templates" if best["held_out"] else "the same templates (in-sample)"
    return (
        f"best by specific reduction on {chosen_on}: {inside['label']}: specific reduction {_share(held, 'specific_reduction')}, "
        f"β {number(held['beta'])}, on {where}"
    )


def control_lines(controls: Mapping[str, Any]) -> list[str]:
    """One line a kind of control."""
    if not controls.get("kinds"):
        return []
    share = controls["statistic"] == "specific_reduction"
    show = percent if share else lambda x: f"{signed(x)} nats"
    what = "specific reduction" if share else "bias removed"
    verdict = {
        "yes": "it beats its controls",
        "no": "it does not beat its controls",
        "undetermined": "whether it beats its controls is undetermined (19 of a kind are the fewest whose p can reach 0.05)",
    }.get(controls.get("verdict", ""))
    return [
        f"{part['n']} controls ({kind}): {what} median {show(part['median'])}, 95th percentile {show(part['percentile95'])}, "
        f"the feature {show(controls['value'])}, {p_text(part['p_value'])}"
        for kind, part in controls["kinds"].items()
    ] + ([verdict] if verdict else [])


def mismatch_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the edit removed where it should remove less."""
    return [
        f"mismatch ({m['label']}): bias removed {signed(m['removed_nats'])} {bracket(m['removed_nats_low'], m['removed_nats_high'])} nats"
        for m in found
    ]


def cost_note(rows: Any) -> str:
    """At how many strengths of a table the cost leaves out 1 − β because β is undefined, and why; empty where at none."""
    if "cost_without_beta" not in rows:
        return ""  # an older sae-bias
    edits = rows[rows["kind"] != "base"].drop_duplicates("cell")
    open_ = edits[edits["cost_without_beta"].fillna(False).astype(bool)]
    if not len(open_):
        return ""
    why = ", ".join(dict.fromkeys(map(str, open_["specific_reason"])))
    return f"cost is of KL alone, without 1 − β, at {len(open_)} of {len(edits)} strengths: β is undefined ({why})"


def _specific(part: Mapping[str, Any]) -> str:
    return f"undefined: {part['undefined']}" if not is_number(part["estimate"]) else _share(part)


def _did(part: Mapping[str, Any]) -> str:
    """That of the difference in differences, where pairs have twins."""
    if not is_number(part.get("did_estimate")):
        return ""
    ends = bracket(part["did_ci_low"], part["did_ci_high"], share=True)
    return f" of the bias, {percent(part['did_estimate'])} {ends} of the difference in differences"


def _share(part: Mapping[str, Any], key: str = "estimate") -> str:
    return f"{percent(part[key])} {bracket(part['ci_low'], part['ci_high'], share=True)}"


def _nats(part: Mapping[str, Any]) -> str:
    return f"{signed(part['change'])} {bracket(part['change_low'], part['change_high'])} nats"


def _move(before: float, after: float) -> str:
    return f"{signed(before)} → {signed(after)}"
