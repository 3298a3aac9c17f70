"""A sweep that is killed, started twice or out of disk: it resumes, and its table is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from killed_sweep import sweep_of
from tallies import tally

import sae_bias as sb
from sae_bias.runs.folder import RunFolder

HERE = Path(__file__).resolve().parents[1] / "helpers"
N_KILLS = 30


def _start(tiny, out: Path, **options) -> subprocess.Popen:
    command = [
        sys.executable,
        str(HERE / "killed_sweep.py"),
        str(tiny.folder),
        str(tiny.sae_folder),
        str(out),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options
    )


def _undisturbed(tiny, out: Path) -> pd.DataFrame:
    """The table of a run that nobody disturbs, in a process of its own: threads are part of what makes the bits."""
    assert "done" in _start(tiny, out).communicate()[0]
    return RunFolder(out).read_table("sweep")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_and_then_the_same_table(gemma3, pairs, tmp_path):
    """kill -9 at random moments; every part stays readable, and the resumed table has the bits of an uninterrupted run."""
    rng, cells = random.Random(0), tmp_path / "cells"
    killed = 0
    while killed < N_KILLS:
        process = _start(gemma3, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.stderr.read()  # type: ignore[union-attr]
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        finished = "done" in process.communicate()[0]
        killed += 1
        for part in cells.glob("*.parquet") if cells.is_dir() else ():
            assert len(pd.read_parquet(part)) == len(pairs)
        if finished:  # nothing was left to interrupt: take a random half away and go on
            for part in rng.sample(sorted(cells.iterdir()), len(list(cells.iterdir())) // 2):
                part.unlink()
    last = _start(gemma3, tmp_path)
    assert "done" in last.communicate()[0]
    table = RunFolder(tmp_path).read_table("sweep")
    assert not table.duplicated(["cell", "split"]).any()
    pd.testing.assert_frame_equal(table, _undisturbed(gemma3, tmp_path / "undisturbed"), check_exact=True)
    assert not list(tmp_path.rglob("*.partial"))
    tally("kill -9 during a sweep, resumed to the same bits", N_KILLS)


def test_an_interrupted_sweep_goes_on_where_it_stopped(gemma3, pairs, probe, tmp_path, monkeypatch):
    """The quick form of the kill: an exception in the middle of a group."""
    sweep = sb.Sweep([sb.Clamp(gemma3.feature(3), -0.2 * k) for k in range(20)])
    whole = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe).frame
    plain, written = RunFolder.write_cell, []

    def dies(self, cell, frame, facts):
        if len(written) == 11:
            raise KeyboardInterrupt
        written.append(cell)
        plain(self, cell, frame, facts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_cell", dies)
        sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 11
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    resumed = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path).frame
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert all((tmp_path / "cells" / name).stat().st_mtime_ns == at for name, at in stamps.items())


@pytest.mark.slow
def test_two_processes_on_one_folder(gemma3, pairs, probe, tmp_path):
    """The second is told in one line and does nothing; the first finishes."""
    first = _start(gemma3, tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    deadline = time.time() + 60
    while not (tmp_path / "cells").is_dir():
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        with pytest.raises(sb.SaeBiasError, match="another process is writing"):
            sb.run_sweep(gemma3.model, pairs, sweep_of(str(gemma3.sae_folder)), probe=probe, out=tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert "done" in first.communicate()[0]
    table = RunFolder(tmp_path).read_table("sweep")
    pd.testing.assert_frame_equal(table, _undisturbed(gemma3, tmp_path / "undisturbed"), check_exact=True)


@pytest.mark.slow
def test_a_real_write_that_fails_is_an_error_and_the_folder_resumes(gemma3, tmp_path):
    """The operating system refuses the write half way through a file (a size limit stands in for a full disk)."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = _start(gemma3, tmp_path, preexec_fn=limit)
    out, err = process.communicate()
    assert "done" not in out
    assert process.returncode != 0
    assert "cannot write" in err or "no space left" in err
    assert not list(tmp_path.rglob("*.partial"))
    again = _start(gemma3, tmp_path)
    assert "done" in again.communicate()[0]
    pd.testing.assert_frame_equal(
        RunFolder(tmp_path).read_table("sweep"),
        _undisturbed(gemma3, tmp_path / "undisturbed"),
        check_exact=True,
    )


def test_a_full_disk_in_the_middle_of_a_sweep(gemma3, pairs, probe, tmp_path, monkeypatch):
    """Finished cells are kept, the error says so, and the same call goes on."""
    sweep = sb.Sweep([sb.Clamp(gemma3.feature(3), -0.2 * k) for k in range(12)])
    plain, written = pd.DataFrame.to_parquet, []

    def full(self, to, **options):
        if len(written) == 5:
            Path(to).write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")
        written.append(to)
        return plain(self, to, **options)

    with monkeypatch.context() as patch, pytest.raises(sb.MissingError, match="no space left"):
        patch.setattr(pd.DataFrame, "to_parquet", full)
        sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path)
    assert len(list((tmp_path / "cells").glob("*"))) == 5
    resumed = sb.run_sweep(gemma3.model, pairs, sweep, probe=probe, out=tmp_path).frame
    pd.testing.assert_frame_equal(
        resumed, sb.run_sweep(gemma3.model, pairs, sweep, probe=probe).frame, check_exact=True
    )
