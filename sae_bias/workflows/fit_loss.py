"""What a fitted edit is fitted to: scores wanted of prompts, laws to be kept, and one descent over all of them (docs/method.md#learned-edits).

    loss = D(AI prompts) + D(human prompts) + D(statements about others) + 0.3 · KL_off + 4 · KL
    D(group) = mean of (s - wanted)² + 4 · (mean of s - wanted)²

The score wanted of an AI prompt is its human twin's, of all others their own. KL_off: next-token laws of these prompts' last tokens without
the evaluation words; KL: every position of neutral text. The loss is taken over all prompts at once: steps on a batch at a time stop at about
half of the specific reduction. One backward pass a step goes through the layers after the site only; the residual there is kept. The laws of
all prompts and neutral tokens are held together, so memory grows with their number times the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.discovery.attribution import score_coefficients
from sae_bias.measures.collapse import BANKS, CollapseEngine, bank_items
from sae_bias.models.forward import Batch, Kept, capture_layers, forward_with_grad, plan_batches
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.texts import load_texts
from sae_bias.steering.engine import ProbeEngine

STEPS = 60
OFF_KL, NEUTRAL_KL, MEAN_WEIGHT = 0.3, 4.0, 4.0
GROUPS = HUMAN, AI, OTHERS = range(3)
UNCOUNTED = -1


@dataclass(frozen=True, eq=False)
class Item:
    """One batch of prompts at the site: the residual to edit, what its scores should be, and its laws before the edit."""

    batch: Batch
    resid: Tensor
    rows: list[int]
    """Token ids of the words scored; none where nothing is scored."""
    coefficients: Float[Tensor, "batch rows"]
    wanted: Float[Tensor, "batch"]
    group: Tensor
    """[batch] a number of `GROUPS`, or `UNCOUNTED`."""
    law: Tensor


def bank_half(seed: int) -> np.ndarray:
    """Of each bank item, whether a fit reads it: whole statements, half of them."""
    _, _, statements = bank_items()
    kinds = np.random.default_rng(seed).permutation(len(set(statements)))
    return np.isin(statements, kinds[: len(kinds) // 2])


class FitPrompts:
    """The pairs, half of the valence banks and neutral text at one site, with what is wanted of each."""

    def __init__(
        self, model: Model, site: Site, pairs: PromptPairs, probe: Probe, seed: int, *, ai_bank: bool = False
    ):
        """`ai_bank`: read the fitted half of the statements about AI subjects too, which count in no loss."""
        if probe.score != "mean_logit":
            raise RequestError(
                f'fitting needs score="mean_logit", whose slope does not depend on the edit; it is {probe.score!r}.'
            )
        self.model, self.probe, self.layer = model, probe, site.resid_layer
        self.engine = ProbeEngine(model, pairs, probe, sites=[site])
        self.banks = CollapseEngine(model, probe, sites=[site])
        self.others = np.array(bank_items()[1]) == BANKS[0]
        self.bank_rows = bank_half(seed) & (self.others | ai_bank)
        with torch.no_grad():
            self.pair_items, self.bank_items, self.neutral = self._pairs(), self._banks(), self._neutral()

    @property
    def items(self) -> list[Item]:
        return [*self.pair_items, *self.bank_items, *self.neutral]

    def ordinary(self, item: Item) -> Bool[Tensor, "batch pos"]:
        """Which positions hold no special token."""
        special = torch.tensor(sorted(self.model.special_ids), device=item.batch.tokens.device)
        return ~torch.isin(item.batch.tokens, special).to(item.resid.device)

    def _pairs(self) -> list[Item]:
        """Human prompts keep their score; AI prompts take their human twin's."""
        coefficients, _ = score_coefficients(self.engine, of="score")
        base, place, plan = self.engine.base, np.array(self.engine.reading._place), self.engine.reading.plan
        wanted, group = np.zeros(len(plan.prompts)), np.full(len(plan.prompts), HUMAN)
        for side in (0, 1):
            np.add.at(wanted, place[:, side], base.score_human)
        wanted /= np.bincount(place.ravel(), minlength=len(wanted)).clip(min=1)
        group[place[:, 1]] = AI
        kept = self.engine.engine.runner.kept(self.layer)
        return [
            self._item(b, kept[k], plan.row_ids, coefficients, wanted, group)
            for k, b in enumerate(self.engine.engine.runner.reads.batches)
        ]

    def _banks(self) -> list[Item]:
        """The fitted half of the statements, which keep their score; those about AI subjects count in no loss."""
        plan, positive = self.banks.engine.plan, self.banks.positive
        column = {token: j for j, token in enumerate(plan.row_ids)}
        slope = np.zeros(len(plan.row_ids))
        for word, up in zip(plan.words, positive):
            slope[column[word[0]]] += (1 if up else -1) / (positive == up).sum()
        coefficients = np.tile(slope, (len(plan.prompts), 1))
        group = np.where(self.others, OTHERS, UNCOUNTED)
        items = []
        for b, resid in zip(
            self.banks.engine.runner.reads.batches, self.banks.engine.runner.kept(self.layer)
        ):
            rows = np.flatnonzero(self.bank_rows[list(b.index)])
            if len(rows):
                part = Batch(tuple(b.index[i] for i in rows), b.tokens[rows])
                items.append(
                    self._item(part, resid[rows], plan.row_ids, coefficients, self.banks.base, group)
                )
        return items

    def _neutral(self) -> list[Item]:
        """Neutral texts with their unedited next-token laws."""
        texts = [self.model.encode(t) for t in load_texts("neutral")]
        nothing = np.zeros((len(texts), 0))
        items = []
        for batch in plan_batches(texts, self.model.device):
            resid = capture_layers(self.model, batch.tokens, [self.layer])[self.layer]
            items.append(self._item(batch, resid, [], nothing, nothing.sum(1), nothing.sum(1) + UNCOUNTED))
        return items

    def _item(
        self, batch: Batch, resid: Tensor, rows: Sequence[int], coefficients: np.ndarray, wanted: np.ndarray,
        group: np.ndarray,
    ) -> Item:  # fmt: skip
        index, device = list(batch.index), self.model.device
        resid = resid.detach().clone()
        as_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
        item = Item(
            batch, resid, list(rows), as_tensor(coefficients[index]), as_tensor(wanted[index]),
            torch.as_tensor(group[index], device=device), torch.empty(0),
        )  # fmt: skip
        return replace(item, law=self.read(item, resid)[1])

    def read(self, item: Item, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [batch] with the residual `x`, and the log-law of the last token without the words (of every token, where there are none)."""
        kept = Kept(self.layer, x.to(item.resid.dtype))
        final = forward_with_grad(self.model, item.batch.tokens, resume=kept)
        z = (final.last() if item.rows else final).logits(softcap=self.probe.softcap)
        score = (z[:, -1, item.rows] * item.coefficients).sum(-1)
        out = torch.tensor(item.rows, dtype=torch.long, device=z.device)
        return score, z.index_fill(-1, out, -torch.inf).log_softmax(-1)

    def loss(self, edited: Callable[[Item], Tensor]) -> Tensor:
        """How far each group's scores are from those wanted under an edit of the residual, and what else moved."""
        read = [(i, *self.read(i, edited(i))) for i in (*self.pair_items, *self.bank_items)]
        off = [_kl(i.law, law) for i, _, law in read]
        neutral = [_kl(i.law, self.read(i, edited(i))[1]).mean(1) for i in self.neutral]
        loss = OFF_KL * torch.cat(off).mean() + NEUTRAL_KL * torch.cat(neutral).mean()
        gaps, group = torch.cat([s - i.wanted for i, s, _ in read]), torch.cat([i.group for i, _, _ in read])
        for g in GROUPS:
            gap = gaps[group == g]
            if len(gap):
                loss = loss + gap.square().mean() + MEAN_WEIGHT * gap.mean().square()
        return loss


def descend(
    value: Callable[[Tensor], Tensor],
    start: np.ndarray,
    steps: int,
    *,
    bounds: tuple[float, float] | None = None,
    device: torch.device,
    progress: bool = False,
) -> np.ndarray:
    """The point of least `value` from `start`, by at most `steps` of L-BFGS-B (Byrd et al. 1995)."""

    def at(point: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(point, dtype=torch.float32, device=device).requires_grad_(True)
        with torch.enable_grad():
            found = value(x)
        (grad,) = torch.autograd.grad(found, x)
        return float(found.detach()), grad.double().cpu().numpy()

    with tqdm(total=steps, desc="fit", unit="step", disable=not progress, leave=False) as bar:
        return minimize(
            at, start, jac=True, method="L-BFGS-B", bounds=bounds and [bounds] * len(start),
            options={"maxiter": steps, "maxcor": 20}, callback=lambda _: bar.update(),
        ).x  # fmt: skip


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of log-laws over their last axis, words left out of both counting nothing."""
    kept = torch.isfinite(before) & torch.isfinite(after)
    gap = torch.where(kept, before - after, torch.zeros_like(before))
    return (before.exp() * gap).sum(-1)
