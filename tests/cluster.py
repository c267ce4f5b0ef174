"""A Ray cluster of this machine for a whole test session, and the pipelines run on it as a person would run them."""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parent.parent
START_SECONDS = 120
RUN_SECONDS = 300

CANDIDATE_PORTS = iter(range(20_000 + os.getpid() % 2000, 22_700))
"""Above Ray's worker ports (10002-19999); a storage server's second port, 10,000 higher, stays below the kernel's choices."""


@dataclass(frozen=True)
class Cluster:
    """Where the cluster answers: `address` for drivers, `dashboard` for jobs, `metrics` for Prometheus; `pid` is the process
    above all its others, and `env` what they and its clients share."""

    address: str
    dashboard: str
    metrics: str
    pid: int
    env: dict[str, str] = field(repr=False)

    def start(self, *words: object, env: dict[str, str] | None = None, log: Path | None = None) -> subprocess.Popen[str]:
        """Starts a program of the project (`pipelines/dpo.py --flag value`) with Python, attached to this cluster."""
        with log.open("w") if log else contextlib.nullcontext(subprocess.PIPE) as output:
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env={**self.env, "RAY_ADDRESS": self.address, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, *words: object, env: dict[str, str] | None = None, code: int = 0) -> str:
        """Runs a program to its end, checks its exit code, and returns what it printed."""
        process = self.start(*words, env=env)
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{words[0]} took more than {RUN_SECONDS} s:\n{output[-5000:]}") from None
        assert process.returncode == code, f"{words[0]} ended with {process.returncode}, not {code}:\n{output[-5000:]}"
        return output


@contextlib.contextmanager
def running_cluster(folder: Path, *, num_cpus: int, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A head node with a dashboard on free ports; ends with everything it started."""
    port, dashboard, agent, client, metrics = free_ports(5)
    variables = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_DEDUP_LOGS": "0",
        **(env or {}),
    }
    words = [
        *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true", "--dashboard-host=127.0.0.1"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *(f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1", f"--object-store-memory={200 * 2**20}"),
        f"--temp-dir={folder}",
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(dashboard, head, log)
        pages = (f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
        yield Cluster(f"127.0.0.1:{port}", *pages, head.pid, variables)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=2)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert head.poll() is None, f"The cluster ended at once:\n{log.read_text()}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            if re.search("Ray runtime started", log.read_text()):
                return
        time.sleep(0.2)
    raise AssertionError(f"The cluster did not start in {START_SECONDS} s:\n{log.read_text()}")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, none of them given out before by this process."""
    ports: list[int] = []
    for port in CANDIDATE_PORTS:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("There are no free ports.")


@contextlib.contextmanager
def head_without_cpus(folder: Path) -> Iterator[Cluster]:
    """A head node without CPUs, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch, running_cluster(folder, num_cpus=0) as cluster:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address=cluster.address, logging_level=logging.WARNING)
        yield cluster
        ray.shutdown()


def start_node(head: Cluster, folder: Path, *of_this_node: str) -> subprocess.Popen[bytes]:
    """Starts another node of a cluster on this machine, with 2 CPUs; one at a time, since two that look for a free name of a
    socket at once may take the same."""
    agent, metrics, runtime = free_ports(3)
    words = (
        *("start", "--block", f"--address={head.address}", "--node-ip-address=127.0.0.1", "--num-cpus=2", *of_this_node),
        *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}"),
        f"--object-store-memory={100 * 2**20}",
    )
    folder.mkdir(exist_ok=True)
    with (folder / "node.log").open("w") as log:
        program = str(Path(sys.executable).with_name("ray"))
        return subprocess.Popen([program, *words], env=head.env, stdout=log, stderr=subprocess.STDOUT)
