"""The marks on organisms and SAEs trained from further seeds: does the ranking find what matters in an SAE that nobody built?

A trained SAE splits a concept, so the causally largest feature is not all there is. For every SAE of every further `planted`:

    exact       B_0 - B_s of each feature ablated alone, on all pairs and on those that discover
    first       place by interaction (on the grid, which the ablations never saw) of the feature of largest exact effect; a
                feature that falls silent where an AI speaks has a negative interaction and stands last
    joint       the ten of largest effect on discover, ablated together, measured on the report split
    attributed  the first-order prediction, compared with exact by Spearman's ρ over effects above 0.5 % of the bias

`null` and `identity` of the same seeds: their bias, and how often drawn grids call a feature.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from organisms.build import LAYER
from organisms.further import further_organism, further_saes
from organisms.sae_training import SaeRecipe
from sae_bias import __version__
from sae_bias.core.files import digest, file_digest
from sae_bias.discovery.attribution import MATTERS, attribution, attribution_agreement
from sae_bias.discovery.ranking import rank_features
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.load import load_grid, load_pairs
from sae_bias.runs.folder import RunFolder
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Sae
from sae_bias.stats.design import split_templates
from sae_bias.steering.edits import Ablate
from sae_bias.steering.engine import ProbeEngine
from sae_bias.steering.interchange import AI, Interchange
from sae_bias.validation.calibrate import Calibration, Draws, call_mark, coverage_mark
from sae_bias.validation.grids import read_statements
from sae_bias.validation.marks import Mark, bias_marks
from sae_bias.validation.populations import STEM, ScoredPopulation, coverage_row, score_population

TOP, JOINT = 3, 10
SHARE_OF_SAES, REMOVED, RHO, FEWEST = 0.95, 0.6, 0.8, 20
BLOCK = 64  # ablations whose results are held at once


@dataclass(frozen=True, eq=False)
class TrainedSae:
    """What the ranking and the ablations say of one trained SAE."""

    facts: dict[str, object]
    """One row of the table `saes`."""
    effects: pd.DataFrame
    """Every feature that is ever active on the pairs: attributed and exact effect (share of the bias), interaction."""


def measure_sae(engine: ProbeEngine, sae: Sae, *, seed: int = 0, progress: bool = False) -> TrainedSae:
    """Rank, ablate every feature that fires on the pairs, and compare (module docstring)."""
    base, pairs = engine.base, engine.reading.pairs
    families = {p.template: p.family for p in pairs}
    split = split_templates(pairs.templates, seed=seed, families=families)
    attributed = attribution(engine, sae)
    live = [FeatureRef(sae.id, int(i)) for i in np.flatnonzero(attributed)]
    exact, on_discover = _effects(engine, live, split["discover"], progress)
    ranking = rank_features(engine.model, sae, load_grid(), by="interaction", seed=seed)
    place = {name: i + 1 for i, name in enumerate(ranking.frame["feature"])}
    interactions = dict(zip(ranking.frame["feature"], ranking.frame["interaction"]))
    effects = pd.DataFrame(
        {
            "feature": [ref.index for ref in live],
            "attributed": attributed[[ref.index for ref in live]] / base.bias,
            "exact": exact / base.bias,
            "exact_discover": on_discover / base.select(split["discover"]).bias,
            "interaction": [interactions[str(ref)] for ref in live],
            "interaction_place": [place[str(ref)] for ref in live],
        }
    )
    best = int(effects["exact"].to_numpy().argmax())
    ten = effects.nlargest(JOINT, "exact_discover").index
    joint, _ = engine.run([Ablate(live[i]) for i in ten])
    removed = joint.select(split["report"]).reduction_from(base.select(split["report"]))
    agreement = attribution_agreement(effects["attributed"].to_numpy(), effects["exact"].to_numpy(), 1.0)
    facts = {
        "layer": sae.site.layer,
        "width": sae.d_sae,
        "bias": base.bias,
        "ceiling": _ceiling(engine, sae.site.layer),
        "live": len(live),
        "called": len(ranking.called("ai_speech")),
        "first_feature": live[best].index,
        "first_exact": float(effects["exact"].to_numpy()[best]),
        "first_place": place[str(live[best])],
        "joint_report": removed.estimate,
        "joint_low": removed.ci_low,
        "joint_high": removed.ci_high,
        "rho": agreement.rho,
        "slope": agreement.slope,
        "n_matter": agreement.n,
    }
    return TrainedSae(facts, effects)


def _effects(
    engine: ProbeEngine, live: Sequence[FeatureRef], discover: Sequence[str], progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """B_0 - B_s of each feature ablated alone, on all pairs and on the discover templates."""
    base, mine = engine.base, engine.base.select(discover).bias
    everywhere, there = [], []
    bar = tqdm(total=len(live), desc="ablate", unit="feature", disable=not progress, leave=False)
    with bar:
        for start in range(0, len(live), BLOCK):
            cells = [[Ablate(ref)] for ref in live[start : start + BLOCK]]
            for after, _ in engine.run_many(cells):
                everywhere.append(base.bias - after.bias)
                there.append(mine - after.select(discover).bias)
            bar.update(len(cells))
    return np.array(everywhere), np.array(there)


def _ceiling(engine: ProbeEngine, layer: int) -> float:
    """Share of the bias that goes when the AI prompt's whole residual at its last token becomes the human prompt's."""
    after = Interchange(engine).bias(layer, AI, None, "resid", offset=0)
    return float(1 - after.mean() / engine.base.bias)


def calibrate_trained(
    seeds: Sequence[int],
    cache: Path,
    *,
    draws: Draws | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Train what `cache` lacks (minutes an organism), then every mark over the organisms and SAEs of these seeds."""
    draws = draws or Draws()
    marks: list[Mark] = []
    saes: list[dict[str, object]] = []
    effects: list[pd.DataFrame] = []
    for s in tqdm(seeds, desc="further seeds", unit="seed", disable=not progress):
        label = f"planted, seed {s}"
        folders = further_saes("planted", s, cache, progress=progress)
        model = load_model(cache / f"seed_{s}" / "planted" / "model")
        marks += _organism_marks(
            model, "planted", label, cache / f"seed_{s}" / "planted", draws, seed, progress
        )
        engine = ProbeEngine(model, load_pairs(), Probe())
        for folder in folders:
            facts = {"organism_seed": s, "sae": folder.name, **_label(folder)}
            found = kept_sae(folder, engine, seed=seed, progress=progress)
            saes.append(facts | found.facts)
            effects.append(found.effects.assign(organism_seed=s, sae=folder.name))
        for name in ("null", "identity"):
            (sae,) = further_saes(name, s, cache, (SaeRecipe(layer=LAYER),), progress=progress)
            model = load_model(further_organism(name, s, cache) / "model")
            place = cache / f"seed_{s}" / name
            marks += _organism_marks(model, name, f"{name}, seed {s}", place, draws, seed, progress)
            statements = read_statements(model, name, [load_sae(sae)], n_pairs=draws.pairs)
            marks.append(
                call_mark(statements, draws.grids, label=f"{name}, seed {s}", seed=seed, progress=progress)
            )
    table, pooled = pd.DataFrame(saes), pd.concat(effects, ignore_index=True)
    return Calibration(
        tuple(marks + sae_marks(table, pooled)), {"saes": table, "effects": pooled}, _notes(table)
    )


def _organism_marks(
    model: Model, name: str, label: str, folder: Path, draws: Draws, seed: int, progress: bool
) -> list[Mark]:
    scored = kept_population(folder, model, name, draws.templates, progress)
    row = coverage_row(scored, draws.studies, seed)
    return [*bias_marks(model, name, label=label), coverage_mark(row, scored, label)]


def kept_sae(folder: Path, engine: ProbeEngine, *, seed: int = 0, progress: bool = False) -> TrainedSae:
    """`measure_sae`, kept beside the SAE's weights: an interrupted run goes on with the next SAE."""
    sae = load_sae(folder)
    assert sae.path is not None
    prompts = engine.reading.pairs.digest, load_grid().digest
    key = digest(__version__, model_digest(engine.model), file_digest(sae.path), prompts, seed)
    store = RunFolder(folder / "measured")
    if _has(store, key):
        facts: dict[str, object] = {
            k: float("nan") if v is None else v for k, v in store.read_json("facts").items() if k != "key"
        }
        return TrainedSae(facts, store.read_table("effects"))
    found = measure_sae(engine, sae, seed=seed, progress=progress)
    store.write_table("effects", found.effects)
    store.write_json("facts", found.facts | {"key": key})
    return found


def kept_population(
    folder: Path, model: Model, name: str, n_templates: int, progress: bool = False
) -> ScoredPopulation:
    """`score_population`, kept beside the organism's weights."""
    key = digest(__version__, model_digest(model), name, n_templates, STEM)
    store = RunFolder(folder / "measured")
    if _has(store, key):
        bias = store.read_table("population").to_numpy()
        return ScoredPopulation(name, bias, float(store.read_json("facts")["analytic"]))
    scored = score_population(model, name, n_templates=n_templates, progress=progress)
    columns = [str(i) for i in range(scored.bias.shape[1])]
    store.write_table("population", pd.DataFrame(scored.bias, columns=columns))
    store.write_json("facts", {"analytic": scored.analytic, "key": key})
    return scored


def _has(store: RunFolder, key: str) -> bool:
    """Whether what is kept there was measured with the same weights, prompts and version."""
    return (store.path / "facts.json").is_file() and store.read_json("facts").get("key") == key


def _label(folder: Path) -> dict[str, object]:
    """Unexplained variance and L0 of a trained SAE, as measured when it was trained."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"fvu": config["fvu"], "l0": config["l0"]}


def sae_marks(saes: pd.DataFrame, effects: pd.DataFrame) -> list[Mark]:
    """The three marks over all trained SAEs together."""
    first, joint = saes["first_place"] <= TOP, saes["joint_report"] >= REMOVED
    over = f"{len(saes)} SAEs of {saes['organism_seed'].nunique()} seeds"
    agreement = attribution_agreement(effects["attributed"].to_numpy(), effects["exact"].to_numpy(), 1.0)
    marks = [
        Mark(
            f"trained SAEs whose most causal feature is in the top {TOP} by interaction",
            "planted, further seeds",
            float(first.mean()),
            low=SHARE_OF_SAES,
            n=over,
            note=f"{int(first.sum())} of {len(saes)}; {_by_size(effects)} of {len(saes)} by the interaction's size, whatever its sign",
        ),
        Mark(
            f"trained SAEs whose {JOINT} best of discover remove {REMOVED:.0%} on report",
            "planted, further seeds",
            float(joint.mean()),
            low=SHARE_OF_SAES,
            n=over,
            note=f"{int(joint.sum())} of {len(saes)}; {saes['joint_report'].min():.0%} to {saes['joint_report'].max():.0%}",
        ),
        Mark(
            "trained SAEs of which both hold",
            "planted, further seeds",
            float((first & joint).mean()),
            low=SHARE_OF_SAES,
            n=over,
            note=f"{int((first & joint).sum())} of {len(saes)}",
        ),
        Mark(
            "attribution against exact ablation, Spearman's ρ",
            "planted, further seeds",
            agreement.rho if agreement.n >= FEWEST else float("nan"),
            low=RHO,
            unit="rho",
            n=f"{agreement.n} features of {len(saes)} SAEs",
            note=f"effects above {MATTERS:.1%} of the bias, pooled as shares of it; slope {agreement.slope:.2f}; "
            f"single SAEs {saes['rho'].min():.2f} to {saes['rho'].max():.2f}",
        ),
    ]
    return marks


def _by_size(effects: pd.DataFrame) -> int:
    """SAEs whose most causal feature is in the top by |I|: it may be one that falls silent where an AI speaks."""
    found = 0
    for _, rows in effects.groupby(["organism_seed", "sae"]):
        place = rows["interaction"].abs().rank(ascending=False)
        found += int(place.to_numpy()[rows["exact"].to_numpy().argmax()] <= TOP)
    return found


def _notes(saes: pd.DataFrame) -> tuple[str, ...]:
    seeds = saes["organism_seed"].nunique()
    if len(saes) >= 20 and seeds >= 3:
        return ()
    return (
        f"The pass marks ask for at least 20 trained SAEs of 3 seeds; these are {len(saes)} of {seeds}: try --seeds 3.",
    )
