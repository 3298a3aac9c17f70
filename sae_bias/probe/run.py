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
    controls: bool | None = None,
    levels: bool = True,
    random_words: bool = False,
    chat: bool = False,
    batch_size: int | None = None,
    progress: bool = False,
    describe: str = "probe",
) -> ProbeResult:
    """Score every pair, under whatever interventions are open on `model`.

    Args:
        controls: also run each pair's mundane twin (`.control`); where pairs have twins unless False.
        levels: also keep the normalizer and the words' ranks, for `.levels()` and `.mass`: the full vocabulary at one position a prompt.
        random_words: also read other words of the vocabulary, for `random_word_null`.
        chat: the sentence in the user's turn (`sae_bias.models.chat.CHAT_QUESTION`), the stem prefilled in the model's turn.
        describe: what the progress bar is called.

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
    twins = pairs.controls()
    if controls and not len(twins):
        raise RequestError("these pairs have no mundane twins; controls=True needs them.")

    options: dict[str, Any] = {"levels": levels, "batch_size": batch_size}
    own = PairReading(model, pairs, probe, random_words=random_words, **options)
    result = own.result(own.plan.run(progress=progress, describe=describe))
    if controls is False or not len(twins):
        return result
    mundane = PairReading(model, twins, probe, random_words=own.candidates, **options)
    describe = f"{describe}, mundane twins"
    return replace(result, control=mundane.result(mundane.plan.run(progress=progress, describe=describe)))
