"""A study: one YAML file in, the whole chain out — probe, rank, choose, suppress, probe again, report.

Templates are split once: `discover` ranks and chooses the feature, `tune` chooses a strength, `report` gives the figures. The
chosen feature is the one of largest exact ablation effect among those called AI-speech; where none is called, none is suppressed
and the report says so.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_bias.cluster import Cluster
from sae_bias.errors import RequestError
from sae_bias.judge import Confirm
from sae_bias.prompt_files import read_yaml
from sae_bias.replication import Replication, ReplicationResult, run_replication
from sae_bias.store import RunFolder, plain
from sae_bias.study_file import Study
from sae_bias.study_steps import StudyRun
from sae_bias.summary import headline
from sae_bias.sweep_work import run_here

__all__ = ["Study", "StudyResult", "load_study", "run_study"]


@dataclass(frozen=True)
class StudyResult:
    """Where the run is, and its headline figures."""

    path: Path
    summary: dict[str, Any] = field(repr=False)
    report: Path

    def headline(self) -> list[str]:
        """The result in a few plain lines."""
        return headline(self.summary)


def load_study(path: str | Path | None = None) -> Study | Replication:
    """A study file; None is the bundled demo. With `models:` in place of `model:` it is a replication over several models.

    Raises:
        RequestError: the file does not exist, is no YAML, or has a field that is not known.
    """
    source = Path(__file__).parent / "data" / "study.yaml" if path is None else Path(path)
    if not source.is_file():
        raise RequestError(
            f"there is no study file {source}; give a .yaml file such as the bundled study.yaml."
        )
    doc = read_yaml(source)
    if isinstance(doc.value, dict) and "models" in doc.value:
        return doc.check(Replication)
    return doc.check(Study)


def run_study(
    study: Study | Replication,
    *,
    out: str | Path,
    gate: bool = True,
    shard: tuple[int, int] | None = None,
    cluster: Cluster | None = None,
    stand_ins: bool = False,
    confirm: Confirm | None = None,
    progress: bool = True,
) -> StudyResult | ReplicationResult:
    """Run every step of `study` into the run folder `out`; cells already there are not run again.

    `cluster` runs the sweep's cells there; everything else, and all writing, is done in this process.
    `confirm` is asked before paid judge requests, with the estimate; without it they are refused.
    `stand_ins` puts tiny random checkpoints in place of a replication's models: plumbing, not figures.
    """
    from sae_bias.report import write_report

    if isinstance(study, Replication):
        if shard is not None or cluster is not None:
            raise RequestError(
                "a study of several models has no cells to share out; give each machine a file with its models."
            )
        return run_replication(study, out=out, stand_ins=stand_ins, gate=gate, progress=progress)
    if stand_ins:
        raise RequestError("--stand-ins is for study files that name several `models:`.")
    if shard is not None and cluster is not None:
        raise RequestError("--shard and --cluster both share out the cells; choose one.")
    folder = RunFolder(out, shard=shard)
    with cluster.connected() if cluster else nullcontext(), folder.writing():
        executor = cluster.run if cluster else run_here
        summary = StudyRun(study, folder, gate, shard, progress, executor, confirm).run()
        folder.write_json("summary", summary)
    report = write_report(folder.path) if shard is None else folder.path / "summary.json"
    return StudyResult(folder.path, plain(summary), report)
