"""Directions that need no SAE, as baselines beside the feature.

- difference of means: d = mean residual of AI prompts - mean of human prompts at the last token, or of a contrast's positive and
  negative texts. Arditi et al. 2024 (arXiv:2406.11717) find refusal so, and ablate it at every layer: `at_every_layer(model,
  ProjectOut(direction))`.
- subspace: the k leading right singular vectors of the paired differences; refusal turned out to have several dimensions.
- ridge probe: w = (XᵀX + λI)⁻¹Xᵀy at each layer, with its 5-fold R² and the R² of shuffled labels (`ridge`).
- random directions.

All are found on templates that discover, never on those that report. On Gemma 3 a few dimensions are hundreds of times larger than
the rest and can carry a whole difference; `without_massive` leaves them out and says how many.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.models.chat import opening_ids
from sae_bias.models.forward import check_site
from sae_bias.models.model import Model
from sae_bias.models.residuals import residuals
from sae_bias.prompts.contrast import Contrast
from sae_bias.prompts.pairs import PromptPairs

MASSIVE = 100.0  # times the median absolute activation


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction, or an orthonormal basis of several, at a site of one model."""

    name: str
    """Where it comes from, such as "difference of means"."""
    site: Site
    basis: Float[Tensor, "k d_model"]
    """Rows: unit length for one direction, orthonormal for several. Float32."""
    mean: Float[Tensor, "d_model"] | None = None
    """μ of the affine projection, or None."""

    @property
    def digest(self) -> str:
        """Hash of the numbers, which with the site decides equality."""
        parts = [self.basis] if self.mean is None else [self.basis, self.mean]
        data = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return hashlib.sha256(data).hexdigest()[:16]

    def to(self, device: torch.device) -> Direction:
        """The same direction on a device."""
        mean = None if self.mean is None else self.mean.to(device)
        return replace(self, basis=self.basis.to(device), mean=mean)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Direction) and (self.site, self.digest) == (other.site, other.digest)

    def __hash__(self) -> int:
        return hash((self.site, self.digest))

    def __str__(self) -> str:
        return f"{self.name} @ {self.site}"


def difference_of_means(
    model: Model,
    pairs: PromptPairs | Contrast,
    site: Site | str | int,
    *,
    without_massive: bool = False,
    chat: bool = False,
) -> Direction:
    """Unit direction from human to AI prompts at the last token, or from a contrast's negative to its positive texts.

    Its mean is the human (negative) one, so projecting it out (affine form) gives the others that side's value.

    Args:
        chat: a contrast's texts as user turns of the model's chat template (pairs: `probe.chat` turns them).

    Raises:
        RequestError: the two means are equal.
    """
    site = check_site(model, site)
    human, ai = _sides(model, pairs, site, chat)
    difference, left_out = _without_massive(ai.mean(0) - human.mean(0), human, ai, without_massive)
    if not float(difference.norm()) > 0:
        raise RequestError(
            f"both sides of {pairs.name} have the same mean residual at {site}; there is no direction."
        )
    name = "difference of means" + left_out
    return Direction(name, site, (difference / difference.norm())[None], human.mean(0))


def difference_subspace(
    model: Model, pairs: PromptPairs, site: Site | str | int, k: int, *, without_massive: bool = False
) -> Direction:
    """Orthonormal basis of the k directions along which AI and human prompts of a pair differ most, about 0.

    The differences are not centered, so the first direction is close to the difference of means.

    Raises:
        RequestError: the pairs' differences span fewer than k directions.
    """
    site = check_site(model, site)
    human, ai = _sides(model, pairs, site)
    difference, left_out = _without_massive(ai - human, human, ai, without_massive)
    _, size, basis = torch.linalg.svd(difference, full_matrices=False)
    rank = int((size > 1e-5 * size[:1].clamp(min=1e-30)).sum())
    if not 1 <= k <= rank:
        raise RequestError(
            f"a subspace of {k} directions: the {len(pairs)} paired differences at {site} span {rank}."
        )
    return Direction(f"subspace of {k} directions{left_out}", site, basis[:k].contiguous(), human.mean(0))


def massive_dimensions(resid: Float[Tensor, "n d_model"]) -> Bool[Tensor, "d_model"]:
    """Which dimensions exceed 100 times the median absolute activation on average."""
    size = resid.abs()
    return size.mean(0) > MASSIVE * size.median()


def random_direction(d_model: int, site: Site, seed: int) -> Direction:
    """A unit direction drawn uniformly, from a seed."""
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(d_model)).float()
    return Direction(f"random direction {seed}", site, (vector / vector.norm())[None])


def random_subspace(d_model: int, site: Site, k: int, seed: int) -> Direction:
    """An orthonormal basis of k directions drawn uniformly, from a seed."""
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal((d_model, k))).float()
    return Direction(f"random subspace {seed} of {k}", site, torch.linalg.qr(drawn).Q.T.contiguous())


def _sides(
    model: Model, pairs: PromptPairs | Contrast, site: Site, chat: bool = False
) -> tuple[Tensor, Tensor]:
    """Last-token residuals of human and AI prompts (negative and positive texts), each [n, d_model]."""
    if isinstance(pairs, Contrast):
        first, second = pairs.negative, pairs.positive
    else:
        first, second = [p.human for p in pairs], [p.ai for p in pairs]
    both = residuals(model, [opening_ids(model, t, chat=chat) for t in (*first, *second)], site)
    assert isinstance(both, Tensor)
    return both[: len(first)], both[len(first) :]


def _without_massive(difference: Tensor, human: Tensor, ai: Tensor, wanted: bool) -> tuple[Tensor, str]:
    if not wanted:
        return difference, ""
    massive = massive_dimensions(torch.cat([human, ai]))
    return difference.masked_fill(massive, 0.0), f" without {int(massive.sum())} massive dimensions"
