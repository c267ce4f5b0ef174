"""Nodes with labels and kinds of GPU: workers and encoding run where flags say. The nodes are processes of this machine."""

import json
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
from tests.cluster import Cluster, head_without_cpus, start_node


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head_without_cpus(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


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
