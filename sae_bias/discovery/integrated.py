"""Integrated gradients from the human twin, and where the bias lies: after the subject, in an SAE's features, in its error.

    x(α) = x_twin + α (x − x_twin)        AI prompt; α from 0 to 1; positions matched from the right after the subject
    IG_f = Σ_pos ∫ ∂s/∂x(α) dα · W_dec[f] (a_f(x_twin) − a_f(x))

(Sundararajan, Taly & Yan 2017, arXiv:1703.01365; for SAE features Marks et al. 2024, arXiv:2403.19647), the integral by ten Gauss–Legendre
points (more where ten are too few). Σ over features and the SAE's error is the bias that goes when the AI prompt takes over the human residual after the subject:
the most that any edit there can remove. What the subject's own tokens carry past this layer is the rest of the bias. A feature that is silent in
AI prompts and fires in human ones gets its credit, which a reference of 0 denies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.text import bracket, percent, signed
from sae_bias.discovery.attribution import logit_coefficients, weighted_score, word_slopes
from sae_bias.models.forward import Final
from sae_bias.models.reads import Spot
from sae_bias.saes.sae import Sae
from sae_bias.saes.stream import acts_blocks
from sae_bias.stats.reduction import fieller_reduction
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.interchange import AI, Interchange, Part

STEPS = 10
"""Points of the integral; as many again, twice, … where Σ misses the exact upper bound by over `CLOSE` of it."""
MOST_PANELS = 16
CLOSE = 0.02
PARTS = {
    "after the subject": "AI prompts given the human residual after the subject: the most that any edit there can remove",
    "features": "AI prompts given the human twin's reconstruction: what this SAE's features together can remove",
    "error": "AI prompts given the human twin's SAE error: what none of its features can remove",
}


@dataclass(frozen=True, eq=False)
class IntegratedGradients:
    """What taking over the human twin's values should remove of the bias, feature by feature (nats)."""

    features: Float[np.ndarray, "d_sae"]
    error: float
    """The same of what the SAE does not reconstruct."""
    upper_bound: float
    """Exact: bias removed when the AI prompts take over the human residual after the subject."""
    steps: int = STEPS

    @property
    def total(self) -> float:
        """Σ over features and error; equals `upper_bound` up to the integral's own error."""
        return float(self.features.sum()) + self.error


class Paths:
    """The AI prompts of a probe engine on the way from their human twins' residuals to their own."""

    def __init__(self, engine: ProbeEngine):
        self.engine, self.exchange = engine, Interchange(engine)
        self._gradients: dict[int, tuple[int, Tensor, Tensor, Tensor, float]] = {}
        self.mundane = None if engine.twins is None else Paths(engine.twins)
        """The same of the mundane twins, whose figures are taken off."""

    @property
    def matched(self) -> bool:
        """Whether the two prompts of some pair share an ending: else nothing can be taken over."""
        return self.exchange.longest > 0 and (self.mundane is None or self.mundane.matched)

    def integrated_gradients(self, sae: Sae) -> IntegratedGradients:
        """IG of every feature of one SAE.

        Raises:
            RequestError: score="auroc", which has no gradient.
        """
        found = self._own(sae)
        if self.mundane is None:
            return found
        less = self.mundane._own(sae)
        return IntegratedGradients(
            found.features - less.features, found.error - less.error, found.upper_bound - less.upper_bound, max(found.steps, less.steps)
        )  # fmt: skip

    def _gradient(self, layer: int) -> tuple[int, Tensor, Tensor, Tensor, float]:
        """Steps taken, mean gradient, own and twin's residuals, and the exact upper bound of one layer."""
        if layer not in self._gradients:
            bound = float(
                (self.engine.base.pair_bias - self.exchange.bias(layer, AI, None, "residual")).mean()
            )
            panels, missed = 1, True
            while missed:
                grads, own, twin = _path_gradient(self.exchange, layer, panels)
                gap = abs(float((grads * (twin - own)).sum(dtype=torch.float64)) - bound)
                missed = gap > CLOSE / 2 * abs(bound) and gap > 1e-3 and panels < MOST_PANELS
                self._gradients[layer] = (panels * STEPS, grads, own, twin, bound)
                panels *= 2
        return self._gradients[layer]

    def _own(self, sae: Sae) -> IntegratedGradients:
        steps, grads, own, twin, bound = self._gradient(sae.site.resid_layer)
        scales = [sae.decoder_scale(x) for x in (own, twin)]
        out = np.zeros(sae.d_sae)
        for (start, acts, w_dec), (_, twin_acts, _) in zip(
            acts_blocks(sae, own, decoder=True), acts_blocks(sae, twin)
        ):
            assert w_dec is not None
            sides = [a if s is None else a * s[:, None] for a, s in zip((acts, twin_acts), scales)]
            values = ((sides[1] - sides[0]) * (grads @ w_dec.T)).sum(0)
            out[start : start + len(values)] = values.cpu().double().numpy()
        total = float((grads * (twin - own)).sum(dtype=torch.float64))
        return IntegratedGradients(out, total - float(out.sum()), bound, steps)

    def parts(self, sae: Sae, found: IntegratedGradients) -> pd.DataFrame:
        """One row a part of the primary figure: exact effect in nats and as a share with its interval, and what IG says of it."""
        base = self.engine.base
        credit = dict(zip(PARTS, (found.total, float(found.features.sum()), found.error)))
        rows = []
        for name, meaning in PARTS.items():
            left = self._exchanged(sae, name)
            then, now = base.pair_bias, left
            if self.mundane is not None:
                then, now = base.did.values, left - self.mundane._exchanged(sae, name)
            r = fieller_reduction(then, now, *base.clusters)
            rows.append((str(sae.id), sae.site.layer, base.estimand, name, r.change.mean, *r.change.ci, r.estimate, *r.ci, credit[name], len(now), meaning))  # fmt: skip
        return pd.DataFrame(rows, columns=COLUMNS)

    def _exchanged(self, sae: Sae, part: str) -> Float[np.ndarray, "n_pairs"]:
        """Bias of each pair whose AI prompt has taken over one part of the human residual."""
        if part == "after the subject":
            return self.exchange.bias(sae.site.resid_layer, AI, None, "residual")
        whole = reconstruction(sae)
        taken: Part = whole if part == "features" else lambda x: x - whole(x)
        self.exchange.forget()
        return self.exchange.bias(sae.site.resid_layer, AI, taken, part)


COLUMNS = ["sae", "layer", "of", "part", "effect", "ci_low", "ci_high", "share_of_bias", "share_low", "share_high", "integrated", "n_pairs", "meaning"]  # fmt: skip


def parts_sentence(parts: pd.DataFrame) -> str:
    """The shares of one SAE in words; nats where the bias is not told from 0."""
    by_part = parts.set_index("part")

    def figure(name: str) -> str:
        row: Any = by_part.loc[name]
        if not math.isfinite(row["share_of_bias"]):
            return f"{signed(row['effect'])} {bracket(row['ci_low'], row['ci_high'])} nats"
        return f"{percent(row['share_of_bias'])} {bracket(row['share_low'], row['share_high'], share=True)}"

    return (
        f"of the {parts['of'].iloc[0]} at layer {parts['layer'].iloc[0]}, any edit after the subject could remove {figure('after the subject')},"
        f" this SAE's features {figure('features')}, its error term {figure('error')}"
    )


def reconstruction(sae: Sae) -> Part:
    """Residual rows → what the SAE decodes of them."""

    def part(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        out = sae.b_dec.to(x.device).expand(len(x), -1).clone()
        for _, acts, rows in acts_blocks(sae, x, decoder=True):
            assert rows is not None
            out += acts @ rows
        return out

    def whole(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return torch.cat([sae.decode(sae.encode(rows), rows) for rows in x.split(1024)])

    return part if sae.reduces_to_one_row else whole


@torch.inference_mode(False)
def _path_gradient(exchange: Interchange, layer: int, panels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """∂(mean s(AI))/∂x averaged over the path, the AI prompts' own x and their twins', each [n_nodes, d_model] in float32.

    Only tokens at which the two differ: elsewhere the path does not move.
    """
    side = exchange.sides[AI]
    own, twin = exchange.own(layer, AI), exchange.exchanged(layer, AI, None, "residual").clone()
    grads = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    alphas = (np.arange(panels)[:, None] + (nodes + 1) / 2).ravel() / panels
    for alpha, weight in zip(alphas, np.tile(weights / 2 / panels, panels)):
        x = (twin.float() + float(alpha) * (own.float() - twin.float())).to(own.dtype)
        coefficients, normalizer = _coefficients(exchange, layer, x)
        x.requires_grad_(True)

        def visit(wanted: Sequence[Sequence[Spot]], final: Final, x: Tensor = x, weight: float = weight, by: Any = (coefficients, normalizer)) -> None:  # fmt: skip
            value = weighted_score(side.plan, final, [i for ((i, _),) in wanted], *by)
            grads.add_(torch.autograd.grad(value, x)[0], alpha=float(weight))

        side.reads.resume(layer, x, visit, grad=True)
    moved = (own != twin).any(-1)
    return grads[moved], own[moved].float(), twin[moved].float()


def _coefficients(exchange: Interchange, layer: int, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """∂(mean s(AI))/∂(row logits) at one point of the path: constant for mean_logit, read there for the log-odds."""
    base = exchange.engine.base
    values = exchange.values(layer, AI, x) if base.probe.score == "logodds" else base.values_ai
    return logit_coefficients(exchange.sides[AI].plan, word_slopes(base, values) / base.n_pairs)
