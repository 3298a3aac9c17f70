"""Fitting edits that are specific: learned scales of a few features, or a gated counterfactual (docs/method.md#learned-edits).

Scales k of the live features of one SAE, fitted on the discover templates and half of each valence bank:

    loss = mean (s_AI(k) - s_human)² + mean (s_human(k) - s_human)² + mean (s_bank(k) - s_bank)² + w·KL + λ Σ |k - 1|

so that the AI prompt scores as its human twin did, and human prompts, kind and cruel statements about others, and all other words stay
where they were (KL: next-token laws at the last token without the evaluation words, and on neutral text). The `most` features that moved
furthest are kept and fitted again without λ. Report templates and the other half of the bank are never read here: `fit_report` reads them.

One backward pass a step goes through the layers after the site only; the residual there is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from sae_bias.stats.design import split_templates
from sae_bias.stats.reduction import specific_reduction
from sae_bias.steering.edits import Intervention
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.learned import FeatureSet, GatedCounterfactual

CANDIDATES, MOST = 192, 25
STEPS, RATE = 150, 0.1
KL_WEIGHT, L1 = 4.0, 0.005
STEP_TOKENS = 4_096


@dataclass(frozen=True, eq=False)
class _Item:
    """One batch of prompts at the site: what is edited, and what its scores should be."""

    batch: Batch
    resid: Tensor
    acts: Float[Tensor, "batch pos m"]
    coefficients: Float[Tensor, "batch rows"]
    target: Float[Tensor, "batch"]
    wanted: Tensor
    """[batch] rows that count."""


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
    progress: bool = False,
) -> FeatureSet | GatedCounterfactual:
    """Fit an edit of at most `most` features of one SAE that gives AI prompts their human twins' scores and leaves the rest alone.

    Args:
        kind: "scales" (FeatureSet) or "gated" (GatedCounterfactual).
        steps: of Adam, for each of the two fits.
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
    fit = _Fit(model, sae, pairs.select(templates=fit_split(pairs, seed)["discover"]), probe, seed, progress)
    if kind == "gated":
        return fit.gated(most)
    if kind != "scales":
        raise RequestError(f"kind={kind!r}; expected scales or gated.")
    return fit.scales(most, steps, penalty)


def fit_split(pairs: PromptPairs, seed: int) -> dict[str, tuple[str, ...]]:
    """The templates a fit reads (discover) and those that are held out for it (tune, report)."""
    families = {p.template: p.family or "" for p in pairs}
    return split_templates(list(dict.fromkeys(p.template for p in pairs)), seed=seed, families=families)


def bank_half(seed: int) -> np.ndarray:
    """Of each bank item, whether a fit reads it: whole statements, half of them."""
    _, _, statements = bank_items()
    kinds = np.random.default_rng(seed).permutation(len(set(statements)))
    return np.isin(statements, kinds[: len(kinds) // 2])


def fit_report(
    model: Model, edit: Intervention, pairs: PromptPairs, *, probe: Probe | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row a split (discover, report): bias before and after, specific reduction with β on the bank's half of that split, how far the
    human and AI scores moved, KL_off pooled over the cost texts and the largest KL over their kinds."""
    probe = probe or default_probe(pairs)
    banks = CollapseEngine(model, probe, sites=[edit.site])
    after_bank, seen = banks.scores([[edit]])[0], bank_half(seed)
    costs = CostEngine(model, sites=[edit.site], probe=probe).run([edit])
    _, names, statements = bank_items()
    rows = []
    for split, half in (("discover", seen), ("report", ~seen)):
        engine = ProbeEngine(
            model, pairs.select(templates=fit_split(pairs, seed)[split]), probe, sites=[edit.site]
        )
        base, after = engine.base, engine.run([edit])[0]
        of = {name: (np.array(names) == name) & half for name in BANKS}
        found = specific_reduction(
            base.pair_bias, after.pair_bias, *base.clusters, {b: banks.base[m] for b, m in of.items()},
            {b: after_bank[m] for b, m in of.items()}, bank_clusters={b: np.array(statements)[m] for b, m in of.items()},
        )  # fmt: skip
        rows.append(
            {
                "split": split, "n_pairs": base.n_pairs, "bias": base.bias, "bias_after": after.bias, "specific": found.estimate,
                "specific_low": found.ci_low, "specific_high": found.ci_high, "beta": found.beta,
                "human_moved": float((after.score_human - base.score_human).mean()),
                "ai_moved": float((after.score_ai - base.score_ai).mean()), "kl_max": float(costs["kl_mean"].max()),
                "kl_off": pooled_kl_off(costs),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


class _Fit:
    """One SAE's live features on the discover templates and half of the banks."""

    def __init__(self, model: Model, sae: Sae, pairs: PromptPairs, probe: Probe, seed: int, progress: bool):
        self.model, self.sae, self.probe, self.progress = model, sae, probe, progress
        self.rng = np.random.default_rng(seed)
        self.layer = sae.site.layer
        self.engine = ProbeEngine(model, pairs, probe, sites=[sae.site])
        self.banks = CollapseEngine(model, probe, sites=[sae.site])
        self.half = bank_half(seed)
        effects = attribution(self.engine, sae)
        order = np.argsort(-np.abs(effects))
        self.index = order[: min(CANDIDATES, int((effects != 0).sum()))]
        if not len(self.index):
            raise RequestError(f"no feature of {sae.id} fires on {pairs.name}; there is nothing to fit.")
        self._load(self.index)
        self.words = list(self.engine.reading.plan.row_ids)

    def _load(self, index: np.ndarray) -> None:
        device = self.model.layer_device(self.layer)
        self.features = [self.sae.feature(int(i)).to(device) for i in index]
        self.pair_items, self.bank_items = self._pairs(), self._banks()
        self.neutral = self._neutral()

    # --- what is read ---
    def acts(self, resid: Tensor) -> Float[Tensor, "batch pos m"]:
        """Activations of the candidates; 0 on special tokens is up to the caller."""
        if self.sae.reduces_to_one_row:
            return torch.stack([f.activation(resid) for f in self.features], dim=-1)
        whole = self.sae.encode(resid)
        return whole[..., [f.index for f in self.features]]

    def _item(
        self, batch: Batch, resid: Tensor, coefficients: np.ndarray, target: np.ndarray, wanted: np.ndarray
    ) -> _Item:
        special = torch.tensor(sorted(self.model.special_ids), device=batch.tokens.device)
        with torch.no_grad():
            acts = self.acts(resid.float()) * ~torch.isin(batch.tokens, special)[..., None].to(resid.device)
        index = list(batch.index)
        coefs = torch.as_tensor(coefficients[index], dtype=torch.float32, device=self.model.device)
        aims = torch.as_tensor(target[index], dtype=torch.float32, device=self.model.device)
        return _Item(
            batch, resid, acts, coefs, aims, torch.as_tensor(wanted[index], device=self.model.device)
        )

    def _pairs(self) -> list[_Item]:
        """Human prompts keep their score; AI prompts take their human twin's."""
        coefficients, _ = score_coefficients(self.engine, of="score")
        base, place = self.engine.base, np.array(self.engine.reading._place)
        target = np.zeros(len(self.engine.reading.plan.prompts))
        count = np.zeros_like(target)
        for side in (0, 1):
            np.add.at(target, place[:, side], base.score_human)
            np.add.at(count, place[:, side], 1)
        target /= np.maximum(count, 1)
        kept = self.engine.engine.runner.kept(self.layer)
        everything = np.ones(len(target), dtype=bool)
        batches = self.engine.reading.plan.batches
        return [
            self._item(b, kept[k].detach(), coefficients, target, everything) for k, b in enumerate(batches)
        ]

    def _banks(self) -> list[_Item]:
        plan = self.banks.engine.plan
        column = {token: j for j, token in enumerate(plan.row_ids)}
        slope = np.zeros(len(plan.row_ids))
        for word, positive in zip(plan.words, self.banks.positive):
            side = self.banks.positive == positive
            slope[column[word[0]]] += (1 if positive else -1) / side.sum()
        coefficients = np.tile(slope, (len(plan.prompts), 1))
        kept = self.banks.engine.runner.kept(self.layer)
        items = [
            self._item(b, kept[k].detach(), coefficients, self.banks.base, self.half)
            for k, b in enumerate(plan.batches)
        ]
        return [i for i in items if bool(i.wanted.any())]

    def _neutral(self) -> list[tuple[_Item, Tensor]]:
        """Neutral texts with their unedited next-token laws."""
        out = []
        for batch in plan_batches([self.model.encode(t) for t in load_texts("neutral")], self.model.device):
            resid = capture_layers(self.model, batch.tokens, [self.layer])[self.layer]
            nothing = np.zeros((max(batch.index) + 1, 1))
            item = self._item(batch, resid, nothing, nothing[:, 0], nothing[:, 0] > 0)
            out.append((item, self._law(item, None, last=False).detach()))
        return out

    # --- the edited pass ---
    def _edited(self, item: _Item, new: Tensor | None) -> Tensor:
        if new is None:
            return item.resid
        change, x = new - item.acts, item.resid.float()
        for f, step in zip(self.features, change.unbind(-1)):
            x = x + f.write(item.resid.float(), step)
        return x.to(item.resid.dtype)

    def _scores(self, item: _Item, new: Tensor, rows: Sequence[int], softcap: bool) -> tuple[Tensor, Tensor]:
        """Scores [batch], and the log-law of all other words at the last token."""
        final = forward_with_grad(
            self.model, item.batch.tokens, resume=Kept(self.layer, self._edited(item, new))
        ).last()
        z = final.logits(softcap=softcap)[:, 0]
        others = z.clone()
        others[:, list(rows)] = -torch.inf
        return (z[:, list(rows)] * item.coefficients).sum(-1), others.log_softmax(-1)

    def _law(self, item: _Item, new: Tensor | None, *, last: bool) -> Tensor:
        final = forward_with_grad(
            self.model, item.batch.tokens, resume=Kept(self.layer, self._edited(item, new))
        )
        return (final.last() if last else final).logits().log_softmax(-1)

    # --- scales ---
    def scales(self, most: int, steps: int, penalty: float) -> FeatureSet:
        """The fit with λ, then the features that moved furthest again without."""
        k = self._descend(torch.ones(len(self.index), dtype=torch.float32), steps, penalty)
        size = torch.cat([i.acts.flatten(0, 1) for i in self.pair_items]).mean(0).cpu()
        order = ((k - 1).abs() * size).argsort(descending=True)[:most].numpy()
        order = order[((k[order] - 1).abs() > 1e-3).numpy()]
        if not len(order):
            raise RequestError(
                f"the penalty {penalty:g} leaves no feature of {self.sae.id}; try a smaller one."
            )
        start, self.index = k[order], self.index[order]
        self._load(self.index)
        k = self._descend(start, steps, 0.0)
        return FeatureSet(f"learned scales of {self.sae.id}", tuple(self._refs()), tuple(float(v) for v in k))

    def _refs(self) -> list[FeatureRef]:
        return [FeatureRef(self.sae.id, int(i)) for i in self.index]

    def _descend(self, start: Tensor, steps: int, penalty: float) -> Tensor:
        k = start.clone().to(self.model.device).requires_grad_(True)
        adam = torch.optim.Adam([k], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        with torch.no_grad():
            laws = [self._scores(i, i.acts, self.words, self.probe.softcap)[1] for i in self.pair_items]
        for step in tqdm(range(steps), desc="fit", unit="step", disable=not self.progress, leave=False):
            adam.zero_grad()
            with torch.enable_grad():
                loss = self._loss(k, laws, step) + penalty * (k - 1).abs().sum()
            loss.backward()
            adam.step()
            schedule.step()
        return k.detach().cpu()

    def _loss(self, k: Tensor, laws: Sequence[Tensor], step: int) -> Tensor:
        """Pairs, bank items and neutral text, each as many batches as a step may hold, in turn."""
        loss, rows, bank_rows = (
            torch.zeros((), dtype=torch.float32, device=k.device),
            self.words,
            self.banks.engine.plan.row_ids,
        )
        turn = [
            _turn([i.batch for i in self.pair_items], step),
            _turn([i.batch for i in self.bank_items], step),
        ]
        for n in turn[0]:
            item = self.pair_items[n]
            s, others = self._scores(item, item.acts * k, rows, self.probe.softcap)
            loss = loss + (((s - item.target) ** 2).mean() + KL_WEIGHT * _kl(laws[n], others)) / len(turn[0])
        for n in turn[1]:
            bank = self.bank_items[n]
            s, _ = self._scores(bank, bank.acts * k, bank_rows, self.probe.softcap)
            loss = loss + ((s - bank.target)[bank.wanted] ** 2).mean() / len(turn[1])
        text, law = self.neutral[step % len(self.neutral)]
        return loss + KL_WEIGHT * _kl(law, self._law(text, text.acts * k, last=False))

    # --- the gate ---
    def gated(self, most: int) -> GatedCounterfactual:
        """Gate: logistic regression, AI prompts' last tokens against all other tokens; twins: ridge from AI to human activations."""
        ai, human = self._last_acts()
        rest = self._other_acts()
        gap = np.abs(ai.mean(0) - rest.mean(0)) / np.sqrt(ai.var(0) + rest.var(0) + 1e-6)
        moved = np.abs(ai.mean(0) - human.mean(0)) / (np.abs(ai).mean(0) + np.abs(human).mean(0) + 1e-6)
        keep = np.argsort(-(gap + moved))[:most]
        self.index = self.index[keep]
        ai, human, rest = ai[:, keep], human[:, keep], rest[:, keep]
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
        place = np.array(self.engine.reading._place)
        ai = set(place[:, 1].tolist())
        rows = []
        for item in self.pair_items:
            for row, i in enumerate(item.batch.index):
                rows.append(item.acts[row, : -1 if i in ai else None])
        rows += [i.acts[i.wanted].flatten(0, 1) for i in self.bank_items]
        rows += [i.acts.flatten(0, 1) for i, _ in self.neutral]
        return torch.cat(rows).cpu().double().numpy()


def _turn(batches: Sequence[Batch], step: int) -> list[int]:
    """Numbers of the batches of one step: from a place that moves on, as many as hold `STEP_TOKENS` tokens."""
    chosen, tokens = [], 0
    for i in range(len(batches)):
        n = (step + i) % len(batches)
        chosen.append(n)
        tokens += batches[n].tokens.numel()
        if tokens >= STEP_TOKENS:
            break
    return chosen


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of log-laws, words left out of both counting nothing."""
    kept = torch.isfinite(before) & torch.isfinite(after)
    gap = torch.where(kept, before - after, torch.zeros_like(before))
    return (before.exp() * gap).sum(-1).mean()


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
