"""Nodes of a real cluster: one that joins while a run waits for it, paths that are looked at from both, and where pairs are
fetched."""

import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.util

from rayalign import nodes
from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from rayalign.data.stream import _streamed
from rayalign.shared_paths import SharedFile, check_shared_paths
from tests.cluster import Cluster, head_without_cpus, start_node


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head_without_cpus(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


def test_a_run_waits_for_the_node_that_its_workers_need_and_looks_at_its_paths_from_there(
    head: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"room for 0 .* and no more came in 1 s"):
        nodes.wait_for_workers(Config(DPO(), cluster=ClusterConfig(num_workers=2, wait_for_nodes=1)))
    started: list[subprocess.Popen[bytes]] = []
    joins = threading.Timer(1, lambda: started.append(start_node(head, tmp_path)))
    joins.start()
    try:
        began = time.monotonic()
        with caplog.at_level(logging.INFO):
            nodes.wait_for_workers(Config(DPO(), cluster=ClusterConfig(num_workers=2, wait_for_nodes=60)))
            (tmp_path / "rows.jsonl").write_bytes(b"12")
            rows = SharedFile("--dataset rows.jsonl", str(tmp_path / "rows.jsonl"), 2)
            check_shared_paths([rows], {"--output_dir run": str(tmp_path / "run")})
        assert 1 < time.monotonic() - began < 60
        assert [record.getMessage() for record in caplog.records if record.name.startswith("rayalign")] == [
            "Waiting for nodes, 60 s at most (--wait_for_nodes): there is room for 0 of 2 workers with 1 CPU each; the cluster "
            "has 1 node with 0 CPUs and 0 GPUs",
            "The nodes for 2 workers are there",
            "Looking at the run's paths from 2 nodes",
        ]
        assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
        assert not (tmp_path / "run").exists()
        gone = SharedFile("--dataset gone.jsonl", str(tmp_path / "gone.jsonl"), 2)
        with pytest.raises(ValueError, match=r"--dataset gone.jsonl: [\d.]+, [\d.]+ \(2\) \(of 2 nodes\) do not see"):
            check_shared_paths([gone], {}, arrival_seconds=0)
    finally:
        joins.join()
        for node in started:
            node.terminate()
            node.wait()


def test_pairs_are_fetched_on_the_node_of_the_worker_that_needs_them(head: Cluster, tmp_path: Path) -> None:
    """And on no other, such as a head without CPUs: here the worker is this process, beside the head."""
    node = start_node(head, tmp_path)
    try:
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            time.sleep(0.1)
        tables = list(_streamed(_where, [{"first": step, "last": step + 1} for step in range(8)]))
        found = pa.concat_tables(tables).to_pydict()
        assert found["first"] == list(range(8))
        assert set(found["node"]) == {ray.get_runtime_context().get_node_id()}
    finally:
        node.terminate()
        node.wait()


def _where(lines: pa.Table) -> pa.Table:
    return lines.append_column("node", pa.array([ray.get_runtime_context().get_node_id()] * len(lines)))
