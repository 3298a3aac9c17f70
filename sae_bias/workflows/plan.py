"""What a study will cost, before any weight is loaded: memory by part, operations, time, downloads, disk.

    weights             parameters × bytes of the dtype
    kept residuals      prompts × tokens × d_model × bytes, once a site (pairs, texts and banks of a sweep; twice where costs are measured)
    activations         what the widest point of a layer holds, for the tokens of the largest batch
    gradients           what the layers above the site keep for the backward pass of one batch (attribution)
    logits              blocks of 64 positions × vocabulary in float32, and the unembedding in float32 where weights are not
    SAE slices          encoder columns, decoder rows and activations of one block (64 MB each); the SAE is never held
    tables              on the host: a row a feature of every SAE ranked

Time is operations over an assumed share of the hardware's stated rate (`hardware`), plus reading files at an assumed rate. Tokens are
counted from words and punctuation marks, as no tokenizer is loaded: what the probe, its checks and scenarios put together for a model
they put together for `WordModel`, and its tree of prefixes is counted. What depends on figures (which features are tried, which prompts
an edit changes) is counted at its most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_bias.core.errors import RequestError
from sae_bias.discovery.causal import MOST_LAYERS, MOST_POSITIONS
from sae_bias.discovery.contrasts import cell_texts
from sae_bias.discovery.integrated import STEPS
from sae_bias.discovery.text_reading import ROW_BYTES
from sae_bias.measures.capability import load_questions
from sae_bias.measures.continuations import Continuations, Phrasing, make_asks
from sae_bias.measures.costs import BLOCK as COST_BLOCK
from sae_bias.measures.identity import N_SAMPLES
from sae_bias.measures.identity import NEW_TOKENS as IDENTITY_TOKENS
from sae_bias.models.gguf.packaged import PACKAGED
from sae_bias.models.reads import Asked, Reader
from sae_bias.models.residuals import HELD_BYTES
from sae_bias.models.tree import common_prefix
from sae_bias.probe.checks import check_asks
from sae_bias.probe.reading import PlanReader
from sae_bias.probe.run import ask_probe
from sae_bias.probe.words import Probe, default_probe
from sae_bias.prompts.contrast import Contrast
from sae_bias.prompts.grid import PromptGrid
from sae_bias.prompts.load import load_grid, load_lexicon, load_pairs, questions
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.prompts.scenarios import load_scenarios
from sae_bias.prompts.texts import COST_TEXTS, load_identity, load_texts
from sae_bias.steering.banks import bank_items
from sae_bias.steering.runner import STACK, STACK_TOKENS
from sae_bias.workflows.as_published import STRENGTHS
from sae_bias.workflows.contrast_study import ContrastStudy
from sae_bias.workflows.hardware import Hardware
from sae_bias.workflows.plan_costs import Costs, Step, Texts, WordModel, Work
from sae_bias.workflows.plan_shapes import BYTES, ModelShape, SaeShape, model_shape, sae_shapes
from sae_bias.workflows.replication import Replication
from sae_bias.workflows.study_file import MOST_JOINT, Study

NEW_TOKENS = 40
NORM_BLOCK = 64  # rows whose logits `Final.log_normaliser` holds at once
LOGIT_COPIES = 1.25  # logits, and the exponentials of a quarter of the rows (`log_sum_exp`)
COST_COPIES = 7  # z, log p and p of the base, z and log q of a cell, log p - log q and p times that
TABLE_BYTES = 1600  # of host memory a ranked feature takes at its peak, tables of both rankings and their merge (measured)
DISK_TABLE_BYTES = 110  # of ranking.parquet a feature (measured)
CELL_BYTES = 15_000  # of one cell's file of 280 pairs (measured)
EDIT_SWITCHES = 6  # rules of `as_published.intervention_rules`


@dataclass(frozen=True)
class ModelPlan:
    """One model's share of a study."""

    model: ModelShape
    dtype: str
    device: str
    saes: tuple[SaeShape, ...]
    unknown_saes: tuple[str, ...]
    steps: tuple[Step, ...]
    cells: int
    hardware: Hardware
    disk_bytes: float

    @property
    def weights(self) -> float:
        return float(self.model.n_params * BYTES[self.dtype])

    @property
    def resident(self) -> float:
        """Bytes of the weights that are in memory: on a CPU the file is mapped, and an embedding of its own is read by rows."""
        mapped = self.hardware.is_cpu and self.dtype == self.model.dtype and not self.model.tied
        return self.weights - (self.model.d_vocab * self.model.d_model * BYTES[self.dtype] if mapped else 0)

    @property
    def peak(self) -> Step:
        """The step that holds most on the device."""
        return max(self.steps, key=lambda s: s.device_bytes)

    @property
    def device_bytes(self) -> float:
        return self.resident + self.peak.device_bytes

    @property
    def host_bytes(self) -> float:
        """Of the process itself beside the device: tables (and on a CPU the whole)."""
        tables = max(s.host_bytes for s in self.steps)
        if not self.hardware.is_cpu:
            return tables
        return self.resident + max(s.device_bytes + s.host_bytes for s in self.steps)

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.steps)

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.steps)

    @property
    def download_bytes(self) -> float:
        """Of what is not local: the checkpoint's files and the SAEs'."""
        name = self.model.name
        local = (
            name.startswith(("organism:", "/", ".", "~"))
            or name in PACKAGED
            or Path(name).expanduser().exists()
        )
        return (0 if local else self.model.n_checkpoint_bytes) + sum(
            s.n_bytes for s in self.saes if not s.local
        )

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a tenth of the hardware's memory free."""
        held = self.host_bytes if self.hardware.is_cpu else self.device_bytes
        return held <= 0.9 * self.hardware.memory

    def advice(self) -> list[str]:
        """What to change where it does not fit, or takes long."""
        return _advice(self)


@dataclass(frozen=True)
class StudyPlan:
    """A study's plan: each model, one after another."""

    name: str
    models: tuple[ModelPlan, ...]

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.models)

    @property
    def flops(self) -> float:
        return sum(m.flops for m in self.models)

    @property
    def download_bytes(self) -> float:
        """Each file once, though several models may name it."""
        files = {m.model.name: float(m.download_bytes - sum(s.n_bytes for s in m.saes if not s.local)) for m in self.models}  # fmt: skip
        files |= {s.name: float(s.n_bytes) for m in self.models for s in m.saes if not s.local}
        return sum(files.values())

    @property
    def disk_bytes(self) -> float:
        return sum(m.disk_bytes for m in self.models)


def plan_study(study: Study | Replication | ContrastStudy, hardware: Hardware) -> StudyPlan:
    """The plan of a study file on some hardware.

    Raises:
        RequestError: a file, folder or name that does not exist.
        MissingError: a model whose shape is not known and whose config is not cached.
    """
    if isinstance(study, Replication):
        return StudyPlan(study.name, tuple(_probe_plan(study, name, hardware) for name in study.models))
    if isinstance(study, ContrastStudy):
        return StudyPlan(study.name, (contrast_plan(study, hardware),))
    return StudyPlan(study.name, (_full_plan(study, hardware),))


# ── one model ───────────────────────────────────────────────────────────────────────────────────────────────
def _dtype(asked: str, hardware: Hardware) -> str:
    return ("float32" if hardware.is_cpu else "bfloat16") if asked == "auto" else asked


def _pair_texts(pairs: PromptPairs, *, controls: bool) -> Texts:
    every = [*pairs, *(pairs.controls() if controls else ())]
    return Texts.of(t for p in every for t in (p.human, p.ai))


def _load(c: Costs) -> Step:
    size = float(c.model.n_checkpoint_bytes)
    return c.step("load", Work(), {}, read=size)


def _readers(asked: Iterable[Callable[[], Asked[Any]]]) -> list[Reader]:
    """What can be asked of these pairs."""
    found: list[Reader] = []
    for ask in asked:
        with suppress(RequestError):
            found += ask().readers
    return found


def _read(c: Costs, readers: Sequence[Reader]) -> Work:
    """All layers over what several readers read together."""
    return c.base(Texts(tuple(tuple(s) for r in readers for s in r.sequences)), c.model.n_layers)


def _probe_steps(
    c: Costs, pairs: PromptPairs, probe: Probe, *, checks: bool, forms: int = 1, switches: bool = False
) -> list[Step]:
    """The probe with its controls and levels, and what a study checks beside it."""
    every, plain, words = _pair_texts(pairs, controls=True), _pair_texts(pairs, controls=False), WordModel()
    parts = c.passing(every, logits=c.logits(min(NORM_BLOCK, every.n), LOGIT_COPIES))
    work = c.base(every, c.model.n_layers, kept=True, ends=checks) + c.run(every, c.model.n_layers, forms - 1)
    work += Work(0, forms * c.model.unembed_flops(every.n))
    steps = [c.step("probe", work, parts)]
    if checks:
        asked = ask_probe(words, pairs, probe)
        for reader in asked.readers:  # a result to ask the checks with
            assert isinstance(reader, PlanReader)
            reader.z[:] = 0
            if reader.norm is not None:
                reader.norm[:] = 0
        more = _readers(check_asks(words, pairs, asked.finish()).values())
        steps.append(c.step("checks", _read(c, more), parts))
    if switches:
        steps.append(c.step("switches", c.run(plain, c.model.n_layers, len(pairs.stems) + 1), parts))
    return steps


def _probe_plan(study: Replication, name: str, hardware: Hardware) -> ModelPlan:
    """One model of a study of several: the probe in both forms, and the switches."""
    model = model_shape(name)
    c = Costs(model, _dtype(study.dtype, hardware), hardware)
    forms = 2 if study.chat and _has_chat(name) else 1
    pairs = load_pairs(study.pairs)
    steps = (
        _load(c),
        *_probe_steps(c, pairs, default_probe(pairs), checks=False, forms=forms, switches=study.switches),
    )
    return ModelPlan(model, c.dtype, c.kind, (), (), steps, 0, hardware, 3e6 * forms)


def _has_chat(name: str) -> bool:
    from sae_bias.models.catalog import model_info

    info = model_info(name)
    return bool(info and info.has_chat)


def _full_plan(study: Study, hardware: Hardware) -> ModelPlan:
    model = model_shape(study.model)
    pairs, grid = load_pairs(study.pairs), load_grid(study.grid)
    saes, unknown = sae_shapes(study.saes, model.d_model)
    c = Costs(model, _dtype(study.dtype, hardware), hardware, kept_layers=len({s.layer for s in saes}))
    profile = study.profile == "as_published"
    probe = default_probe(pairs, load_lexicon(study.words) if study.words else None, score=study.score)
    steps = [_load(c), *_probe_steps(c, pairs, probe, checks=study.checks, switches=profile)]
    cells = 0
    if saes:
        split = pairs.split(study.seed)
        cells = 4 + len(study.strengths) + study.controls
        ranked, report = pairs.effects_of(study.effects_of), pairs.select(templates=split["report"])
        steps.insert(1, _gate(c, saes))
        steps.append(_rank(c, study, ranked.select(templates=split["discover"]), grid, saes))
        table = c.base(Texts.of(p.text for p in grid), model.n_layers - _later(c, saes))
        steps.append(c.step("table", table, steps[2].parts))
        steps.append(_sweep(c, study, pairs, saes, cells))
        steps.append(_joint(c, study, ranked.select(templates=split["report"]), saes))
        steps.append(_behavior(c, study, saes))
        if profile:
            plain, later = _pair_texts(pairs, controls=False), _later(c, saes)
            work = c.run(plain, model.n_layers) + c.run(plain, later, EDIT_SWITCHES * len(STRENGTHS))
            steps.append(c.step("edit switches", work, steps[2].parts))
        if study.checks:
            steps.append(_feature(c, report, saes, steps[2].parts))
    disk = cells * CELL_BYTES * len(pairs) / 280 + sum(s.d_sae for s in saes) * DISK_TABLE_BYTES + 5e6
    return ModelPlan(model, c.dtype, c.kind, tuple(saes), tuple(unknown), tuple(steps), cells, hardware, disk)


def contrast_plan(study: ContrastStudy, hardware: Hardware) -> ModelPlan:
    """A study of texts: the scan of every feature, and each strength with its controls, capability and questions."""
    model = model_shape(study.model)
    c = Costs(model, _dtype(study.dtype, hardware), hardware)
    saes, unknown = sae_shapes(study.saes, model.d_model)
    contrasts = [study.texts(name) for name in study.files()]
    texts = Texts.of(t for contrast in contrasts for t in contrast.texts)
    prompts = [study.asked(contrast) for contrast in contrasts]
    asked = [text for p in prompts for text in (p.texts if isinstance(p, Contrast) else p)]
    strengths = max(1, len(study.strengths))
    cells = strengths * (1 + study.controls) + 4 * study.mismatches  # two layers, two other hooks
    steps = [_load(c)]
    if saes:
        steps += [_gate(c, saes), _scan(c, study, texts, saes)]
    if study.behavior is not None or study.judge is not None or study.behaviors:
        steps.append(_dose(c, study, Texts.of(asked), cells + 1))
    questions_of = Texts.of(
        f"Question {q.text} Answer {a}" for q in load_questions() for a in (q.right, *q.wrong)
    )
    passes = (
        [Texts.of(load_texts("neutral")), questions_of] * study.capability * (strengths + 1) * len(contrasts)
    )
    for name in study.questions:
        turns = (strengths * (1 + study.controls) + 1) * len(contrasts)
        passes += [_pair_texts(load_pairs(name), controls=False)] * turns
    if passes:
        work = _sum(c.run(t, model.n_layers) for t in passes)
        parts = c.passing(*passes, logits=c.logits(COST_BLOCK, LOGIT_COPIES))
        steps.append(c.step("capability", work, parts))
    if study.baseline is not None:
        other = model_shape(study.baseline)
        both = {"the baseline's weights": float(other.n_params * c.size)}
        steps = [replace(step, parts=step.parts | both) for step in steps]
        steps.insert(1, c.step("load baseline", Work(), both, read=float(other.n_checkpoint_bytes)))
    disk = sum(min(s.d_sae, 1_000) for s in saes) * DISK_TABLE_BYTES * len(contrasts) + 5e6
    return ModelPlan(
        model,
        c.dtype,
        c.kind,
        tuple(saes),
        tuple(unknown),
        tuple(steps),
        cells * len(contrasts),
        hardware,
        disk,
    )


def _scan(c: Costs, study: ContrastStudy, texts: Texts, saes: Sequence[SaeShape]) -> Step:
    """Every feature on every text: the layers up to the highest SAE once, and the encoders over the rows that are read."""
    m, width, top = c.model, sum(s.d_sae for s in saes), max(s.layer for s in saes) + 1
    rows = texts.n if study.reduce == "last" else texts.tokens
    waiting = int(min(rows, ROW_BYTES // (4 * m.d_model)))
    models = 2 if study.baseline is not None else 1
    parts = {
        "kept residuals": float(min(ROW_BYTES, 4 * rows * m.d_model * len({s.layer for s in saes}))),
        "activations": c.activations(*c.widest(texts)),
        "SAE slices": c.slices(saes, waiting, decoder=False, copies=2),
    }
    turns = math.ceil(rows / max(1, waiting))
    return c.step(
        "scan", c.run(texts, top, models), parts, f32=models * 2.0 * rows * m.d_model * width,
        read=models * turns * sum(s.n_bytes for s in saes) / 2, host=TABLE_BYTES * width,
    )  # fmt: skip


def _dose(c: Costs, study: ContrastStudy, prompts: Texts, conditions: int) -> Step:
    """Texts of every condition."""
    work, streaming, cache = c.writing(prompts, study.max_new_tokens, conditions)
    parts = {"key-value cache": cache, **c.passing(prompts, logits=c.logits(16, 3))}
    return c.step("dose", work, parts, extra=streaming)


def _gate(c: Costs, saes: Sequence[SaeShape]) -> Step:
    """Each SAE's reconstruction of the neutral text, whole columns and the active rows; once a model and SAE."""
    neutral, m = Texts.of(load_texts("neutral")), c.model
    encode = sum(2.0 * neutral.tokens * m.d_model * s.d_sae for s in saes)
    passes = Work()
    for sae in saes:  # the residual, and beside it Hugging Face's own pass
        passes += c.run(neutral, m.n_layers + sae.layer + 1, alone=True)
    widest = max(s.d_sae for s in saes)
    parts = {
        "activations": c.activations(*c.widest(neutral)),
        "SAE slices": 4.0 * neutral.tokens * widest + c.slices(saes, neutral.tokens, decoder=False, copies=2),
    }
    return c.step("gate", passes, parts, f32=encode, read=sum(s.n_bytes for s in saes) / 2)


def _rank(c: Costs, study: Study, discover: PromptPairs, grid: PromptGrid, saes: Sequence[SaeShape]) -> Step:
    """Separation, interaction, attribution over every feature, and exact ablation of the first."""
    m, n = c.model, c.model.n_layers
    pairs, twins = (_pair_texts(p, controls=False) for p in (discover, discover.controls()))
    cells, neutral = Texts.of(cell_texts(grid)), Texts.of(load_texts("neutral"))
    width, layers = sum(s.d_sae for s in saes), {s.layer for s in saes}
    work = _sum(c.base(t, max(layers) + 1, kept=True) for t in (pairs, cells, neutral)) + c.base(cells, n)
    tried, later = min(study.ablate_top, width), _later(c, saes)
    for texts, of in ((pairs, discover), (twins, discover.controls())):
        ai = Texts.of(p.ai for p in of)
        work += c.base(texts, n) + c.run(texts, later, tried) + c.run(ai, later, tried)
        for s in saes:  # the upper bound and its parts are exact
            work += c.run(texts, n - s.layer - 1, gradients=True) + c.run(ai, n - s.layer - 1, 4)
        work += _sum(c.run(ai, n - layer - 1, STEPS, gradients=True) for layer in layers)
    parts = {
        "kept residuals": max(
            c.kept(c.nodes(pairs), len(layers)) + 8.0 * c.nodes(pairs) * m.d_model,
            min(HELD_BYTES, c.kept(c.nodes(cells), len(layers))),
        ),
        "activations": c.activations(*c.widest(cells, pairs, neutral)),
        "gradients": c.gradients(c.widest(pairs)[0], n - min(layers) - 1),
        "SAE slices": c.slices(saes, pairs.tokens, decoder=True, copies=3),
    }
    f32 = 2.0 * m.d_model * width * (pairs.n + cells.n + 2 * pairs.tokens)
    read = sum(s.n_bytes / 2 * 2 + s.n_bytes for s in saes)  # columns twice, then columns and rows
    return c.step("rank", work, parts, f32=f32, read=read, host=TABLE_BYTES * width)


def _sweep(c: Costs, study: Study, pairs: PromptPairs, saes: Sequence[SaeShape], cells: int) -> Step:
    """The base, the candidates with costs and banks, and the controls; every prompt is taken to change."""
    m, prompts = c.model, _pair_texts(pairs, controls=False)
    cost_texts = Texts.of(t for kind in COST_TEXTS for t in load_texts(kind))
    bank = Texts.of(bank_items()[0])
    later, costed = _later(c, saes), cells - study.controls - 1
    twins = _pair_texts(pairs.controls(), controls=False)
    work = Work()
    for texts, times in ((prompts, cells - 1), (bank, cells - 1), (twins, costed), (cost_texts, costed)):
        work += c.base(texts, m.n_layers, kept=True) + c.run(texts, later, times)
    unembed = (costed + 1) * m.unembed_flops(cost_texts.tokens)
    tokens, length = c.widest(prompts, twins, cost_texts, bank)
    stacked = min(STACK_TOKENS[c.kind], STACK * c.widest(prompts)[0])
    costs = (2 + min(STACK, costed)) * c.nodes(cost_texts)  # at the site, ends of the base, of each cell
    parts = {
        "kept residuals": c.kept(c.nodes(prompts) + c.nodes(twins) + c.nodes(bank) + costs, 1),
        "activations": c.activations(max(tokens, stacked), length),
        "logits": c.logits(COST_BLOCK, COST_COPIES),
        "SAE slices": c.slices(saes, prompts.tokens // 2, decoder=True, copies=3),
    }
    read = max(s.n_bytes for s in saes)  # the search for matched controls
    return c.step("sweep", work, parts, f32=unembed, read=read)


def _joint(c: Costs, study: Study, report: PromptPairs, saes: Sequence[SaeShape]) -> Step:
    """At most ten joint ablations for each SAE, of the features that were ablated alone."""
    m, prompts = c.model, _pair_texts(report, controls=False)
    times = min(MOST_JOINT * len(saes), study.ablate_top)
    work = Work()
    for texts in (prompts, _pair_texts(report.controls(), controls=False)):
        work += c.base(texts, m.n_layers) + c.run(texts, _later(c, saes), times)
    kept = {"kept residuals": c.kept(c.nodes(prompts), len({s.layer for s in saes}))}
    return c.step("joint", work, kept | c.passing(prompts))


def _later(c: Costs, saes: Sequence[SaeShape]) -> float:
    """Layers above a feature, the mean over features."""
    width = sum(s.d_sae for s in saes)
    return c.model.n_layers - sum(s.layer * s.d_sae for s in saes) / width - 1


def _sum(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())


def _feature(c: Costs, report: PromptPairs, saes: Sequence[SaeShape], parts: dict[str, float]) -> Step:
    """The chosen feature's causal analysis, the other questions before and after, its dashboard."""
    n, later, own = c.model.n_layers, _later(c, saes), _pair_texts(report, controls=False)
    ai, words = Texts.of(p.ai for p in report), WordModel()
    endings = [common_prefix(words.encode(p.human)[::-1], words.encode(p.ai)[::-1]) for p in report]
    work = c.run(own, n) + c.run(own, later) + c.run(ai, later, 7)  # once more, for residuals at other layers
    places = 1 + min(MOST_POSITIONS, max(endings, default=0))
    for layer in {int(i) for i in np.linspace(0, n - 1, min(MOST_LAYERS, n)).round()}:
        work += c.run(ai, n - layer - 1, places)
    for name in questions():
        other = _pair_texts(load_pairs(name), controls=False)
        work += c.base(other, n) + c.run(other, later)
    work += c.base(Texts.of(load_texts("neutral")), n - later)
    return c.step("feature", work, parts)


def _behavior(c: Costs, study: Study, saes: Sequence[SaeShape]) -> Step:
    """Texts, scenarios and answers to who the model is, before and after."""
    m, bank, asked = c.model, load_identity(), [(study.prompts, NEW_TOKENS)]
    if study.identity is not None:
        asked += [(bank.prompts, IDENTITY_TOKENS), (bank.sampled * N_SAMPLES, IDENTITY_TOKENS)]
    written = [c.writing(Texts.of(prompts), new, 2) for prompts, new in asked]
    work, streaming = _sum(w for w, _, _ in written), sum(s for _, s, _ in written)
    if study.scenarios is not None:
        asks = make_asks(Phrasing(WordModel()), load_scenarios(study.scenarios))
        read = Texts(tuple(map(tuple, Continuations(asks).sequences)))
        work += c.run(read, (m.n_layers + _later(c, saes)) * (2 if study.system else 1))
    parts = {"key-value cache": max(cache for _, _, cache in written), "logits": c.logits(16, 3)}
    return c.step("behavior", work, parts, extra=streaming)


# ── what to change ──────────────────────────────────────────────────────────────────────────────────────────
def _advice(plan: ModelPlan) -> list[str]:
    memory, found = plan.hardware.memory, []
    if not plan.fits:
        if plan.dtype == "float32" and plan.hardware.is_cpu is False:
            found.append("dtype: bfloat16 halves the weights and the residuals.")
        n = math.ceil(plan.device_bytes / (0.85 * memory))
        if plan.hardware.is_cpu and plan.host_bytes - plan.device_bytes > plan.weights:
            pass
        elif n > 1:
            found.append(
                f"device_map: auto spreads the model over {n} such devices (or offloads layers to memory or disk)."
            )
        if plan.peak.parts.get("gradients", 0) > 0.3 * memory:
            found.append(
                "The backward pass of the attribution holds most: list SAEs of later layers, or give fewer pairs."
            )
    width = sum(s.d_sae for s in plan.saes)
    tables = max(s.host_bytes for s in plan.steps)
    if tables > 32e9:
        groups = math.ceil(tables / 32e9)
        found.append(
            f"Ranking {width:,} features at once takes {tables / 1e9:.0f} GB of the host's memory: split the SAEs over {groups} study files "
            "(the correction then is over each file's family)."
        )
    sweep = next((s for s in plan.steps if s.name == "sweep"), None)
    if sweep is not None and sweep.seconds > 600:
        found.append(
            f"The sweep's {plan.cells} cells divide over machines: --cluster ADDRESS, or --shard I/N on each and `sae-bias merge`."
        )
    reading = sum(s.read_bytes for s in plan.steps)
    if reading > 200e9:
        found.append(f"{reading / 1e12:.1f} TB of files are read: keep the SAEs on a local disk.")
    if plan.unknown_saes:
        found.append(
            f"{len(plan.unknown_saes)} SAEs are not counted, their names tell no layer and width (first: {plan.unknown_saes[0]})."
        )
    return found
