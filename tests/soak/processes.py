"""The processes of a Ray cluster of this machine, by what they do, and their sudden end."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from tests.cluster import START_SECONDS, Cluster, running_cluster, start_node

HELPERS = (
    *("_AutoscalingCoordinatorActor", "_StatsActor", "ActorLocationTracker", "DatasetManager", "PlacementGroupCleaner"),
    *("PreemptionWatcher", "SynchronizationActor"),
)
"""Actors that Ray Data and Ray Train start beside the work."""

NAMES = {
    "train worker": ("ray::RayTrainWorker",),
    "controller": ("ray::TrainController",),
    "data task": ("ray::MapBatches",),
    "reference worker": ("ray::MapWorker", "ray::_MapWorker", "ray::RayTrainWorker"),
    "helper": tuple(f"ray::{name}" for name in HELPERS),
}
"""How Ray titles the processes that do these things, as far as they are at work. Train workers compute a sharded model's
reference."""


SECONDS_TO_FOLLOW = 20
"""In which the processes of a node end after its raylet."""


class Nodes:
    """A head without CPUs and two nodes of some, which can be killed and replaced; a context that ends them all."""

    def __init__(self, env: dict[str, str], *, num_cpus: int = 2) -> None:
        self.env = env
        self._num_cpus = num_cpus
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Nodes":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def start(self) -> None:
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="storm", ignore_cleanup_errors=True)))
        self.head: Cluster = self._open.enter_context(running_cluster(folder, num_cpus=0, env=self.env))
        self._folder, self._started = folder, 0
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        for _ in range(2):
            self.add_node()

    def add_node(self) -> None:
        """Returns once it has joined: two that look for a free name of a socket at once may take the same."""
        self._started += 1
        folder = self._folder / f"node{self._started}"
        # The head's log monitor sees all logs of this machine.
        node = start_node(self.head, folder, "--include-log-monitor=false", f"--num-cpus={self._num_cpus}")
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (folder / "node.log").read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"A node did not start:\n{(folder / 'node.log').read_text()}")
            time.sleep(0.1)
        self._nodes[node.pid] = node

    def kill_node(self, number: int, *, only_raylet: bool = False) -> None:
        """Ends a node with all that runs there, or its raylet, without which the others end by themselves. It is one with train
        workers if there are some, and another comes in its place."""
        busy = [node for node in self._nodes if self.pids("train worker", [node])] or [*self._nodes]
        node = busy[number % len(busy)]
        processes = _tree([node])
        if only_raylet:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    if process.name() == "raylet":
                        process.kill()
            psutil.wait_procs(processes, timeout=SECONDS_TO_FOLLOW)
        _kill(processes)
        self._nodes.pop(node).wait()
        self.add_node()

    def kill(self) -> None:
        """Ends every process of every node."""
        self._end()
        self._open = contextlib.ExitStack()

    def _end(self) -> None:
        kill_all([*self._nodes, self.head.pid])
        for node in self._nodes.values():
            node.wait()
        self._open.close()

    def pids(self, what: str, nodes: Sequence[int] = ()) -> list[int]:
        """The processes of one of NAMES, on some nodes or on all, in the order of their numbers."""
        found = []
        for process in _tree(nodes or [*self._nodes, self.head.pid]):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(NAMES[what]):
                    found.append(process.pid)
        return sorted(found)


def kill_all(roots: Iterable[int]) -> None:
    """Kills these processes and all that they started, and those in turn."""
    _kill(_tree(roots))


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _tree(roots: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in roots:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            found += [root, *root.children(recursive=True)]
    return found
