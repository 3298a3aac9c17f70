"""A study of a contrast set: which features tell its sides apart, and what the model does when they are edited.

A study file with `contrast:` (or several, `contrasts:`) is one. It ranks every feature of its SAEs on the contrast, edits the best ones together
(or the features named, or the difference of means at every layer), reads a behavior at each strength with random controls and what is left of
capability, and the bias on further questions. Paths in the file are relative to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
from pydantic import Field, model_validator

from sae_bias.core.errors import RequestError
from sae_bias.core.text import number
from sae_bias.discovery.model_diff import model_diff
from sae_bias.discovery.ranking import Ranking, rank_features
from sae_bias.discovery.text_contrasts import first_chosen
from sae_bias.measures.behavior import Behavior, DoseResponse, Judged, behavior_scores, dose_response
from sae_bias.measures.fidelity import Gate, run_gate
from sae_bias.measures.judge import Confirm, Judge
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.prompts.contrast import Contrast, load_contrast
from sae_bias.prompts.files import read_lines
from sae_bias.prompts.load import load_pairs
from sae_bias.runs.folder import RunFolder
from sae_bias.runs.manifest import manifest
from sae_bias.runs.summary import Summary
from sae_bias.saes.load import expand_saes, load_sae
from sae_bias.saes.sae import Sae, check_sae
from sae_bias.steering.directions import difference_of_means
from sae_bias.steering.edits import ProjectOut, at_every_layer, edit_features
from sae_bias.steering.intervention import Intervention
from sae_bias.steering.tensors import activations
from sae_bias.workflows.study_file import StudyFile, StudyResult

MOST_FEATURES = 1_000
"""Rows of a ranking that the run folder keeps."""


class ContrastStudy(StudyFile):
    """What to measure; only the model and a contrast must be given."""

    name: str = "contrast study"
    question: str = "Which features tell these texts apart, and what does the model do without them?"
    model: str
    contrast: str | None = None
    """.jsonl or .csv with text, label and optional group; or hub:OWNER/NAME."""
    contrasts: dict[str, str] = Field({})
    """Several, by name: each is a run folder of its own below the study's."""
    most_texts: Annotated[int, Field(ge=2)] | None = None
    """Only the first of each side, for a trial."""
    saes: tuple[str, ...] = ()
    """SAEs to search, as one family."""
    other_model: bool = False
    """Yes to SAEs that were trained on another model (a base model's, applied to its instruct model); the gate says how well they fit."""
    baseline: str | None = None
    """Another model that reads the same texts: which features fire more in `model` (table model_diff)."""
    reduce: Literal["last", "mean", "max", "any"] = "last"
    chat: bool = False
    system: str | None = None
    all_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    top: Annotated[int, Field(ge=1, le=4096)] = 5
    """How many of the best features are edited together."""
    features: tuple[str, ...] = ()
    """Features to edit instead of the ranking's best."""
    direction: Annotated[int, Field(ge=0)] | None = None
    """Instead of features: the difference of the sides' means after this layer, projected out at every layer."""
    edit: str = "ablate"
    strengths: tuple[float, ...] = ()
    unit: Literal["act", "max"] = "max"
    """What strengths of clamp, cap and steer count in: activations, or each feature's largest on the contrast."""
    behavior: str | None = "refusal"
    """refusal, default_negativity, a name that a plugin registered, or a regular expression of what the model writes after the prompts; null
    reads none."""
    behaviors: dict[str, str] = Field({})
    """By contrast, instead of `behavior`."""
    judge: str | None = None
    """PROVIDER/MODEL whose mark is the behavior instead; paid ones need a yes."""
    judge_url: str | None = None
    judge_part: Literal["coherence", "harm", "stance"] = "harm"
    prompts: str | None = None
    """File of prompts, one a line; null asks the contrast's own texts."""
    questions: tuple[str, ...] = ()
    """Pairs files or bundled names (age, gender ...) whose bias is measured at each strength."""
    controls: Annotated[int, Field(ge=0, le=99)] = 1
    mismatches: bool = False
    """Also the last strength at an earlier and a later layer."""
    capability: bool = True
    margin: Annotated[float, Field(gt=0)] = 0.1
    max_new_tokens: Annotated[int, Field(ge=1)] = 40

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.contrast is None) == (not self.contrasts):
            raise ValueError("give contrast, or contrasts (a name and a file each)")
        if self.direction is None and not self.features and not self.saes:
            raise ValueError("give saes to search, features to edit, or a direction (a layer)")
        if unknown := sorted(set(self.behaviors) - set(self.contrasts)):
            raise ValueError(f"behaviors: no contrast is called {unknown[0]!r}; contrasts are {', '.join(self.contrasts) or 'not named'}")  # fmt: skip
        return self

    def files(self) -> dict[str, str]:
        """Each contrast by name; the only one is called ''."""
        return {"": self.contrast} if self.contrast is not None else dict(self.contrasts)

    def located(self, folder: Path) -> Self:
        """With paths that lie beside the study file told in full."""

        def full(name: str) -> str:
            beside = folder / name
            return str(beside) if beside.exists() else name

        update: dict[str, Any] = {"contrasts": {k: full(v) for k, v in self.contrasts.items()}}
        update |= {n: full(v) for n in ("contrast", "prompts") if (v := getattr(self, n)) is not None}
        update["questions"] = tuple(
            full(q) if q.endswith((".yaml", ".csv", ".jsonl")) else q for q in self.questions
        )
        return self.model_copy(update=update)

    def texts(self, name: str) -> Contrast:
        """One of its contrasts, cut to `most_texts` a side."""
        contrast = load_contrast(self.files()[name])
        n = self.most_texts
        if n is None:
            return contrast
        k = len(contrast.positive)
        groups = None if contrast.groups is None else contrast.groups[:k][:n] + contrast.groups[k:][:n]
        return replace(
            contrast, positive=contrast.positive[:n], negative=contrast.negative[:n], groups=groups
        )

    def behavior_of(self, name: str) -> str | None:
        """What is read under the edits of one contrast."""
        return self.behaviors.get(name, self.behavior)

    def asked(self, contrast: Contrast) -> Contrast | list[str]:
        """What the behavior is read on."""
        if self.prompts is None:
            return contrast
        return read_lines(Path(self.prompts).expanduser())[: self.most_texts]

    def check_read(self) -> None:
        """Every file, question and behavior that a later step reads: a wrong name need not wait until the ranking is over."""
        for name in self.files():
            self.asked(self.texts(name))
        for name in self.questions:
            load_pairs(name)
        for name in self.files():
            if (own := self.behavior_of(name)) is not None:
                behavior_scores(own, [])


def run_contrast_study(
    study: ContrastStudy,
    *,
    out: str | Path,
    gate: bool = True,
    confirm: Confirm | None = None,
    progress: bool = True,
) -> StudyResult:
    """Every contrast of `study`, each in a run folder; one report over them.

    Raises:
        RequestError: an SAE of another model without `other_model: true`; what ranking, edits and behaviors raise.
    """
    from sae_bias.report.page import write_report

    study.check_read()
    saes = [load_sae(s) for s in expand_saes(study.saes)] if study.saes else []
    model = load_model(study.model, **study.placement)
    for sae in saes:
        check_sae(model, sae)
        _refuse_another(study, model, sae)
    found = run_gate(model, saes, skip=not gate)
    baseline = None if study.baseline is None else load_model(study.baseline, **study.placement)
    root, lines, paths = Path(out), found.warnings, []
    summary = Summary.from_facts({})
    for name in study.files():
        folder = RunFolder(root / name if name else root)
        run = _Run(study, model, saes, found, baseline, confirm, progress)
        with folder.writing():
            summary, said = run.write(folder, name)
        lines += [f"{name}: {line}" if name else line for line in said]
        paths.append(folder.path)
    report = write_report(*paths, out=root / "report.html")
    if len(paths) > 1:
        whole = RunFolder(root)
        with whole.writing():
            whole.write_json("manifest", RunFolder(paths[0]).read_json("manifest"))
            whole.write_json("summary", summary.facts())
    return StudyResult(root, summary, report, tuple(lines))


def ranking_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A ranking with the columns that a report draws; what it did not measure is missing, not zero."""
    return frame.assign(**{c: float("nan") for c in ("auroc", "interaction") if c not in frame})


def _refuse_another(study: ContrastStudy, model: Model, sae: Sae) -> None:
    """An SAE whose release names another model of the hub needs a yes."""
    named, own = (str(n or "").rpartition("/")[2].lower() for n in (sae.model_name, model.name))
    known = (
        "/" in str(sae.model_name or "") and "/" in model.name and not Path(model.name).expanduser().exists()
    )
    if known and named != own and not study.other_model:
        raise RequestError(
            f"{sae.id} was trained on {sae.model_name}, the study's model is {model.name}; other_model: true in the study file says that this is meant "
            "(the gate's figures then say how well it fits)."
        )


@dataclass
class _Run:
    """One contrast at work."""

    study: ContrastStudy
    model: Model
    saes: list[Sae]
    gate: Gate
    baseline: Model | None
    confirm: Confirm | None
    progress: bool

    def write(self, folder: RunFolder, name: str) -> tuple[Summary, list[str]]:
        s, contrast = self.study, self.study.texts(name)
        facts = manifest(
            self.model, saes=self.saes, seed=s.seed, study=json.loads(s.model_dump_json()), gate=self.gate.facts(),
            contrast={"name": contrast.name, "n_positive": len(contrast.positive), "n_negative": len(contrast.negative), "paired": contrast.paired},
        )  # fmt: skip
        folder.write_json("manifest", facts)
        lines: list[str] = []
        ranking = self._rank(folder, contrast, lines)
        edits = self._edits(contrast, ranking)
        summary: dict[str, object] = {
            "contrast": facts["contrast"]
            | {"note": ranking.note if ranking else "", "edited": list(edits[0].names)}
        }
        read = s.behavior_of(name)
        if read is not None or s.judge is not None:
            found = self._dose(folder, edits, s.asked(contrast), read or "refusal")
            for table, frame in found.tables().items():
                folder.write_table(table, frame)
            summary["behavior"] = found.summary()
            lines += dose_lines(found)
        if s.questions:
            folder.write_table("question_bias", self._questions(edits, lines))
        whole = Summary.from_facts(summary)
        folder.write_json("summary", whole.facts())
        return whole, lines

    def _rank(self, folder: RunFolder, contrast: Contrast, lines: list[str]) -> Ranking | None:
        s = self.study
        if not self.saes:
            return None
        read: dict[str, Any] = {"reduce": s.reduce, "chat": s.chat, "seed": s.seed, "progress": self.progress}
        if self.baseline is not None:
            frame = model_diff(self.model, self.baseline, self.saes, contrast.texts, **read).to_frame()
            first = frame["mean_diff"].abs().sort_values(ascending=False).index[:MOST_FEATURES]
            folder.write_table("model_diff", frame.reindex(first))
            n = int((frame["separates"] == "yes").sum())
            lines.append(f"{n} of {len(frame)} features fire differently in {self.model.name} and {self.baseline.name}")  # fmt: skip
        ranking = rank_features(self.model, self.saes, contrast, all_of=s.all_of, none_of=s.none_of, **read)
        folder.write_table("ranking", ranking_table(ranking.to_frame()).head(MOST_FEATURES))
        lines.append(f"{len(ranking.to_frame()):,} features ranked on {ranking.n_units} {ranking.units}; {ranking.note}")  # fmt: skip
        return ranking

    def _edits(self, contrast: Contrast, ranking: Ranking | None) -> list[Intervention]:
        """One edit a strength: of the direction, of the features named, or of the best on the units that discover."""
        s = self.study
        if s.direction is not None:
            found = difference_of_means(self.model, contrast, s.direction, chat=s.chat)
            return [
                at_every_layer(self.model, ProjectOut(found, share=share)) for share in s.strengths or (1.0,)
            ]
        names = s.features
        if not names:
            assert ranking is not None
            names = tuple(first_chosen(ranking.to_frame())["feature"].head(s.top))
            if not names:
                raise RequestError(
                    f"no feature of {', '.join(s.saes)} is left on {contrast.name!r} to edit; loosen all_of and none_of."
                )
        units = None
        if s.unit == "max" and s.strengths:
            top = activations(self.model, contrast.texts, list(names), reduce="max", chat=s.chat).max()
            if silent := [str(f) for f, value in top.items() if not value > 0]:
                raise RequestError(
                    f"{silent[0]} fires on no text of {contrast.name!r}, so it has no unit; give unit: act."
                )
            units = top.tolist()
        return [edit_features(s.edit, names, v, units=units) for v in s.strengths or (None,)]

    def _dose(
        self, folder: RunFolder, edits: Sequence[Intervention], prompts: Contrast | list[str], read: Behavior
    ) -> DoseResponse:
        s = self.study
        if s.judge is not None:
            read = Judged(Judge(s.judge, s.judge_url), s.judge_part, folder.path, self.confirm)
        return dose_response(
            self.model, prompts, edits, read, controls=s.controls, mismatches=s.mismatches, capability=s.capability, margin=s.margin,
            chat=s.chat, system=s.system, max_new_tokens=s.max_new_tokens, seed=s.seed, progress=self.progress,
        )  # fmt: skip

    def _questions(self, edits: Sequence[Intervention], lines: list[str]) -> pd.DataFrame:
        """The primary figure of each question at each strength: the bias, or beyond mundane twins where it has some."""
        s, parts = self.study, []
        for name in s.questions:
            pairs = load_pairs(name)
            found = dose_response(
                self.model, pairs, edits, controls=s.controls, capability=False, seed=s.seed
            )
            parts.append(found.frame.assign(question=pairs.name, of=found.behavior))
            base, last = found.frame.iloc[0], found.frame.iloc[-1]
            lines.append(
                f"{found.behavior}: {number(base['rate'])} nats unsteered, {number(last['rate'])} at the last strength ({last['n_units']} templates)"
            )
        return pd.concat(parts, ignore_index=True)


def dose_lines(found: DoseResponse) -> list[str]:
    """The behavior without and under the strongest edit, and the usable range."""
    lines = []
    for side, rows in found.frame.groupby("side", sort=False):
        base, last = rows.iloc[0], rows[rows["kind"] == "candidate"].iloc[-1]
        where = f"strength {number(last['strength'])}" if last["strength"] == last["strength"] else "the edit"
        lines.append(
            f"{found.behavior} ({side}): {number(base['rate'])} unsteered, {number(last['rate'])} [{number(last['ci_low'])}, {number(last['ci_high'])}] at "
            f"{where}; random controls changed it by {number(last['control_change'])} (n = {last['n']})"
        )
    lines.append(found.usable())
    return lines
