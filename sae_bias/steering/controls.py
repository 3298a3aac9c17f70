"""Controls for one feature edit: would any edit of this size, at these places, have done the same? (docs/method.md#controls)

Matched features come from the same SAE and fire at the same positions, about as often and as strongly, with a decoder row of
about the same length and another direction (cosine at most 0.5). Random directions, drawn from the residual covariance, follow until
there are as many as asked for: the feature's own gate and the same ‖Δ‖,

    v = Σ_i g_i (x_i - x̄),  g_i ~ N(0, 1) over the residuals x_i, then of the decoder row's length.

The two kinds give two p values, (1 + #≥) / (1 + N) each, never a pooled one, and the statistic is the specific reduction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sae_bias.core.errors import RequestError
from sae_bias.core.site import KINDS, Site
from sae_bias.models.model import Model
from sae_bias.models.residuals import ordinary_residuals
from sae_bias.models.sites import site_module, site_width
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.randomized import randomized_sae
from sae_bias.saes.sae import Feature, Sae, check_sae
from sae_bias.saes.stream import acts_blocks
from sae_bias.steering.directions import Direction
from sae_bias.steering.intervention import AlongEdit, FeatureEdit, FeatureLike, Intervention

if TYPE_CHECKING:
    from sae_bias.steering.edits import EditSet

MAX_COSINE = 0.5
FACTOR = 2.0  # matched features are within this factor in firing rate, mean active value and decoder norm
ENOUGH = 19
"""Fewest controls of one kind whose p can reach 0.05."""
ALPHA = 0.05


def control_edits(
    model: Model,
    edit: FeatureEdit,
    pairs: PromptPairs,
    n: int,
    seed: int = 0,
    *,
    family: Sequence[FeatureRef] = (),
) -> list[tuple[FeatureEdit, str]]:
    """At least `n` edits like `edit` on controls, each with its kind; features in `family` are never controls."""
    feature = as_feature(edit.feature)
    controls: list[tuple[FeatureEdit, str]] = []
    if feature.ref.sae.release != RANDOM_RELEASE:
        sae = load_sae(feature.ref.sae)
        for index in matched_features(
            model, sae, feature, pairs, exclude=[f.index for f in family if f.sae == sae.id]
        ):
            controls.append((replace(edit, feature=FeatureRef(sae.id, index)), MATCHED))
    wanted = max(0, n - len(controls))
    if wanted:
        x = ordinary_residuals(model, [p.ai for p in pairs], [feature.site])[feature.site]
        controls += [(replace(edit, feature=twin), RANDOM) for twin in random_twins(feature, x, wanted, seed)]
    return controls


def set_controls(
    model: Model, edits: EditSet, pairs: PromptPairs, n: int, seed: int = 0
) -> list[tuple[EditSet, str]]:
    """`n` copies of a set of feature edits, every feature with its own gate and size and a random direction in place of its row."""
    drawn = _random_controls(model, edits, [p.ai for p in pairs], n, seed)
    return [(_with_parts(edits, parts, f"random directions {k}"), RANDOM) for k, parts in enumerate(drawn)]  # type: ignore[misc]


def mismatch_edits(
    model: Model, edit: Intervention, saes: Sequence[Sae | SaeId | str] = ()
) -> list[tuple[Intervention, str]]:
    """`edit` where it should do less, each with its label: a quarter of the model's depth before and after its own layers, at the other
    hooks of its layers, and the feature of the same index in each of `saes`. They are shown beside the controls and are in no p value.

    Raises:
        RequestError: an SAE that has no such feature or does not fit the model, or is the feature's own.
    """
    step = max(1, model.n_layers // 4)
    found: list[tuple[Intervention, str]] = []
    own = [part.site for part in edit.parts]
    elsewhere = [
        (f"the same, {step} layers {name}", [(s.layer + shift, s.kind) for s in own])
        for shift, name in ((-step, "earlier"), (step, "later"))
    ] + [
        (f"the same at {kind}", [(s.layer, kind) for s in own])
        for kind in KINDS
        if kind not in {s.kind for s in own}
    ]
    for label, places in elsewhere:
        if all(isinstance(part, AlongEdit) for part in edit.parts) and _same_width(model, own, places):
            moved = [replace(part, at=Site(*place)) for part, place in zip(edit.parts, places)]  # type: ignore[call-arg]
            found.append((_with_parts(edit, moved, label), label))
    for name in saes:
        sae, along = load_sae(name), _one(edit).read
        if isinstance(along, Direction):
            raise RequestError(f"{edit.describe()} is along a direction, which no SAE has an index of.")
        if sae.id == along.ref.sae:
            raise RequestError(f"{sae.id} is the feature's own SAE; a mismatch control needs another.")
        check_sae(model, sae.feature(along.index))
        found.append((_one(edit).of(FeatureRef(sae.id, along.index)), f"feature {along.index} of {sae.id}"))
    return found


def _same_width(model: Model, own: Sequence[Site], places: Sequence[tuple[int, str]]) -> bool:
    """Whether the model has all of these places, as wide as the sites they stand for."""
    try:
        widths = [site_width(model, Site(layer, kind)) for layer, kind in places]
        _ = [site_module(model, Site(layer, kind)) for layer, kind in places]
    except RequestError:
        return False
    return widths == [site_width(model, site) for site in own]


def _with_parts(edit: Intervention, parts: Sequence[Intervention], name: str) -> Intervention:
    """`edit` with these parts; a set of them gets a name."""
    more: dict[str, Any] = {"name": name, "edits": tuple(parts)}
    return replace(edit, **more) if hasattr(edit, "edits") else parts[0]


def _one(edit: Intervention) -> AlongEdit:
    """An edit of one feature or direction.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(edit, AlongEdit):
        raise RequestError(
            f"no control can be made for {edit.describe()}: it is no edit of one feature or direction."
        )
    return edit


def random_control(model: Model, edit: Intervention, texts: Sequence[str], seed: int = 0) -> Intervention:
    """`edit` with every feature's or direction's own gate and size, along directions drawn from the residual covariance on `texts`.

    A direction that several parts share (at every layer) stays one direction.

    Raises:
        RequestError: an edit without features or directions of its own.
    """
    return _with_parts(edit, _random_controls(model, edit, texts, 1, seed)[0], f"random directions {seed}")


def _random_controls(
    model: Model, edit: Intervention, texts: Sequence[str], n: int, seed: int
) -> list[tuple[AlongEdit, ...]]:
    """The parts of `edit` along `n` draws of random directions."""
    residual: dict[Site, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    copies: list[list[AlongEdit]] = []
    for i, part in enumerate(map(_one, edit.parts)):
        along, own_seed = part.read, seed + 1_000 * i
        if part.site not in residual:
            residual |= ordinary_residuals(model, texts, [part.site])
        x = residual[part.site]
        if isinstance(along, Direction):
            name = along.digest if along.mean is None else str(i)
            if name not in drawn:
                drawn[name] = covariance_directions(x, len(along.basis), own_seed)
            twin = replace(along, name=f"random direction {seed}", basis=drawn[name])
            copies.append([part.of(twin)] * n)
        else:
            copies.append([part.of(twin) for twin in random_twins(along, x, n, own_seed)])
    return list(zip(*copies))


def _drawn(x: Float[Tensor, "n d_model"], k: int, seed: int) -> Float[Tensor, "k d_model"]:
    """k vectors drawn from the covariance of `x`, in double precision."""
    rows = x.double().cpu()
    rows = rows - rows.mean(0)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((k, len(rows)))) @ rows


def covariance_directions(x: Float[Tensor, "n d_model"], k: int, seed: int) -> Float[Tensor, "k d_model"]:
    """k orthonormal directions drawn from the covariance of `x`."""
    return torch.linalg.qr(_drawn(x, k, seed).T).Q.T.float().contiguous()


RANDOM_RELEASE = "random-direction"
MATCHED, RANDOM = "matched feature", "random direction, same gate"


def random_twins(feature: Feature, x: Float[Tensor, "n d_model"], n: int, seed: int = 0) -> list[Feature]:
    """`feature` with decoder rows drawn from the covariance of `x`: the same gate, the same ‖Δ‖, other directions."""
    drawn = _drawn(x, n, seed)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True) * feature.w_dec.norm().double().cpu()).float()
    return [twin_along(feature, row, f"covariance-{seed}-{k}") for k, row in enumerate(drawn)]


def twin_along(feature: Feature, w_dec: Float[Tensor, "d_model"], name: str) -> Feature:
    """`feature` that writes along another row."""
    ref = FeatureRef(SaeId(RANDOM_RELEASE, name), feature.index)
    return replace(feature, ref=ref, w_dec=w_dec.clone())


def random_twin(feature: Feature, seed: int) -> Feature:
    """An isotropic random direction of the same length: the controls of runs before 0.2, which keep only their seed."""
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(feature.w_dec.shape[0])).float()
    return twin_along(feature, vector / vector.norm() * feature.w_dec.norm(), f"seed-{seed}")


@torch.no_grad()
def matched_features(
    model: Model, sae: Sae, feature: Feature, pairs: PromptPairs, *, exclude: Sequence[int] = ()
) -> list[int]:
    """Features of `sae` that fire where `feature` fires, about as often, as strongly and with as long a decoder row."""
    x = ordinary_residuals(model, [p.ai for p in pairs], [sae.site])[sae.site]
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


def randomized_control(model: Model, sae: Sae, pairs: PromptPairs, seed: int = 0) -> Sae:
    """`randomized_sae` of `sae`, each feature as often active on the pairs' ordinary tokens as before."""
    texts, site = [t for p in pairs for t in (p.human, p.ai)], sae.site
    return randomized_sae(sae, ordinary_residuals(model, texts, [site])[site], seed)


@torch.no_grad()
def observed_max(model: Model, feature: FeatureLike, pairs: PromptPairs) -> float:
    """The feature's largest activation on any ordinary token of the pairs: the unit of strengths.

    Raises:
        RequestError: it fires nowhere on them, so it has no maximum.
    """
    loaded = as_feature(feature)
    x = ordinary_residuals(model, [t for p in pairs for t in (p.human, p.ai)], [loaded.site])[loaded.site]
    top = float(loaded.activation(x).max())
    if not top > 0:
        raise RequestError(f"{loaded.ref} fires on no token of {pairs.name}; it has no observed maximum.")
    return top


def _near(values: Tensor, target: float) -> Tensor:
    return (values >= target / FACTOR) & (values <= target * FACTOR)


# --- what the controls say -----------------------------------------------------------------------------
@dataclass(frozen=True)
class ControlTest:
    """A candidate among its matched features and among random directions: two p values, never pooled."""

    candidate: float
    """Specific reduction of the candidate; so are all figures here."""
    p_matched: float
    """NaN without matched features."""
    p_random: float
    n_matched: int
    n_random: int
    median: float
    percentile95: float
    dropped: int = 0
    """Controls whose specific reduction is undefined."""

    @property
    def p(self) -> float:
        """The larger of the two: both must be small."""
        found = [p for p in (self.p_matched, self.p_random) if p == p]
        return max(found) if found else float("nan")

    @property
    def in_words(self) -> str:
        """Each kind's p with how many there are."""
        kinds = (
            ("random directions", self.p_random, self.n_random),
            ("matched features", self.p_matched, self.n_matched),
        )
        return ", ".join(f"p = {p:.3f} among {n} {kind}" for kind, p, n in kinds if n)

    @property
    def verdict(self) -> str:
        """yes, no, or undetermined where matched features exist but are too few for their own p."""
        if np.isnan(self.candidate) or not self.n_matched + self.n_random:
            return "undetermined"
        if self.candidate <= 0 or (self.n_random >= ENOUGH and self.p_random > ALPHA):
            return "no"
        if self.n_matched and self.p_matched > max(ALPHA, 1 / (1 + self.n_matched)):
            return "no"
        enough = (self.n_random >= ENOUGH or self.n_matched >= ENOUGH) and not 0 < self.n_matched < ENOUGH
        return "yes" if enough and self.p <= ALPHA else "undetermined"


def control_test(candidate: float, values: ArrayLike, kinds: Iterable[str]) -> ControlTest:
    """Two empirical p of `candidate` from its controls' values and kinds; an undefined control is dropped and counted."""
    x, kind = np.asarray(values, dtype=float), np.array(list(kinds), dtype=object)
    known = ~np.isnan(x)
    matched, random = (x[known & (kind == k)] for k in (MATCHED, RANDOM))
    p_matched, p_random = (
        empirical_p(candidate, part) if len(part) and not np.isnan(candidate) else float("nan")
        for part in (matched, random)
    )
    both = np.concatenate([matched, random])
    middle, high = (float(np.quantile(both, q)) if len(both) else float("nan") for q in (0.5, 0.95))
    dropped = int((~known).sum())
    return ControlTest(candidate, p_matched, p_random, len(matched), len(random), middle, high, dropped)


def empirical_p(candidate: float, controls: ArrayLike) -> float:
    """(1 + how many controls do at least as much) / (1 + controls)."""
    values = np.asarray(controls)
    return float((1 + (values >= candidate).sum()) / (1 + len(values)))
