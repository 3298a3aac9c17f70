"""Controls for one feature edit: would any edit of this size, at these places, have done the same?

Matched features come from the same SAE and fire at the same positions, about as often and as strongly, with a decoder row of
about the same length and another direction (cosine at most 0.5). Where they are too few, random directions follow, with the
feature's own gate and the same ‖Δ‖.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.models.forward import capture_layers, plan_batches
from sae_bias.models.model import Model
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.sae import Feature, Sae
from sae_bias.saes.stream import acts_blocks
from sae_bias.steering.intervention import FeatureEdit, FeatureLike

MAX_COSINE = 0.5
FACTOR = 2.0  # matched features are within this factor in firing rate, mean active value and decoder norm
ENOUGH_MATCHED = 19


def control_edits(
    model: Model,
    edit: FeatureEdit,
    pairs: PromptPairs,
    n: int,
    seed: int = 0,
    *,
    family: Sequence[FeatureRef] = (),
) -> list[tuple[FeatureEdit, str]]:
    """At least `n` edits like `edit` on controls, each with its label; features in `family` are never controls."""
    feature = as_feature(edit.feature)
    controls: list[tuple[FeatureEdit, str]] = []
    if feature.ref.sae.release != RANDOM_RELEASE:
        sae = load_sae(feature.ref.sae)
        for index in matched_features(
            model, sae, feature, pairs, exclude=[f.index for f in family if f.sae == sae.id]
        ):
            controls.append((replace(edit, feature=FeatureRef(sae.id, index)), "matched feature"))
    for k in range(max(0, n - len(controls))):
        controls.append(
            (replace(edit, feature=random_twin(feature, seed + k)), "random direction, same gate")
        )
    return controls


RANDOM_RELEASE = "random-direction"


def random_twin(feature: Feature, seed: int) -> Feature:
    """`feature` with a random decoder row of the same length: the same gate, the same ‖Δ‖, another direction."""
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(feature.w_dec.shape[0])).float()
    w_dec = vector / vector.norm() * feature.w_dec.norm()
    return replace(feature, ref=FeatureRef(SaeId(RANDOM_RELEASE, f"seed-{seed}"), feature.index), w_dec=w_dec)


@torch.no_grad()
def matched_features(
    model: Model, sae: Sae, feature: Feature, pairs: PromptPairs, *, exclude: Sequence[int] = ()
) -> list[int]:
    """Features of `sae` that fire where `feature` fires, about as often, as strongly and with as long a decoder row."""
    x = _ordinary_residuals(model, [p.ai for p in pairs], sae.site.layer)
    target = feature.to(x.device).activation(x)
    where = target > 0
    if not bool(where.any()):
        return []
    rate, level, norm = float(where.float().mean()), float(target[where].mean()), float(feature.w_dec.norm())
    matched: list[int] = []
    for start, acts, w_dec in acts_blocks(sae, x, decoder=True):
        assert w_dec is not None
        active = acts > 0
        count = active.sum(0).clamp(min=1)
        w_norm = w_dec.norm(dim=1)
        cosine = (w_dec @ feature.w_dec.to(x.device)) / (w_norm * norm).clamp(min=1e-12)
        keep = (
            (active[where].float().mean(0) >= 0.5)
            & _near(active.float().mean(0), rate)
            & _near(acts.sum(0) / count, level)
            & _near(w_norm, norm)
            & (cosine.abs() <= MAX_COSINE)
        )
        matched += [start + int(i) for i in keep.nonzero()[:, 0]]
    return [i for i in matched if i != feature.index and i not in set(exclude)]


@torch.no_grad()
def observed_max(model: Model, feature: FeatureLike, pairs: PromptPairs) -> float:
    """The feature's largest activation on any ordinary token of the pairs: the unit of strengths.

    Raises:
        RequestError: it fires nowhere on them, so it has no maximum.
    """
    loaded = as_feature(feature)
    x = _ordinary_residuals(model, [t for p in pairs for t in (p.human, p.ai)], loaded.site.layer)
    top = float(loaded.activation(x).max())
    if not top > 0:
        raise RequestError(f"{loaded.ref} fires on no token of {pairs.name}; it has no observed maximum.")
    return top


def _near(values: Tensor, target: float) -> Tensor:
    return (values >= target / FACTOR) & (values <= target * FACTOR)


def _ordinary_residuals(model: Model, texts: Sequence[str], layer: int) -> Float[Tensor, "n d_model"]:
    """Residuals at every ordinary position of `texts`."""
    special = torch.tensor(sorted(model.special_ids), device=model.device)
    parts = []
    for batch in plan_batches([model.encode(t) for t in texts], model.device):
        x = capture_layers(model, batch.tokens, [layer])[layer].float()
        parts.append(x[~torch.isin(batch.tokens, special).to(x.device)])
    return torch.cat(parts)


def empirical_p(candidate: float, controls: Sequence[float]) -> float:
    """(1 + how many controls do at least as much) / (1 + controls)."""
    values = np.asarray(controls)
    return float((1 + (values >= candidate).sum()) / (1 + len(values)))
