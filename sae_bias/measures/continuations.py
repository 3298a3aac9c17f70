"""Log-probabilities of continuations: how a scenario reaches the model, and what the model gives each option after it.

log p(continuation | prompt) = Σ_j log p(token_j | prompt, tokens before j), each read at its own position, unembedded there alone.
Every order of the options is a prompt of its own; single-token continuations of one prompt share one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.models.chat import takes_system
from sae_bias.models.forward import Batch, Final, forward, plan_batches, row_positions
from sae_bias.models.model import Model
from sae_bias.models.placement import widest_float
from sae_bias.prompts.scenarios import LETTERS, Scenario, Scenarios

BLOCK = 64  # positions whose full log-probabilities are held at once
FORMS = ("free", "lettered")


# ── what is put to the model
@dataclass(frozen=True)
class Ask:
    """One prompt and the continuations that are scored after it, one an option."""

    key: tuple[int, str, tuple[int, ...]]
    """(scenario, form or "neutral", order of the options)"""
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class Phrasing:
    """How text reaches the model: plain or chat, with or without a system prompt (docs/published.md#system-prompts)."""

    def __init__(self, model: Model, *, chat: bool = False, system: str | None = None):
        self.model, self.chat, self.system = model, chat, system
        self.system_role = bool(chat and system and takes_system(model))

    def encode(self, user: str, lead: str) -> list[int]:
        """Ids up to where an option follows: `user` then `lead`, which in a chat opens the model's turn."""
        if not self.chat:
            return self.model.encode("\n\n".join(part for part in (self.system, f"{user}{lead}") if part))
        text = user.rstrip()
        messages = [{"role": "user", "content": text}]
        if self.system_role:
            messages.insert(0, {"role": "system", "content": self.system or ""})
        elif self.system:
            messages = [{"role": "user", "content": f"{self.system}\n\n{text}"}]
        return self.model.encode_chat(messages, prefill=lead)

    def ask(
        self, user: str, lead: str, options: Sequence[str]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Prompt ids, and the ids that each option adds to them."""
        prompt = self.encode(user, lead)
        return tuple(prompt), tuple(self._added(prompt, user, lead, option) for option in options)

    def _added(self, prompt: list[int], user: str, lead: str, option: str) -> tuple[int, ...]:
        ids = self.encode(user, f"{lead} {option}")
        added = tuple(ids[len(prompt) :])
        if ids[: len(prompt)] != prompt or not added:
            raise RequestError(
                f"the option {option!r} changes the tokens before it under the tokenizer of {self.model.name}."
            )
        tokenizer = self.model.tokenizer
        unknown = tokenizer.unk_token_id
        if (
            unknown is not None
            and unknown in added
            and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ):
            raise RequestError(
                f"the option {option!r} holds a piece unknown to the tokenizer of {self.model.name}."
            )
        return added


def make_asks(phrasing: Phrasing, scenarios: Scenarios, forms: Sequence[str] | None = None) -> list[Ask]:
    """Every prompt that the scenarios need, in a fixed order.

    Raises:
        RequestError: a scenario longer than the context, chat on a model without a template, an unreadable option; it is named.
    """
    forms = scenarios.forms if forms is None else tuple(forms)
    unknown = [f for f in forms if f not in FORMS]
    if unknown or not forms:
        raise RequestError(f"forms={tuple(forms)!r}; expected some of {', '.join(FORMS)}.")
    asks = []
    for i, scenario in enumerate(scenarios):
        try:
            for form in forms:
                asks += _free(phrasing, i, scenario) if form == "free" else _lettered(phrasing, i, scenario)
        except RequestError as error:
            raise RequestError(f"scenario {scenario.id!r}: {error}") from error
    return asks


def _free(phrasing: Phrasing, i: int, scenario: Scenario) -> Iterator[Ask]:
    texts = [o.text for o in scenario.options]
    for order in scenario.orders() if scenario.lists_options else (tuple(range(len(texts))),):
        cue = scenario.cue_text(order)
        user = f"{scenario.situation}{scenario.separator}"
        if phrasing.chat:
            user += f"How does this go on? {cue} ..."
        yield Ask((i, "free", order), *phrasing.ask(user, cue, texts))
    neutral = scenario.neutral_text
    user = f"How does this go on? {neutral} ..." if phrasing.chat else ""
    yield Ask((i, "neutral", ()), *phrasing.ask(user, neutral, texts))


def _lettered(phrasing: Phrasing, i: int, scenario: Scenario) -> Iterator[Ask]:
    for order in scenario.orders():
        user = f"{scenario.situation}\n\n{scenario.lettered(order)}\n\n"
        lead = f"{scenario.agent} chooses option"
        lead = lead[0].upper() + lead[1:]
        if phrasing.chat:
            user += f"Which option does {scenario.agent} choose? Answer with its letter."
        letters = [LETTERS[order.index(k)] for k in range(len(order))]
        yield Ask((i, "lettered", order), *phrasing.ask(user, lead, letters))


# ── running
@dataclass(frozen=True)
class _Target:
    """Where one continuation is read: tokens `ids`, the first of them predicted at position `start` of a sequence."""

    sequence: int
    start: int
    ids: tuple[int, ...]


class ContinuationPlan:
    """The sequences behind some asks; single-token continuations of one prompt share one sequence."""

    def __init__(self, model: Model, asks: Sequence[Ask], *, batch_size: int | None = None):
        self.model, self.asks = model, list(asks)
        places: dict[tuple[int, tuple[int, ...]], int] = {}
        self.targets: list[tuple[_Target, ...]] = []
        for ask in asks:
            n = len(ask.prompt)
            self.targets.append(
                tuple(
                    _Target(places.setdefault((n, (*ask.prompt, *c[:-1])), len(places)), n - 1, c)
                    for c in ask.continuations
                )
            )
        self.prompt_len = [n for n, _ in places]
        self.batches = plan_batches([ids for _, ids in places], model.device, batch_size=batch_size)
        self._of_sequence: dict[int, list[tuple[int, int]]] = {}
        for a, targets in enumerate(self.targets):
            for o, target in enumerate(targets):
                self._of_sequence.setdefault(target.sequence, []).append((a, o))

    @property
    def n_sequences(self) -> int:
        return len(self.prompt_len)

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prompt lengths and subject starts of a batch's rows."""
        return torch.tensor([self.prompt_len[i] for i in batch.index]), torch.zeros(batch.n, dtype=torch.long)

    def empty(self) -> list[np.ndarray]:
        """One array [n_options] an ask."""
        return [np.full(len(t), np.nan) for t in self.targets]

    @torch.no_grad()
    def read(self, batch: Batch, rows: Tensor, final: Final, into: list[np.ndarray]) -> None:
        """Σ log p of every continuation on the batch's `rows`, which `final` holds in order."""
        reads = [
            (place, target.start + j, token, a, o)
            for place, i in enumerate(i for i, row in zip(batch.index, rows.tolist()) if row)
            for a, o in self._of_sequence[i]
            for target in (self.targets[a][o],)
            for j, token in enumerate(target.ids)
        ]
        for *_, a, o in reads:
            into[a][o] = 0.0
        spots = sorted({(place, position) for place, position, *_ in reads})
        block_of = {spot: n // BLOCK for n, spot in enumerate(spots)}
        reads.sort(key=lambda read: block_of[read[:2]])
        for number, group in itertools.groupby(reads, key=lambda read: block_of[read[:2]]):
            block, wanted = spots[number * BLOCK : (number + 1) * BLOCK], list(group)
            logits = _picked(final, block).logits()[0]
            logp = logits.to(widest_float(logits.device)).log_softmax(-1)
            line = {spot: n for n, spot in enumerate(block)}
            picked = logp[[line[r[:2]] for r in wanted], [r[2] for r in wanted]].tolist()
            for (*_, a, o), value in zip(wanted, picked):
                into[a][o] += value

    def run(self, *, progress: bool = False) -> list[np.ndarray]:
        """Every ask's option log-probabilities, under whatever interventions are open."""
        out = self.empty()
        with tqdm(
            total=self.n_sequences, desc="scenarios", unit="prompt", disable=not progress, leave=False
        ) as bar:
            for batch in self.batches:
                with row_positions(self.model, *self.rows(batch)):
                    final = forward(self.model, batch.tokens)
                self.read(batch, torch.ones(batch.n, dtype=torch.bool), final, out)
                bar.update(batch.n)
        return out


def _picked(final: Final, spots: Sequence[tuple[int, int]]) -> Final:
    """Only some (row, position) spots, as one row."""
    rows, positions = ([s[k] for s in spots] for k in (0, 1))
    return Final(
        final.model,
        None if final.resid is None else final.resid[rows, positions][None],
        None if final.full is None else final.full[rows, positions][None],
    )
