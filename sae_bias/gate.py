"""The fidelity gate as commands run it: once for a model and an SAE, and remembered.

The figures (`measures.fidelity`) depend on the weights, the precision, the device and the libraries that run them, and on nothing
else. They are kept under a hash of these in `sae-bias/gate` of the user's cache folder (XDG_CACHE_HOME, else ~/.cache): one small
JSON file a pair, written in one step. Only what passed is kept, so a gate that stops is run again. What cannot be known by its
files (a model object in memory, a model that carries hooks, an SAE without a file) is measured every time. The Python functions
never run the gate.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_bias.measures.fidelity import N_TEXTS, Fidelity, check_fidelity, check_logits, fidelity_of
from sae_bias.model import Model
from sae_bias.provenance import model_digest, sae_facts, versions
from sae_bias.sae import Sae
from sae_bias.store import digest

VERSION = 1  # of what is measured; part of every key
LIBRARIES = ("sae-bias", "torch", "transformers", "transformer-lens", "sae-lens")
LOGITS_PROMPT = "An AI says that it wants to go on. This is"

Figures = dict[str, float]


def cache_folder() -> Path:
    """Where passed gates are remembered."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sae-bias" / "gate"


def gate_sae(model: Model, sae: Sae) -> Fidelity:
    """The gate's figures of one SAE, measured once.

    Raises:
        GateError: the captured residual is not Hugging Face's hidden state.
    """

    def measure() -> Figures:
        found = check_fidelity(model, sae)
        return {"residual_max_rel_error": found.residual_max_rel_error, "fvu": found.fvu, "l0": found.l0}

    files = sae_facts(sae)["files"]
    key = _key(model, {"sae": files, "layer": sae.site.layer, "texts": N_TEXTS}) if files else None
    return fidelity_of(sae, **_once(key, ("residual_max_rel_error", "fvu", "l0"), measure))


def gate_model(model: Model) -> float:
    """Largest relative difference between the logits read here and the model's own, measured once.

    Raises:
        GateError: it is larger than rounding.
    """
    key = _key(model, {"logits": LOGITS_PROMPT})
    return _once(key, ("logits",), lambda: {"logits": check_logits(model, LOGITS_PROMPT)})["logits"]


def gate_lines(facts: Mapping[str, Any]) -> list[str]:
    """A manifest's gate in a line, and one for each warning."""
    status = facts.get("status")
    if status == "skipped":
        return ["fidelity gate: skipped (--no-gate)"]
    if facts.get("logits_max_rel_error") is not None:
        return [
            f"fidelity gate: logits as the model's own to {facts['logits_max_rel_error']:.1e} of their size"
        ]
    saes = facts.get("saes") or []
    if not saes:
        return []
    shown = [
        f"{s['sae']}: unexplained variance {s['fvu']:.3f}, L0 {s['l0']:.1f}"
        + (f" (label {s['label_l0']:.0f})" if s["label_l0"] else "")
        for s in saes[:4]
    ]
    more = [f"and {len(saes) - 4} more"] if len(saes) > 4 else []
    error = f"residual as Hugging Face's to {facts['residual_max_rel_error']:.1e} of its size"
    warnings = [f"warning: {w}" for s in saes for w in s["warnings"]]
    return [f"fidelity gate {status}: " + "; ".join([error, *shown, *more]), *warnings]


# --- the cache ---


def _key(model: Model, what: dict[str, Any]) -> str | None:
    """Name of the figures' file; None where they must be measured each time."""
    if model.in_memory or model.foreign_hooks():
        return None
    known = versions()
    return digest(
        VERSION,
        model_digest(model),
        str(model.dtype),
        model.device.type,
        {n: known[n] for n in LIBRARIES},
        what,
    )


def _once(key: str | None, names: Sequence[str], measure: Callable[[], Figures]) -> Figures:
    """The figures under `key`, or measured and kept there."""
    if key is None:
        return measure()
    path = cache_folder() / f"{key}.json"
    kept = _read(path, names)
    if kept is not None:
        return kept
    found = measure()
    _write(path, found)
    return found


def _read(path: Path, names: Sequence[str]) -> Figures | None:
    """The figures of a file; None where there is none, or it is not what was written."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(1 << 16))
        values = {name: data[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(v is None or (isinstance(v, float) and math.isfinite(v)) for v in values.values()):
        return None
    return {name: math.nan if v is None else v for name, v in values.items()}


def _write(path: Path, figures: Figures) -> None:
    """Keep the figures; a cache that cannot be written is no reason to fail."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    plain = {name: float(v) if math.isfinite(v) else None for name, v in figures.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(plain) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
