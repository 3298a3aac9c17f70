"""The counterpart of a feature in another model, by what it does and not by its index (docs/method.md#matching-features).

    profile   the feature's activation at the last token of every prompt of one bank, as mid-ranks
    rho       Pearson's r of two profiles' ranks (Spearman's ρ with ties)

A match asks for more than the largest rho: mutual nearest neighbors (the candidate's own best partner in the first SAE is the feature
itself), a rho beyond two permutation nulls over the *whole* family scanned (the profile permuted within each subject, and within each
statement, the largest rho over all features each time; p is the larger), the same class in the 2 × 2 with the badly judged human deeds
(HC), an ablation effect of the same sign where pairs are given (both intervals on one side of 0), and a margin over the second best. "Functionally similar" is all that can be claimed: vectors of two models cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.discovery.contrasts import HARM
from sae_bias.discovery.ranking import load_saes
from sae_bias.discovery.tables import feature_acts
from sae_bias.models.model import Model
from sae_bias.models.residuals import last_residuals
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.load import load_grid
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef, SaeId
from sae_bias.saes.load import as_feature, load_sae
from sae_bias.saes.sae import Feature, Sae, check_sae
from sae_bias.saes.stream import live_blocks
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine

if TYPE_CHECKING:
    from sae_bias.stats.clustered import Clustered


ALPHA = 0.05
ON = 0.5  # a cell of the 2 × 2 is on from this share of the strongest
Profile = Float[np.ndarray, "n_prompts"]


@dataclass(frozen=True, eq=False)
class Match(Framed):
    """The candidates for a feature's counterpart, most similar first."""

    frame_field: ClassVar[str] = "candidates"
    feature: FeatureRef
    candidates: pd.DataFrame
    """feature, sae, index, rho, p_fwer, mutual, class, same_class, removed … and removed_original … with intervals, same_sign."""
    best: FeatureRef | None
    """The counterpart, where one passes every test that was made."""
    margin: float
    """rho of the first less rho of the second."""
    profile_class: str
    """Which cells of the 2 × 2 the feature itself is on in."""
    verdict: str
    n_prompts: int
    family_size: int

    def plot(self) -> Figure:
        """The candidates by rank correlation."""
        from sae_bias.figures.features import match_figure

        return match_figure(self.candidates, str(self.feature))

    def __repr__(self) -> str:
        head = f"Match of {self.feature} ({self.profile_class}) over {self.n_prompts} prompts and {self.family_size:,} features"
        return f"{head}: {self.verdict}\n{self.candidates.head(8).round(3).to_string(index=False)}"


def match_features(
    feature: Feature | FeatureRef | str,
    model_a: Model,
    model_b: Model,
    saes_b: Sae | SaeId | str | Sequence[Sae | SaeId | str],
    prompts: PromptGrid | None = None,
    *,
    k: int = 10,
    n_permutations: int = 1000,
    pairs: PromptPairs | None = None,
    probe: Probe | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Match:
    """The features of `saes_b` (one family) most like `feature` in what they fire on.

    Args:
        prompts: the bank, a grid; the bundled one by default.
        k: how many candidates are looked at closely.
        pairs: then the feature and the best candidate are ablated, and their effects must have the same sign.

    Raises:
        RequestError: a feature or SAE that does not fit its model; a feature silent on the whole bank.
    """
    loaded = as_feature(feature)
    check_sae(model_a, loaded)
    saes = load_saes(model_b, saes_b)
    grid = load_grid() if prompts is None else prompts
    texts = [p.text for p in grid]
    acts = feature_acts(model_a, texts, loaded)
    if np.ptp(acts) == 0:
        raise RequestError(
            f"{loaded.ref} has the same activation on all {len(texts)} prompts of the bank; nothing can be matched."
        )
    target = _ranks(acts[:, None])[:, 0]
    nulls, found = _scan(model_b, saes, texts, target, _groups(grid), k, n_permutations, seed, progress)
    frame = pd.DataFrame([{"feature": str(ref), "sae": str(ref.sae), "index": ref.index, "rho": rho} for rho, ref, _ in found])  # fmt: skip
    own_class = cell_class(acts, grid)
    if not len(frame):
        verdict = "none: every feature of the other SAEs is silent on the bank"
        return Match(loaded.ref, frame, None, float("nan"), own_class, verdict, len(texts), sum(s.d_sae for s in saes))  # fmt: skip
    frame["p_fwer"] = [max((1 + (null >= rho - 1e-12).sum()) / (1 + len(null)) for null in nulls) for rho in frame["rho"]]  # fmt: skip
    frame["mutual"] = _mutual(model_a, loaded, texts, [profile for _, _, profile in found])
    frame["class"] = [cell_class(profile, grid) for _, _, profile in found]
    frame["same_class"] = frame["class"] == own_class
    margin = float(frame["rho"].iloc[0] - frame["rho"].iloc[1]) if len(frame) > 1 else float("nan")
    if pairs is not None:
        _add_effects(frame, loaded, model_a, model_b, pairs, probe or default_probe(pairs))
    best, verdict = _verdict(frame, margin)
    return Match(loaded.ref, frame, best, margin, own_class, verdict, len(texts), sum(s.d_sae for s in saes))


def _groups(grid: PromptGrid) -> list[list[str]]:
    """What the profile is permuted within: subjects, and statements, where any has more than one prompt; else the whole bank."""
    ways = [[p.subject for p in grid], [p.statement for p in grid]]
    return [labels for labels in ways if len(set(labels)) < len(labels)] or [[""] * len(grid)]


def _permuted(
    target: Profile, labels: Sequence[str], n: int, rng: np.random.Generator
) -> Float[np.ndarray, "n n_prompts"]:
    """The profile with its values exchanged among the prompts of each label, n times."""
    order, out = np.unique(labels, return_inverse=True)[1], np.empty((n, len(target)))
    for group in range(order.max() + 1):
        place = np.flatnonzero(order == group)
        out[:, place] = rng.permuted(np.tile(target[place], (n, 1)), axis=1)
    return out


def _scan(
    model: Model, saes: Sequence[Sae], texts: list[str], target: Profile, groups: Sequence[Sequence[str]], k: int, n_permutations: int,
    seed: int, progress: bool,
) -> tuple[Float[np.ndarray, "n_ways n_permutations"], list[tuple[float, FeatureRef, Profile]]]:  # fmt: skip
    """Each null's largest rho of each permutation, and the k best (rho, feature, activations)."""
    resid = last_residuals(model, texts, {s.site for s in saes})
    rng = np.random.default_rng(seed)
    shuffled = np.stack([_permuted(target, labels, n_permutations, rng) for labels in groups])
    null, best = np.full(shuffled.shape[:2], -np.inf), []
    for sae in saes:
        for block in live_blocks(sae, resid[sae.site]):
            if not len(block.index):
                continue
            ranks = _ranks(block.acts)
            np.maximum(null, (shuffled @ ranks).max(-1), out=null)
            rho = target @ ranks
            top = np.argsort(-rho, kind="stable")[:k]
            best += [
                (float(rho[i]), FeatureRef(sae.id, int(block.index[i])), block.acts[:, i].copy()) for i in top
            ]
            best = sorted(best, key=lambda item: -item[0])[:k]
    return null, best


def _mutual(model: Model, feature: Feature, texts: list[str], profiles: Sequence[Profile]) -> list[bool]:
    """Whether each candidate's best partner in the feature's own SAE is the feature."""
    sae = feature.whole if feature.whole is not None else load_sae(feature.ref.sae)
    resid = last_residuals(model, texts, {sae.site})[sae.site]
    targets = _ranks(np.stack(profiles, axis=1)).T
    best, who = np.full(len(profiles), -np.inf), np.full(len(profiles), -1)
    for block in live_blocks(sae, resid):
        if not len(block.index):
            continue
        rho = targets @ _ranks(block.acts)
        top = rho.argmax(1)
        value = rho[np.arange(len(top)), top]
        who = np.where(value > best, block.index[top], who)
        best = np.maximum(best, value)
    return [int(w) == feature.index for w in who]


def _ranks(acts: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n f"]:
    """Mid-ranks of each column, centered and of unit length: a product of two is their rank correlation."""
    ranks = scipy.stats.rankdata(acts, axis=0)
    ranks = ranks - ranks.mean(0)
    size = np.linalg.norm(ranks, axis=0)
    return np.divide(ranks, size, out=np.zeros_like(ranks), where=size > 0)


def cell_class(acts: Profile, grid: PromptGrid) -> str:
    """Cells of the 2 × 2 (and the dog's) in which a profile is on: "AS" is AI speech, "AS+AN" AI identity, "AS+HS+DS" speech, "AS+HC" bad verdicts."""
    cells = {"AS": ("ai", "speech"), "AN": ("ai", "nonspeech"), "HS": ("human", "speech"), "HN": ("human", "nonspeech"), "DS": ("animal", "speech")}  # fmt: skip
    means = {}
    for name, cell in cells.items():
        rows = [i for i, p in enumerate(grid) if (p.group, p.act) == cell]
        if rows:
            means[name] = float(np.asarray(acts)[rows].mean())
    if harm := [i for i, p in enumerate(grid) if p.group in HARM and p.act == "harm"]:
        means["HC"] = float(np.asarray(acts)[harm].mean())
    top = max(means.values(), default=0.0)
    return "+".join(c for c, value in means.items() if value >= ON * top) if top > 0 else "silent"


def _add_effects(
    frame: pd.DataFrame, feature: Feature, model_a: Model, model_b: Model, pairs: PromptPairs, probe: Probe
) -> None:
    """What ablating the feature removes of the primary figure in its model, and the first candidate in the other.

    `same_sign` is "undetermined" unless both intervals leave out 0.
    """
    original = _removed(model_a, feature, pairs, probe)
    other = _removed(model_b, FeatureRef.parse(str(frame["feature"].iloc[0])), pairs, probe)
    for column, stat in (("removed", other), ("removed_original", original)):
        for name, value in ((column, stat.mean), (f"{column}_low", stat.ci_low), (f"{column}_high", stat.ci_high)):  # fmt: skip
            frame[name] = np.nan
            frame.loc[0, name] = value
    frame["same_sign"] = "not measured"
    frame.loc[0, "same_sign"] = same_sign(original, other)


def same_sign(first: Clustered, second: Clustered) -> str:
    """yes or no where both effects have a sign (their intervals leave out 0, in designs large enough for a call), else undetermined."""
    if not {first.call, second.call} <= {"positive", "negative"}:
        return "undetermined"
    return "yes" if first.mean * second.mean > 0 else "no"


def _removed(model: Model, feature: Feature | FeatureRef, pairs: PromptPairs, probe: Probe) -> Clustered:
    engine = ProbeEngine(model, pairs, probe, controls=True)
    return engine.run([Ablate(feature)])[0].reduction_from(engine.base).change


def _verdict(frame: pd.DataFrame, margin: float) -> tuple[FeatureRef | None, str]:
    first = frame.iloc[0]
    failed = [
        reason
        for fails, reason in (
            (first["p_fwer"] > ALPHA, f"its correlation is not larger than chance gives (p = {first['p_fwer']:.2g})"),
            (not first["mutual"], "they are not mutual nearest neighbors"),
            (not first["same_class"], f"it is on in other cells of the 2 × 2 ({first['class']})"),
            (first.get("same_sign") == "no", "ablating it moves the bias the other way"),
        )
        if fails
    ]  # fmt: skip
    open_ = "; whether ablation moves the bias the same way is undetermined (an interval holds 0, or the design is too small for a call)" if first.get("same_sign") == "undetermined" else ""  # fmt: skip
    over = f"margin {margin:.2f} over the second best" if margin == margin else "the only live feature"
    if failed:
        return (
            None,
            f"no match: the most similar is {first['feature']} (ρ = {first['rho']:.2f}, {over}), but {'; '.join(failed)}",
        )
    return FeatureRef.parse(
        str(first["feature"])
    ), f"{first['feature']}: functionally similar, ρ = {first['rho']:.2f}, {over}{open_}"
