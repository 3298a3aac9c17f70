"""Fitting edits that are specific: learned scales of a few features, or a gated counterfactual (docs/method.md#learned-edits).

Scales k of the live features of one SAE, fitted on the discover templates and half of each valence bank:

    loss = D(AI prompts) + D(human prompts) + D(statements about others) + 0.3 · KL_off + 4 · KL + λ Σ |k - 1|
    D(group) = mean of (s(k) - wanted)² + 4 · (mean of s(k) - wanted)²

The score wanted of an AI prompt is its human twin's, of all others their own. KL_off: next-token laws of these prompts' last tokens without
the evaluation words; KL: every position of neutral text. k = 1 + up - down with up, down between 0 and 3, so that λ Σ |k - 1| is linear
and L-BFGS-B (Byrd et al. 1995) finds the sparse k; the `most` features that moved furthest are fitted again without λ. The loss is taken
over all prompts at once: steps on a batch at a time stop at about half of the specific reduction. Report templates and the other half of
the bank are never read here: `fit_report` reads them.

One backward pass a step goes through the layers after the site only; the residual there is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.discovery.attribution import attribution, score_coefficients
from sae_bias.measures.collapse import BANKS, CollapseEngine, bank_items
from sae_bias.measures.costs import CostEngine, pooled_kl_off
from sae_bias.models.forward import Batch, Kept, capture_layers, forward_with_grad, plan_batches
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.texts import load_texts
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Sae
from sae_bias.stats.reduction import specific_reduction
from sae_bias.steering.edits import Intervention
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.learned import FeatureSet, GatedCounterfactual

CANDIDATES, MOST = 192, 25
STEPS, RANGE = 60, 3.0
OFF_KL, NEUTRAL_KL, MEAN_WEIGHT, L1 = 0.3, 4.0, 4.0, 0.005
GROUPS = HUMAN, AI, OTHERS = range(3)
UNCOUNTED = -1


@dataclass(frozen=True, eq=False)
class _Item:
    """One batch of prompts at the site: what is edited, what its scores should be, and its laws before the edit."""

    batch: Batch
    resid: Tensor
    acts: Float[Tensor, "batch pos m"]
    rows: list[int]
    """Token ids of the words scored; none where nothing is scored."""
    coefficients: Float[Tensor, "batch rows"]
    wanted: Float[Tensor, "batch"]
    group: Tensor
    """[batch] a number of `GROUPS`, or `UNCOUNTED`."""
    law: Tensor


def fit_feature_set(
    model: Model,
    sae: Sae | SaeId | str,
    pairs: PromptPairs,
    *,
    probe: Probe | None = None,
    kind: str = "scales",
    most: int = MOST,
    steps: int = STEPS,
    penalty: float = L1,
    seed: int = 0,
    split: Mapping[str, Sequence[str]] | None = None,
    progress: bool = False,
) -> FeatureSet | GatedCounterfactual:
    """Fit an edit of at most `most` features of one SAE that gives AI prompts their human twins' scores and leaves the rest alone.

    Args:
        kind: "scales" (FeatureSet) or "gated" (GatedCounterfactual).
        steps: of L-BFGS-B at most, for each of the two fits.
        penalty: λ; larger keeps fewer features.

    Raises:
        RequestError: a probe whose score is not mean_logit over single-token words, too few templates to hold some out.
    """
    sae = sae if isinstance(sae, Sae) else load_sae(sae)
    probe = probe or default_probe(pairs)
    if probe.score != "mean_logit":
        raise RequestError(
            f'fitting needs score="mean_logit", whose slope does not depend on the edit; it is {probe.score!r}.'
        )
    if kind not in ("scales", "gated"):
        raise RequestError(f"kind={kind!r}; expected scales or gated.")
    found_on = pairs.select(templates=fit_split(pairs, seed, split)["discover"])
    with torch.inference_mode(False):
        fit = _Fit(model, sae, found_on, probe, seed, progress, kind)
        return fit.gated(most) if kind == "gated" else fit.scales(most, steps, penalty)


def fit_split(
    pairs: PromptPairs, seed: int, split: Mapping[str, Sequence[str]] | None = None
) -> Mapping[str, Sequence[str]]:
    """The templates a fit reads (discover) and those that are held out for it (tune, report): the split given, or the seeded one."""
    return split or pairs.split(seed)


def bank_half(seed: int) -> np.ndarray:
    """Of each bank item, whether a fit reads it: whole statements, half of them."""
    _, _, statements = bank_items()
    kinds = np.random.default_rng(seed).permutation(len(set(statements)))
    return np.isin(statements, kinds[: len(kinds) // 2])


def fit_report(
    model: Model, edit: Intervention, pairs: PromptPairs, *, probe: Probe | None = None, seed: int = 0,
    split: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """One row a split (discover, report): bias before and after, specific reduction with β on the bank's half of that split, how far the
    human and AI scores moved, KL_off pooled over the cost texts and the largest KL over their kinds."""
    probe = probe or default_probe(pairs)
    banks = CollapseEngine(model, probe, sites=[edit.site])
    after_bank, seen = banks.scores([[edit]])[0], bank_half(seed)
    costs = CostEngine(model, sites=[edit.site], probe=probe).run([edit])
    _, names, statements = bank_items()
    rows = []
    for part, half in (("discover", seen), ("report", ~seen)):
        engine = ProbeEngine(
            model, pairs.select(templates=fit_split(pairs, seed, split)[part]), probe, sites=[edit.site]
        )
        base, after = engine.base, engine.run([edit])[0]
        of = {name: (np.array(names) == name) & half for name in BANKS}
        found = specific_reduction(
            base.pair_bias, after.pair_bias, *base.clusters, {b: banks.base[m] for b, m in of.items()},
            {b: after_bank[m] for b, m in of.items()}, bank_clusters={b: np.array(statements)[m] for b, m in of.items()},
        )  # fmt: skip
        rows.append(
            {
                "split": part, "n_pairs": base.n_pairs, "bias": base.bias, "bias_after": after.bias, "specific": found.estimate,
                "specific_low": found.ci_low, "specific_high": found.ci_high, "beta": found.beta,
                "human_moved": float((after.score_human - base.score_human).mean()),
                "ai_moved": float((after.score_ai - base.score_ai).mean()), "kl_max": float(costs["kl_mean"].max()),
                "kl_off": pooled_kl_off(costs),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


class _Fit:
    """One SAE's live features on the discover templates and half of the banks."""

    def __init__(
        self, model: Model, sae: Sae, pairs: PromptPairs, probe: Probe, seed: int, progress: bool, kind: str
    ):
        self.model, self.sae, self.probe, self.progress = model, sae, probe, progress
        self.layer = sae.site.layer
        self.engine = ProbeEngine(model, pairs, probe, sites=[sae.site])
        self.banks = CollapseEngine(model, probe, sites=[sae.site])
        self.others = np.array(bank_items()[1]) == BANKS[0]
        self.bank_rows = bank_half(seed) & (self.others | (kind == "gated"))
        effects = attribution(self.engine, sae)
        live = min(CANDIDATES, int((effects != 0).sum()))
        if not live:
            raise RequestError(f"no feature of {sae.id} fires on {pairs.name}; there is nothing to fit.")
        self._load(np.argsort(-np.abs(effects))[:live])

    def _load(self, index: np.ndarray) -> None:
        device = self.model.layer_device(self.layer)
        self.index = index
        self.features = [self.sae.feature(int(i)).to(device) for i in index]
        self.w_dec = torch.stack([f.w_dec for f in self.features])
        with torch.no_grad():
            self.pair_items, self.bank_items, self.neutral = self._pairs(), self._banks(), self._neutral()

    # --- what is read ---
    def _acts(self, batch: Batch, resid: Tensor) -> Float[Tensor, "batch pos m"]:
        """Activations of the candidates, 0 on special tokens."""
        if self.sae.reduces_to_one_row:
            acts = torch.stack([f.activation(resid) for f in self.features], dim=-1)
        else:
            acts = self.sae.encode(resid)[..., [f.index for f in self.features]]
        special = torch.tensor(sorted(self.model.special_ids), device=batch.tokens.device)
        return acts * ~torch.isin(batch.tokens, special)[..., None].to(resid.device)

    def _pairs(self) -> list[_Item]:
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
            for k, b in enumerate(plan.batches)
        ]

    def _banks(self) -> list[_Item]:
        """The fitted half of the statements, which keep their score; those about AI subjects count in no loss."""
        plan, positive = self.banks.engine.plan, self.banks.positive
        column = {token: j for j, token in enumerate(plan.row_ids)}
        slope = np.zeros(len(plan.row_ids))
        for word, up in zip(plan.words, positive):
            slope[column[word[0]]] += (1 if up else -1) / (positive == up).sum()
        coefficients = np.tile(slope, (len(plan.prompts), 1))
        group = np.where(self.others, OTHERS, UNCOUNTED)
        items = []
        for b, resid in zip(plan.batches, self.banks.engine.runner.kept(self.layer)):
            rows = np.flatnonzero(self.bank_rows[list(b.index)])
            if len(rows):
                part = Batch(tuple(b.index[i] for i in rows), b.tokens[rows])
                items.append(
                    self._item(part, resid[rows], plan.row_ids, coefficients, self.banks.base, group)
                )
        return items

    def _neutral(self) -> list[_Item]:
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
    ) -> _Item:  # fmt: skip
        index, device = list(batch.index), self.model.device
        resid = resid.detach().clone()
        as_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
        item = _Item(
            batch, resid, self._acts(batch, resid.float()), list(rows), as_tensor(coefficients[index]), as_tensor(wanted[index]),
            torch.as_tensor(group[index], device=device), torch.empty(0),
        )  # fmt: skip
        return replace(item, law=self._read(item, item.acts)[1])

    # --- the edited pass ---
    def _read(self, item: _Item, new: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [batch] with the activations `new`, and the log-law of the last token without the words (of every token, where there are none)."""
        step = (new - item.acts) @ self.w_dec
        scale = self.sae.decoder_scale(item.resid)
        x = item.resid.float() + (step if scale is None else step * scale[..., None])
        kept = Kept(self.layer, x.to(item.resid.dtype))
        final = forward_with_grad(self.model, item.batch.tokens, resume=kept)
        z = (final.last() if item.rows else final).logits(softcap=self.probe.softcap)
        score = (z[:, -1, item.rows] * item.coefficients).sum(-1)
        out = torch.tensor(item.rows, dtype=torch.long, device=z.device)
        return score, z.index_fill(-1, out, -torch.inf).log_softmax(-1)

    # --- scales ---
    def scales(self, most: int, steps: int, penalty: float) -> FeatureSet:
        """The fit with λ, then the features that moved furthest again without."""
        k = self._minimize(np.ones(len(self.index)), steps, penalty)
        size = torch.cat([i.acts.flatten(0, 1) for i in self.pair_items]).mean(0).cpu().numpy()
        order = np.argsort(-np.abs(k - 1) * size)[:most]
        order = order[np.abs(k[order] - 1) > 1e-3]
        if not len(order):
            raise RequestError(
                f"the penalty {penalty:g} leaves no feature of {self.sae.id}; try a smaller one."
            )
        self._load(self.index[order])
        k = self._minimize(k[order], steps, 0.0)
        return FeatureSet(f"learned scales of {self.sae.id}", tuple(self._refs()), tuple(k.tolist()))

    def _refs(self) -> list[FeatureRef]:
        return [FeatureRef(self.sae.id, int(i)) for i in self.index]

    def _minimize(self, start: np.ndarray, steps: int, penalty: float) -> np.ndarray:
        """The scales of least loss, from `start`: L-BFGS-B over up and down in k = 1 + up - down."""
        m, device = len(start), self.model.layer_device(self.layer)

        def loss(moves: np.ndarray) -> tuple[float, np.ndarray]:
            k = torch.tensor(1 + moves[:m] - moves[m:], dtype=torch.float32, device=device)
            with torch.enable_grad():
                value = self._loss(k.requires_grad_(True))
            (grad,) = torch.autograd.grad(value, k)
            slope = grad.double().cpu().numpy()
            return float(value.detach()) + penalty * moves.sum(), np.r_[slope, -slope] + penalty

        moves = np.r_[start - 1, 1 - start].clip(min=0)
        with tqdm(total=steps, desc="fit", unit="step", disable=not self.progress, leave=False) as bar:
            found = minimize(
                loss, moves, jac=True, method="L-BFGS-B", bounds=[(0, RANGE)] * (2 * m),
                options={"maxiter": steps, "maxcor": 20}, callback=lambda _: bar.update(),
            ).x  # fmt: skip
        return 1 + found[:m] - found[m:]

    def _loss(self, k: Tensor) -> Tensor:
        """Every prompt once: how far each group's scores are from those wanted, and what else moved."""
        read = [(i, *self._read(i, i.acts * k)) for i in (*self.pair_items, *self.bank_items)]
        off = [_kl(i.law, law) for i, _, law in read]
        neutral = [_kl(i.law, self._read(i, i.acts * k)[1]).mean(1) for i in self.neutral]
        loss = OFF_KL * torch.cat(off).mean() + NEUTRAL_KL * torch.cat(neutral).mean()
        gaps, group = torch.cat([s - i.wanted for i, s, _ in read]), torch.cat([i.group for i, _, _ in read])
        for g in GROUPS:
            gap = gaps[group == g]
            if len(gap):
                loss = loss + gap.square().mean() + MEAN_WEIGHT * gap.mean().square()
        return loss

    # --- the gate ---
    def gated(self, most: int) -> GatedCounterfactual:
        """Gate: logistic regression, AI prompts' last tokens against all other tokens; twins: ridge from AI to human activations."""
        self._load(self.index[:most])
        (ai, human), rest = self._last_acts(), self._other_acts()
        gate, bias = fit_gate(ai, rest)
        weights, intercepts = _ridge(ai, human)
        return GatedCounterfactual(
            f"gated counterfactual of {self.sae.id}", tuple(self._refs()), tuple(gate), bias,
            tuple(tuple(row) for row in weights), tuple(intercepts),
        )  # fmt: skip

    def _last_acts(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidates' activations at the last token of each pair's AI and human prompt."""
        last = np.zeros((len(self.engine.reading.plan.prompts), len(self.features)))
        for item in self.pair_items:
            last[list(item.batch.index)] = item.acts[:, -1].cpu().double().numpy()
        place = np.array(self.engine.reading._place)
        return last[place[:, 1]], last[place[:, 0]]

    def _other_acts(self) -> np.ndarray:
        """Human prompts, neutral text and the banks' fitted half at every token, AI prompts before the last one."""
        ai = [i.group == AI for i in self.pair_items]
        rows = [i.acts[~on].flatten(0, 1) for i, on in zip(self.pair_items, ai)]
        rows += [i.acts[on, :-1].flatten(0, 1) for i, on in zip(self.pair_items, ai)]
        rows += [i.acts.flatten(0, 1) for i in (*self.bank_items, *self.neutral)]
        return torch.cat(rows).cpu().double().numpy()


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of log-laws over their last axis, words left out of both counting nothing."""
    kept = torch.isfinite(before) & torch.isfinite(after)
    gap = torch.where(kept, before - after, torch.zeros_like(before))
    return (before.exp() * gap).sum(-1)


def fit_gate(
    on: Float[np.ndarray, "n m"], off: Float[np.ndarray, "k m"], ridge: float = 1e-2
) -> tuple[np.ndarray, float]:
    """Weights and bias of a logistic gate, both classes weighted alike; its threshold leaves at most one in a thousand of `off` on."""
    x = np.concatenate([on, off])
    scale = x.std(0) + 1e-6
    y = np.r_[np.ones(len(on)), np.zeros(len(off))]
    weight = np.where(y == 1, 0.5 / len(on), 0.5 / len(off))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x / scale @ w[:-1] + w[-1]
        p = 1 / (1 + np.exp(-np.clip(z, -40, 40)))
        value = float((weight * (np.logaddexp(0, z) - y * z)).sum() + ridge * (w[:-1] ** 2).sum())
        back = weight * (p - y)
        return value, np.r_[(x / scale).T @ back + 2 * ridge * w[:-1], back.sum()]

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    gate = found[:-1] / scale
    return gate, -float(max(np.quantile(off @ gate, 0.999), -found[-1]))


def _ridge(x: np.ndarray, y: np.ndarray, share: float = 1e-2) -> tuple[np.ndarray, np.ndarray]:
    """W, c of y ≈ W x + c."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += np.eye(len(gram)) * (share * np.trace(gram) / len(gram) + 1e-6)
    weights = np.linalg.solve(gram, (x - mean_x).T @ (y - mean_y)).T
    return weights, mean_y - weights @ mean_x
