"""cluster.yaml is checked by Ray's own validator, without a cloud, and against the files of this repository."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def validate(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_cluster(cluster: dict[str, Any]):
    validate(cluster)


def test_ray_refuses_an_unknown_key(cluster: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate({**cluster, "max_wrokers": 1})


def test_ray_refuses_an_unknown_key_of_a_node_type(cluster: dict[str, Any]):
    cluster["available_node_types"]["gpu"]["min_wrokers"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_wrokers"):
        validate(cluster)


def test_gpu_nodes_scale_from_zero(cluster: dict[str, Any]):
    types = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert any("GPU" in kind["resources"] for kind in types)
    for kind in types:
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= cluster["max_workers"]


def test_the_head_offers_no_resources_to_training(cluster: dict[str, Any]):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert not any(head["resources"].values())


def test_the_dashboard_is_bound_to_localhost_and_every_node_asks_for_the_token(cluster: dict[str, Any]):
    (head,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    (worker,) = [command for command in cluster["worker_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert command.startswith("RAY_AUTH_MODE=token ")


def test_images_carry_the_locked_ray(cluster: dict[str, Any]):
    locked = re.search(r"^ray==(\S+)$", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    for image in ("head_image", "worker_image"):
        assert cluster["docker"][image].startswith(f"rayproject/ray:{locked[1]}-py311-")


def test_every_mounted_file_of_the_repository_exists(cluster: dict[str, Any]):
    for local in cluster["file_mounts"].values():
        assert local.startswith("~") or (REPOSITORY / local).exists(), local
