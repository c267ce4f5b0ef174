"""cluster.yaml is checked by Ray's own validator, without a cloud, and against the files of this repository."""

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from rayalign import __version__
from rayalign.algorithms import ALGORITHMS
from rayalign.config.command_line import build
from tests.deploy.files import REPOSITORY, locked_version, read_yaml


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read_yaml("cluster.yaml")


def policy(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "deploy" / "aws" / f"{name}.json").read_text())


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


def test_the_image_is_built_on_the_locked_ray_with_gpus():
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.+)$", dockerfile, re.MULTILINE) == [f"rayproject/ray:{locked_version('ray')}-py311-gpu"]


def test_every_node_runs_the_image_of_this_version_and_installs_nothing(cluster: dict[str, Any]):
    assert cluster["docker"]["image"] == f"REGISTRY/rayalign:{__version__}"
    assert f"-t {cluster['docker']['image']} ." in (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert not {"setup_commands", "head_setup_commands", "worker_setup_commands"} & cluster.keys()


def test_the_image_gets_every_file_that_rayalign_is_built_from_and_no_other():
    folder = REPOSITORY / "deploy"
    copied = re.findall(r"^COPY --chown=ray:users (.+) \S+$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    sent = re.findall("^!(.+)$", (folder / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert [name for words in copied for name in words.split()] == sent
    assert all((REPOSITORY / name).exists() for name in sent)
    assert {"README.md", "LICENSE"} <= set(sent)  # which pyproject.toml names


def test_nodes_start_from_an_image_with_a_driver_that_must_be_named(cluster: dict[str, Any]):
    configs = [kind["node_config"] for kind in cluster["available_node_types"].values()]
    assert {config["ImageId"] for config in configs} == {"ami-00000000000000000"}  # no machine has it: it must be edited


def test_the_head_may_give_every_other_node_its_role(cluster: dict[str, Any]):
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in cluster["available_node_types"].items()
    }
    head = profiles.pop(cluster["head_node_type"])
    (worker,) = set(profiles.values())
    (statement,) = policy("pass-role")["Statement"]
    assert (statement["Action"], statement["Resource"]) == ("iam:PassRole", f"arn:aws:iam::*:role/{worker}")
    commands = (REPOSITORY / "docs" / "cluster.md").read_text()
    for role in (head, worker):
        assert f"--instance-profile-name {role}" in commands or f"in {worker} {head}" in commands
    assert f"--role-name {head} --policy-name pass-role --policy-document file://deploy/aws/pass-role.json" in commands


@pytest.mark.parametrize("name", ["trust", "bucket", "pass-role"])
def test_a_policy_has_the_form_of_one(name: str):
    document = policy(name)
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        assert statement.keys() <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert ("Principal" in statement) != ("Resource" in statement)
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert all(re.fullmatch("(s3|iam|sts):[A-Za-z]+", action) for action in actions)


def test_the_first_command_says_how_many_gpus_it_wants():
    said = "".join(
        line.lstrip("# ").rstrip("\\")
        for line in (REPOSITORY / "cluster.yaml").read_text().splitlines()
        if line.startswith("#")
    )
    command = re.search(r"python pipelines/dpo\.py (.+?/runs/first)", said)
    assert command
    config, _ = build(ALGORITHMS, "dpo", dict(pair.split() for pair in command[1].split("--")[1:] if "config" not in pair))
    assert (config.cluster.num_workers, config.cluster.gpus_per_worker) == (4, 1)


def test_every_mounted_file_of_the_repository_exists(cluster: dict[str, Any]):
    for local in cluster["file_mounts"].values():
        assert local.startswith("~") or (REPOSITORY / local).exists(), local


def test_records_can_be_encoded_on_nodes_without_gpus_by_their_label(cluster: dict[str, Any]):
    labelled = [kind for kind in cluster["available_node_types"].values() if kind.get("labels") == {"pool": "cpu"}]
    assert labelled
    assert not any("GPU" in kind["resources"] for kind in labelled)
