"""A real Ray cluster on one machine for the tests: every node a raylet of its own, in processes of its own, with one CPU."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STORE = 78_650_000  # bytes of object store: the least that Ray allows is 75 MB
QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Nodes:
    """The nodes of one cluster; `address` is the head's."""

    port: int
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, *, head: bool = False, cores: str | None = None) -> int:
        """Start a node and wait until it has joined; its number. `cores` pins it and all its workers."""
        number = len(self.processes)
        join = (
            [f"--port={self.port}", "--head", "--include-dashboard=false"]
            if head
            else [f"--address={self.address}"]
        )
        pin = ["taskset", "-c", cores] if cores is not None else []
        command = [
            *pin, sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *join, "--num-cpus=1",
            f"--object-store-memory={STORE}", "--node-ip-address=127.0.0.1", "--block", "--disable-usage-stats",
            f"--temp-dir={self.folder}" if head else "--log-style=record",
        ]  # fmt: skip
        log = (self.folder / f"node-{number}.log").open("wb")
        environment = {**os.environ, **QUICK_DEATH, **QUIET}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.processes.append(process)
        return number

    def raylet(self, number: int) -> int:
        """Process id of a node's raylet."""
        for pid in _family(self.processes[number].pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet"):
                    return pid
        raise AssertionError(f"node {number} has no raylet")

    def kill(self, number: int) -> None:
        """Kill a node as a lost machine is lost: its raylet and every process of it, at once."""
        for pid in _family(self.processes[number].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes[number].wait()

    def close(self) -> None:
        for number, process in reversed(list(enumerate(self.processes))):
            if process.poll() is None:
                self.kill(number)


@contextlib.contextmanager
def nodes(n: int, *, cores: tuple[str, ...] = ()) -> Iterator[Nodes]:
    """A head and n - 1 further nodes, all gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path must be short
    cluster = Nodes(_free_port(), folder)
    try:
        for k in range(n):
            cluster.add(head=k == 0, cores=cores[k] if cores else None)
            _wait_for(cluster, k + 1)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(cluster: Nodes, n: int, seconds: float = 60) -> None:
    """Until n raylets run and the head's port answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, AssertionError):
            cluster.raylet(n - 1)
            socket.create_connection(("127.0.0.1", cluster.port), timeout=1).close()
            if n == 1 or b"Ray runtime started" in (cluster.folder / f"node-{n - 1}.log").read_bytes():
                return
        time.sleep(0.1)
    log = (cluster.folder / f"node-{n - 1}.log").read_text(errors="replace")
    raise AssertionError(f"node {n - 1} did not start:\n{log[-2000:]}")


def _family(pid: int) -> list[int]:
    """A process and all below it, leaves last; Ray's daemons stay below `ray start --block`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, stack = [], [pid]
    while stack:
        found.append(one := stack.pop())
        stack += children.get(one, [])
    return found


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
