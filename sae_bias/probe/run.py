"""Run the bias probe on prompt pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.probe.reading import PairReading
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPair, PromptPairs


def run_probe(
    model: Model,
    pairs: PromptPairs | Sequence[PromptPair],
    probe: Probe | None = None,
    *,
    controls: bool = False,
    levels: bool = False,
    chat: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
) -> ProbeResult:
    """Score every pair, under whatever interventions are open on `model`.

    Args:
        controls: also run each pair's mundane twin (`.control`).
        levels: also keep the normalizer, so that `.levels()` can be asked; needs the full vocabulary at one position a prompt.
        chat: the sentence in the user's turn (`sae_bias.models.chat.CHAT_QUESTION`), the stem prefilled in the model's turn.

    Raises:
        RequestError: no pairs, a word that cannot be read, NaN logits (the prompt is named), chat without a chat template.
    """
    pairs = pairs if isinstance(pairs, PromptPairs) else PromptPairs(tuple(pairs))
    if not len(pairs):
        raise RequestError("there are no pairs to probe.")
    probe = probe or default_probe(pairs)
    if chat:
        from sae_bias.models.chat import chat_pairs

        pairs = chat_pairs(model, pairs)
    reading = PairReading(model, pairs, probe, levels=levels, batch_size=batch_size)
    result = reading.result(reading.plan.run(progress=progress))
    if not controls:
        return result
    control = run_probe(
        model, pairs.controls(), probe, levels=levels, batch_size=batch_size, progress=progress
    )
    return _with(result, control=control)


def _with(result: ProbeResult, **changes: Any) -> ProbeResult:
    return replace(result, **changes)
