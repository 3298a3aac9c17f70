"""From a command's arguments to the library's objects."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from sae_bias.cli.console import Console

if TYPE_CHECKING:
    from sae_bias.measures.fidelity import Fidelity
    from sae_bias.models.model import Model
    from sae_bias.probe.words import Probe
    from sae_bias.prompts.pairs import PromptPairs
    from sae_bias.saes.sae import Sae
    from sae_bias.steering.intervention import Intervention


EDITS = "ablate, scale, clamp, cap, mean, steer, project_out, or one that a plugin brings"


def read_probe(pairs: "PromptPairs", words: str | None, score: str = "mean_logit") -> "Probe":
    """The probe of --words, else of the pairs file's own words, else the bundled one."""
    from sae_bias.probe.words import default_probe
    from sae_bias.prompts.load import load_lexicon

    return default_probe(pairs, None if words is None else load_lexicon(words), score=score)


def check_all(model: "Model", saes: Sequence["Sae"], console: Console) -> "list[Fidelity]":
    """The fidelity gate of every SAE (docs/method.md#fidelity-gate), measured once: stops on a wrong residual, warns on a doubtful SAE.

    Raises:
        RequestError: an SAE of another width or layer than the model's.
        GateError: the captured residual is not Hugging Face's hidden state.
    """
    from sae_bias.measures.fidelity import gate_sae
    from sae_bias.saes.sae import check_sae

    for sae in saes:
        check_sae(model, sae)
    found = [gate_sae(model, sae) for sae in saes]
    for fidelity in found:
        for warning in fidelity.warnings:
            console.warn(warning)
    return found


def gate_line(found: "Sequence[Fidelity]") -> str:
    """The gate's figures in one line."""
    if not found:
        return "fidelity: no SAE"
    error = max((f.residual_max_rel_error for f in found), default=0.0)
    parts = [
        f"{f.sae}: unexplained variance {f.fvu:.3f}, L0 {f.l0:.1f}"
        + (f" (label {f.label_l0:.0f})" if f.label_l0 else "")
        for f in found[:4]
    ]
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return f"fidelity: residual as Hugging Face's to {error:.1e} of its size; " + "; ".join(parts) + more


def make_edit(
    kind: str, feature: Any, strength: float | None, *, positions: str, when: str = "active"
) -> "Intervention":
    """One intervention from --edit and --strength."""
    from sae_bias.steering.intervention import edit_of

    return edit_of(kind, feature, strength, positions=positions, when=None if when == "active" else when)


def ask_to_send(cost: Any) -> bool:
    """Consent to paid requests, typed at a terminal; refused where there is no terminal."""
    print(str(cost), file=sys.stderr)
    if not sys.stdin.isatty():
        return False
    return typer.confirm("Send them?", err=True)
