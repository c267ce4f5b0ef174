"""A cluster that begins with nothing but a head: Ray's second autoscaler brings nodes when a run asks, and takes them back.

The nodes are processes of this machine, started by the provider that Ray's own tests use.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from safetensors.torch import load_file

from rayalign import nodes
from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from tests.cluster import ROOT, free_ports
from tests.paced import PACED_DPO, PROGRAM
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

MOST_SECONDS = 90

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""By its class: of its own type, `fake_multinode`, Ray's wheel lacks a file."""

NODE_TYPES = {
    FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "gpu": {
        "resources": {"CPU": 2, "GPU": 1, "accelerator_type:L4": 1, "object_store_memory": 100 * 2**20},
        "labels": {"pool": "train"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    },
    "cpu": {
        "resources": {"CPU": 2, "object_store_memory": 100 * 2**20},
        "labels": {"pool": "cpu"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    },
}


def cluster_config(address: str) -> dict[str, Any]:
    """What `ray start --autoscaling-config` takes, for a head at this address."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": 6,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
            "disable_node_updaters": True,
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "available_node_types": NODE_TYPES,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **{f"{when}_commands": [] for when in commands},
    }


@pytest.fixture
def autoscaling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A head node whose autoscaler starts and ends the nodes, which this process is connected to."""
    folder = tmp_path_factory.mktemp("head")
    port, dashboard, agent, client, metrics, runtime = free_ports(6)
    address = f"127.0.0.1:{port}"
    (folder / "cluster.json").write_text(json.dumps(cluster_config(address)))
    words = (
        *(
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            "--num-cpus=0",
            f"--port={port}",
            "--node-ip-address=127.0.0.1",
        ),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}"),
        *(f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}", f"--autoscaling-config={folder / 'cluster.json'}"),
    )
    variables = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *words],
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: "Ray runtime started" in log.read_text())
        ray.init(address=address, logging_level=logging.WARNING)
        yield
        ray.shutdown()
    finally:
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MOST_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pools() -> Counter[str]:
    """How many nodes there are besides the head, by their label."""
    return Counter(node["Labels"]["pool"] for node in ray.nodes() if node["Alive"] and "pool" in node["Labels"])


@contextlib.contextmanager
def running(log: Path, *words: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A command of the project on this cluster, which is ended at the end."""
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}
    with log.open("w") as output:
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("autoscaling")
def test_nodes_of_the_kind_that_a_run_asks_for_come_from_zero_and_go_when_idle() -> None:
    flags: dict[str, Any] = {"gpus_per_worker": 1, "accelerator_type": "L4", "label_selector": ("pool=train",)}
    config = Config(
        DPO(),
        cluster=ClusterConfig(num_workers=2, data_label_selector=("pool=cpu",), wait_for_nodes=MOST_SECONDS, **flags),
    )
    assert pools() == {}
    nodes.wait_for_workers(config)
    assert pools() == {"train": 2}
    nodes.wait_for_cpus(config)
    assert pools()["cpu"] == 1
    until(lambda: not pools())


@pytest.mark.usefixtures("autoscaling")
def test_a_sweep_gets_nodes_for_the_trials_that_wait(tmp_path: Path) -> None:
    model, records = save_tiny_model(tmp_path / "llava"), write_rows(tmp_path / "data", 60, seed=1)
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", tmp_path / "sweep"),
        *("--max_steps", 60, "--batch_size", 8, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.2),
        *("--eval_steps", 20, "--gpus_per_worker", 0, "--label_selector", "pool=cpu", "--wait_for_nodes", MOST_SECONDS),
        *("--search", "beta=uniform:0.1:0.5", "--num_samples", 8, "--scheduler", "none"),
    )
    most, log = 0, tmp_path / "sweep.log"
    with running(log, "pipelines/tune.py", *words) as sweep:
        while sweep.poll() is None:
            most = max(most, pools()["cpu"])
            time.sleep(0.5)
    assert sweep.returncode == 0, log.read_text()[-3000:]
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished"] * 8
    # The sweep needs one node of two CPUs; the others came for trials that waited.
    assert most >= 2, log.read_text()[-3000:]
    assert "No available node types" not in log.read_text()  # though more wait than the cluster may get


@pytest.mark.usefixtures("autoscaling")
def test_an_elastic_run_grows_with_the_nodes_that_the_autoscaler_brings_and_gets_another_for_a_lost_one(tmp_path: Path) -> None:
    """To the weights of a run of one worker."""
    model, records = save_tiny_model(tmp_path / "llava"), write_rows(tmp_path / "data", 40, seed=1)
    (tmp_path / "paced.py").write_text(PACED_DPO)

    def words(name: str, num_workers: str, accumulation: int) -> tuple[object, ...]:
        return (
            *("-c", PROGRAM, "rlhf", "--model", model, "--dataset", records, "--output_dir", tmp_path / name),
            *("--num_workers", num_workers, "--batch_size", 1, "--gradient_accumulation_steps", accumulation),
            *("--cpus_per_worker", 2, "--gpus_per_worker", 0, "--dataset_test_ratio", 0, "--save_steps", 10),
            *("--max_steps", 120, "--eval_answers", 0, "--precompute_ref_log_probs", "false"),
            *("--wait_for_nodes", MOST_SECONDS, "--cache_dir", tmp_path / "cache"),
        )

    def starts() -> list[str]:
        lines = dict.fromkeys(line for line in log.read_text().splitlines() if "Training PACED from step" in line)
        return [line.split()[-3] for line in lines]

    log = tmp_path / "elastic.log"
    with running(log, *words("elastic", "1:2", 2), "--plugin", tmp_path / "paced.py", "--rlhf_type", "paced") as run:
        until(lambda: starts()[-1:] == ["2"] and (tmp_path / "elastic" / "checkpoints").is_dir())
        grown = len(starts())
        lost = next(node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        os.kill(raylet_of(lost["NodeID"]), signal.SIGKILL)
        until(lambda: starts()[grown:][-1:] == ["2"])
        assert run.wait(2 * MOST_SECONDS) == 0, log.read_text()[-3000:]
    with running(tmp_path / "one.log", *words("one", "1", 4), "--rlhf_type", "dpo") as run:
        assert run.wait(2 * MOST_SECONDS) == 0, (tmp_path / "one.log").read_text()[-3000:]
    elastic, one = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("elastic", "one"))
    for name, value in one.items():
        torch.testing.assert_close(elastic[name], value, atol=1e-6, rtol=0)  # float32, added in another order
    until(lambda: not pools())


def raylet_of(node: str) -> int:
    """The process of one of this machine's nodes."""
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet" and process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node:
            return int(process.pid)
    raise AssertionError(f"no raylet is the node {node}")
