"""A sweep's cells on other machines, through Ray: actors that each hold the model, and one process that writes.

    sae-bias run STUDY.yaml --cluster ADDRESS

The process that runs the study loads the model, plans the cells and hands out one group of them at a time; an actor loads the same
model by name, checks that it is the same weights, and sends back each group's rows, which are written as a local run writes
them: one writer a folder, the same names, the same resume. An actor or node that is lost gives its group back, to be done
elsewhere. What does not come from cells (the probe, the ranking, the controls' search) is done where the study runs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import sae_bias
from sae_bias.core.errors import MissingError, RequestError, SaeBiasError
from sae_bias.models.fingerprint import model_digest
from sae_bias.models.load import load_model
from sae_bias.models.model import Model
from sae_bias.probe.words import Probe
from sae_bias.prompts.pairs import PromptPairs
from sae_bias.saes.load import load_sae
from sae_bias.saes.sae import Feature, Sae
from sae_bias.steering.edits import Patch
from sae_bias.steering.intervention import Intervention, map_features
from sae_bias.workflows.cells import Cell
from sae_bias.workflows.sweep_work import CellResult, Group, Results, Work

MAX_LOSSES = 3
"""So many actors may be lost on one group of cells before it is given up: it may be what ends them."""
LOADING = -1  # stands for no group where losses are counted: an actor that was lost before it had its model
LOOK = 10.0
"""Seconds between two looks at a cluster on which nothing is running yet."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to run cells on; `cluster.run` is a `run_sweep` executor."""

    address: str = "auto"
    """`auto` (the cluster this machine belongs to), `local` (one of this machine alone), HOST:PORT, or ray://HOST:PORT."""
    workers: int | None = None
    """Actors, each with a copy of the model; None is as many as the cluster has room for."""
    gpus_per_worker: float | None = None
    """GPUs of an actor; None is 1 for a model on CUDA, 0 for others."""
    cpus_per_worker: float | None = None
    """CPUs (and threads) of an actor; None is 1 beside a GPU, else a node's whole, or its share where `workers` are more."""
    timeout: float = 30
    """Seconds to wait for a cluster to answer."""

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Joined to the cluster meanwhile; a connection the caller has already is used and kept.

        Raises:
            MissingError: Ray is not installed, or no cluster answers there.
        """
        ray = _ray()
        if ray.is_initialized():
            yield
            return
        address = _checked(self.address, self.timeout)
        local = {"num_cpus": os.cpu_count(), "include_dashboard": False}
        options: dict[str, Any] = local if address == "local" else {}
        with _quietly():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
        try:
            yield
        finally:
            ray.shutdown()

    def run(self, work: Work, groups: Sequence[Group]) -> Results:
        """Each group's results as they come back.

        Raises:
            RequestError: a model that workers cannot load by name, or whose weights differ there.
            MissingError: no node has room for a worker, or one group of cells ended worker after worker.
        """
        job = _Job.of(work)
        with self.connected():
            pool = _Pool(_ray(), self, job)
            try:
                yield from pool.run(groups)
            finally:
                pool.close()


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, eq=False)
class _Job:
    """A sweep's work without its model, which every actor loads for itself."""

    model: str
    dtype: str
    device: str
    device_map: Any
    digest: str
    version: str
    pairs: PromptPairs
    probe: Probe
    cells: tuple[Cell, ...]
    costed: tuple[bool, ...]
    wholes: tuple[str, ...]
    """SAEs that actors load whole: those whose features are not one encoder column each."""
    folder: str
    """Where the study runs: relative names of files mean the same in an actor, where the folder is there too."""

    @classmethod
    def of(cls, work: Work) -> _Job:
        model = work.model
        wholes: set[str] = set()
        cells = tuple(replace(c, edits=tuple(_portable(e, wholes) for e in c.edits)) for c in work.cells)
        dtype, device = str(model.dtype).removeprefix("torch."), model.device.type
        where = _name(model), dtype, device, model.device_map, model_digest(model), sae_bias.__version__
        return cls(*where, work.pairs, work.probe, cells, work.costed, tuple(sorted(wholes)), os.getcwd())

    def work(self) -> Work:
        """The same work with a model of this process's own."""
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        model = load_model(self.model, device=self.device, dtype=self.dtype, device_map=self.device_map)
        if model_digest(model) != self.digest:
            raise RequestError(
                f"{self.model} is not the same here as where the study runs (its files differ); give every node the same files."
            )
        wholes = {name: load_sae(name) for name in self.wholes}
        cells = tuple(replace(c, edits=tuple(_whole_again(e, wholes) for e in c.edits)) for c in self.cells)
        return Work(model, self.pairs, self.probe, cells, self.costed)


def _name(model: Model) -> str:
    """The name under which another process finds the model."""
    if model.in_memory:
        raise RequestError(
            "a model object cannot be sent to a cluster; load it by name or from a folder that every node sees."
        )
    if model.is_organism or model.gguf is not None or not model.source:
        return model.name
    return str(model.source.resolve())


def _portable(edit: Intervention, wholes: set[str]) -> Intervention:
    """`edit` as it can be sent: features by value (two vectors each); an SAE that is needed whole is noted in `wholes`."""
    if any(isinstance(part, Patch) for part in edit.parts):
        raise RequestError(
            "a patch from another model cannot be sent to a cluster; run it without --cluster."
        )

    def alone(feature: Feature) -> Feature:
        if feature.whole is None:
            return feature
        if feature.whole.path is None and feature.whole.id.release == "object:sae_lens":
            raise RequestError(
                f"{feature.whole.id} is an object in memory and cannot be sent to a cluster; save it and give its folder."
            )
        wholes.add(str(feature.ref.sae))
        return replace(feature, whole=None)

    return map_features(edit, alone)


def _whole_again(edit: Intervention, wholes: dict[str, Sae]) -> Intervention:
    """`edit` with its feature's SAE put back where its encoder column alone does not do."""
    return map_features(
        edit, lambda f: replace(f, whole=wholes[str(f.ref.sae)]) if str(f.ref.sae) in wholes else f
    )


class _Worker:
    """What runs in an actor: a model, and the groups of cells it is given."""

    def __init__(self, job: _Job):
        self.job = job
        self.work: Work | None = None

    def ready(self) -> str:
        """Load the model; the node's name."""
        if self.job.version != sae_bias.__version__:
            raise RequestError(
                f"{socket.gethostname()} has sae-bias {sae_bias.__version__}, the study runs {self.job.version}; install one version everywhere."
            )
        self.work = self.job.work()
        return socket.gethostname()

    def run(self, group: Group) -> list[CellResult]:
        assert self.work is not None
        return self.work.run(group)


# ── who does what ───────────────────────────────────────────────────────────────────────────────────────────
class _Pool:
    """Actors, and the groups of cells still to be done."""

    def __init__(self, ray: Any, cluster: Cluster, job: _Job):
        self.ray = ray
        gpus = cluster.gpus_per_worker
        self.gpus = float(job.device == "cuda") if gpus is None else gpus
        self.wanted = cluster.workers
        self.cpus = cluster.cpus_per_worker or self.share_of_cpus()
        self.job = ray.put(job)
        self.actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)(_Worker)
        self.busy: dict[Any, tuple[Any, Group | None]] = {}  # call -> its actor and group; None while loading
        self.idle: list[Any] = []
        self.losses: Counter[int] = Counter()

    def run(self, groups: Sequence[Group]) -> Results:
        waiting = deque(groups)
        there = len(self.idle) + len(self.busy)
        for _ in range(there, min(len(groups), self.wanted or self.room())):
            self.start()
        while waiting or self.at_work:
            self.hand_out(waiting)
            for call in self.next():
                actor, group = self.busy.pop(call)
                try:
                    results = self.ray.get(call)
                except self.ray.exceptions.RayTaskError as error:
                    raise _explained(error) from error
                except self.ray.exceptions.RayError as error:
                    self.lost(group, error)
                    if group is not None:
                        waiting.appendleft(group)
                    self.start()
                    continue
                self.idle.append(actor)
                self.hand_out(waiting)  # before the results are written
                if group is None:
                    self.losses[LOADING] = 0
                else:
                    yield group, results

    def hand_out(self, waiting: deque[Group]) -> None:
        """A group to every actor that has none."""
        while waiting and self.idle:
            actor, group = self.idle.pop(), waiting.popleft()
            self.busy[actor.run.remote(group)] = (actor, group)

    @property
    def at_work(self) -> bool:
        return any(group is not None for _, group in self.busy.values())

    def start(self) -> None:
        """One more actor, which loads its model as soon as a node has room for it."""
        actor = self.actor.remote(self.job)
        self.busy[actor.ready.remote()] = (actor, None)

    def next(self) -> list[Any]:
        """Calls that have ended; waits for one."""
        while True:
            done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=LOOK)
            if done:
                return done
            if not self.at_work:
                self.room()

    def lost(self, group: Group | None, error: Exception) -> None:
        key = LOADING if group is None else group[0]
        self.losses[key] += 1
        if self.losses[key] > MAX_LOSSES:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = "loading the model" if group is None else f"the cells {group}"
            raise MissingError(
                f"{self.losses[key]} workers were lost while {what} ran ({type(error).__name__}: {first[:200]}); "
                "give each more memory (fewer workers a node), or look at the nodes' logs. What is finished is kept."
            )

    def nodes(self) -> list[dict[str, float]]:
        """Resources of the living nodes."""
        return [n["Resources"] for n in self.ray.nodes() if n["Alive"]]

    def share_of_cpus(self) -> int:
        """CPUs of one actor: 1 beside a GPU; else all of the smallest node, or less where more actors are wanted."""
        cpus = [int(n["CPU"]) for n in self.nodes() if n.get("CPU", 0) >= 1]
        if self.gpus or not cpus:
            return 1
        return max(1, min(min(cpus), sum(cpus) // (self.wanted or 1)))

    def room(self) -> int:
        """How many actors the living nodes can hold."""
        nodes, total = self.nodes(), 0
        for node in nodes:
            fits = [node.get("CPU", 0) / self.cpus] if self.cpus else []
            fits += [node.get("GPU", 0) / self.gpus] if self.gpus else []
            total += int(min(fits)) if fits else 1
        if total == 0:
            raise MissingError(
                f"none of the cluster's {len(nodes)} nodes has room for a worker with {self.cpus:g} CPU and {self.gpus:g} GPU; "
                "start nodes that have (ray start --num-cpus/--num-gpus). What is finished is kept."
            )
        return total

    def close(self) -> None:
        """End every actor, loading or working or idle."""
        for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
            with contextlib.suppress(Exception):
                self.ray.kill(actor)


def _explained(error: Any) -> BaseException:
    """What went wrong in an actor, as it would have read here."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, SaeBiasError):
        return type(cause)(f"on a worker of the cluster: {cause}")
    return cause if isinstance(cause, BaseException) else error


# ── finding the cluster ─────────────────────────────────────────────────────────────────────────────────────
def _ray() -> Any:
    if find_spec("ray") is None:
        raise MissingError("--cluster needs Ray; `pip install 'sae-bias[ray]'`.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _checked(address: str, timeout: float) -> str:
    """`address`, once a cluster has answered there; Ray itself would wait for minutes or end this process."""
    if address == "local":
        return address
    place = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    host, mark, port = place.removeprefix("ray://").rpartition(":")
    if place != "auto" and not (mark and host and port.isdigit()):
        raise RequestError(f"--cluster {address!r}: expected auto, local, HOST:PORT or ray://HOST:PORT.")
    if place != "auto" and not _listens(host, int(port), min(timeout, 10)):
        raise _nobody(place)
    look = f"import ray; ray.init(address={place!r}, log_to_driver=False, logging_level='CRITICAL')"
    try:
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise _nobody(place, f"no answer in {timeout:g} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise _nobody(place, last[:200])
    return place


def _listens(host: str, port: int, timeout: float) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), timeout=timeout).close()
    except OSError:
        return False
    return True


def _nobody(place: str, why: str = "") -> MissingError:
    where = (
        "this machine belongs to no Ray cluster" if place == "auto" else f"no Ray cluster answers at {place}"
    )
    return MissingError(
        f"{where}{f' ({why})' if why else ''}; start one with `ray start --head` (and `ray start --address HOST:PORT` on the "
        "other nodes), or use --cluster local."
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Ray's banner goes nowhere; standard output belongs to the command."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
