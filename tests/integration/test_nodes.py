"""Nodes of a real cluster: one that joins while a run waits for it, and paths that are looked at from both."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data
import ray.util

from rayalign import nodes
from rayalign.algorithms import DPO
from rayalign.cluster import configure_ray_data, place_ray_data
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from rayalign.shared_paths import SharedFile, check_shared_paths
from tests.cluster import Cluster, free_ports, running_cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node without CPUs, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch, running_cluster(tmp_path_factory.mktemp("head"), num_cpus=0) as cluster:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address=cluster.address, logging_level=logging.WARNING)
        yield cluster
        ray.shutdown()


def start_node(head: Cluster, folder: Path, *of_this_node: str) -> subprocess.Popen[bytes]:
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


def test_workers_and_data_tasks_run_on_the_nodes_with_their_kind_of_gpu_and_labels(head: Cluster, tmp_path: Path) -> None:
    of_train = ("--num-gpus=1", f"--resources={json.dumps({'accelerator_type:L4': 1})}", "--labels=pool=train")
    started = [start_node(head, tmp_path / "train", *of_train)]
    try:
        flags = {"gpus_per_worker": 1, "accelerator_type": "L4", "label_selector": ("pool=train",)}
        config = Config(DPO(), cluster=ClusterConfig(**flags, data_label_selector=("pool=data",), wait_for_nodes=60))
        nodes.wait_for_workers(config)
        # Not beside the first: both would look for a free name of a socket at the same time, and may take the same.
        started.append(start_node(head, tmp_path / "data", "--labels=pool=data"))
        nodes.wait_for_cpus(config)
        other = Config(DPO(), cluster=ClusterConfig(**{**flags, "accelerator_type": "A100"}, wait_for_nodes=0))
        with pytest.raises(ValueError, match="--accelerator_type A100, ") as refused:
            nodes.wait_for_workers(other)
        for words in ("1 node with 2 CPUs and 1 GPU of type L4, pool=train", "1 node with 2 CPUs and 0 GPUs, pool=data"):
            assert words in str(refused.value)  # in any order
        by_pool = {node["Labels"].get("pool"): node["NodeID"] for node in ray.nodes() if node["Alive"]}

        room = nodes.Room(1, {"CPU": 1, "GPU": 1}, "workers", "", "", "L4", config.cluster.worker_labels)
        group = ray.util.placement_group([room.bundle], bundle_label_selector=[dict(room.labels)])
        assert group.wait(30)
        assert ray.util.placement_group_table(group)["bundles_to_node_id"] == {0: by_pool["train"]}
        ray.util.remove_placement_group(group)

        configure_ray_data()
        place_ray_data(config.cluster.data_labels)
        where = ray.data.from_items(list(range(4)), override_num_blocks=4).map_batches(
            lambda _: pa.table({"node": [ray.get_runtime_context().get_node_id()]}), batch_format="pyarrow"
        )
        assert [row["node"] for row in where.take_all()] == [by_pool["data"]] * 4
    finally:
        place_ray_data({})
        for node in started:
            node.terminate()
            node.wait()
