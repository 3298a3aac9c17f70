"""Causal effect of every feature on the bias: predicted with one backward pass, exact by ablation.

    attribution_f = mean over pairs of Σ_pos (∂bias/∂x · W_dec[f]) · a_f

summed over both prompts of a pair, the SAE error (and the size that a normalizing SAE scales its rows by) held constant: the first-order estimate of B_0 - B_s when f is ablated
(attribution patching with reference activation 0). Exact ablation then checks the features that matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.models.forward import Final
from sae_bias.models.reads import Spot
from sae_bias.models.workers import share_out
from sae_bias.probe.reading import ReadingPlan
from sae_bias.probe.result import ProbeResult
from sae_bias.saes.load import as_feature
from sae_bias.saes.sae import Feature, Sae
from sae_bias.saes.stream import acts_blocks
from sae_bias.stats.clustered import Clustered, clustered_mean
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.interchange import AI, Interchange
from sae_bias.steering.intervention import FeatureLike, feature_ref

MATTERS = 0.005  # of the bias: effects below it are not compared


def attribution(engine: ProbeEngine, sae: Sae) -> Float[np.ndarray, "d_sae"]:
    """Predicted bias removed by ablating each feature alone, in the probe's units; of an engine with mundane twins, less theirs.

    Raises:
        RequestError: score="auroc", which has no gradient.
    """
    if engine.twins is not None:
        return _first_order(engine, sae) - _first_order(engine.twins, sae)
    return _first_order(engine, sae)


def _first_order(engine: ProbeEngine, sae: Sae) -> Float[np.ndarray, "d_sae"]:
    grads, resid = _bias_gradient(engine, sae.site.resid_layer)
    scale = sae.decoder_scale(resid)
    grads = grads if scale is None else grads * scale[:, None]
    out = np.zeros(sae.d_sae)
    for start, acts, w_dec in acts_blocks(sae, resid, decoder=True):
        assert w_dec is not None
        out[start : start + acts.shape[1]] = (acts * (grads @ w_dec.T)).sum(0).cpu().double().numpy()
    return out


@dataclass(frozen=True)
class Agreement:
    """An exact effect against its prediction, over the features that matter."""

    rho: float
    """Spearman rank correlation; NaN with fewer than three features."""
    slope: float
    """Least squares of exact on predicted, with intercept: 1 where the prediction has the right size."""
    n: int
    """Features with |effect| over 0.5 % of the bias, exact or predicted."""
    slope_low: float = math.nan
    slope_high: float = math.nan
    """95 % t interval over these features."""

    def __str__(self) -> str:
        if self.n < 3:
            return f"compared on {self.n} features: too few"
        between = f" [{self.slope_low:.2f}, {self.slope_high:.2f}]" if math.isfinite(self.slope_low) else ""
        return f"Spearman ρ {self.rho:.2f}, slope {self.slope:.2f}{between}, n = {self.n}"


def attribution_agreement(
    attributed: Float[np.ndarray, "n"], exact: Float[np.ndarray, "n"], bias: float, *, share: float = MATTERS
) -> Agreement:
    """Spearman ρ and slope of exact on attributed effects over those larger than `share` of the bias (docs/method.md#attribution)."""
    attributed, exact = np.asarray(attributed, dtype=float), np.asarray(exact, dtype=float)
    matter = np.isfinite(attributed) & np.isfinite(exact)
    matter &= np.maximum(np.abs(attributed), np.abs(exact)) > share * abs(bias)
    x, y = attributed[matter], exact[matter]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(math.nan, math.nan, len(x))
    fit = scipy.stats.linregress(x, y)
    slope, half = float(fit.slope), float(stdtrit(len(x) - 2, 0.975) * fit.stderr)
    return Agreement(float(scipy.stats.spearmanr(x, y)[0]), slope, len(x), slope - half, slope + half)


def exact_ablation(
    engine: ProbeEngine, features: Sequence[FeatureLike], *, workers: int = 1, progress: bool = False
) -> Float[np.ndarray, "n_features"]:
    """B_0 - B_s of the primary figure with each feature ablated alone."""
    return means(ablation_effects(engine, features, workers=workers, progress=progress))


def exact_resampling(
    engine: ProbeEngine, features: Sequence[FeatureLike], *, workers: int = 1, progress: bool = False
) -> Float[np.ndarray, "n_features"]:
    """B_0 - B_s with each feature alone set to its human twin's value; NaN where that could not be measured."""
    return means(resampling_effects(engine, features, workers=workers, progress=progress))


def means(effects: Sequence[Clustered | None]) -> Float[np.ndarray, "n_features"]:
    """The effects without their intervals; NaN where none was measured."""
    return np.array([math.nan if e is None else e.mean for e in effects])


def ablation_effects(
    engine: ProbeEngine, features: Sequence[FeatureLike], *, workers: int = 1, progress: bool = False
) -> list[Clustered | None]:
    """B_0 - B_s of the primary figure, two-way clustered, with each feature ablated alone."""
    base = engine.base

    def removed(feature: FeatureLike) -> Clustered:
        after, _ = engine.run([Ablate(feature)])
        mundane = base.control and after.control and base.control.pair_bias - after.control.pair_bias
        return clustered_mean(*base.primary_values((base.pair_bias - after.pair_bias, mundane)))

    return _each(engine, removed, features, workers, "ablate" if progress else "")


def resampling_effects(
    engine: ProbeEngine, features: Sequence[FeatureLike], *, workers: int = 1, progress: bool = False
) -> list[Clustered | None]:
    """The same with each feature alone set to its human twin's value, position by position, in the words after the AI subject.

    None where the two prompts of no pair share an ending.
    """
    exchanges = [Interchange(e) for e in (engine, engine.twins) if e is not None]
    if not all(exchange.longest for exchange in exchanges):
        return [None] * len(features)

    def removed(given: FeatureLike) -> Clustered:
        feature = as_feature(given).to(engine.model.device)
        own, *mundane = (_resampled(exchange, feature) for exchange in exchanges)
        return clustered_mean(*engine.base.primary_values((own, mundane[0] if mundane else None)))

    return _each(engine, removed, features, workers, "resample" if progress else "")


def _each(
    engine: ProbeEngine, work: Callable[[FeatureLike], Clustered], features: Sequence[FeatureLike], workers: int, shown: str
) -> list[Clustered | None]:  # fmt: skip
    """One effect a feature; `shown` names the progress bar, where there is one."""
    out: list[Clustered | None] = [None] * len(features)
    found = share_out(engine.model, work, features, workers)
    for i, value in tqdm(found, total=len(features), desc=shown, unit="feature", disable=not shown, leave=False):  # fmt: skip
        out[i] = value
    return out


def _resampled(exchange: Interchange, feature: Feature) -> Float[np.ndarray, "n_pairs"]:
    """Bias removed from each pair when its AI prompt takes over one feature's part of the human residual."""
    part = lambda x: feature.activation(x)[:, None] * feature.w_dec  # noqa: E731
    exchange.forget()
    bias = exchange.bias(feature.site.resid_layer, AI, part, str(feature.ref), scale=feature.decoder_scale)
    return exchange.engine.base.pair_bias - bias


def carriers(
    ablation: Sequence[Clustered | None], resampling: Sequence[Clustered | None], bias: float, *, share: float = MATTERS
) -> list[str]:  # fmt: skip
    """What the two exact effects say of each feature: "carrier", "damage", "resampling only", "no" or "undetermined".

    An effect is shown where its interval leaves out 0 and it is over `share` of the figure: a tiny regular one is none, and nor is
    a large one that pairs disagree on. A carrier shows both, of one sign. An ablation effect without one of resampling is damage: the
    feature is as active for the human twin, so it cannot carry the difference. Undetermined: not measured, under six templates
    or entities, or the effect that is not shown may be as large as the other.
    """
    return [_carries(*both, share * abs(bias)) for both in zip(ablation, resampling)]


def _carries(removed: Clustered | None, resampled: Clustered | None, least: float) -> str:
    if removed is None or resampled is None or "undetermined" in (removed.call, resampled.call):
        return "undetermined"
    one, other = (e.distinguishable and abs(e.mean) > least for e in (removed, resampled))
    if one and other:
        return "carrier" if removed.mean * resampled.mean > 0 else "damage"
    if one and not resampled.ci_low <= removed.mean <= resampled.ci_high:
        return "damage"
    if other and not removed.ci_low <= resampled.mean <= removed.ci_high:
        return "resampling only"
    return "undetermined" if one or other else "no"


def cumulative_ablation(
    engine: ProbeEngine, features: Sequence[FeatureLike], *, templates: Sequence[str] | None = None
) -> pd.DataFrame:
    """Joint ablation of the first 1, 2, … features: k, feature, bias (the primary figure left), change (B_0 - B_s), reduction.

    `templates` restricts the measured pairs, such as to the report split.
    """

    def on(result: ProbeResult) -> ProbeResult:
        return result if templates is None else result.select(templates)

    base = on(engine.base)
    rows = []
    for k in range(1, len(features) + 1):
        reduction = on(engine.run([Ablate(f) for f in features[:k]])[0]).reduction_from(base)
        rows.append(
            {
                "k": k,
                "feature": str(feature_ref(features[k - 1])),
                "bias": reduction.after_bias,
                "change": reduction.change.mean,
                "reduction": reduction.estimate,
                "red_low": reduction.ci_low,
                "red_high": reduction.ci_high,
            }
        )
    return pd.DataFrame(rows, columns=["k", "feature", "bias", "change", "reduction", "red_low", "red_high"])


@torch.inference_mode(False)
def _bias_gradient(engine: ProbeEngine, layer: int) -> tuple[Tensor, Tensor]:
    """∂bias/∂x and x at every ordinary token of the prefixes, each [n_nodes, d_model] in float32."""
    coefficients, normalizer = score_coefficients(engine)
    reads = engine.engine.runner.reads
    x = reads.keep(layer).detach().clone().requires_grad_(True)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    def visit(wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        index = [i for ((i, _),) in wanted]
        (grad,) = torch.autograd.grad(weighted_score(engine.reading.plan, final, index, coefficients, normalizer), x)  # fmt: skip
        total.add_(grad)

    reads.resume(layer, x, visit, grad=True)
    special = torch.tensor(sorted(engine.model.special_ids), device=engine.model.device)
    ordinary = ~torch.isin(reads.node_tokens(), special).to(x.device)
    return total[ordinary], x.detach()[ordinary].float()


def weighted_score(
    plan: ReadingPlan, final: Final, index: Sequence[int], coefficients: np.ndarray, normalizer: np.ndarray
) -> Tensor:
    """Σ over some sequences of coefficient · logit, less the normalizer's part: a scalar to take gradients of."""
    index = list(index)
    z = final.logits(plan.row_ids, softcap=plan.softcap)[:, 0]
    value = (z * torch.as_tensor(coefficients[index], dtype=z.dtype, device=z.device)).sum()
    weights = normalizer[index]
    if np.any(np.abs(weights) > 1e-12):
        norm = final.logits(softcap=plan.softcap)[:, 0].logsumexp(-1)
        value = value - (norm * torch.as_tensor(weights, dtype=z.dtype, device=z.device)).sum()
    return value


def score_coefficients(engine: ProbeEngine, *, of: str = "bias") -> tuple[np.ndarray, np.ndarray]:
    """∂(mean bias)/∂ of each sequence's row logits [n_sequences, n_rows] and of its normalizer [n_sequences].

    With of="score" instead ∂s(prompt)/∂, whatever the prompt's side and however many pairs share it.
    """
    base, plan = engine.base, engine.reading.plan
    by_prompt = np.zeros((len(plan.prompts), len(plan.words)))
    for values, side, sign in ((base.values_human, 0, 1.0), (base.values_ai, 1, -1.0)):
        slopes, place = word_slopes(base, values), [place[side] for place in engine.reading._place]
        if of == "score":
            by_prompt[place] = slopes
        else:
            np.add.at(by_prompt, place, sign * slopes / base.n_pairs)
    return logit_coefficients(plan, by_prompt)


def logit_coefficients(
    plan: ReadingPlan, by_prompt: Float[np.ndarray, "n_prompts n_words"]
) -> tuple[Float[np.ndarray, "n_sequences n_rows"], Float[np.ndarray, "n_sequences"]]:
    """Weights of word scores as weights of row logits, and of the normalizers of their sequences."""
    column = {t: j for j, t in enumerate(plan.row_ids)}
    rows = np.zeros((len(plan.prompts), len(plan.prefixes), len(plan.row_ids)))
    norm = np.zeros((len(plan.prompts), len(plan.prefixes)))
    for w, tokens in enumerate(plan.words):
        for j, token in enumerate(tokens):
            rows[:, plan.prefixes[tokens[:j]], column[token]] += by_prompt[:, w]
            norm[:, plan.prefixes[tokens[:j]]] += by_prompt[:, w]
    return rows.reshape(plan.n_sequences, -1), norm.reshape(-1)


def word_slopes(base: ProbeResult, values: np.ndarray) -> np.ndarray:
    """∂s/∂(word score) for each prompt and word.

    Raises:
        RequestError: score="auroc", which has no gradient.
    """
    if base.probe.score == "auroc":
        raise RequestError(
            'attribution needs a gradient, and score="auroc" is not differentiable; use mean_logit or logodds.'
        )
    out = np.empty_like(values)
    for side, sign in ((base.positive, 1.0), (~base.positive, -1.0)):
        v = values[:, side]
        if base.probe.score == "mean_logit":
            out[:, side] = sign / side.sum()
        else:
            out[:, side] = sign * np.exp(v - np.logaddexp.reduce(v, axis=1, keepdims=True))
    return out
