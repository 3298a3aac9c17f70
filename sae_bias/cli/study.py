"""`sae-bias demo` and `sae-bias run`: a whole study, from the probe to the report."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sae_bias.cli.context import Run, ask_to_send, command
from sae_bias.core.errors import RequestError

if TYPE_CHECKING:
    from sae_bias.integrations.ray import Cluster
    from sae_bias.workflows.study import AnyStudy


STUDY = ("pairs", "words")


@command("demo", "sae-bias demo", takes=STUDY)
def demo(run: Run, seed: int | None = None, device: str | None = None, dtype: str | None = None) -> None:
    """Run the whole chain on a bundled model: probe, rank, suppress, probe again, report.

    The model is a calibration organism: a tiny Gemma trained so that its double standard is known. Nothing here is a finding
    about Gemma. Writes runs/demo under the current folder, with report.html in it.

    Args:
        --seed: Seed of every random choice; the study's own by default.
        --device: auto, cpu, cuda …; the study's own by default.
        --dtype: auto, float32, bfloat16, float16; the study's own by default.
    """
    run.out = run.out or Path("runs/demo")
    _run(run, None, {"seed": seed, "device": device, "dtype": dtype})


@command("run", "sae-bias run study.yaml --out runs/first", takes=(*STUDY, "shard"))
def run(
    run: Run,
    study: Path,
    no_gate: bool = False, cluster: str | None = None, workers: Annotated[int | None, {"min": 1}] = None,
    gpus_per_worker: Annotated[float | None, {"min": 0}] = None, stand_ins: bool = False, yes: bool = False,
    seed: int | None = None, device: str | None = None, dtype: str | None = None,
) -> None:  # fmt: skip
    """Run a study file: the probe, the ranking, the sweep and the report.

    The file names the model, the SAEs and whatever differs from the defaults. Options given here stand above the file. What the
    folder holds already is not run again. Writes runs/NAME under the current folder, or --out.

    Args:
        STUDY.yaml: Study file.
        --no-gate: Skip the fidelity gate; the manifest says so.
        --cluster ADDRESS: Run the sweep's cells on a Ray cluster: auto (this machine's), local, HOST:PORT. Same folder, same resume.
        --workers: Processes for exact effects and the sweep's cells: on this machine's CPU they share one copy of the weights, a thread each; with --cluster each has a copy, as many as fit by default.
        --gpus-per-worker: With --cluster: 1 by default for a model on CUDA; more for one spread by `device_map`.
        --stand-ins: For a study of several models: tiny random models in their place. Tests the plumbing; no figure means anything.
        --yes, -y: Send the study's paid judge requests without asking.
        --seed: Seed of every random choice; the study's own by default.
        --device: auto, cpu, cuda …; the study's own by default.
        --dtype: auto, float32, bfloat16, float16; the study's own by default.
    """
    from sae_bias.integrations.ray import Cluster

    if cluster is None and gpus_per_worker is not None:
        raise RequestError("--gpus-per-worker needs --cluster ADDRESS.")
    nodes = None if cluster is None else Cluster(cluster, workers, gpus_per_worker)
    if run.shard is not None and (nodes or workers):
        raise RequestError("--shard, --workers and --cluster all share out the cells; choose one.")
    given = {"seed": seed, "device": device, "dtype": dtype}
    options = {
        "gate": not no_gate,
        "shard": run.shard,
        "confirm": lambda cost: yes or ask_to_send(cost),
    }
    if nodes is None and workers is not None:
        options["workers"] = workers
    _run(run, study, given, nodes=nodes, stand_ins=stand_ins, **options)


def _run(
    run: Run, path: Path | None, given: dict[str, Any], *, nodes: "Cluster | None" = None, stand_ins: bool = False, **options: Any
) -> None:  # fmt: skip
    from sae_bias.measures.fidelity import gate_lines
    from sae_bias.runs.folder import RunFolder
    from sae_bias.validation.stand_ins import StandIns
    from sae_bias.workflows.study import load_study, run_study

    given |= {name: run.given[name] for name in STUDY}
    study = load_study(path).model_copy(update={k: v for k, v in given.items() if v is not None})
    if nodes is not None:
        options["executor"] = nodes.run
    if stand_ins:
        options["loader"] = StandIns()
    with nodes.connected() if nodes else nullcontext():
        result = run_study(study, out=run.out or _folder(study), progress=run.progress, **options)
    if str(study.model).startswith("organism:"):
        run.note("A calibration organism: nothing here is a finding about Gemma.")
    for line in result.headline():
        run.say(line)
    facts = RunFolder(result.path).read_json("manifest")
    for line in gate_lines(facts.get("gate") or {}):
        run.note(line)
    run.say_terms((facts.get("model") or {}).get("gguf"))
    if options.get("shard") is None:
        run.say(f"report: {result.report}")
    where = {"run": str(result.path), "report": str(result.report)}
    run.finish({"study": study.name, "model": study.model, **result.summary, **where})


def _folder(study: "AnyStudy") -> Path:
    """runs/NAME, with nothing in the name that a folder cannot have."""
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", study.name).strip(".-") or "study")
