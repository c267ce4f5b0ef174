"""The task for SkyPilot: keys that its tasks have, this version's image, and a run that fits the machines it asks for."""

import subprocess
from typing import Any

import pytest

from rayalign import __version__
from tests.deploy.files import config_of, rayalign_commands, read_yaml

TASK_KEYS = {
    *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "config", "setup", "run"),
}
RESOURCE_KEYS = {
    *("infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier", "ports", "image_id"),
    *("any_of", "ordered", "job_recovery", "autostop", "network_tier"),
}
"""https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""


@pytest.fixture
def task() -> dict[str, Any]:
    return read_yaml("deploy/skypilot.yaml")


def test_the_keys_are_those_of_a_task(task: dict[str, Any]) -> None:
    assert task.keys() <= TASK_KEYS
    assert task["resources"].keys() <= RESOURCE_KEYS
    assert task["resources"]["image_id"] == f"docker:REGISTRY/rayalign:{__version__}"


def test_the_cluster_asks_for_a_token_that_the_file_does_not_hold(task: dict[str, Any]) -> None:
    assert task["envs"]["RAY_AUTH_MODE"] == "token"
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}


def test_the_first_machine_alone_runs_the_command_and_it_fits_the_machines(task: dict[str, Any]) -> None:
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    start, condition, *_ = task["run"].splitlines()
    assert (start, condition) == ("~/sky_templates/ray/start_cluster", 'if [ "$SKYPILOT_NODE_RANK" = 0 ]; then')
    (words,) = rayalign_commands(task["run"])
    cluster = config_of([word.replace("$BUCKET", task["envs"]["BUCKET"]) for word in words]).cluster
    _, _, gpus = task["resources"]["accelerators"].partition(":")
    assert cluster.num_workers * (cluster.gpus_per_worker or 0) == task["num_nodes"] * int(gpus)
    cpus = int(task["resources"]["cpus"].rstrip("+"))
    assert cluster.num_workers * cluster.cpus_per_worker + 1 <= task["num_nodes"] * cpus
