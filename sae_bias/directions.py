"""Directions that need no SAE, as baselines beside the feature: difference of means, random.

Difference of means: d = mean residual of AI prompts - mean residual of human prompts at the last token, on the templates that
discover, never on those that report (Arditi et al. 2024 use it for refusal). On Gemma 3 a few dimensions are hundreds of times
larger than the rest and can carry the whole difference; `without_massive` leaves them out and says how many.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_bias.activations import check_site, residuals
from sae_bias.errors import RequestError
from sae_bias.interventions import Direction
from sae_bias.model import Model
from sae_bias.prompts import PromptPairs
from sae_bias.sites import Site

MASSIVE = 100.0  # times the median absolute activation


def difference_of_means(
    model: Model, pairs: PromptPairs, site: Site | str | int, *, without_massive: bool = False
) -> Direction:
    """Unit direction from human to AI prompts at the last token; its mean is the human one, so projecting it out
    (affine form) gives AI prompts the human prompts' value.

    Raises:
        RequestError: the two means are equal.
    """
    site = check_site(model, site)
    human, ai = (_last(model, texts, site) for texts in ([p.human for p in pairs], [p.ai for p in pairs]))
    difference = ai.mean(0) - human.mean(0)
    name = "difference of means"
    if without_massive:
        massive = massive_dimensions(torch.cat([human, ai]))
        difference = difference.masked_fill(massive, 0.0)
        name += f" without {int(massive.sum())} massive dimensions"
    if not float(difference.norm()) > 0:
        raise RequestError(
            f"AI and human prompts have the same mean residual at {site}; there is no direction."
        )
    return Direction(name, site, (difference / difference.norm())[None], human.mean(0))


def massive_dimensions(resid: Tensor) -> Tensor:
    """Which dimensions [d_model] exceed 100 times the median absolute activation on average."""
    size = resid.abs()
    return size.mean(0) > MASSIVE * size.median()


def random_direction(d_model: int, site: Site, seed: int) -> Direction:
    """A unit direction drawn uniformly, from a seed."""
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(d_model)).float()
    return Direction(f"random direction {seed}", site, (vector / vector.norm())[None])


def _last(model: Model, texts: list[str], site: Site) -> Tensor:
    resid = residuals(model, texts, site)
    assert isinstance(resid, Tensor)
    return resid
