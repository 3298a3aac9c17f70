"""The steps of a study: load, probe, rank, choose, sweep, write, in the order that keeps the splits apart.

`discover` templates rank and choose the feature, `tune` ones choose a strength, `report` ones give the figures. Each step writes its
tables as soon as it has them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from sae_bias.core.errors import RequestError
from sae_bias.core.labels import columns_of
from sae_bias.core.site import Site
from sae_bias.discovery.attribution import cumulative_ablation
from sae_bias.discovery.calls import TESTED, call_sentence
from sae_bias.discovery.causal import ladder_layers, ladder_of
from sae_bias.discovery.dashboards import feature_card
from sae_bias.discovery.effects import effect_sentence, first_by_prediction, measure_effects, predict_effects
from sae_bias.discovery.ranking import Ranking, rank_features
from sae_bias.discovery.tables import activation_table
from sae_bias.measures.base import run_measures
from sae_bias.measures.continuations import Phrasing, make_asks
from sae_bias.measures.fidelity import Gate, run_gate
from sae_bias.measures.identity import known_identities
from sae_bias.measures.judge import Confirm, Judge
from sae_bias.models.catalog import organism_folder
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.models.reads import knowing
from sae_bias.probe.checks import null_facts, run_checks
from sae_bias.probe.checks_subjects import ask_decomposition
from sae_bias.probe.random_words import random_word_null
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import default_probe
from sae_bias.prompts.load import load_grid, load_lexicon, load_pairs
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.prompts.texts import load_identity
from sae_bias.runs.copies import probe_facts
from sae_bias.runs.folder import RunFolder
from sae_bias.runs.manifest import manifest
from sae_bias.runs.summary import CausalFigure, Summary, bias_summary
from sae_bias.saes.ids import FeatureRef
from sae_bias.saes.load import as_feature, expand_saes, load_sae
from sae_bias.steering.controls import observed_max
from sae_bias.steering.directions import difference_of_means
from sae_bias.steering.edits import Ablate, Clamp, ProjectOut
from sae_bias.steering.engine import ProbeEngine
from sae_bias.workflows.as_published import intervention_switches, probe_switches
from sae_bias.workflows.behavior import run_identity, run_judges, run_scenario_arms, run_scenarios, run_texts
from sae_bias.workflows.cells import Cell, Sweep
from sae_bias.workflows.study_file import EXAMPLES, MOST_JOINT, Study
from sae_bias.workflows.sweep import SweepResult, run_sweep
from sae_bias.workflows.sweep_summary import beats_controls, controls_table, summarize_sweep
from sae_bias.workflows.sweep_work import Executor

CHOSEN = ("AI-speech", "silent at AI speech")
"""The calls whose most causal feature is suppressed, the first first."""
READ_AGAIN = ("probe", "rank", "sweep")
"""Steps whose prompts later ones read at the SAEs' layers too."""


Tables = dict[str, pd.DataFrame]


class StudyRun:
    """The steps of one study, each writing its tables."""

    def __init__(
        self, study: Study, folder: RunFolder, gate: bool, shard: tuple[int, int] | None, progress: bool, executor: Executor,
        confirm: Confirm | None, workers: int = 1,
    ):  # fmt: skip
        self.executor, self.confirm, self.workers = executor, confirm, workers
        self.study, self.folder, self.gate, self.shard, self.progress = study, folder, gate, shard, progress
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.chosen: FeatureRef | None = None
        n_steps = (
            2 + study.checks + (study.profile == "as_published") + (5 + study.checks if study.saes else 0)
        )
        self.bar = tqdm(total=n_steps, desc="study", unit="step", disable=not progress, leave=False)

    def run(self) -> Summary:
        study = self.study
        with self.bar, ExitStack() as stack:
            with self.step("load"):
                self.model = load_model(study.model, **study.placement)
                self.pairs, self.grid = load_pairs(study.pairs), load_grid(study.grid)
                words = load_lexicon(study.words) if study.words else None
                self.probe = default_probe(self.pairs, words, score=study.score)
                self.saes = [load_sae(s) for s in expand_saes(study.saes)] if study.saes else []
                held = [p.template for p in self.pairs if study.report_held_out and p.corpus is False]
                self.split = self.pairs.split(study.seed, must_report=held)
                if self.saes:
                    check_behavior(study, self.model)
                stack.enter_context(knowing(self.model, self.sites))
                self.found = self.check()
            with self.step("probe"):
                base = run_probe(self.model, self.pairs, self.probe, random_words=True)
            self.write_base(base)
            summary: dict[str, object] = {
                "question": study.question,
                **bias_summary(base),
                "notes": self.notes,
            }
            if self.study.checks and self.shard is None:
                with self.step("checks"):
                    checks = run_checks(self.model, base.pairs, base=base, seed=self.study.seed)
                self.add(
                    checks.run_tables(), [f"not checked: {n} ({why})" for n, why in checks.skipped.items()]
                )
                summary |= checks.facts | {"warnings": checks.warnings}
            else:
                summary["random_words"] = null_facts(random_word_null(base, seed=self.study.seed))
            if self.saes:
                summary |= self.discover(base)
            if self.study.profile == "as_published" and self.shard is None:
                with self.step("switches"):
                    self.add(*self.switches(base))
            summary["truth"] = _truth(self.model)
            summary["seconds"] = self.seconds
        return Summary.from_facts(summary)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.bar.set_postfix_str(name)
        if name != "load":
            ends = (
                [self.model.n_layers - 1] if name == "probe" and self.study.checks else []
            )  # checks read every position
            self.model.known.keep_at([*self.sites, *ends] if name in READ_AGAIN else ())
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.bar.update()

    def check(self) -> Gate:
        found = run_gate(self.model, self.saes, skip=not self.gate)
        self.notes += ["The fidelity gate was switched off (--no-gate)."] if found.skipped else found.warnings
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
            probe=probe_facts(self.probe, base.vocabulary), study=json.loads(self.study.model_dump_json()), split=self.split, gate=self.found.facts(),
        )  # fmt: skip
        self.folder.write_json("manifest", facts)

    # --- discover, suppress, report ---

    def discover(self, base: ProbeResult) -> dict[str, object]:
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
        facts = chosen_facts(ranking, chosen)
        if self.shard is not None:  # a shard ends with its cells; figures need all of them
            i, n = self.shard
            done = (
                f"shard {i}/{n}, {sweep.frame['cell'].nunique()} cells with the base; when all {n} are done"
            )
            return {
                "feature": {
                    **facts,
                    "why": f"{done}: sae-bias merge {self.folder.root}, then the same command without --shard",
                }
            }
        report = sweep.frame[sweep.frame["split"] == "report"]
        self.folder.write_table("controls", controls_table(report[report["kind"] == "control"]))
        swept = summarize_sweep(sweep.frame, str(chosen), chosen.index)
        summary = {"controls": {"n": 0}, **swept, "feature": facts}
        if called in CHOSEN:
            ranking.loc[ranking["feature"] == str(chosen), "causal_ai_speech"] = beats_controls(swept)
        self.folder.write_table("ranking", ranking)
        with self.step("joint"):
            self.folder.write_table("cumulative", self.joint(ranking))
        with self.step("behavior"):
            self.write_examples(base, sweep)
            summary |= self.behavior(chosen)
        if self.study.checks:
            with self.step("feature"):
                summary["ladder"] = self.causal(chosen)
                found = run_measures(self.report, (Ablate(chosen),))
                self.add(found.tables)
                page = self.folder.path / "cards" / f"{chosen.index}.html"
                page.parent.mkdir(exist_ok=True)
                feature_card(self.model, chosen, table=table).to_html(page)
                summary |= found.summary
        return summary

    def add(self, tables: Mapping[str, pd.DataFrame], notes: Sequence[str] = ()) -> None:
        for name, frame in tables.items():
            self.folder.write_table(name, frame)
        self.notes += notes

    def causal(self, chosen: FeatureRef) -> CausalFigure:
        """The causal analysis of the chosen feature on the report pairs."""
        climbed = ladder_of(self.report, as_feature(chosen))
        tables = {"ladder": climbed.to_frame(), "ceilings": climbed.ceilings, "direct_words": climbed.words}
        self.add(tables, [climbed.note] if climbed.note else [])
        return CausalFigure(feature=str(chosen), layer=climbed.layer, bias=climbed.base.bias)

    def switches(self, base: ProbeResult) -> tuple[Tables, list[str]]:
        """Profile `as_published`: how each choice the study leaves open moves the bias and the reduction (docs/method.md#verdict-on-a-published-figure)."""
        tables = {"switches_probe": probe_switches(self.model, self.pairs, self.probe, base=base)}
        if self.chosen is None:
            return tables, ["no feature was chosen, so the intervention's switches were not run"]
        try:
            asked = self.model, self.pairs, self.chosen, self.probe
            tables["switches_intervention"] = intervention_switches(*asked, seed=self.study.seed)
        except RequestError as error:
            return tables, [f"the intervention's switches were not run: {error}"]
        return tables, []

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

    def rank(
        self, separation: Ranking, interaction: Ranking, engine: ProbeEngine
    ) -> tuple[pd.DataFrame, list[str]]:
        """One table of every feature: separation, interaction, predicted effects, exact effects of the first."""
        frame = interaction.to_frame().drop(columns=["q_bh", "t"], errors="ignore")
        keep = list(
            columns_of("feature; auroc; mean_human; mean_ai; mean_diff; fire_human; fire_ai; t; separates")
        )
        frame = frame.merge(separation.frame[keep], on="feature")
        frame["q_bh"] = interaction.frame.set_index("feature")["q_bh"].reindex(frame["feature"]).to_numpy()
        most, found = self.study.ablate_top, predict_effects(frame, engine, self.saes, split="discover")
        called = frame.index[frame["ai_speech"] == "yes"][:most]
        first = list(dict.fromkeys([*first_by_prediction(frame, most), *called]))
        found = measure_effects(frame, engine, first, found, workers=self.workers, progress=self.progress)
        self.add({"bias_parts": found.parts, "predictions": found.predictions})
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
        top = observed_max(
            self.model, feature, discover
        )  # at any token: some features are silent at the last
        direction = difference_of_means(self.model, discover, feature.site)
        cells = [Cell((Ablate(chosen),), label="ablate")]
        cells += [Cell((Clamp(chosen, s * top),), label=f"clamp {s:g} × max") for s in self.study.strengths]
        cells.append(Cell((Clamp(chosen, top),), "opposite", "clamp +1 × max (opposite sign)"))
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
            self.model, self.pairs, sweep, probe=self.probe, out=self.folder.root / "sweep", progress=self.progress, shard=self.shard,
            executor=self.executor,
        )  # fmt: skip
        self.folder.write_table("sweep", result.frame)
        return result

    def write_examples(self, base: ProbeResult, sweep: SweepResult) -> None:
        after = sweep.cells[str(sweep.frame.loc[sweep.frame["label"] == "ablate", "cell"].iloc[0])]
        after = after[after["template"].isin(list(self.split["report"]))]  # in the order of the pairs
        scores = ["score_human", "score_ai", "bias"]
        frame = base.select(self.split["report"]).to_frame()[["human", "ai", *scores]]
        frame.columns = ["human", "ai", "before_human", "before_ai", "bias_before"]
        frame[["after_human", "after_ai", "bias_after"]] = after[scores].to_numpy()
        step = max(1, len(frame) // EXAMPLES)
        self.folder.write_table("examples", frame.iloc[::step].head(EXAMPLES))

    def behavior(self, chosen: FeatureRef) -> dict[str, object]:
        """Texts and scenarios before and after the ablation, where the study asks for them."""
        edits, found = (Ablate(chosen),), dict[str, object]()
        if self.study.prompts:
            tables, found["generations"] = run_texts(self.model, self.study.prompts, edits)
            self.add(tables)
            if self.study.judges:
                judges = [Judge(name, self.study.judge_url) for name in self.study.judges]
                options: dict[str, Any] = {"seed": self.study.seed, "confirm": self.confirm}
                tables, judged, why = run_judges(tables["generations"], judges, self.folder.path, **options)
                self.add(tables, [why] if why else [])
                found |= {"judge": judged} if judged else {}
        if self.study.scenarios is not None:
            items, chat, system = load_scenarios(self.study.scenarios), self.study.chat, self.study.system
            if system:
                tables, more = run_scenario_arms(self.model, items, edits, system=system, chat=chat)
                found |= more
            else:
                tables, found["scenarios"] = run_scenarios(self.model, items, edits, chat=chat)
            self.add(tables)
        if self.study.identity is not None:
            own = self.study.identity
            tables, found["identity"] = run_identity(self.model, edits, own=own, chat=self.study.chat)
            self.add(tables)
        return found


def check_behavior(study: Study, model: Model) -> None:
    """What the last steps of a study ask for, read and encoded at its start: a wrong name need not wait until the sweep is over."""
    known_identities(study.identity or ())
    if study.identity is not None:
        Phrasing(model, chat=study.chat).encode(load_identity().prompts[0], "")
    for prompt in study.prompts:
        model.encode(prompt)
    if study.scenarios is not None:
        for system in {None, study.system}:
            make_asks(Phrasing(model, chat=study.chat, system=system), load_scenarios(study.scenarios))


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


def chosen_facts(ranking: pd.DataFrame, chosen: FeatureRef | None) -> dict[str, object]:
    """The chosen feature, how it is called, why it was chosen and what was tested of it."""
    if chosen is None:
        found = ranking["call"].value_counts().drop(["no"], errors="ignore")
        calls = ", ".join(f"{call} {n:,}" for call, n in found.items())
        others = f"; called otherwise: {calls}" if calls else ""
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
    called = "ai_speech" if row["call"] == "AI-speech" else "silent"
    why, tested = (
        f"{most} among the features called {row['call']}",
        f"{call_sentence(row)} {effect_sentence(row)}",
    )
    return {"id": str(chosen), "index": chosen.index, "called": called, "why": why, "tested": tested}


def rejected_candidates(
    ranking: pd.DataFrame, tried: Sequence[str], chosen: FeatureRef | None
) -> pd.DataFrame:
    """Every candidate that was looked at and not chosen, with the reason."""
    looked = set(tried) | set(ranking.head(20)["feature"]) | set(ranking.nlargest(20, "auroc")["feature"])
    rows = ranking[ranking["feature"].isin(looked - {str(chosen)})]
    reasons = [_why_not(row) for row in rows.itertuples()]
    return rows[["feature", "auroc", "interaction", "ablation"]].assign(reason=reasons).reset_index(drop=True)


def _why_not(row: Any) -> str:
    if row.call == "AI-speech" and row.carrier == "damage":
        return f"called AI-speech, but its ablation ({row.ablation:+.3f}) is damage: taking over the human value does not move the bias"
    if row.call == "AI-speech":
        return f"called AI-speech, but its ablation removes less ({row.ablation:+.3f})"
    if row.call != "no":
        return f"{row.call}: {TESTED[row.call].removeprefix('undetermined: ')}"
    if row.p_fwer > 0.05:
        return f"its interaction is not significant over the family (p = {row.p_fwer:.2g})"
    if row.interaction <= 0:
        return "its interaction is negative, and it is not silent enough at AI speech on held-out statements"
    return "significant interaction, but too small a part of its activation on held-out statements"


def _truth(model: Model) -> dict[str, object]:
    """What is known to be true of a bundled organism; empty for any other model."""
    if not model.is_organism:
        return {}
    path = organism_folder(model.name.removeprefix("organism:")) / "truth.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    built = known.get("constructed") or {}
    facts = {"what was planted": known["rule"]["words"], **known.get("analytic", {})}
    names = {
        "layer": "constructed SAE's layer",
        "index": "its AI-speech feature",
        "valence_index": "its valence read-out",
    }
    facts |= {said: built[key] for key, said in names.items()} if built else {}
    return {key.replace("_", " "): value for key, value in facts.items()}
