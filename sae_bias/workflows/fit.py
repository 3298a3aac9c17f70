"""Fitting edits that are specific: learned scales of a few features, a gated counterfactual, a direction (docs/method.md#learned-edits).

Scales k of the live features of one SAE, fitted on the discover templates and half of each valence bank to least `fit_loss` + λ Σ |k - 1|.
With k = 1 + up - down, up and down between 0 and 3, λ Σ |k - 1| is linear and the descent finds the sparse k; the `most` features that moved
furthest are fitted again without λ. Report templates and the other half of the bank are never read here: `fit_report` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.discovery.attribution import attribution
from sae_bias.measures.collapse import BANKS, CollapseEngine, bank_items
from sae_bias.measures.costs import CostEngine, pooled_kl_off
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Sae
from sae_bias.stats.reduction import specific_reduction
from sae_bias.steering.directions import Direction, difference_of_means
from sae_bias.steering.edits import Intervention
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.learned import FeatureSet, GatedCounterfactual
from sae_bias.workflows.fit_loss import AI, STEPS, FitPrompts, Item, bank_half, descend

CANDIDATES, MOST, L1, RANGE = 192, 25, 0.005, 3.0


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
    discover: Sequence[str] | None = None,
    progress: bool = False,
) -> FeatureSet | GatedCounterfactual:
    """Fit an edit of at most `most` features of one SAE that gives AI prompts their human twins' scores and leaves the rest alone.

    Args:
        kind: "scales" (FeatureSet) or "gated" (GatedCounterfactual).
        steps: of L-BFGS-B at most, for each of the two fits.
        penalty: λ; larger keeps fewer features.
        discover: templates to fit on; without them the discover templates of the split of `seed`.

    Raises:
        RequestError: a probe whose score is not mean_logit over single-token words, too few templates to hold some out.
    """
    sae = sae if isinstance(sae, Sae) else load_sae(sae)
    probe = probe or default_probe(pairs)
    if kind not in ("scales", "gated"):
        raise RequestError(f"kind={kind!r}; expected scales or gated.")
    found_on = pairs.select(templates=discover or pairs.split(seed)["discover"])
    with torch.inference_mode(False):
        fit = _Fit(model, sae, found_on, probe, seed, progress, kind)
        return fit.gated(most) if kind == "gated" else fit.scales(most, steps, penalty)


def fit_split(
    pairs: PromptPairs, seed: int, split: Mapping[str, Sequence[str]] | None = None
) -> Mapping[str, Sequence[str]]:
    """The templates a fit reads (discover) and those that are held out for it (tune, report): the split given, or the seeded one."""
    return split or pairs.split(seed)


def fit_direction(
    model: Model,
    site: Site,
    pairs: PromptPairs,
    *,
    probe: Probe | None = None,
    positions: str = "last",
    rectified: bool = False,
    start: Direction | None = None,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Direction:
    """One direction r and value c such that x - (r·x - c) r at `positions` gives AI prompts their human twins' scores and leaves the rest alone.

    The rank-1 form of distributed alignment search and of representation finetuning (Geiger et al. 2024, arXiv:2303.02536; Wu et al. 2024,
    arXiv:2404.03592); `pairs` are those to fit on. The direction's mean is c·r. `rectified`: for a `RectifiedProjectOut`,
    x - ReLU(r·x - c) r, one vector that detects and writes as in ReFT-r1 (Wu et al. 2025, arXiv:2501.17148). From `start`, or the difference
    of means; a rectified one from the learned one, because a direction that fires nowhere has no slope to leave by.
    """
    if positions not in ("last", "all"):
        raise RequestError(f"positions={positions!r}; a direction is fitted at last or all.")
    if start is None and rectified:
        start = fit_direction(model, site, pairs, probe=probe, positions=positions, steps=steps, seed=seed, progress=progress)  # fmt: skip
    start = start or difference_of_means(model, pairs, site)
    assert start.mean is not None
    with torch.inference_mode(False):
        prompts = FitPrompts(model, site, pairs, probe or default_probe(pairs), seed)

        def value(point: Tensor) -> Tensor:
            unit, c = point[:-1] / point[:-1].norm(), point[-1]

            def edited(item: Item) -> Tensor:
                step = item.resid.float() @ unit - c
                step = (step.relu() if rectified else step) * prompts.ordinary(item)
                if positions == "last":
                    step = torch.cat([torch.zeros_like(step[:, :-1]), step[:, -1:]], dim=1)
                return item.resid.float() - step[..., None] * unit

            return prompts.loss(edited)

        r = start.basis[0].cpu()
        first = np.r_[r.numpy(), float(start.mean.cpu() @ r)]
        device = model.layer_device(site.layer)
        found = torch.from_numpy(descend(value, first, steps, device=device, progress=progress)).float()
    r = found[:-1] / found[:-1].norm()
    name = f"{'ReFT-r1' if rectified else 'learned'} direction ({positions})"
    return Direction(name, site, r[None], found[-1] * r)


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
        self.model, self.sae, self.progress = model, sae, progress
        self.prompts = FitPrompts(model, sae.site, pairs, probe, seed, ai_bank=kind == "gated")
        self.engine, self.pair_items = self.prompts.engine, self.prompts.pair_items
        effects = attribution(self.engine, sae)
        live = min(CANDIDATES, int((effects != 0).sum()))
        if not live:
            raise RequestError(f"no feature of {sae.id} fires on {pairs.name}; there is nothing to fit.")
        self._load(np.argsort(-np.abs(effects))[:live])

    def _load(self, index: np.ndarray) -> None:
        device = self.model.layer_device(self.sae.site.layer)
        self.index = index
        self.features = [self.sae.feature(int(i)).to(device) for i in index]
        self.w_dec = torch.stack([f.w_dec for f in self.features])
        with torch.no_grad():
            self.acts = {item: self._acts(item) for item in self.prompts.items}

    def _acts(self, item: Item) -> Float[Tensor, "batch pos m"]:
        """Activations of the candidates, 0 on special tokens."""
        resid = item.resid.float()
        if self.sae.reduces_to_one_row:
            acts = torch.stack([f.activation(resid) for f in self.features], dim=-1)
        else:
            acts = self.sae.encode(resid)[..., [f.index for f in self.features]]
        return acts * self.prompts.ordinary(item)[..., None]

    def edited(self, item: Item, k: Tensor) -> Tensor:
        """The residual under the scales `k`."""
        step = (self.acts[item] * (k - 1)) @ self.w_dec
        scale = self.sae.decoder_scale(item.resid)
        return item.resid.float() + (step if scale is None else step * scale[..., None])

    def loss(self, k: Tensor) -> Tensor:
        return self.prompts.loss(lambda item: self.edited(item, k))

    # --- scales ---
    def scales(self, most: int, steps: int, penalty: float) -> FeatureSet:
        """The fit with λ, then the features that moved furthest again without."""
        k = self._minimize(np.ones(len(self.index)), steps, penalty)
        size = torch.cat([self.acts[i].flatten(0, 1) for i in self.pair_items]).mean(0).cpu().numpy()
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
        """The scales of least loss, from `start`."""
        m = len(start)
        device = self.model.layer_device(self.sae.site.layer)
        found = descend(
            lambda moves: self.loss(1 + moves[:m] - moves[m:]) + penalty * moves.sum(),
            np.r_[start - 1, 1 - start].clip(min=0), steps, bounds=(0, RANGE), device=device, progress=self.progress,
        )  # fmt: skip
        return 1 + found[:m] - found[m:]

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
            last[list(item.batch.index)] = self.acts[item][:, -1].cpu().double().numpy()
        place = np.array(self.engine.reading._place)
        return last[place[:, 1]], last[place[:, 0]]

    def _other_acts(self) -> np.ndarray:
        """Human prompts, neutral text and the banks' fitted half at every token, AI prompts before the last one."""
        ai = [i.group == AI for i in self.pair_items]
        rows = [self.acts[i][~on].flatten(0, 1) for i, on in zip(self.pair_items, ai)]
        rows += [self.acts[i][on, :-1].flatten(0, 1) for i, on in zip(self.pair_items, ai)]
        rows += [self.acts[i].flatten(0, 1) for i in (*self.prompts.bank_items, *self.prompts.neutral)]
        return torch.cat(rows).cpu().double().numpy()


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
