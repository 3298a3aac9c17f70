"""Log-probabilities of continuations: how a scenario reaches the model, and what the model gives each option after it.

log p(continuation | prompt) = Σ_j log p(token_j | prompt, tokens before j), each read at its own position, unembedded there alone.
What the orders and the options of a scenario share is computed once (`models.tree`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.models.chat import takes_system
from sae_bias.models.forward import Final, log_sum_exp
from sae_bias.models.model import Model
from sae_bias.models.reads import Reader, Spot, read_together
from sae_bias.probe.words import refuse_unknown
from sae_bias.prompts.scenarios import LETTERS, Scenario, Scenarios

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
        opening = [{"role": "system", "content": self.system or ""}] if self.system_role else []
        text = f"{self.system}\n\n{user.rstrip()}" if self.system and not self.system_role else user.rstrip()
        return self.model.encode_chat([*opening, {"role": "user", "content": text}], prefill=lead)

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
        refuse_unknown(self.model, added, f"the option {option!r}")
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
class Continuations(Reader):
    """Log-probabilities of every ask's continuations, as they come in; single-token continuations of one prompt share one sequence."""

    def __init__(self, asks: Sequence[Ask]):
        self.asks = list(asks)
        places: dict[tuple[int, tuple[int, ...]], int] = {}
        self._tokens: dict[Spot, list[tuple[int, int]]] = {}
        """Of each spot, the (place in `found`, token) it predicts."""
        self._sizes: list[list[int]] = []
        n = 0
        for ask in asks:
            start = len(ask.prompt)
            for ids in ask.continuations:
                sequence = places.setdefault((start, (*ask.prompt, *ids[:-1])), len(places))
                for j, token in enumerate(ids):
                    self._tokens.setdefault((sequence, start - 1 + j), []).append((n + j, token))
                n += len(ids)
            self._sizes.append([len(ids) for ids in ask.continuations])
        self.sequences = [ids for _, ids in places]
        self.positions = [range(start - 1, len(ids)) for start, ids in places]
        self.ends, self.starts = [start for start, _ in places], [0] * len(places)
        self.partners = [None] * len(places)
        self.found = np.full(n, np.nan)

    def copy(self) -> Continuations:
        """The same figures, to be replaced where an edit changes them."""
        other = copy(self)
        other.found = self.found.copy()
        return other

    def take(self, wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        for rows, z in final.blocks():
            norm = log_sum_exp(z)
            reads = [(row, *read) for row, spots in enumerate(wanted[rows]) for spot in spots for read in self._tokens.get(spot, ())]  # fmt: skip
            if reads:
                row, place, token = map(list, zip(*reads))
                self.found[place] = (z[row, token] - norm[row]).cpu().numpy()

    def values(self) -> list[Float[np.ndarray, "n_options"]]:
        """Σ log p of each ask's options."""
        sizes = [n for of_ask in self._sizes for n in of_ask]
        sums = np.add.reduceat(self.found, np.cumsum([0, *sizes])[:-1]) if sizes else np.empty(0)
        return np.split(sums, np.cumsum([len(s) for s in self._sizes])[:-1])

    def read(self, model: Model, *, progress: bool = False, batch_size: int | None = None) -> list[Float[np.ndarray, "n_options"]]:  # fmt: skip
        """Every ask's option log-probabilities, under whatever interventions are open."""
        read_together(model, [self], progress=progress, describe="scenarios", batch_size=batch_size)
        return self.values()
