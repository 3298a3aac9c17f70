"""The causal analysis of one feature: what it does to the bias, in the light of what any edit at its place could do (docs/method.md#causal-analysis).

    ceiling      the upper bound by activation patching: human → AI residual interchange at the feature's layer, over the words after the subject
    necessity    ablation: bias removed, also as a share of the upper bound
    sufficiency  the feature set to its AI value in the human prompts: does the penalty appear?
    error        interchange of the SAE's error alone: the part of the bias no feature of this SAE holds
    direct       a·W_dec[f] read by the unembedding with the final norm frozen; the rest of the ablation is mediated by later layers

Without it a feature that "switches to judging" and one that "writes the word *dangerous*" look alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.result import Figure, Framed
from sae_bias.discovery.attribution import score_coefficients, weighted_score
from sae_bias.discovery.integrated import reconstruction
from sae_bias.models.forward import Final
from sae_bias.models.model import Model
from sae_bias.models.reads import Spot
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature, sae_of
from sae_bias.saes.sae import Feature, check_sae
from sae_bias.stats.clustered import Clustered, clustered_mean
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.interchange import AI, HUMAN, Interchange

MOST_LAYERS = 9
MOST_POSITIONS = 8
MEANING = {
    "ceiling": "AI prompts given the human residual after the subject: what any edit there could remove",
    "necessity": "feature ablated: bias removed",
    "resample": "AI prompts given the feature's human value after the subject: bias removed",
    "sufficiency": "human prompts given the feature's AI value after the subject: bias that appears",
    "reverse ceiling": "human prompts given the AI residual after the subject: what any edit there could bring about",
    "all features": "AI prompts given the human reconstruction: what this SAE's features together could remove",
    "error": "AI prompts given the human SAE error: the part of the bias outside the SAE",
    "direct": "of the ablation, what W_dec writes straight to the evaluation words (final norm frozen)",
    "mediated": "of the ablation, the rest: what later layers make of the feature",
}


@dataclass(frozen=True, eq=False)
class Ladder(Framed):
    """The causal effects of one feature, each in nats of bias with its interval."""

    frame_field: ClassVar[str] = "rungs"
    feature: FeatureRef
    base: ProbeResult
    rungs: pd.DataFrame
    """rung, effect (nats of bias), ci_low, ci_high, share_of_bias, share_of_ceiling, n_pairs, meaning."""
    ceilings: pd.DataFrame
    """layer, offset from the last token (None: the whole suffix), effect, share_of_bias, n_pairs."""
    words: pd.DataFrame
    """word, side, direct: logit written per unit of activation, final norm frozen at its mean size."""
    layer: int
    note: str = ""

    def __getitem__(self, rung: str) -> float:
        """One effect in nats."""
        return float(self.rungs.set_index("rung").loc[rung, "effect"])  # type: ignore[arg-type]

    def plot(self) -> Figure:
        """The effects with their intervals, and the upper bound at every layer and position."""
        from sae_bias.figures.features import ladder

        return ladder(
            self.rungs, self.base.bias, ceilings=self.ceilings, layer=self.layer, feature=str(self.feature)
        )

    def __repr__(self) -> str:
        lines = [
            f"Causal analysis of {self.feature}: unsteered bias {self.base.bias:+.3f} nats, {self.base.n_pairs} pairs"
        ]
        for row in self.rungs.to_dict("records"):
            share = row["share_of_ceiling"]
            of = f", {share:.0%} of its upper bound" if math.isfinite(share) else ""
            lines.append(
                f"  {row['rung']:<16}{row['effect']:+8.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]  {row['share_of_bias']:.0%} of the bias{of}"
            )
        return "\n".join(lines + ([f"  {self.note}"] if self.note else []))


def causal_ladder(
    model: Model,
    feature: Feature | FeatureRef | str,
    pairs: PromptPairs,
    probe: Probe | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: int = MOST_POSITIONS,
    progress: bool = False,
) -> Ladder:
    """The causal analysis of `feature`: upper bound (activation patching), necessity (ablation), sufficiency, the SAE's error, direct and indirect effect.

    Args:
        layers: where the upper bound is measured; by default all of a small model, else nine spread over the depth and the
            feature's own. The feature's own layer is always among them.
        positions: how many single positions from the end; 0 measures the whole suffix only.

    Raises:
        RequestError: a feature that does not fit the model; pairs whose two prompts share no ending; no bias to explain.
    """
    check_sae(model, loaded := as_feature(feature))
    engine = ProbeEngine(model, pairs, probe or default_probe(pairs))
    return ladder_of(engine, loaded, layers=layers, positions=positions, progress=progress)


def ladder_of(
    engine: ProbeEngine, feature: Feature, *, layers: Sequence[int] | None = None, positions: int = MOST_POSITIONS, progress: bool = False
) -> Ladder:  # fmt: skip
    """`causal_ladder` on an engine that has run its pairs already."""
    exchange = Interchange(engine)
    if not exchange.longest:
        raise RequestError(
            "the two prompts of each pair share no ending, so nothing can be interchanged; end both in the same words."
        )
    rows, note = _rungs(engine, exchange, feature)
    where = ladder_layers(engine.model, feature.site.resid_layer, layers)
    ceilings = _ceilings(exchange, where, min(positions, exchange.longest), progress)
    return Ladder(
        feature.ref, engine.base, rows, ceilings, _words(engine, feature), feature.site.resid_layer, note
    )


def _rungs(engine: ProbeEngine, exchange: Interchange, feature: Feature) -> tuple[pd.DataFrame, str]:
    base, layer = engine.base, feature.site.resid_layer
    ablated = engine.run([Ablate(feature)])[0].pair_bias
    removed = {
        "ceiling": base.pair_bias - exchange.bias(layer, AI, None, "residual"),
        "necessity": base.pair_bias - ablated,
        "resample": base.pair_bias
        - exchange.bias(layer, AI, _feature_part(feature), "feature", scale=feature.decoder_scale),
        "sufficiency": base.pair_bias
        - exchange.bias(layer, HUMAN, _feature_part(feature), "feature", scale=feature.decoder_scale),
        "reverse ceiling": base.pair_bias - exchange.bias(layer, HUMAN, None, "residual"),
    }
    note = ""
    sae = sae_of(feature)
    if sae is None:
        note = "all features, error: not measured, the feature belongs to no SAE that can be loaded"
    else:
        part = reconstruction(sae)
        removed["all features"] = base.pair_bias - exchange.bias(layer, AI, part, "reconstruction")
        removed["error"] = base.pair_bias - exchange.bias(layer, AI, lambda x: x - part(x), "error")
    if base.probe.score == "auroc":
        note = "; ".join(filter(None, [note, 'direct, mediated: score="auroc" has no gradient']))
    else:
        direct = direct_effect(engine, feature)
        removed |= {"direct": direct, "mediated": base.pair_bias - ablated - direct}
    stats = {rung: clustered_mean(values, *base.clusters) for rung, values in removed.items()}
    of = {"sufficiency": stats["reverse ceiling"].mean, "reverse ceiling": math.nan, "ceiling": math.nan}
    if abs(stats["necessity"].mean) > 1.05 * abs(stats["ceiling"].mean):
        more = "ablation does more than the upper bound: it also acts on the subject's own tokens, or it damages; see resample"
        note = "; ".join(filter(None, [note, more]))
    rows = [
        _row(rung, stat, base.bias, of.get(rung, stats["ceiling"].mean), len(base.pair_bias))
        for rung, stat in stats.items()
    ]
    return pd.DataFrame(rows), note


def _row(rung: str, stat: Clustered, bias: float, ceiling: float, n: int) -> dict[str, object]:
    return {
        "rung": rung,
        **stat.columns("effect"),
        "share_of_bias": stat.mean / bias if bias else math.nan,
        "share_of_ceiling": stat.mean / ceiling if ceiling else math.nan,
        "n_pairs": n,
        "meaning": MEANING[rung],
    }


def _feature_part(feature: Feature):
    """a·δ at every row, not yet scaled: the edited prompt's own residual scales both sides' (`Feature.decoder_scale`)."""
    return lambda x: feature.activation(x)[:, None] * feature.w_dec.to(x.device)


# --- the ceiling everywhere ------------------------------------------------------------------------------
def ladder_layers(model: Model, own: int, given: Sequence[int] | None = None) -> list[int]:
    """Where the upper bound is measured: the layers given, or some spread over the model, and the feature's own."""
    if given is not None:
        bad = [layer for layer in given if not 0 <= layer < model.n_layers]
        if bad:
            raise RequestError(f"layers {bad} do not exist in {model.name}: 0 to {model.n_layers - 1}.")
        return sorted({*given, own})
    spread = np.linspace(0, model.n_layers - 1, min(MOST_LAYERS, model.n_layers)).round().astype(int)
    return sorted({*(int(i) for i in spread), own})


def _ceilings(exchange: Interchange, layers: Sequence[int], positions: int, progress: bool) -> pd.DataFrame:
    base = exchange.engine.base
    rows = []
    places: list[int | None] = [None, *range(positions)]
    with tqdm(
        total=len(layers) * len(places), desc="patching", unit="place", disable=not progress, leave=False
    ) as bar:
        for layer in layers:
            for offset in places:
                has = exchange.suffix > (0 if offset is None else offset)
                change = (
                    base.pair_bias - exchange.bias(layer, AI, None, "residual", offset=offset) if has.any() else base.pair_bias
                )[has]  # fmt: skip
                effect = float(change.mean()) if has.any() else math.nan
                share = effect / float(base.pair_bias[has].mean()) if has.any() else math.nan
                rows.append(
                    {"layer": layer, "offset": offset, "effect": effect, "share_of_bias": share, "n_pairs": int(has.sum())}
                )  # fmt: skip
                bar.update()
    return pd.DataFrame(rows).astype({"offset": "Int64"})


# --- the direct path ---------------------------------------------------------------------------------------
def direct_effect(engine: ProbeEngine, feature: Feature) -> Float[np.ndarray, "n_pairs"]:
    """Bias of each pair that ablation removes along the direct path: a·δ read by the unembedding, final norm frozen.

    The scored position is the only one whose residual the unembedding reads, so the direct path is
    Σ_words (∂s/∂z_w)·(∂z_w/∂r · a·δ) with r the last residual and the norm's scale held at its value.
    """
    plan, model, layer = engine.reading.plan, engine.model, feature.site.resid_layer
    reads = engine.engine.runner.reads
    coefficients, normalizer = score_coefficients(engine, of="score")
    per_prompt = np.zeros(plan.n_sequences)

    def visit(wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        index = [i for ((i, _),) in wanted]
        last = reads.keep(layer)[[reads.paths[i][-1] for i in index]].float()
        written = feature.write(last, feature.activation(last))
        assert final.resid is not None
        r = final.resid.detach().float().requires_grad_(True)
        with torch.enable_grad():
            value = weighted_score(plan, _Frozen(model, r), index, coefficients, normalizer)
            (grad,) = torch.autograd.grad(value, r)
        per_prompt[index] = (grad[:, 0] * written).sum(-1).cpu().double().numpy()

    reads.resume(layer, reads.keep(layer), visit)
    by_prompt = per_prompt.reshape(len(plan.prompts), -1).sum(1)
    place = np.asarray(engine.reading._place)
    return by_prompt[place[:, HUMAN]] - by_prompt[place[:, AI]]


class _Frozen(Final):
    """The end of a forward pass whose final norm keeps its scale: linear in the residual up to the softcap."""

    def __init__(self, model: Model, resid: Tensor):
        super().__init__(model, resid)

    def logits(self, token_ids: Sequence[int] | None = None, *, softcap: bool = True) -> Tensor:
        assert self.resid is not None
        w, b = self.model.rows(range(self.model.d_vocab) if token_ids is None else token_ids)
        model = self.model
        z = model.arch.norm.frozen(model.final_norm, self.resid, self.resid.detach()) @ w.T
        z = z if b is None else z + b
        cap = self.model.softcap if softcap else None
        return z if cap is None else cap * torch.tanh(z / cap)


def _words(engine: ProbeEngine, feature: Feature) -> pd.DataFrame:
    """Logit that one unit of the feature writes to each evaluation word, the norm at its mean size on the AI prompts."""
    model, plan, layer = engine.model, engine.reading.plan, feature.site.resid_layer
    norm, scales, reads = model.arch.norm, np.zeros(plan.n_sequences), engine.engine.runner.reads

    def visit(wanted: Sequence[Sequence[Spot]], final: Final) -> None:
        index = [i for ((i, _),) in wanted]
        assert final.resid is not None
        written = feature.decoder_scale(reads.keep(layer)[[reads.paths[i][-1] for i in index]])
        size = norm.scale(model.final_norm, final.resid.float()).flatten()
        scales[index] = (size if written is None else size * written).cpu().numpy()

    reads.resume(layer, reads.keep(layer), visit)
    unit = norm.center(feature.w_dec.to(model.device))
    written = unit * norm.gain(model.final_norm, model.d_model) * float(scales.mean())
    w, _ = model.rows(plan.row_ids)
    logit = dict(zip(plan.row_ids, (w @ written.to(w.device)).tolist()))
    return pd.DataFrame(
        [
            {"word": v.word, "side": "positive" if v.positive else "negative", "direct": logit[v.tokens[0]]}
            for v in engine.base.vocabulary.kept
        ]
    )
