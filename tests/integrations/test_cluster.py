"""Cells on a Ray cluster: the local run's table, whatever is lost on the way.

The cluster is a real one: two raylets in processes of their own on this machine, one CPU each (`ray_nodes`). The expected table is
the local run's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from killed_sweep import sweep_of
from ray_nodes import nodes

import sae_bias as sb
from sae_bias.cli.main import main
from sae_bias.integrations import ray as cluster_module
from sae_bias.integrations.ray import Cluster, _Job, _Pool
from sae_bias.runs.folder import RunFolder
from sae_bias.steering.edits import Patch
from sae_bias.workflows.cells import Cell
from sae_bias.workflows.sweep import collect
from sae_bias.workflows.sweep_work import LocalWorkers, Work

ray = pytest.importorskip("ray")

HERE = Path(__file__).resolve().parents[1] / "helpers"


@pytest.fixture(scope="module")
def work(make_tiny):
    """A tiny checkpoint, two hundred cells in groups, and the local run's result."""
    tiny = make_tiny("gemma3")
    from architectures import NEGATIVE, PAIRS, POSITIVE

    pairs = sb.PromptPairs(tuple(sb.PromptPair(human, ai, t, e) for t, e, human, ai in PAIRS), name="tiny")
    probe, sweep = sb.Probe(POSITIVE, NEGATIVE), sweep_of(str(tiny.sae_folder))
    return tiny, (tiny.fresh(), pairs, sweep), probe, sb.run_sweep(tiny.model, pairs, sweep, probe=probe)


def assert_same(found: sb.SweepResult, local: sb.SweepResult) -> None:
    """The local run's table and pairs to float32 rounding, every cell once."""
    pd.testing.assert_frame_equal(found.frame, local.frame, rtol=1e-5, atol=1e-6)
    assert found.frame.duplicated(["cell", "split"]).sum() == 0
    assert found.cells.keys() == local.cells.keys()
    for name, frame in local.cells.items():
        pd.testing.assert_frame_equal(found.cells[name], frame, rtol=1e-4, atol=1e-5)
        assert found.cells[name].attrs["receipt"] == frame.attrs["receipt"]


@pytest.mark.slow
def test_two_nodes_give_the_local_table_also_when_one_is_lost(work, tmp_path, monkeypatch):
    """A real cluster of two; the second node is killed after three groups, the driver of another run after some cells."""
    tiny, args, probe, local = work
    lost, groups = [], []
    note = _Pool.lost
    monkeypatch.setattr(
        _Pool, "lost", lambda pool, group, error: (lost.append(group), note(pool, group, error))[1]
    )
    with nodes(2) as cluster:
        out = tmp_path / "driver"
        driver = start_driver(tiny, out, cluster.address)
        wait_for_cells(driver, out, 20)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        n_kept = len(list((out / "cells").glob("*.parquet")))
        assert 20 <= n_kept < len(local.cells)

        def executor(job, todo):
            with Cluster(cluster.address).connected():
                assert sum(n["Alive"] for n in ray.nodes()) == 2
                for k, (group, results) in enumerate(Cluster(cluster.address).run(job, todo)):
                    groups.append(tuple(group))
                    if k == 3:
                        cluster.kill(1)
                    yield group, results
                until = time.monotonic() + 60  # the head notices a lost node by its missing heartbeats
                while (alive := sum(n["Alive"] for n in ray.nodes())) > 1 and time.monotonic() < until:
                    time.sleep(0.5)
                assert alive == 1

        found = sb.run_sweep(*args, probe=probe, out=tmp_path / "node", executor=executor)
        assert lost, "the node was killed while it had work, and that was noticed"
        assert len(groups) == len(set(groups))
        assert_same(found, local)
        assert_same(collect(tmp_path / "node"), local)

        before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.parquet")}
        resumed = sb.run_sweep(*args, probe=probe, out=out, executor=Cluster(cluster.address).run)
        assert_same(resumed, local)
        assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "kept cells are not written again"


def start_driver(tiny, out: Path, address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "cluster_driver.py"), str(tiny.folder), str(tiny.sae_folder), str(out), address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_cells(driver: subprocess.Popen[str], out: Path, n: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(list((out / "cells").glob("*.parquet"))) < n:
        assert driver.poll() is None, driver.stdout.read() if driver.stdout else ""
        assert time.monotonic() < end
        time.sleep(0.01)


STUDY = """
name: small
model: organism:planted
saes: [organism:planted/constructed]
strengths: [0.0, -1.0]
controls: 30
ablate_top: 4
checks: false
"""


@pytest.mark.slow
def test_a_study_run_on_a_cluster_has_the_local_tables(tmp_path, capsys):
    """`sae-bias run --cluster` on two nodes, one of them killed while the sweep runs."""
    (tmp_path / "study.yaml").write_text(STUDY)
    study, here, there = str(tmp_path / "study.yaml"), tmp_path / "here", tmp_path / "there"
    assert main(["run", study, "--out", str(here), "--quiet"]) == 0
    with nodes(2) as cluster:
        command = [sys.executable, "-m", "sae_bias.cli.main", "run", study, "--out", str(there), "--quiet"]
        driver = subprocess.Popen(
            [*command, "--cluster", cluster.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_cells(driver, there / "sweep", 9)
        cluster.kill(1)
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
    a, b = collect(here / "sweep"), collect(there / "sweep")
    pd.testing.assert_frame_equal(a.frame, b.frame, rtol=1e-4, atol=1e-6)
    assert out.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1], "the headline is the local one"
    for name in ("pairs", "ranking", "sweep", "controls", "cumulative"):
        one, two = (RunFolder(f).read_table(name) for f in (here, there))
        pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_shards_of_a_study_run_side_by_side_and_merge_to_the_whole(tmp_path, capsys):
    """Two processes at once on one run folder, merged; then the command without --shard measures no cell again."""
    (tmp_path / "study.yaml").write_text(STUDY)
    study, here, there = str(tmp_path / "study.yaml"), tmp_path / "here", tmp_path / "there"
    assert main(["run", study, "--out", str(here), "--quiet"]) == 0
    command = [
        sys.executable,
        "-m",
        "sae_bias.cli.main",
        "run",
        study,
        "--out",
        str(there),
        "--quiet",
        "--shard",
    ]
    shards = [
        subprocess.Popen([*command, f"{i}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in (1, 2)
    ]
    for shard in shards:
        out, err = shard.communicate(timeout=300)
        assert shard.returncode == 0, err
        assert f"sae-bias merge {there}" in out
    local = capsys.readouterr().out.splitlines()
    assert main(["merge", str(there), "--quiet"]) == 0
    before = {p: p.stat().st_mtime_ns for p in (there / "sweep" / "cells").glob("*.parquet")}
    capsys.readouterr()
    assert main(["run", study, "--out", str(there), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == local[:-1]
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    pd.testing.assert_frame_equal(collect(here / "sweep").frame, collect(there / "sweep").frame)


# --- without a cluster ---


def job_of(tiny, pairs, probe, *edits) -> Work:
    cells = tuple(Cell((e,)) for e in edits)
    return Work(tiny.model, pairs, probe, cells, (False,) * len(cells))


def test_a_job_says_where_the_model_is_and_carries_features_by_value(gemma3, pairs, probe):
    job = _Job.of(job_of(gemma3, pairs, probe, sb.Ablate(gemma3.feature(3))))
    assert (job.model, job.dtype, job.device) == (str(gemma3.folder.resolve()), "float32", "cpu")
    again = job.work()
    expected = [r.pairs for r in job_of(gemma3, pairs, probe, sb.Ablate(gemma3.feature(3))).run([0])]
    pd.testing.assert_frame_equal(again.run([0])[0].pairs, expected[0])


def test_what_cannot_be_sent_is_refused_before_a_cluster_is_asked(gemma3, pairs, probe):
    in_memory = sb.load_model(gemma3.fresh().hf)
    for work, expected in (
        (job_of(gemma3, pairs, probe, Patch(1, gemma3.model)), "cannot be sent"),
        (Work(in_memory, pairs, probe, (), ()), "load it by name"),
    ):
        with pytest.raises(sb.RequestError, match=expected):
            next(iter(Cluster("127.0.0.1:1").run(work, [[0]])))


def test_other_weights_on_a_worker_are_refused(gemma3, pairs, probe):
    from dataclasses import replace

    job = replace(_Job.of(job_of(gemma3, pairs, probe)), digest="another")
    with pytest.raises(sb.RequestError, match="not the same here"):
        job.work()


def test_the_local_executor_runs_groups_in_order(gemma3, pairs, probe):
    work = job_of(gemma3, pairs, probe, *(sb.Clamp(gemma3.feature(3), -float(k)) for k in range(4)))
    assert [group for group, _ in LocalWorkers().run(work, [[0, 1], [2, 3]])] == [[0, 1], [2, 3]]


# --- who does what, against a Ray of a few lines: actors that die when told to ---


class FakeRay:
    """Actors in this process; the n-th calls named in `dies` end their actor in place of answering."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception):
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self, dies: set[int] = frozenset(), nodes: tuple[float, ...] = (1.0, 1.0), fails: int = -1):
        self.dies, self.fails, self.cpus, self.calls, self.killed = dies, fails, nodes, 0, 0
        self.sent: dict[int, tuple[str, tuple]] = {}

    def remote(self, **options: object):
        ray = self

        class Method:
            def __init__(self, name: str, actor: object):
                self.name, self.actor = name, actor

            def remote(self, *args: object):
                ray.calls += 1
                ray.sent[ray.calls] = self.name, args
                return ray.calls

        class Actor:
            def __init__(self, job: object):
                self.ready, self.run = Method("ready", self), Method("run", self)

        return lambda kind: type("Handle", (), {"remote": staticmethod(Actor)})

    def put(self, value: object) -> object:
        return value

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": n}} for n in self.cpus]

    def wait(self, calls, num_returns: int, timeout: float):
        return calls[:1], calls[1:]

    def get(self, call):
        name, args = self.sent[call]
        if call in self.dies:
            raise self.exceptions.RayError("the actor died")
        if call == self.fails:
            raise self.exceptions.RayTaskError(sb.RequestError("not the same here"))
        return "node" if name == "ready" else [f"results of {args[0]}"]

    def kill(self, actor: object) -> None:
        self.killed += 1


GROUPS = [[0], [1, 2], [3, 4], [5]]


def pool_of(ray, **options) -> _Pool:
    return _Pool(ray, Cluster(**options), type("Job", (), {"device": "cpu"}))


@pytest.mark.parametrize("dies", [set(), {1}, {3}, {4, 5}, {1, 2, 4, 7}])
def test_every_group_comes_back_once_whatever_dies(dies):
    found = list(pool_of(FakeRay(dies)).run(GROUPS))
    assert sorted(group for group, _ in found) == GROUPS
    assert all(results == [f"results of {group}"] for group, results in found)


def test_a_group_that_ends_every_worker_is_given_up():
    with pytest.raises(sb.MissingError, match=r"workers were lost while the cells \[0\] ran"):
        list(pool_of(FakeRay(set(range(2, 60, 2))), workers=1).run([[0]]))


def test_an_error_in_a_worker_is_read_as_it_was_raised_there():
    with pytest.raises(sb.RequestError, match="on a worker of the cluster: not the same here"):
        list(pool_of(FakeRay(fails=1)).run(GROUPS))


def test_workers_take_the_nodes_cpus_and_are_all_ended():
    ray = FakeRay(nodes=(8.0, 4.0))
    pool = pool_of(ray)
    assert (pool.cpus, pool.room()) == (4, 3)
    assert (pool_of(ray, workers=6).cpus, pool_of(ray, gpus_per_worker=1).cpus) == (2, 1)
    list(pool.run(GROUPS))
    pool.close()
    assert ray.killed == 3
    with pytest.raises(sb.MissingError, match="none of the cluster's 2 nodes has room"):
        pool_of(ray, gpus_per_worker=1).room()


# --- what a user reads ---


@pytest.fixture
def study(tmp_path) -> str:
    (tmp_path / "study.yaml").write_text("model: organism:planted\n")
    return str(tmp_path / "study.yaml")


def fails(capsys, code: int, *argv: str) -> str:
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err


def test_without_ray_it_says_how_to_get_it(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster_module, "find_spec", lambda name: None)
    err = fails(capsys, 3, "run", study, "--out", str(tmp_path / "run"), "--cluster", "auto")
    assert "pip install 'sae-bias[ray]'" in err
    assert not (tmp_path / "run").exists()


def test_an_address_where_nobody_listens(study, capsys, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    err = fails(capsys, 3, "run", study, "--out", str(tmp_path / "run"), "--cluster", f"127.0.0.1:{port}")
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in err and "ray start --head" in err
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_something_else(capsys):
    """A port that listens and never answers: the time is up, and this process lives."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with (
            pytest.raises(sb.MissingError, match="no Ray cluster answers at"),
            Cluster(f"127.0.0.1:{s.getsockname()[1]}", timeout=1).connected(),
        ):
            pass


def test_wrong_requests(study, capsys):
    assert "expected auto, local, HOST:PORT" in fails(capsys, 2, "run", study, "--cluster", "nowhere")
    assert "choose one" in fails(capsys, 2, "run", study, "--cluster", "local", "--shard", "1/2")
    assert "choose one" in fails(capsys, 2, "run", study, "--workers", "2", "--shard", "1/2")
    assert "needs --cluster" in fails(capsys, 2, "run", study, "--gpus-per-worker", "2")
