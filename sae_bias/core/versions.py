"""Versions of what makes the numbers, and the state of the checkout in use."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sae_bias

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
