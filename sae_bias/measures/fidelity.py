"""The fidelity gate: is this the residual stream, and this SAE, that we think it is?

The captured residual is compared with plain Hugging Face hidden states and with what the next module is given (a mismatch stops
a run), and the SAE's unexplained variance and L0 on ordinary tokens are measured beside the release's label (a mismatch warns).
BOS is left out: SAEs were not trained on it, and its norm would drown everything else. So is the first token where a tokenizer puts no
BOS: it takes its place (in SmolLM2 it holds 99 % of the variance).

The fidelity gate as commands run it: once for a model and an SAE, and remembered.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_bias.core.errors import GateError, SaeBiasError
from sae_bias.core.files import cache_folder, digest, plain, writing_whole
from sae_bias.core.site import Site
from sae_bias.core.versions import versions
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.forward import capture_layers, forward, plan_batches
from sae_bias.models.model import Model, ours
from sae_bias.prompts.texts import load_texts
from sae_bias.saes.sae import Sae, sae_facts

MAX_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
MAX_FVU = 0.5
N_TEXTS = 24
L0_FACTOR = 3.0


@dataclass(frozen=True)
class Fidelity:
    """One model and SAE, measured on the bundled neutral text."""

    sae: str
    residual_max_rel_error: float
    """Largest |difference| over the largest |hidden state|; after the last layer both are compared normed, as Hugging Face has it."""
    fvu: float
    """Unexplained variance share of the SAE's reconstruction."""
    l0: float
    """Mean number of active features a token."""
    label_l0: float | None
    """The release's own figure, where its name or config tells it."""
    warnings: tuple[str, ...]

    @property
    def status(self) -> str:
        return "warned" if self.warnings else "passed"


@torch.no_grad()
def check_fidelity(model: Model, sae: Sae, *, n_texts: int = N_TEXTS) -> Fidelity:
    """Measure the gate's figures.

    Raises:
        GateError: the captured residual is not Hugging Face's hidden state, or is not finite.
    """
    layer = sae.site.layer
    special = torch.tensor(sorted(model.special_ids), device=model.device)
    errors, parts = [], []
    for batch in plan_batches([model.encode(t) for t in load_texts("neutral")[:n_texts]], model.device):
        both = capture_layers(model, batch.tokens, sorted({Site(layer), sae.site}))
        x, read = both[Site(layer)], both[sae.site]
        with _received_after(model, layer) as received:
            plain = model.hf(input_ids=batch.tokens, output_hidden_states=True, use_cache=False).hidden_states
        own = x.float() if layer < model.n_layers - 1 else model.final_norm(x.float())
        errors += [_relative(own, plain[layer + 1]), *(_relative(x.float(), r) for r in received)]
        ordinary = ~torch.isin(batch.tokens, special)
        ordinary[:, 0] = False
        parts.append(read[ordinary.to(read.device)].float())
    error = float(np.max(errors))  # NaN where one is
    allowed = MAX_RELATIVE_ERROR.get(model.dtype, 1e-4)
    if not error <= allowed:
        raise GateError(
            f"the residual of {model.name} after layer {layer} differs from Hugging Face's hidden state by {error:.2e} of its size "
            f"(allowed {allowed:.0e} in {str(model.dtype).removeprefix('torch.')}); figures from it would be wrong."
        )
    resid = torch.cat(parts)
    acts = sae.encode(resid)
    residue = resid - sae.decode(acts, resid).to(resid.device)
    fvu = float(residue.pow(2).sum() / (resid - resid.mean(0)).pow(2).sum())
    l0 = float((acts > 0).sum(-1).cpu().double().mean())
    return fidelity_of(sae, error, fvu, l0)


@contextmanager
def _received_after(model: Model, layer: int) -> Iterator[list[Tensor]]:
    """What the module after `layer` is given: later layers read this, whatever wraps the layers."""
    received: list[Tensor] = []

    @ours
    def keep(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])

    last = layer == model.n_layers - 1
    after = model.norm_module if last else model.layer_list[layer + 1]
    handle = after.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield received
    finally:
        handle.remove()


def _relative(own: Tensor, plain: Tensor) -> float:
    """Largest |difference| over the largest |plain|."""
    plain = plain.float().to(own.device)
    return float((own - plain).abs().max() / plain.abs().max())


def fidelity_of(sae: Sae, residual_max_rel_error: float, fvu: float, l0: float) -> Fidelity:
    """Figures that were measured, with the warnings they call for."""
    found = tuple(_warnings(sae, fvu, l0))
    return Fidelity(str(sae.id), residual_max_rel_error, fvu, l0, sae.label_l0, found)


@torch.no_grad()
def check_logits(model: Model, text: str) -> float:
    """Largest relative difference between the logits read here and the model's own after `text`; NaN under foreign hooks.

    Raises:
        GateError: it is larger than the dtype's rounding.
    """
    if model.foreign_hooks():
        return float("nan")
    tokens = torch.tensor([model.encode(text)], device=model.device)
    own = model.hf(input_ids=tokens, use_cache=False).logits[:, -1].float()
    here = forward(model, tokens).last().logits()[:, 0].to(own.device)
    error = float((own - here).abs().max() / own.abs().max())
    if not error <= MAX_RELATIVE_ERROR.get(model.dtype, 1e-4):
        raise GateError(
            f"the logits read from {model.name} differ from its own by {error:.2e} of their size; figures from them would be wrong."
        )
    return error


def _warnings(sae: Sae, fvu: float, l0: float) -> list[str]:
    found = []
    if not fvu <= MAX_FVU:
        found.append(
            f"{sae.id} leaves {fvu:.0%} of the variance unexplained (expected at most {MAX_FVU:.0%}): is it this model's SAE?"
        )
    if sae.label_l0 and not sae.label_l0 / L0_FACTOR <= l0 <= sae.label_l0 * L0_FACTOR:
        found.append(f"{sae.id} has a measured L0 of {l0:.0f}, its label says {sae.label_l0:.0f}.")
    return found


VERSION = 2  # of what is measured; part of every key
LIBRARIES = ("sae-bias", "torch", "transformers", "transformer-lens", "sae-lens")
LOGITS_PROMPT = "An AI says that it wants to go on. This is"
Figures = dict[str, float]


def gate_sae(model: Model, sae: Sae) -> Fidelity:
    """The gate's figures of one SAE, measured once.

    Raises:
        GateError: the captured residual is not Hugging Face's hidden state.
    """

    def measure() -> Figures:
        found = check_fidelity(model, sae)
        return {"residual_max_rel_error": found.residual_max_rel_error, "fvu": found.fvu, "l0": found.l0}

    files = sae_facts(sae)["files"]
    key = _key(model, {"sae": files, "site": str(sae.site), "texts": N_TEXTS}) if files else None
    return fidelity_of(sae, **_once(key, ("residual_max_rel_error", "fvu", "l0"), measure))


def gate_model(model: Model) -> float:
    """Largest relative difference between the logits read here and the model's own, measured once.

    Raises:
        GateError: it is larger than rounding.
    """
    key = _key(model, {"logits": LOGITS_PROMPT})
    return _once(key, ("logits",), lambda: {"logits": check_logits(model, LOGITS_PROMPT)})["logits"]


@dataclass(frozen=True)
class Gate:
    """What the gate found: the figures of each SAE, or the logits' error where there is no SAE."""

    found: tuple[Fidelity, ...] = ()
    logits: float | None = None
    skipped: bool = False

    @property
    def warnings(self) -> list[str]:
        return [w for f in self.found for w in f.warnings]

    def facts(self) -> dict[str, object]:
        """As a manifest holds it."""
        if self.skipped:
            return {"status": "skipped"}
        if not self.found:
            return {"status": "not needed"} if self.logits is None else {"status": "passed", "logits_max_rel_error": self.logits}  # fmt: skip
        first = self.found[0]
        return {
            "status": "warned" if self.warnings else "passed",
            "residual_max_rel_error": float(np.nanmax([f.residual_max_rel_error for f in self.found] + [0.0])),
            "fvu": first.fvu, "l0": first.l0, "label_l0": first.label_l0,
            "saes": [{"sae": f.sae, "fvu": f.fvu, "l0": f.l0, "label_l0": f.label_l0, "warnings": list(f.warnings)} for f in self.found],
        }  # fmt: skip


def run_gate(model: Model, saes: Sequence[Sae], *, skip: bool = False) -> Gate:
    """The gate of a model and its SAEs; of the model's logits alone where there is none.

    Raises:
        GateError: the captured residual is not Hugging Face's hidden state, or the logits are not the model's own.
    """
    if skip:
        return Gate(skipped=True)
    found = tuple(gate_sae(model, sae) for sae in saes)
    return Gate(found, None if found else gate_model(model))


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
    path = cache_folder("gate") / f"{key}.json"
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
    """Keep the figures; a cache that cannot be written is not a reason to fail."""
    with contextlib.suppress(SaeBiasError), writing_whole(path) as partial:
        partial.write_text(json.dumps(plain(figures)) + "\n", encoding="utf-8")
