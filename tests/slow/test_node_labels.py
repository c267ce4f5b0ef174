"""Nodes with labels and kinds of GPU: workers and encoding run where flags say. The nodes are processes of this machine: a head
without CPUs, one for data, two to train on."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data
import ray.util
import ray.util.state

from rayalign import nodes
from rayalign.algorithms import DPO
from rayalign.cluster import configure_ray_data, place_ray_data
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from tests.cluster import Cluster, head_without_cpus, start_node

MOST_LINES = 10_000
"""Of a list of Ray's."""

TO_TRAIN = (
    *("--num-gpus=1", f"--resources={json.dumps({'accelerator_type:L4': 1})}"),
    "--labels=pool=train",
)


@dataclass(frozen=True)
class Nodes:
    """A cluster of four nodes: its head, and the ids of those of each pool."""

    head: Cluster
    train: frozenset[str]
    data: frozenset[str]


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Every other node starts when the one before is there: two that look for a free name of a socket at the same time may take
    the same. What a run waits for is what the fixture waits for."""
    folder = tmp_path_factory.mktemp("nodes")
    flags = {"gpus_per_worker": 1, "accelerator_type": "L4", "label_selector": ("pool=train",), "wait_for_nodes": 60}
    with head_without_cpus(tmp_path_factory.mktemp("head")) as head, contextlib.ExitStack() as to_end:

        def start(name: str, *of_this_node: str) -> None:
            node = start_node(head, folder / name, *of_this_node)
            to_end.callback(_end, node)

        for count in (1, 2):
            start(f"train {count}", *TO_TRAIN)
            nodes.wait_for_workers(Config(DPO(), cluster=ClusterConfig(num_workers=count, **flags)))
        start("data", "--labels=pool=data")
        nodes.wait_for_cpus(Config(DPO(), cluster=ClusterConfig(**flags, data_label_selector=("pool=data",))))
        yield Nodes(head, _ids("train"), _ids("data"))


def _end(node: "subprocess.Popen[bytes]") -> None:
    node.terminate()
    node.wait()


def _ids(pool: str) -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Labels"].get("pool") == pool)


def test_a_run_waits_for_and_places_its_workers_by_kind_of_gpu_and_label(four_nodes: Nodes) -> None:
    flags = {"gpus_per_worker": 1, "label_selector": ("pool=train",), "data_label_selector": ("pool=data",)}
    with pytest.raises(ValueError, match="--accelerator_type A100, ") as refused:
        nodes.wait_for_workers(Config(DPO(), cluster=ClusterConfig(**flags, accelerator_type="A100", wait_for_nodes=0)))
    for words in ("2 nodes with 2 CPUs and 1 GPU of type L4, pool=train", "1 node with 2 CPUs and 0 GPUs, pool=data"):
        assert words in str(refused.value)  # in any order

    room = nodes.Room(2, {"CPU": 1, "GPU": 1}, "workers", "", "", "L4", {"pool": "train"})
    group = ray.util.placement_group([room.bundle] * 2, bundle_label_selector=[dict(room.labels)] * 2)
    assert group.wait(30)
    assert set(ray.util.placement_group_table(group)["bundles_to_node_id"].values()) == four_nodes.train
    ray.util.remove_placement_group(group)

    configure_ray_data()
    place_ray_data({"pool": "data"})
    try:
        where = ray.data.from_items(list(range(4)), override_num_blocks=4).map_batches(
            lambda _: pa.table({"node": [ray.get_runtime_context().get_node_id()]}), batch_format="pyarrow"
        )
        assert {row["node"] for row in where.take_all()} == four_nodes.data
    finally:
        place_ray_data({})


def test_a_run_encodes_on_the_data_node_and_scores_and_trains_on_the_others(
    four_nodes: Nodes, model: Path, good_records: Path, tmp_path: Path
) -> None:
    before = {actor.actor_id for actor in _actors()}
    four_nodes.head.run(
        *("pipelines/dpo.py", "--model", model, "--dataset", good_records, "--output_dir", tmp_path / "run", "--max_steps", 3),
        *("--num_workers", 2, "--cpus_per_worker", 2, "--gpus_per_worker", 0, "--batch_size", 2, "--dataset_test_ratio", 0.2),
        *("--label_selector", "pool=train", "--data_label_selector", "pool=data", "--precompute_ref_log_probs", "true"),
    )
    actors = [actor for actor in _actors() if actor.actor_id not in before]
    workers = [actor.node_id for actor in actors if "RayTrainWorker" in actor.class_name]
    assert sorted(workers) == sorted(four_nodes.train)  # each takes all CPUs of a node
    scorers = [actor.node_id for actor in actors if "ShardScorer" in f"{actor.class_name} {actor.name} {actor.repr_name}"]
    assert scorers
    assert four_nodes.train.issuperset(scorers)
    tasks = ray.util.state.list_tasks(four_nodes.head.address, detail=True, limit=MOST_LINES)
    assert {task.node_id for task in tasks if "_prepare_rows" in task.name} == four_nodes.data


def _actors() -> list[ray.util.state.common.ActorState]:
    address = ray.get_runtime_context().gcs_address
    return list(ray.util.state.list_actors(address, detail=True, limit=MOST_LINES))
