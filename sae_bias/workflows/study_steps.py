"""The steps of a study: load, probe, rank, choose, sweep, write, in the order that keeps the splits apart.

`discover` templates rank and choose the feature, `tune` ones choose a strength, `report` ones give the figures. Each step writes its
tables as soon as it has them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.site import Site
from sae_bias.discovery.attribution import cumulative_ablation
from sae_bias.discovery.calls import TESTED, call_sentence
from sae_bias.discovery.causal import ladder_layers, ladder_of
from sae_bias.discovery.dashboards import feature_card
from sae_bias.discovery.effects import effect_sentence, first_by_prediction, measure_effects, predict_effects
from sae_bias.discovery.ranking import Ranking, rank_features
from sae_bias.discovery.tables import ActivationTable, activation_table
from sae_bias.measures.base import run_measures
from sae_bias.measures.fidelity import Fidelity, gate_model, gate_sae
from sae_bias.measures.judge import Confirm, Judge
from sae_bias.models.catalog import organism_folder
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.checks import null_facts, run_checks
from sae_bias.probe.checks_subjects import ask_decomposition
from sae_bias.probe.random_words import random_word_null
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.load import load_grid, load_lexicon, load_pairs
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.runs.copies import probe_facts
from sae_bias.runs.folder import RunFolder
from sae_bias.runs.manifest import manifest
from sae_bias.runs.summary import CausalFigure, bias_summary, gate_facts
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature, expand_saes, load_sae
from sae_bias.stats.design import split_templates
from sae_bias.steering.directions import difference_of_means
from sae_bias.steering.edits import Ablate, Clamp, ProjectOut
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.as_published import intervention_switches, probe_switches
from sae_bias.workflows.behavior import run_identity, run_judges, run_scenario_arms, run_scenarios, run_texts
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.study_file import EXAMPLES, MOST_JOINT, SHARES, Study
from sae_bias.workflows.sweep import SweepResult, run_sweep
from sae_bias.workflows.sweep_summary import beats_controls, controls_table, summarize_sweep
from sae_bias.workflows.sweep_work import Executor

CHOSEN = ("AI-speech", "silent at AI speech")
"""The calls whose most causal feature is suppressed, the first first."""


Tables = dict[str, pd.DataFrame]


class StudyRun:
    """The steps of one study, each writing its tables."""

    def __init__(
        self, study: Study, folder: RunFolder, gate: bool, shard: tuple[int, int] | None, progress: bool, executor: Executor,
        confirm: Confirm | None,
    ):  # fmt: skip
        self.executor, self.confirm = executor, confirm
        self.study, self.folder, self.gate, self.shard, self.progress = study, folder, gate, shard, progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.chosen: FeatureRef | None = None
        self.logits_error: float | None = None
        steps = (["checks"] if study.checks else []) + (
            ["switches"] if study.profile == "as_published" else []
        )
        if study.saes:
            steps += ["rank", "table", "sweep", "joint", "behavior"] + (["feature"] if study.checks else [])
        self.bar = tqdm(total=2 + len(steps), desc="study", unit="step", disable=not progress, leave=False)

    def run(self) -> dict[str, Any]:
        study = self.study
        with self.bar:
            with self.step("load"):
                self.model = load_model(
                    study.model, device=study.device, dtype=study.dtype, device_map=study.device_map
                )
                self.pairs, self.grid = load_pairs(study.pairs), load_grid(study.grid)
                self.probe = _probe(study, self.pairs)
                self.saes = [load_sae(s) for s in expand_saes(study.saes)] if study.saes else []
                self.split = _split(self.pairs, study)
                self.fidelity = self.check()
            with self.step("probe"):
                base = run_probe(self.model, self.pairs, self.probe, random_words=True)
            self.write_base(base)
            summary: dict[str, Any] = {"question": study.question, **bias_summary(base), "notes": self.notes}
            if self.study.checks and self.shard is None:
                with self.step("checks"):
                    checks = run_checks(self.model, base.pairs, base=base, seed=self.study.seed)
                self.add(
                    (checks.run_tables(), [f"not checked: {n} ({why})" for n, why in checks.skipped.items()])
                )
                summary |= checks.facts | {"warnings": checks.warnings}
            else:
                summary["random_words"] = null_facts(random_word_null(base, seed=self.study.seed))
            if self.saes:
                summary |= self.discover(base)
            if self.study.profile == "as_published" and self.shard is None:
                with self.step("switches"):
                    self.add(
                        switch_tables(self.model, self.pairs, self.probe, base, self.chosen, self.study.seed)
                    )
            summary["truth"] = _truth(self.model)
            summary["seconds"] = self.seconds
        return summary

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.bar.set_postfix_str(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.bar.update()

    def check(self) -> list[Fidelity]:
        if not self.gate:
            self.notes.append("The fidelity gate was switched off (--no-gate).")
            return []
        found = [gate_sae(self.model, s) for s in self.saes]
        self.logits_error = None if found else gate_model(self.model)
        self.notes += [w for f in found for w in f.warnings]
        return found

    def write_base(self, base: ProbeResult) -> None:
        frame = base.to_frame()
        place = {t: name for name, templates in self.split.items() for t in templates}
        frame["split"] = [place.get(t, "all") for t in frame["template"]]
        self.folder.write_table("pairs", frame)
        if self.pairs.neutral_prompts and not self.study.checks:  # the checks write the same table
            subjects = ask_decomposition(self.model, self.pairs, base).read(self.model)
            self.folder.write_table("levels", subjects.frame)
        self.folder.write_table("words", base.words().assign(diff=lambda w: w["contribution"]))
        facts = manifest(
            self.model, pairs=self.pairs, grid=self.grid, vocabulary=base.vocabulary, saes=self.saes, seed=self.study.seed,
            probe=probe_facts(self.probe, base.vocabulary), study=json.loads(self.study.model_dump_json()), split=self.split, gate=gate_facts(self.fidelity, self.gate, self.logits_error),
        )  # fmt: skip
        self.folder.write_json("manifest", facts)

    # --- discover, suppress, report ---

    def discover(self, base: ProbeResult) -> dict[str, Any]:
        discover = self.ranked.select(templates=self.split["discover"])
        with self.step("rank"):
            separation = rank_features(self.model, self.saes, discover, by="separation", seed=self.study.seed)
            interaction = rank_features(
                self.model, self.saes, self.grid, by="interaction", probe=self.probe, seed=self.study.seed
            )
            self.folder.write_table("harm_pairs", interaction.pairing)
            engine = ProbeEngine(self.model, discover, self.probe, controls=True, sites=self.sites)
            ranking, tried = self.rank(separation, interaction, engine)
        self.chosen = chosen = choose_feature(ranking, self.study.suppress)
        self.folder.write_table("rejected", rejected_candidates(ranking, tried, chosen))
        if chosen is None:
            self.folder.write_table("ranking", ranking)
            return {"feature": chosen_facts(ranking, chosen)}
        with self.step("table"):
            table = activation_table(self.model, chosen, self.grid)
            self.folder.write_table("activation", table.long())
        with self.step("sweep"):
            called = ranking.loc[ranking["feature"] == str(chosen), "call"].iloc[0]
            family = ranking.loc[ranking["call"] == called, "feature"] if called in CHOSEN else [str(chosen)]
            sweep = self.sweep(chosen, discover, list(family))
        if self.shard is not None:
            return self.one_shard(chosen_facts(ranking, chosen), sweep)
        summary = {**self.suppressed(chosen, sweep), "feature": chosen_facts(ranking, chosen)}
        if called in CHOSEN:
            causal = beats_controls(summary)
            ranking.loc[ranking["feature"] == str(chosen), "causal_ai_speech"] = causal
        self.folder.write_table("ranking", ranking)
        with self.step("joint"):
            self.folder.write_table("cumulative", self.joint(ranking))
        with self.step("behavior"):
            self.write_examples(base, sweep)
            summary |= self.behavior(chosen)
        if self.study.checks:
            with self.step("feature"):
                tables, notes, summary["ladder"] = causal_tables(self.report, chosen)
                self.add((tables, notes))
                found = run_measures(self.report, (Ablate(chosen),))
                self.write_tables(found.tables)
                summary |= found.summary
                self.write_card(chosen, table)
        return summary

    def one_shard(self, chosen: dict[str, Any], sweep: SweepResult) -> dict[str, Any]:
        """A shard ends with its cells; figures need all of them."""
        assert self.shard is not None
        i, n = self.shard
        why = (
            f"shard {i}/{n}, {sweep.frame['cell'].nunique()} cells with the base; when all {n} are done: "
            f"sae-bias merge {self.folder.root}, then the same command without --shard"
        )
        return {"feature": {**chosen, "why": why}}

    def add(self, found: tuple[Mapping[str, pd.DataFrame], list[str]]) -> None:
        tables, notes = found
        self.write_tables(tables)
        self.notes += notes

    @property
    def sites(self) -> list[Site]:
        """Where the SAEs read: the first run of some prompts keeps the residuals there."""
        return [s.site for s in self.saes]

    @property
    def ranked(self) -> PromptPairs:
        """The pairs of ranking, choice and joint ablation; the probe, the sweep and the causal analysis show bias and difference in differences."""
        return self.pairs.effects_of(self.study.effects_of)

    @cached_property
    def report(self) -> ProbeEngine:
        """The report pairs, run once without edits for the causal analysis and the measures."""
        layers = [] if self.chosen is None else ladder_layers(self.model, as_feature(self.chosen).site.layer)
        pairs = self.pairs.select(templates=self.split["report"])
        return ProbeEngine(self.model, pairs, self.probe, sites=[Site(layer) for layer in layers])

    def write_card(self, chosen: FeatureRef, table: ActivationTable) -> None:
        """cards/INDEX.html in the run folder."""
        page = self.folder.path / "cards" / f"{chosen.index}.html"
        page.parent.mkdir(exist_ok=True)
        feature_card(self.model, chosen, table=table).to_html(page)

    def rank(
        self, separation: Ranking, interaction: Ranking, engine: ProbeEngine
    ) -> tuple[pd.DataFrame, list[str]]:
        """One table of every feature: separation, interaction, predicted effects, exact effects of the first."""
        frame = interaction.to_frame().drop(columns=["q_bh", "t"], errors="ignore")
        keep = [
            "feature",
            "auroc",
            "mean_human",
            "mean_ai",
            "mean_diff",
            "fire_human",
            "fire_ai",
            "t",
            "separates",
        ]
        frame = frame.merge(separation.frame[keep], on="feature")
        frame["q_bh"] = interaction.frame.set_index("feature")["q_bh"].reindex(frame["feature"]).to_numpy()
        most, found = self.study.ablate_top, predict_effects(frame, engine, self.saes)
        called = frame.index[frame["ai_speech"] == "yes"][:most]
        first = list(dict.fromkeys([*first_by_prediction(frame, most), *called]))
        found = measure_effects(frame, engine, first, found, progress=self.progress)
        self.write_tables({"bias_parts": found.parts, "predictions": found.predictions})
        self.notes += [f"{n[:1].upper()}{n[1:]}." for n in re.split(r"; (?!and )", found.note)]
        tried = list(frame.loc[first, "feature"])
        frame["causal_ai_speech"] = np.where(frame["ai_speech"] == "no", "no", "undetermined")
        return frame, tried

    def joint(self, ranking: pd.DataFrame) -> pd.DataFrame:
        """Joint ablation on report templates of each SAE's features that removed most alone on discover."""
        pairs = self.ranked.select(templates=self.split["report"])
        report = ProbeEngine(self.model, pairs, self.probe, controls=True, sites=self.sites)
        curves = []
        for name, rows in ranking[ranking["ablation"] > 0].groupby("sae", sort=False):
            best = rows.sort_values("ablation", ascending=False)["feature"].head(MOST_JOINT)
            curves.append(cumulative_ablation(report, list(best)).assign(sae=name, split="report"))
        return pd.concat(curves, ignore_index=True)

    def sweep(self, chosen: FeatureRef, discover: PromptPairs, family: list[str]) -> SweepResult:
        feature = as_feature(chosen)
        top = activation_table(self.model, feature, _as_grid(discover)).activations.max()
        direction = difference_of_means(self.model, discover, feature.site)
        cells = [Cell((Ablate(chosen),), label="ablate")]
        cells += [
            Cell((Clamp(chosen, s * float(top)),), label=f"clamp {s:g} × max") for s in self.study.strengths
        ]
        cells.append(Cell((Clamp(chosen, float(top)),), "opposite", "clamp +1 × max (opposite sign)"))
        cells.append(Cell((ProjectOut(direction),), "direction", "difference of means, projected out"))
        splits = {name: self.split[name] for name in ("tune", "report")}
        sweep = Sweep(
            cells,
            controls=self.study.controls,
            costs=True,
            splits=splits,
            seed=self.study.seed,
            family=family,
        )
        result = run_sweep(
            self.model,
            self.pairs,
            sweep,
            probe=self.probe,
            out=self.folder.root / "sweep",
            progress=self.progress,
            shard=self.shard,
            executor=self.executor,
        )
        self.folder.write_table("sweep", result.frame)
        return result

    def suppressed(self, chosen: FeatureRef, sweep: SweepResult) -> dict[str, Any]:
        report = sweep.frame[sweep.frame["split"] == "report"]
        self.folder.write_table("controls", controls_table(report[report["kind"] == "control"]))
        return {"controls": {"n": 0}, **summarize_sweep(sweep.frame, str(chosen), chosen.index)}

    def on_report(self, sweep: SweepResult, label: str) -> pd.DataFrame:
        """The report pairs of one cell of the sweep, in the order of the pairs."""
        name = sweep.frame.loc[sweep.frame["label"] == label, "cell"].iloc[0]
        cell = sweep.cells[str(name)]
        return cell[cell["template"].isin(list(self.split["report"]))]

    def write_examples(self, base: ProbeResult, sweep: SweepResult) -> None:
        after = self.on_report(sweep, "ablate")
        frame = base.select(self.split["report"]).to_frame()[
            ["human", "ai", "score_human", "score_ai", "bias"]
        ]
        frame.columns = ["human", "ai", "before_human", "before_ai", "bias_before"]
        for column, score in (
            ("after_human", "score_human"),
            ("after_ai", "score_ai"),
            ("bias_after", "bias"),
        ):
            frame[column] = after[score].to_numpy()
        step = max(1, len(frame) // EXAMPLES)
        self.folder.write_table("examples", frame.iloc[::step].head(EXAMPLES))

    def behavior(self, chosen: FeatureRef) -> dict[str, Any]:
        """Texts and scenarios before and after the ablation, where the study asks for them."""
        edits, found = (Ablate(chosen),), {}
        if self.study.prompts:
            tables, found["generations"] = run_texts(self.model, self.study.prompts, edits)
            self.write_tables(tables)
            if self.study.judges:
                found |= self.judge(tables["generations"])
        if self.study.scenarios is not None:
            items, chat, system = load_scenarios(self.study.scenarios), self.study.chat, self.study.system
            if system:
                tables, more = run_scenario_arms(self.model, items, edits, system=system, chat=chat)
                found |= more
            else:
                tables, found["scenarios"] = run_scenarios(self.model, items, edits, chat=chat)
            self.write_tables(tables)
        if self.study.identity is not None:
            own = self.study.identity
            tables, found["identity"] = run_identity(self.model, edits, own=own, chat=self.study.chat)
            self.write_tables(tables)
        return found

    def judge(self, texts: pd.DataFrame) -> dict[str, Any]:
        judges = [Judge(name, self.study.judge_url) for name in self.study.judges]
        tables, summary, why = run_judges(
            texts, judges, self.folder.path, seed=self.study.seed, confirm=self.confirm
        )
        self.write_tables(tables)
        self.notes += [why] if why else []
        return {"judge": summary} if summary else {}

    def write_tables(self, tables: Mapping[str, pd.DataFrame]) -> None:
        for name, frame in tables.items():
            self.folder.write_table(name, frame)


def causal_tables(engine: ProbeEngine, chosen: FeatureRef) -> tuple[Tables, list[str], CausalFigure]:
    """The causal analysis of the chosen feature on the engine's pairs."""
    climbed = ladder_of(engine, as_feature(chosen))
    tables = {"ladder": climbed.to_frame(), "ceilings": climbed.ceilings, "direct_words": climbed.words}
    figure = CausalFigure(feature=str(chosen), layer=climbed.layer, bias=climbed.base.bias)
    return tables, [climbed.note] if climbed.note else [], figure


def switch_tables(
    model: Model, pairs: PromptPairs, probe: Probe, base: ProbeResult, chosen: FeatureRef | None, seed: int
) -> tuple[Tables, list[str]]:
    """Profile `as_published`: how each choice the study leaves open moves the bias and the reduction (docs/method.md#verdict-on-a-published-figure)."""
    tables = {"switches_probe": probe_switches(model, pairs, probe, base=base)}
    if chosen is None:
        return tables, ["no feature was chosen, so the intervention's switches were not run"]
    try:
        tables["switches_intervention"] = intervention_switches(model, pairs, chosen, probe, seed=seed)
    except RequestError as error:
        return tables, [f"the intervention's switches were not run: {error}"]
    return tables, []


def choose_feature(ranking: pd.DataFrame, suppress: str = "called") -> FeatureRef | None:
    """Of the features called AI-speech, or else silent at AI speech, the one whose exact ablation removes most; carriers come first.

    Where none is called: None, or with `suppress="most causal"` the one of largest exact ablation effect, whatever it answers to. An
    ablation effect without one of resampling is damage, so such a feature is chosen only where the group has no carrier.
    """
    tried = ranking[ranking["ablation"].notna()]
    groups = [tried[tried["call"] == call] for call in CHOSEN]
    groups += [tried[tried["ablation"] > 0]] if suppress == "most causal" else []
    for group in groups:
        if len(group):
            carries = group["carrier"] == "carrier"
            best = group[carries] if carries.any() else group
            return FeatureRef.parse(str(best["feature"].iloc[int(best["ablation"].to_numpy().argmax())]))
    return None


def chosen_facts(ranking: pd.DataFrame, chosen: FeatureRef | None) -> dict[str, Any]:
    """The chosen feature, how it is called, why it was chosen and what was tested of it."""
    if chosen is None:
        found = ranking["call"].value_counts().drop(["no"], errors="ignore")
        others = (
            f"; called otherwise: {', '.join(f'{call} {n:,}' for call, n in found.items())}"
            if len(found)
            else ""
        )
        why = f"no feature passed the AI-speech test: a corrected interaction and its size on held-out statements{others}"
        return {"id": None, "index": None, "called": "none", "why": why}
    row = ranking[ranking["feature"] == str(chosen)].iloc[0]
    most = f"the largest exact ablation effect on the discover split{' of a carrier' if row['carrier'] == 'carrier' else ''}"
    if row["call"] not in CHOSEN:
        why = (
            f"no feature passed the AI-speech test; this one has {most} ({row['ablation']:+.3f} nats), whatever it answers to. "
            + effect_sentence(row)
        )
        return {"id": str(chosen), "index": chosen.index, "called": "most_causal", "why": why}
    why = f"{most} among the features called {row['call']}"
    called = "ai_speech" if row["call"] == "AI-speech" else "silent"
    return {
        "id": str(chosen),
        "index": chosen.index,
        "called": called,
        "why": why,
        "tested": f"{call_sentence(row)} {effect_sentence(row)}",
    }


def rejected_candidates(
    ranking: pd.DataFrame, tried: Sequence[str], chosen: FeatureRef | None
) -> pd.DataFrame:
    """Every candidate that was looked at and not chosen, with the reason."""
    looked = set(tried) | set(ranking.head(20)["feature"]) | set(ranking.nlargest(20, "auroc")["feature"])
    rows = []
    row: Any
    for row in ranking[ranking["feature"].isin(looked)].itertuples():
        if str(row.feature) == str(chosen):
            continue
        if row.call == "AI-speech" and row.carrier == "damage":
            reason = f"called AI-speech, but its ablation ({row.ablation:+.3f}) is damage: taking over the human value does not move the bias"
        elif row.call == "AI-speech":
            reason = f"called AI-speech, but its ablation removes less ({row.ablation:+.3f})"
        elif row.call != "no":
            reason = f"{row.call}: {TESTED[row.call].removeprefix('undetermined: ')}"
        elif row.p_fwer > 0.05:
            reason = f"its interaction is not significant over the family (p = {row.p_fwer:.2g})"
        elif row.interaction <= 0:
            reason = (
                "its interaction is negative, and it is not silent enough at AI speech on held-out statements"
            )
        else:
            reason = "significant interaction, but too small a part of its activation on held-out statements"
        rows.append(
            {
                "feature": row.feature,
                "auroc": row.auroc,
                "interaction": row.interaction,
                "ablation": row.ablation,
                "reason": reason,
            }
        )
    return pd.DataFrame(rows, columns=["feature", "auroc", "interaction", "ablation", "reason"])


def _split(pairs: PromptPairs, study: Study) -> dict[str, tuple[str, ...]]:
    families = {p.template: p.family for p in pairs}
    held = (
        tuple(dict.fromkeys(p.template for p in pairs if p.corpus is False)) if study.report_held_out else ()
    )
    return split_templates(pairs.templates, SHARES, study.seed, families=families, must_report=held)


def _probe(study: Study, pairs: PromptPairs) -> Probe:
    return default_probe(pairs, load_lexicon(study.words) if study.words else None, score=study.score)


def _as_grid(pairs: PromptPairs) -> PromptGrid:
    """The AI prompts of some pairs as a grid, to read a feature's activation on them."""
    from sae_bias.prompts.grid import GridPrompt

    prompts = tuple(GridPrompt(p.ai, p.entity, "ai", p.template, "speech", None, p.family) for p in pairs)
    return PromptGrid(prompts, name=pairs.name)


def _truth(model: Model) -> dict[str, Any]:
    """What is known to be true of a bundled organism; empty for any other model."""
    if not model.is_organism:
        return {}
    path = organism_folder(model.name.removeprefix("organism:")) / "truth.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    built = known.get("constructed") or {}
    facts = {"what was planted": known["rule"]["words"], **known.get("analytic", {})}
    if built:
        facts |= {
            "constructed SAE's layer": built["layer"],
            "its AI-speech feature": built["index"],
            "its valence read-out": built["valence_index"],
        }
    return {key.replace("_", " "): value for key, value in facts.items()}
