"""A study: one YAML file in, the whole chain out — probe, rank, choose, suppress, probe again, report.

Templates are split once: `discover` ranks and chooses the feature, `tune` chooses a strength, `report` gives the figures. The
chosen feature is the one of largest exact ablation effect among those called AI-speech; where none is called, none is suppressed
and the report says so.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sae_bias.core.errors import RequestError
from sae_bias.measures.judge import Confirm
from sae_bias.prompts.files import read_yaml
from sae_bias.runs.effect_lines import headline
from sae_bias.runs.folder import RunFolder
from sae_bias.workflows.contrast_study import ContrastStudy, run_contrast_study
from sae_bias.workflows.replication import Loader, Replication, run_replication
from sae_bias.workflows.study_file import Study, StudyResult
from sae_bias.workflows.study_steps import StudyRun
from sae_bias.workflows.sweep_work import Executor, LocalWorkers

__all__ = ["Study", "StudyResult", "load_study", "run_study"]


AnyStudy = Study | Replication | ContrastStudy


def load_study(path: str | Path | None = None) -> AnyStudy:
    """A study file; None is the bundled demo. With `models:` it is a replication over several models, with `contrast:` a study of texts.

    Raises:
        RequestError: the file does not exist, is not YAML, or has an unknown field.
    """
    source = Path(str(files("sae_bias") / "data" / "study.yaml")) if path is None else Path(path)
    if not source.is_file():
        raise RequestError(
            f"there is no study file {source}; give a .yaml file such as the bundled study.yaml."
        )
    doc = read_yaml(source)
    fields = set(doc.value) if isinstance(doc.value, dict) else set()
    if "models" in fields:
        return doc.check(Replication)
    if {"contrast", "contrasts"} & fields:
        return doc.check(ContrastStudy).located(source.parent)
    return doc.check(Study)


def run_study(
    study: AnyStudy,
    *,
    out: str | Path,
    gate: bool = True,
    shard: tuple[int, int] | None = None,
    executor: Executor | None = None,
    loader: Loader | None = None,
    confirm: Confirm | None = None,
    workers: int = 1,
    progress: bool = True,
) -> StudyResult:
    """Run every step of `study` into the run folder `out`; cells already there are not run again.

    `executor` runs the sweep's cells elsewhere (`Cluster.run`); `workers` shares them and the ranking's exact effects out over so many
    processes of this machine (Linux, CPU). Everything else, and all writing, is done in this process.
    `confirm` is asked before paid judge requests, with the estimate; without it they are refused.
    `loader` opens a replication's models; `StandIns` puts tiny random checkpoints in their place: plumbing, not figures.
    """
    from sae_bias.report.page import write_report

    if not isinstance(study, Study):
        if shard is not None or executor is not None or workers > 1:
            raise RequestError(
                "a study of several models or of a contrast has no cells to share out; give each machine a file with its own part."
            )
        if isinstance(study, ContrastStudy):
            return run_contrast_study(study, out=out, gate=gate, confirm=confirm, progress=progress)
        return run_replication(study, out=out, loader=loader, gate=gate, progress=progress)
    if loader is not None:
        raise RequestError("--stand-ins is for study files that name several `models:`.")
    folder = RunFolder(out, shard=shard)
    with folder.writing():
        run = executor or LocalWorkers(workers).run
        summary = StudyRun(study, folder, gate, shard, progress, run, confirm, workers).run()
        folder.write_json("summary", summary.facts())
    report = write_report(folder.path) if shard is None else folder.path / "summary.json"
    return StudyResult(folder.path, summary, report, tuple(headline(summary)))
