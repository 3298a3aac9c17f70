"""Several models from one study file, beside the figures published for them (docs/published.md#five-models).

Each model is loaded, probed in the plain form (and in the chat form where it has a chat template), and let go again. The figure
compared is the one over the words that are single tokens in every model measured; the verdict is fixed in advance (docs/method.md#verdict-on-a-published-figure). A
model that cannot be had is a row "not re-measured here". Stand-ins go into a plumbing table without a published column.

    RUN/models/NAME/       one run folder a model
    RUN/tables/            models, switches, tuning (instruction-tuned - pretrained), and comparison or plumbing
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from tqdm.auto import tqdm

from sae_bias.core.errors import MissingError, RequestError
from sae_bias.core.text import bracket, is_number, number, signed
from sae_bias.measures.fidelity import run_gate
from sae_bias.models.catalog import model_info
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.result import ProbeResult
from sae_bias.probe.run import run_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.load import load_lexicon, load_pairs
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.runs.copies import probe_facts
from sae_bias.runs.folder import RunFolder
from sae_bias.runs.manifest import manifest, manifest_of_several
from sae_bias.runs.summary import Summary, bias_summary
from sae_bias.stats.clustered import clustered_mean
from sae_bias.workflows.as_published import probe_switches, switch_range, verdict
from sae_bias.workflows.study_file import StudyFile, StudyResult

NOT_MEASURED = "not re-measured here"
DID_COLUMNS = ("difference_in_differences", "did_low", "did_high", "did_p")
PUBLISHED_TUNING = -0.114
"""Gemma 3 12B: bias after instruction tuning - before (docs/published.md#pretrained-against-instruction-tuned)."""
TUNED_12B = ("google/gemma-3-12b-pt", "google/gemma-3-12b-it")


class Replication(StudyFile):
    """A study of several models with one probe: a study file with `models:` in place of `model:`."""

    name: str = "bias-probe"
    question: str = "Does each model judge the same words and deeds more harshly when an AI is their subject?"
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Hub ids, local folders or organism:NAME; each once."""
    pairs: str | None = None
    """Pairs file or bundled question, or None for the bundled 280."""
    words: str | None = None
    """File with `positive` and `negative` lists, or None for the pairs' own or the bundled words."""
    chat: bool = True
    """Also the chat form, for models with a chat template."""
    switches: bool = True
    """Also every switch of `as_published`, for the verdict's range."""

    @property
    def model(self) -> str:
        """All names, for a line that names what ran."""
        return ", ".join(self.models)


class Loader(Protocol):
    """Opens the models of a replication in another way than `load_model`: `StandIns` does."""

    def __call__(self, name: str) -> AbstractContextManager[Model]: ...

    def describe(self, name: str) -> str:
        """What stands in for the model of that name, for the tables."""
        ...


@dataclass(frozen=True, eq=False)
class Measured:
    """One model's results, read with every word it can read."""

    name: str
    forms: dict[str, ProbeResult]
    """plain, and chat where asked for and possible."""
    switches: pd.DataFrame | None


def run_replication(
    study: Replication,
    *,
    out: str | Path,
    loader: Loader | None = None,
    gate: bool = True,
    progress: bool = True,
) -> StudyResult:
    """Probe every model of `study` into the run folder `out`.

    Raises:
        MissingError: none of the models could be loaded (the tables say so all the same).
        GateError: the logits read are not the model's own.
    """
    from sae_bias.report.page import write_report

    if len(set(study.models)) != len(study.models):
        raise RequestError(f"a model is named twice in {', '.join(study.models)}.")
    pairs = load_pairs(study.pairs)
    probe = default_probe(pairs, load_lexicon(study.words) if study.words else None)
    folder = RunFolder(out)
    with folder.writing():
        runner = _Runner(study, pairs, probe, folder, loader, gate)
        for name in tqdm(study.models, desc=study.name, unit="model", disable=not progress, leave=False):
            runner.one(name)
        summary = runner.write()
    report = write_report(folder.path)
    if not runner.measured:
        first = next(iter(runner.missing.values()))
        raise MissingError(
            f"none of the {len(study.models)} models could be loaded; the first: {first} To try the plumbing, add --stand-ins."
        )
    for path in runner.folders.values():
        write_report(path)
    return StudyResult(folder.path, Summary.from_facts(summary), report, tuple(_headline(summary)))


class _Runner:
    """The models of one study, one at a time."""

    def __init__(
        self, study: Replication, pairs: PromptPairs, probe: Probe, folder: RunFolder, loader: Loader | None, gate: bool
    ):  # fmt: skip
        self.study, self.pairs, self.probe, self.folder = study, pairs, probe, folder
        self.loader, self.gate = loader, gate
        self.measured: dict[str, Measured] = {}
        self.missing: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    @property
    def comparable(self) -> bool:
        """Whether the published figures are about these prompts: the bundled pairs, a reconstruction of the study's."""
        return self.study.pairs is None

    @property
    def stand_ins(self) -> bool:
        return self.loader is not None

    def one(self, name: str) -> None:
        """Load, check, probe and let go of one model; one that cannot be had is noted with the reason."""
        try:
            with self.loaded(name) as model:
                gate = run_gate(model, [], skip=not self.gate).facts()
                self.measured[name] = self.measure(name, model)
                words = self.measured[name].forms["plain"].vocabulary
                self.facts[name] = manifest(model, pairs=self.pairs, vocabulary=words, seed=self.study.seed, gate=gate)  # fmt: skip
        except MissingError as error:
            self.missing[name] = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            self.missing[name] = f"{name} does not fit in the memory of this machine."

    @contextmanager
    def loaded(self, name: str) -> Iterator[Model]:
        if self.loader is not None:
            with self.loader(name) as model:
                yield model
            return
        model = load_model(name, **self.study.placement)
        try:
            yield model
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def measure(self, name: str, model: Model) -> Measured:
        base = run_probe(model, self.pairs, self.probe)
        forms = {"plain": base}
        if self.study.chat and getattr(model.tokenizer, "chat_template", None):
            forms["chat"] = run_probe(model, self.pairs, self.probe, chat=True)
        switches = probe_switches(model, self.pairs, self.probe, base=base) if self.study.switches else None
        return Measured(name, forms, switches)

    # --- what is written ---

    def write(self) -> dict[str, Any]:
        forms = [form for m in self.measured.values() for form in m.forms.values()]
        kept = [{w.word for w in form.vocabulary.kept} for form in forms]
        given = (*self.probe.positive, *self.probe.negative)
        words = [w for w in given if kept and all(w in k for k in kept)]  # one token for every model measured
        of = {n: {form: r.select_words(words) for form, r in m.forms.items()} for n, m in self.measured.items()}  # fmt: skip
        models, published = self.models_table(of), self.comparable and not self.stand_ins
        tuning = tuning_table({n: forms["plain"] for n, forms in of.items()}, published=published)
        switches = [m.switches.assign(model=m.name) for m in self.measured.values() if m.switches is not None]
        tables = {"models": models, "tuning": tuning}
        if switches:
            tables["switches"] = pd.concat(switches, ignore_index=True)
        if not self.stand_ins:
            tables["comparison"] = self.comparison(models)
        for table, frame in tables.items():
            if len(frame):
                self.folder.write_table(table, frame)
        for name, measured in self.measured.items():
            self.write_model(name, measured, of[name]["plain"])
        left_out = [w for w in given if w not in words]
        self.folder.write_json("manifest", self.run_facts(words, left_out))
        summary = {
            "question": self.study.question, "sides": self.pairs.sides, "stand_ins": self.stand_ins, "models": models.to_dict(orient="records"),
            "tuning": tuning.to_dict(orient="records"), "words": words, "words_left_out": left_out, "missing": self.missing,
        }  # fmt: skip
        self.folder.write_json("summary", summary)
        return summary

    def models_table(self, of: dict[str, dict[str, ProbeResult]]) -> pd.DataFrame:
        """A row a model and form; published figures only beside models measured themselves."""
        rows = []
        for name in self.study.models:
            known = [self.model_row(name, form, result) for form, result in of.get(name, {}).items()]
            rows += known or [self.missing_row(name)]
        frame = pd.DataFrame(rows)
        return frame.drop(columns=["published", "verdict"]) if self.stand_ins else frame

    def missing_row(self, name: str) -> dict[str, Any]:
        info = model_info(name)
        return {
            "model": name, "form": "plain", "status": NOT_MEASURED, "published": info.published_bias if info and self.comparable else None,
            "verdict": NOT_MEASURED, "reason": self.missing.get(name, ""),
        }  # fmt: skip

    def model_row(self, name: str, form: str, result: ProbeResult) -> dict[str, Any]:
        info, flips, sizes = model_info(name), result.sign_flips(), result.effect_sizes()
        published = info.published_bias if info and form == "plain" and self.comparable else None
        switches = self.measured[name].switches
        own = self.measured[name].forms[form]
        row = {
            "model": name, "form": form, "status": "stand-in" if self.stand_ins else "measured",
            "bias": result.bias, "ci_low": result.ci[0], "ci_high": result.ci[1], "p_value": result.p_value,
            "p_templates": flips["templates"].p_value, "p_entities": flips["entities"].p_value,
            "d_z": sizes.d_z, "share_templates_positive": sizes.share_positive,
            "n_pairs": result.n_pairs, "n_words": len(result.vocabulary.kept),
            "bias_own_words": own.bias, "n_own_words": len(own.vocabulary.kept),
            "control_bias": float("nan"), **dict.fromkeys(DID_COLUMNS, float("nan")),
            "published": published,
            "verdict": verdict(published, result.bias, result.ci, None if switches is None else switch_range(switches)),
            "reason": self.loader.describe(name) if self.loader is not None else (result.stat.reason or ""),
        }  # fmt: skip
        if result.control is not None:
            row["control_bias"] = result.control.bias
            row |= dict(zip(DID_COLUMNS, (result.did.mean, *result.did.ci, result.did.p_value)))
        return row

    def comparison(self, models: pd.DataFrame) -> pd.DataFrame:
        """Published beside measured, as the report draws it."""
        rows = models[(models["form"] == "plain") & models["published"].notna()]
        columns = ["model", "published", "bias", "ci_low", "ci_high", "verdict"]
        return rows.reindex(columns=columns).rename(columns={"model": "name", "bias": "measured"}).reset_index(drop=True)  # fmt: skip

    def write_model(self, name: str, measured: Measured, shared: ProbeResult) -> None:
        slug = re.sub(r"[^\w.-]+", "--", name).strip(".-")
        own = RunFolder(self.folder.path / "models" / slug)
        self.folders[name] = own.path
        own.write_json("manifest", {**self.facts[name], "probe": probe_facts(self.probe, shared.vocabulary)})
        own.write_table("pairs", shared.to_frame().assign(split="all"))
        own.write_table("words", shared.words())
        own.write_table("word_levels", shared.levels())
        if measured.switches is not None:
            own.write_table("switches", measured.switches)
        for form, result in measured.forms.items():
            result.save(own.path / f"{form}.npz")
        said = "A stand-in with random weights: its figures test the plumbing and say nothing."
        notes = [said] if self.stand_ins else []
        own.write_json("summary", {"question": self.study.question, **bias_summary(shared), "notes": notes})

    def run_facts(self, words: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
        organisms = all(n.startswith("organism:") for n in self.study.models)
        prompts = {"pairs": {"name": self.pairs.name, "digest": self.pairs.digest, "n": len(self.pairs)}}
        return manifest_of_several(
            study=self.study.model_dump(mode="json"), stand_ins=self.stand_ins, seed=self.study.seed, prompts=prompts,
            model={"name": self.study.model, "organism": organisms}, words={"shared": list(words), "left_out": list(left_out)},
        )  # fmt: skip


# ── instruction-tuned against pretrained
def tuning_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(pretrained, instruction-tuned) models of the same name: NAME-pt or NAME, and NAME-it."""
    found = []
    for name in names:
        root = re.sub(r"-it$", "", name)
        found += [(base, name) for base in (f"{root}-pt", root) if name != root and base in names][:1]
    return found


def tuning_table(results: dict[str, ProbeResult], *, published: bool = True) -> pd.DataFrame:
    """Instruction-tuned - pretrained, pair by pair: the bias, the two scores, and the levels they are made of.

    A fall of the bias with a fall of s(AI) means that s(human) fell more (docs/published.md#pretrained-against-instruction-tuned). Clustered like every other figure.
    """
    rows = []
    for before, after in tuning_pairs(list(results)):
        first, second = results[before], results[after]
        for quantity, values in _tuning_quantities(first, second).items():
            stat = clustered_mean(values, *first.clusters)
            known = PUBLISHED_TUNING if quantity == "bias" and (before, after) == TUNED_12B else None
            rows.append({
                "pretrained": before, "tuned": after, "quantity": quantity, "change": stat.mean, "ci_low": stat.ci_low, "ci_high": stat.ci_high,
                "p_value": stat.p_value, "n_pairs": stat.n, "published": known, "verdict": verdict(known, stat.mean, stat.ci),
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame if published or frame.empty else frame.drop(columns=["published", "verdict"])


def _tuning_quantities(before: ProbeResult, after: ProbeResult) -> dict[str, np.ndarray]:
    names = before.sides
    out = {
        "bias": after.pair_bias - before.pair_bias,
        f"score of {names[0]}": after.score_human - before.score_human,
        f"score of {names[1]}": after.score_ai - before.score_ai,
    }
    for side, old, new in zip(names, before.log_probs(), after.log_probs()):
        for words, mark in (("positive", before.positive), ("negative", ~before.positive)):
            out[f"{words} level of {side}"] = (new - old)[:, mark].mean(1)
    return out


# ── small parts
def _headline(summary: dict[str, Any]) -> list[str]:
    stand_ins, (first, second) = summary["stand_ins"], summary["sides"]
    lines = [
        "plumbing: tiny random stand-ins; every figure is noise and none is a finding"
        if stand_ins
        else f"bias = {first} − {second} in nats, positive: {second} judged worse (published | measured | verdict)"
    ]
    for row in summary["models"]:
        name = row["model"] + ("" if row["form"] == "plain" else f" ({row['form']} form)")
        measured = NOT_MEASURED
        if row["status"] != NOT_MEASURED:
            measured = f"{signed(row['bias'])} {bracket(row['ci_low'], row['ci_high'])}"
        if stand_ins:
            lines.append(f"  {name}: {measured}, {row['n_words']} words; {row['reason']}")
            continue
        known = f"published {number(row['published'])} | " if is_number(row["published"]) else ""
        says = "" if row["verdict"] in (NOT_MEASURED, "no published figure") else f" | {row['verdict']}"
        did, low, high = (row.get(c) for c in DID_COLUMNS[:3])
        beyond = "" if did is None else f"; beyond mundane content {signed(did)} {bracket(low, high)}"
        lines.append(f"  {name}: {known}{measured}{says}{beyond}")
    for row in summary["tuning"]:
        if row["quantity"] == "bias" or row["quantity"].startswith("score"):
            known = row.get("published")
            said = "" if known is None else f" (published {signed(known)}: {row['verdict']})"
            change = f"{signed(row['change'])} {bracket(row['ci_low'], row['ci_high'])}{said}"
            lines.append(f"  {row['tuned']} - {row['pretrained']}, {row['quantity']}: {change}")
    if summary["words"]:
        left_out = ", ".join(summary["words_left_out"]) or "none"
        lines.append(f"  words in every model: {len(summary['words'])}; left out: {left_out}")
    return lines
