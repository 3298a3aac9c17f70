"""Ridge probes: at which layer can a linear read-out of the last token tell AI prompts from human ones (or any target)?

    w = (XᵀX + λI)⁻¹ Xᵀy        R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)²  on the held-out folds

X is centered and divided by one number a layer, y centered, both from the training folds alone. λ is chosen inside the training
folds, by holding out each of them in turn. Whole templates are held out where there are any: with pairs split over folds a probe
reads the template. The control shuffles the labels over all texts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.core.site import Site
from sae_bias.models.model import Model
from sae_bias.models.residuals import last_residuals
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.steering.directions import Direction

PENALTIES = np.geomspace(1e-4, 1e3, 15)  # in units of the mean eigenvalue of XXᵀ
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class RidgeProbe(Framed):
    """Held-out R² of every layer beside shuffled labels, and the direction each layer's probe reads."""

    frame: pd.DataFrame
    """layer, r2 (all held-out predictions together), r2_folds_sd, r2_shuffled (mean), r2_shuffled_95, p_value, n, n_groups."""
    weights: Float[Array, "n_layers d_model"]
    means: Float[Array, "n_layers d_model"]
    layers: tuple[int, ...]
    name: str = "ridge probe"

    def direction(self, layer: int) -> Direction:
        """Unit direction of one layer's probe, fitted on all prompts; its mean is that of the low-target prompts."""
        if layer not in self.layers:
            raise RequestError(f"layer {layer} was not probed; probed: {', '.join(map(str, self.layers))}.")
        i = self.layers.index(layer)
        w = torch.from_numpy(self.weights[i]).float()
        return Direction(
            f"{self.name}, layer {layer}",
            Site(layer),
            (w / w.norm())[None],
            torch.from_numpy(self.means[i]).float(),
        )

    def plot(self) -> Figure:
        """R² by layer, with the 95th percentile of shuffled labels."""
        from sae_bias.figures.style import GREEN, NEUTRAL, figure, zero_line

        fig = figure("Linear probe by layer", "layer", "held-out R²", height=380)
        fig.add_scatter(
            x=self.frame["layer"],
            y=self.frame["r2"],
            mode="lines+markers",
            name="probe",
            line={"color": GREEN},
        )
        shuffled = {"color": NEUTRAL, "dash": "dot"}
        fig.add_scatter(x=self.frame["layer"], y=self.frame["r2_shuffled_95"], mode="lines", name="95 % of shuffled labels", line=shuffled)  # fmt: skip
        return zero_line(fig, "y")

    def __repr__(self) -> str:
        best = self.frame.iloc[int(self.frame["r2"].to_numpy().argmax())]
        return (
            f"RidgeProbe: best held-out R² {best['r2']:.3f} at layer {int(best['layer'])} "
            f"(shuffled labels: 95 % below {best['r2_shuffled_95']:.3f}), n = {int(best['n'])}"
        )


def ridge_probe(
    model: Model,
    inputs: PromptPairs | Sequence[str],
    targets: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    folds: int = 5,
    shuffles: int = 20,
    seed: int = 0,
) -> RidgeProbe:
    """Fit a ridge probe to last-token residuals at each layer.

    Args:
        inputs: pairs (targets then default to AI = 1, human = 0, and templates are held out whole), or texts.
        targets: one number a text; for pairs one a pair's human prompt and then its AI prompt, pair by pair.
        layers: all where None.
        groups: texts with one group are never in training and test at once.

    Raises:
        RequestError: targets missing, not as many as texts, all equal, or fewer groups than folds.
    """
    texts, y, groups = _inputs(inputs, targets, groups)
    layers = tuple(range(model.n_layers)) if layers is None else tuple(layers)
    resid = _last_residuals(model, texts, layers)
    fold = _folds(groups, folds, seed)
    rng = np.random.default_rng(seed)
    targets_all = np.stack([y, *(rng.permutation(y) for _ in range(shuffles))], axis=1)
    rows, weights, means = [], [], []
    for layer, x in zip(layers, resid):
        predicted = _held_out(x, targets_all, fold)
        r2 = _r2(targets_all, predicted)
        per_fold = [_r2(y[fold == k, None], predicted[fold == k, :1])[0] for k in range(folds)]
        control = r2[1:]
        rows.append(
            {
                "layer": layer,
                "r2": r2[0],
                "r2_folds_sd": float(np.nanstd(per_fold, ddof=1)),
                "r2_shuffled": float(control.mean()) if shuffles else float("nan"),
                "r2_shuffled_95": float(np.quantile(control, 0.95)) if shuffles else float("nan"),
                "p_value": float((1 + (control >= r2[0]).sum()) / (1 + shuffles)),
                "n": len(y),
                "n_groups": len(set(groups)),
            }
        )
        weights.append(_fit(x, y[:, None], fold).weights[:, 0])
        means.append(x[y <= np.median(y)].mean(0) if len(np.unique(y)) > 2 else x[y == y.min()].mean(0))
    return RidgeProbe(pd.DataFrame(rows), np.stack(weights), np.stack(means), layers)


class _Ridge:
    """Ridge fits for every penalty, by the eigenvalues of XXᵀ; several targets share them."""

    def __init__(self, x: Float[Array, "n d"], y: Float[Array, "n k"]):
        self.mean, self.y_mean = x.mean(0), y.mean(0)
        centred = x - self.mean
        self.scale = float(np.sqrt((centred**2).mean())) or 1.0
        self.z = centred / self.scale
        values, self.vectors = np.linalg.eigh(self.z @ self.z.T)
        values = values.clip(min=0)
        self.penalties = PENALTIES * max(values.mean(), 1e-12)
        self.inverse = 1 / (values[:, None] + self.penalties)  # [n, n_penalties]
        self.projected = self.vectors.T @ (y - self.y_mean)
        self.best = np.zeros(y.shape[1], dtype=int)

    @property
    def weights(self) -> Float[Array, "d k"]:
        """Weights at each target's own penalty."""
        return self.z.T @ (self.vectors @ (self.projected * self.inverse[:, self.best])) / self.scale

    def predict(self, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        return (x - self.mean) @ self.weights + self.y_mean

    def paths(self, x: Float[Array, "n d"]) -> Float[Array, "n k n_penalties"]:
        """Predictions at every penalty."""
        rows = ((x - self.mean) / self.scale) @ self.z.T @ self.vectors
        return (
            np.einsum("ni,ik,ip->nkp", rows, self.projected, self.inverse, optimize=True)
            + self.y_mean[:, None]
        )


def _fit(x: Array, y: Array, fold: Array) -> _Ridge:
    """A fit whose penalty did best when each of its folds was held out."""
    fit = _Ridge(x, y)
    if len(np.unique(fold)) > 1:
        error = np.zeros((y.shape[1], len(PENALTIES)))
        for k in np.unique(fold):
            test = fold == k
            error += ((_Ridge(x[~test], y[~test]).paths(x[test]) - y[test][:, :, None]) ** 2).sum(0)
        fit.best = error.argmin(1)
    return fit


def _held_out(x: Array, y: Array, fold: Array) -> Array:
    out = np.empty_like(y)
    for k in np.unique(fold):
        test = fold == k
        out[test] = _fit(x[~test], y[~test], fold[~test]).predict(x[test])
    return out


def _r2(y: Array, predicted: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)


def _folds(groups: Sequence[Hashable], folds: int, seed: int) -> Array:
    """A fold of each text; whole groups, shuffled from the seed, the folds of nearly equal size."""
    names = list(dict.fromkeys(groups))
    if not 2 <= folds <= len(names):
        raise RequestError(
            f"{folds} folds need at least 2 and at most one a group; there are {len(names)} groups."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    place = {names[g]: i % folds for i, g in enumerate(order)}
    return np.array([place[g] for g in groups])


def _inputs(
    inputs: PromptPairs | Sequence[str], targets: Sequence[float] | None, groups: Sequence[Hashable] | None
) -> tuple[list[str], Array, list[Hashable]]:
    if isinstance(inputs, PromptPairs):
        texts = [t for p in inputs for t in (p.human, p.ai)]
        targets = [0.0, 1.0] * len(inputs) if targets is None else targets
        groups = [p.template for p in inputs for _ in range(2)] if groups is None else groups
    else:
        texts = list(inputs)
        if targets is None:
            raise RequestError("texts need targets: one number a text.")
    y = np.asarray(targets, dtype=float)
    labels: list[Hashable] = list(range(len(texts))) if groups is None else list(groups)
    if y.shape != (len(texts),) or len(labels) != len(texts):
        raise RequestError(
            f"{len(texts)} texts, {len(y)} targets and {len(labels)} groups: expected one each a text."
        )
    if not np.isfinite(y).all() or np.ptp(y) == 0:
        raise RequestError("the targets hold NaN or are all equal; there is nothing to predict.")
    return texts, y, labels


def _last_residuals(model: Model, texts: Sequence[str], layers: Sequence[int]) -> list[Float[Array, "n d"]]:
    """Last-token residuals at each layer, one pass a prompt."""
    found = last_residuals(model, texts, layers)
    return [found[layer].cpu().double().numpy() for layer in layers]
