"""Versions of what makes the numbers, and the state of the checkout in use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sae_bias

DEFINITIONS = 4
"""Version of what the figures mean; a run's manifest names the one it was made with (1 where it names none)."""

CHANGED: dict[int, dict[str, str]] = {
    2: {
        "specific_reduction": "max(β, 0) − |B_s/B_0|, before: β − B_s/B_0, which credited a bias turned round",
        "spec_low, spec_high": "the interval of that",
        "ci_low, ci_high": "balanced designs: mean squares of the two-way table, before: clustered sums",
        "reduction, red_low, red_high": "undefined where the unsteered bias is not distinguishable from 0",
        "overshoot": "only of an unsteered bias that is distinguishable from 0",
        "best strength": "the largest specific reduction on tune with β ≥ 0.7 and KL_off ≤ 0.05, before: the smallest |bias|",
        "controls": "p by specific reduction, matched and random apart, before: by reduction, pooled",
        "compare": "cost is the largest of KL, KL_off and 1 − β, strengths come from tune; before: KL alone, strengths from report",
        "calls": "AI-speech also needs badly judged human deeds to differ, and ranks are by the size of the interaction; before: by its value, without them",
        "attribution, ablation": "of the difference in differences where the pairs have mundane twins, before: of the bias",
    },
    3: {
        "compare at equal cost": "shares of the difference in differences where the pairs have mundane twins, before: of the bias"
    },
    4: {
        "carrier": "both effects' intervals leave out 0 and the design is large enough for a call, before: both over 0.5% of the figure",
        "score logodds": "a word whose tokens go on from another of its side counts once, before: twice",
        "words left out, nuisances": "of the difference in differences where the pairs have mundane twins, before: of the bias",
        "units of a study's strengths": "the largest activation at any token, before: at the last token of the AI prompts",
        "a share of a gated counterfactual in compare": "taken after the prediction is rectified, before: before that",
    },
}
"""Of each version, the figures whose meaning it changed."""

LIBRARIES = (
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
)


def versions() -> dict[str, str]:
    """Versions of sae-bias, Python and the libraries that make the numbers."""
    out = {"sae-bias": sae_bias.__version__, "python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def definitions_of(manifest: Mapping[str, Any]) -> int:
    """The version of the definitions that a run was made with."""
    found = manifest.get("definitions", 1)
    return found if isinstance(found, int) and not isinstance(found, bool) else 1


def changed_since(version: int) -> dict[str, str]:
    """Figures whose meaning changed after `version`, and how."""
    return {name: how for v, names in CHANGED.items() if v > version for name, how in names.items()}


def changed_columns(version: int) -> set[str]:
    """Columns of a sweep's table whose meaning changed after `version`."""
    return {column for names in changed_since(version) for column in names.split(", ")}


def git_state() -> dict[str, Any]:
    """Commit of the sae-bias checkout in use, and whether it has local changes; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        run = [
            subprocess.run(
                ["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": run[0], "dirty": bool(run[1])}
