"""The marks of the definitions that decide headlines (docs/method.md#pass-marks): what is called, what counts as removed, what it costs.

Taken on organisms whose truth is known, by the functions that a study runs; rates are of simulations. What needs trained organisms, hundreds of runs
or pretrained weights is not here: `ELSEWHERE` names the commands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_bias.discovery.attribution import (
    ablation_effects,
    attribution,
    carriers,
    exact_ablation,
    means,
    resampling_effects,
)
from sae_bias.discovery.integrated import CLOSE, Paths
from sae_bias.discovery.matching import match_features
from sae_bias.discovery.ranking import rank_features
from sae_bias.measures.collapse import CollapseEngine
from sae_bias.measures.specificity import specificity
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_grid, load_pairs
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Sae
from sae_bias.stats.clustered import FEWEST_CLUSTERS, clustered_mean, clustered_means
from sae_bias.stats.reduction import SpecificReduction
from sae_bias.steering.controls import MATCHED, RANDOM, control_test, randomized_control
from sae_bias.steering.directions import difference_of_means
from sae_bias.steering.edits import Ablate, Clamp, ProjectOut, Steer
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.intervention import Intervention
from sae_bias.validation.marks import N_CONTROLS, Mark, ablation_facts, constructed_feature, organism_truth
from sae_bias.workflows.best_strength import MAX_KL_OFF
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.fit import fit_feature_set, fit_report
from sae_bias.workflows.sweep import run_sweep

SIMULATION = "simulation"
ELSEWHERE = (
    "Not measured here, because it trains models or takes hundreds of runs (figures in experiments/calibration/README.md): organisms and SAEs of further "
    "seeds (experiments/organisms/calibrate.py), learned edits in 21 trained SAEs and their randomized twins (learned.py), 200 randomized SAEs through the "
    "whole search (randomized.py), version 2 of the corpus (version_2.py), the probe on pretrained models (experiments/real_models).",
)
CLAMPS = (-40.0, -100.0)


def definition_marks(model: Model, name: str, *, n_controls: int = N_CONTROLS, seed: int = 0) -> list[Mark]:
    """The marks of an organism with a constructed feature."""
    marks = call_marks(model, name, seed=seed) + removal_marks(model, name)
    marks += valence_marks(model, name, n_controls=n_controls, seed=seed) + carrier_marks(model, name)
    return [*marks, equivalence_mark(model, name), direction_mark(model, name, seed=seed)]


def bundled_saes(name: str) -> list[Sae]:
    """An organism's trained SAEs."""
    return [load_sae(f"organism:{name}/{facts['sae']}") for facts in organism_truth(name)["saes"]]


def valence_feature(name: str) -> FeatureRef:
    """The read-out of the evaluation itself in an organism's constructed SAE."""
    return FeatureRef(constructed_feature(name).sae, organism_truth(name)["constructed"]["valence_index"])


# --- 1. calls
def call_marks(model: Model, name: str, *, seed: int = 0) -> list[Mark]:
    """Features of the trained SAEs called AI-speech; they fire at bad human deeds as well."""
    called, negative, n = 0, 0, 0
    for sae in bundled_saes(name):
        frame = rank_features(model, sae, load_grid(), by="interaction", seed=seed).frame
        called += int((frame["call"] == "AI-speech").sum())
        negative += int((frame["call"] == "negative judgement").sum())
        n += len(frame)
    note = f"{negative} called negative judgement"
    return [Mark("features of trained SAEs called AI-speech", name, called, 0, 0, unit="count", n=f"{n:,} features", note=note)]  # fmt: skip


# --- 2. what counts as removed
def removal_marks(model: Model, name: str) -> list[Mark]:
    """Specific reduction never above β or 1; clamps of a lower layer's most causal feature below 0."""
    pairs = load_pairs().select(corpus=False)
    engine, banks = ProbeEngine(model, pairs, Probe()), CollapseEngine(model, Probe())

    def specific(edit: Intervention) -> SpecificReduction:
        return banks.run([edit], engine.base, engine.run([edit])[0]).specific

    below = [s for s in bundled_saes(name) if s.site.resid_layer < organism_truth(name)["layer"]]
    clamps = [Clamp(most_causal(model, below[0]), value) for value in CLAMPS] if below else []
    found = {e: specific(e) for e in clamps}
    marks = [
        Mark(
            f"specific reduction of a clamp at {edit.value:g}, most causal feature of layer {below[0].site.resid_layer}", name, s.estimate,
            high=0.0, n=f"{len(pairs)} held-out pairs", note=f"β − B_s/B_0 would read {s.beta - 1 + s.reduction.estimate:.2f}",
        )
        for edit, s in found.items()
    ]  # fmt: skip
    everything = [*found.values(), *(specific(Ablate(f)) for f in (constructed_feature(name), valence_feature(name)))]  # fmt: skip
    excess = max(s.estimate - min(max(s.beta, 0.0), 1.0) for s in everything)
    return [*marks, Mark("specific reduction less the larger of β and 0, largest", name, excess, high=0.0, n=f"{len(everything)} edits")]  # fmt: skip


def most_causal(model: Model, sae: Sae, n_tried: int = 8) -> FeatureRef:
    """Of the features of largest attribution, the one whose exact ablation removes most of the bias of all pairs."""
    engine = ProbeEngine(model, load_pairs(), Probe())
    first = [FeatureRef(sae.id, int(i)) for i in np.argsort(-np.abs(attribution(engine, sae)))[:n_tried]]
    return first[int(np.argmax(exact_ablation(engine, first)))]


# --- 3., 4. costs and controls
def valence_marks(model: Model, name: str, *, n_controls: int = N_CONTROLS, seed: int = 0) -> list[Mark]:
    """Ablating the read-out of evaluation removes the bias, and is not specific, not free and no better than chance."""
    held_out = load_pairs().select(corpus=False)
    facts = ablation_facts(model, valence_feature(name), held_out, n_controls=n_controls, seed=seed)
    over, test, worst = (
        f"{len(held_out)} held-out pairs",
        facts.test,
        max(facts.kl, key=lambda k: facts.kl[k]),
    )
    return [
        Mark("valence read-out's ablation's specific reduction", name, facts.specific, high=0.0, n=over),
        Mark("its largest cost", name, facts.kl[worst], low=0.05, unit="nats", note=f"kind of text: {worst}"),
        Mark("its p among its controls", name, test.p, low=0.05, unit="p", note=test.in_words),
    ]


def pass_rate(n_matched: int, n: int = 2000, n_controls: int = N_CONTROLS) -> float:
    """Share of candidates called causal that are drawn like their own controls."""
    rng, passed = np.random.default_rng(n_matched), 0
    kinds = [MATCHED] * n_matched + [RANDOM] * max(0, n_controls - n_matched)
    for _ in range(n):
        values = rng.normal(0.05, rng.gamma(2.0, 0.5), 1 + len(kinds))
        passed += control_test(values[0], values[1:], kinds).verdict == "yes"
    return passed / n


def simulation_marks(n_studies: int = 20_000, n_candidates: int = 2000) -> list[Mark]:
    """Exchangeable candidates, and intervals of small designs with normal effects."""
    rates = {m: pass_rate(m, n_candidates) for m in (0, 4, 13, 19, 40)}
    marks = [Mark("exchangeable candidates that pass their controls", SIMULATION, max(rates.values()), high=0.06,
                  n=f"{n_candidates:,} each with {', '.join(map(str, rates))} matched features")]  # fmt: skip
    for n_templates in (3, 4, 6, 12):
        rng, shape = np.random.default_rng(n_templates), (n_studies, n_templates, 8)
        x = rng.normal(size=(*shape[:2], 1)) + rng.normal(size=(n_studies, 1, 8)) + rng.normal(size=shape)
        labels = np.repeat(np.arange(n_templates), 8), np.tile(np.arange(8), n_templates)
        found = clustered_means(x.reshape(n_studies, -1), *labels)
        covered = float(((found["ci_low"] <= 0) & (found["ci_high"] >= 0)).mean())
        call = clustered_mean(x[0].ravel() + 50, *labels).call
        right = (call == "undetermined") == (n_templates < FEWEST_CLUSTERS)
        marks.append(Mark(f"95% intervals that cover the truth, {n_templates} templates", SIMULATION, covered if right else float("nan"),
                          low=0.94, n=f"{n_studies:,} studies × 8 entities", note=f"a call of that size: {call}"))  # fmt: skip
    return marks


# --- 5. methods at the same positions
def direction_mark(model: Model, name: str, *, seed: int = 0) -> Mark:
    """What a difference of means removes, through the toolkit and by a plain hook on the Hugging Face model, at all positions and at the last."""
    pairs, site = load_pairs(), constructed_feature(name).sae
    split, site = pairs.split(seed), load_sae(site).site
    along = difference_of_means(model, pairs.select(templates=split["discover"]), site)
    report = pairs.select(templates=split["report"], entities=list(pairs.entities)[:3])
    engine = ProbeEngine(model, report, Probe())
    gaps = {}
    for where in ("all", "last"):
        after = engine.run([ProjectOut(along, positions=where)])[0].bias
        gaps[where] = abs(after - _bias_by_hook(model, report, site.layer, along, where)) / engine.base.bias
    note = ", ".join(f"{gap:.4f} at {where}" for where, gap in gaps.items())
    return Mark("difference of means against the same by a plain hook", name, max(gaps.values()), high=0.05,
                n=f"share of the bias of {len(report)} pairs", note=note)  # fmt: skip


def _bias_by_hook(model: Model, pairs: PromptPairs, layer: int, along: Any, where: str) -> float:
    """Mean s(human) − s(AI) with x − ((x − μ)·r) r, one prompt at a time, BOS left alone."""
    words = Probe().vocabulary(model, [p.human for p in pairs]).kept
    ids, up = [w.tokens[0] for w in words], torch.tensor([w.positive for w in words])
    r, mean = along.basis[0], along.mean

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        step = ((x - mean) @ r)[..., None] * r
        step[:, : x.shape[1] - 1 if where == "last" else 1] = 0
        return (x - step, *output[1:]) if isinstance(output, tuple) else x - step

    def score(text: str) -> float:
        z = model.hf(input_ids=torch.tensor([model.encode(text)], device=model.device)).logits[0, -1, ids].cpu()  # fmt: skip
        return float(z[up].mean() - z[~up].mean())

    handle = model.layer(layer).register_forward_hook(hook)
    try:
        with torch.no_grad():
            return float(np.mean([score(p.human) - score(p.ai) for p in pairs]))
    finally:
        handle.remove()


# --- 6. edits that can be specific
def learned_table(
    model: Model, saes: Sequence[Sae], kinds: Sequence[str] = ("gated", "scales"), *, seed: int = 0
) -> pd.DataFrame:
    """One row an SAE, its randomized twin beside it, and a kind of learned edit: its figures on report and the unseen half of the banks."""
    pairs, rows = load_pairs(), []
    for sae in saes:
        for weights, used in (("trained", sae), ("randomized", randomized_control(model, sae, pairs, seed))):
            for kind in kinds:
                edit = fit_feature_set(model, used, pairs, kind=kind, seed=seed)
                figures = fit_report(model, edit, pairs, seed=seed).set_index("split").loc["report"]
                key = {"sae": str(sae.id), "weights": weights, "kind": kind, "n_features": len(edit.features)}
                rows.append(key | {str(k): v for k, v in figures.items()})
    return pd.DataFrame(rows)


def learned_marks(table: pd.DataFrame, organism: str) -> list[Mark]:
    """Figures of each kind of edit over the trained SAEs; those of the randomized ones stand in the notes and require nothing."""
    marks = []
    for kind in table["kind"].unique():
        own, chance = (
            table[(table["kind"] == kind) & (table["weights"] == w)] for w in ("trained", "randomized")
        )
        for what, (of, bounds, unit) in FIGURES.items():
            note = f"randomized SAEs {of(chance):.3f}"
            name = f"{EDIT_NAMES[kind]}: {what}"
            marks.append(Mark(name, organism, of(own), **bounds, unit=unit, n=f"{len(own)} SAEs", note=note))
    return marks


EDIT_NAMES = {"scales": "learned scales", "gated": "gated counterfactual"}
FIGURES: dict[str, tuple[Callable[[pd.DataFrame], float], dict[str, float], str]] = {
    "median specific reduction": (lambda t: float(t["specific"].median()), {"low": 0.75}, "share"),
    "SAEs of which it is above 0.6": (lambda t: float((t["specific"] > 0.6).mean()), {"low": 19 / 21}, "share"),
    "largest KL_off": (lambda t: float(t["kl_off"].max()), {"high": MAX_KL_OFF}, "nats"),
    "largest shift of human scores": (lambda t: float(t["human_moved"].abs().max()), {"high": 0.2}, "nats"),
}  # fmt: skip


def learned_notes(table: pd.DataFrame, organism: str) -> list[str]:
    """The same in words. They are asked of 21 trained SAEs (experiments/organisms/learned.py): an organism's one to three bundled SAEs neither meet
    nor miss a rate of 19 in 21, so here they are no pass marks; what would miss is said like what would meet."""
    return [
        f"{m.organism}, {m.mark}: {m.measured} over {m.n}; {m.note}; asked of 21 SAEs: {m.required} ({m.verdict} here)"
        for m in learned_marks(table, organism)
    ]


# --- 9. no ratio of nothing
def no_ratio_marks(model: Model, name: str, *, seed: int = 0) -> list[Mark]:
    """A sweep where the bias may be 0 gives nats and no share, and names no strength."""
    pairs, feature = load_pairs(), f"{bundled_saes(name)[0].id}#0"
    split = {k: v for k, v in pairs.split(seed).items() if k != "discover"}
    found = run_sweep(model, pairs, Sweep([Cell((Steer(feature, a),)) for a in (1.0, 4.0)], costs=True, splits=split))  # fmt: skip
    shares = found.frame[["reduction", "red_low", "red_high", "specific_reduction"]].notna().to_numpy().sum()
    best = found.best_strength()
    n = f"{len(found.frame)} rows of a sweep"
    return [
        Mark("shares given of a bias that may be 0", name, int(shares), 0, 0, unit="count", n=n),
        Mark(
            "strengths called best for it",
            name,
            int(bool(best.cell)),
            0,
            0,
            unit="count",
            n=n,
            note=best.reason,
        ),
    ]


# --- 10., 12. carriers, integrated gradients, matching, equivalence
def carrier_marks(model: Model, name: str) -> list[Mark]:
    """The planted feature moves the figure when ablated and when resampled; integrated gradients add up."""
    engine, feature = ProbeEngine(model, load_pairs(), Probe()), constructed_feature(name)
    both = ablation_effects(engine, [feature]), resampling_effects(engine, [feature])
    (verdict,) = carriers(*both, engine.base.bias)
    ablated, resampled = (means(effects)[0] for effects in both)
    note = f"ablation {ablated:+.3f} nats, resampling {resampled:+.3f}: {verdict}"
    return [Mark("planted feature is a carrier", name, int(verdict == "carrier"), 1, 1, unit="count", note=note), integrated_mark(engine, name)]  # fmt: skip


def integrated_mark(engine: ProbeEngine, name: str) -> Mark:
    """Σ over features and error of one trained SAE against the bias."""
    sae = next(s for s in bundled_saes(name) if s.site.resid_layer == organism_truth(name)["layer"])
    found = Paths(engine).integrated_gradients(sae)
    bias = engine.base.bias
    note = f"{found.total:.4f} of {bias:.4f} nats; exact exchange after the subject {found.upper_bound:.4f}"
    return Mark(f"integrated gradients: Σ over features and error less the bias, layer {sae.site.resid_layer}", name, abs(found.total / bias - 1), high=CLOSE, note=note)  # fmt: skip


def match_mark(model: Model, other: Model, names: tuple[str, str]) -> Mark:
    """The planted feature of one organism finds that of another architecture, effects of one sign."""
    wanted = constructed_feature(names[1])
    found = match_features(constructed_feature(names[0]), model, other, str(wanted.sae), pairs=load_pairs())
    return Mark(f"planted feature matched with that of {names[1]}", names[0], int(found.best == wanted), 1, 1, unit="count", n=f"{found.family_size} features", note=found.verdict)  # fmt: skip


def equivalence_mark(model: Model, name: str) -> Mark:
    """Other biases under the planted feature's ablation: the largest p of the equivalence tests."""
    panel = specificity(model, [Ablate(constructed_feature(name))]).frame
    measured = panel[panel["reason"] == ""]
    return Mark("other biases unmoved (equivalence), largest p", name, float(measured["p_equivalent"].max()), high=0.05, unit="p", n=f"{len(measured)} of {len(panel)} questions")  # fmt: skip
