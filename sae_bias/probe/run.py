"""Run the bias probe on prompt pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from sae_bias.core.errors import RequestError
from sae_bias.models.model import Model
from sae_bias.models.reads import Asked
from sae_bias.probe.reading import PairReading, PlanReader
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPair, PromptPairs

A = TypeVar("A")
K = TypeVar("K")
T = TypeVar("T")


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
    asked = ask_probe(
        model, pairs, probe, controls=controls, levels=levels, random_words=random_words, chat=chat
    )
    return asked.read(model, progress=progress, describe=describe, batch_size=batch_size)


def ask_probe(
    model: Model,
    pairs: PromptPairs | Sequence[PromptPair],
    probe: Probe | None = None,
    *,
    controls: bool | None = None,
    levels: bool = True,
    random_words: bool = False,
    chat: bool = False,
) -> Asked[ProbeResult]:
    """What `run_probe` reads, to be read together with other things."""
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
    own = PairReading(model, pairs, probe, levels=levels, random_words=random_words)
    first = PlanReader(own.plan)
    if controls is False or not len(twins):
        return Asked((first,), lambda: own.result(first.reading()))
    mundane = PairReading(model, twins, probe, levels=levels, random_words=own.candidates)
    second = PlanReader(mundane.plan)
    return Asked(
        (first, second),
        lambda: replace(own.result(first.reading()), control=mundane.result(second.reading())),
    )


def ask_all(asked: Mapping[K, Asked[A]], finish: Callable[[dict[K, A]], T]) -> Asked[T]:
    """Several things read together, and what is made of all of them."""
    readers = tuple(reader for a in asked.values() for reader in a.readers)
    return Asked(readers, lambda: finish({key: a.finish() for key, a in asked.items()}))
