"""The files for KubeRay: pods as Kubernetes knows them, groups as the autoscaler reads them, room for the run they show."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from rayalign import __version__
from rayalign.config.labels import fits_selector
from rayalign.nodes import Node, Room, fits
from tests.deploy.files import DEPLOY, check_ray_start, config_of, locked_version, rayalign_commands, read_yaml

KUBERNETES = "1.34"
"""The oldest version whose API the files are compared with; the schemas are in the package kubernetes-validate."""

JOB = read_yaml("deploy/kubernetes/rayjob.yaml")
CLUSTER = read_yaml("deploy/kubernetes/raycluster.yaml")
GROUPS = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
NAMES = ["head", *(group["groupName"] for group in GROUPS[1:])]


def pod(group: dict[str, Any], name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": group["template"]["spec"]}


@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
@pytest.mark.parametrize(("group", "name"), list(zip(GROUPS, NAMES, strict=True)), ids=NAMES)
def test_a_group_makes_pods_that_kubernetes_takes(group: dict[str, Any], name: str, version: str) -> None:
    kubernetes_validate.validate(pod(group, name), version, strict=True)


def test_kubernetes_would_refuse_a_field_that_pods_do_not_have() -> None:
    wrong = pod(GROUPS[1], "gpu")
    wrong["spec"] = {**wrong["spec"], "restartpolicy": "Never"}
    with pytest.raises(kubernetes_validate.ValidationError, match="restartpolicy"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_pod_mounts_the_claim_that_many_nodes_may_write_to() -> None:
    claim = read_yaml("deploy/kubernetes/storage.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in GROUPS:
        spec = group["template"]["spec"]
        (volume,), (container,) = spec["volumes"], spec["containers"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
        assert spec["securityContext"] == {"fsGroup": 100}


def test_the_jobs_own_cluster_is_the_cluster() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True


def test_the_objects_are_those_of_kuberay_and_stand_in_kueues_queue() -> None:
    for found, kind in ((JOB, "RayJob"), (CLUSTER, "RayCluster")):
        assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
        assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user-queue"}
        assert found["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert JOB["spec"].keys() == {
        *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
    }
    assert CLUSTER["spec"].keys() == {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    }


def test_every_pod_runs_the_image_of_this_version_on_the_locked_ray_and_asks_for_the_token() -> None:
    images = {container["image"] for group in GROUPS for container in group["template"]["spec"]["containers"]}
    assert images == {f"REGISTRY/rayalign:{__version__}"}
    assert CLUSTER["spec"]["rayVersion"] == locked_version("ray")
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize(("group", "name"), list(zip(GROUPS, NAMES, strict=True)), ids=NAMES)
def test_ray_takes_the_parameters_of_a_group(group: dict[str, Any], name: str) -> None:
    labels = ",".join(f"{label}={value}" for label, value in group.get("labels", {}).items())
    resources = json.dumps({key: float(amount) for key, amount in group.get("resources", {}).items()})
    given = {**group["rayStartParams"], "labels": labels, "resources": resources}
    assert check_ray_start([f"--{key}={value}" for key, value in given.items()])["labels"] == labels
    assert group["template"]["spec"]["restartPolicy"] == "Never"  # as the second autoscaler needs it


def autoscaling(cluster: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of the cluster."""
    return _derive_autoscaling_config_from_ray_cr({**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}})


def test_rays_autoscaler_gives_pods_from_zero_and_takes_them_back() -> None:
    options = CLUSTER["spec"]["autoscalerOptions"]
    assert (CLUSTER["spec"]["enableInTreeAutoscaling"], options["version"]) == (True, "v2")
    config = autoscaling(CLUSTER)
    assert config["idle_timeout_minutes"] == 10
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert types.keys() == {"gpu", "cpu"}
    for kind in types.values():
        assert kind["min_workers"] == 0 < kind["max_workers"]
    assert all(group["replicas"] == 0 for group in GROUPS[1:])
    assert (types["gpu"]["resources"]["GPU"], "GPU" in types["cpu"]["resources"]) == (1, False)
    assert types["gpu"]["labels"]["ray.io/accelerator-type"] == "L4"


SHOWN = [
    words
    for text in (JOB["spec"]["entrypoint"], (DEPLOY / "kubernetes" / "raycluster.yaml").read_text())
    for words in rayalign_commands(text)
]


@pytest.mark.parametrize("words", SHOWN, ids=["job", "cluster"])
def test_the_pods_that_may_come_have_room_for_the_run_that_is_shown(words: list[str]) -> None:
    config = config_of(words)
    cluster, types = config.cluster, autoscaling(CLUSTER)["available_node_types"]
    assert (cluster.num_workers, cluster.gpus_per_worker, cluster.accelerator_type) == (4, 1, "L4")
    assert cluster.wait_for_nodes == 1800
    pods = [Node(kind["resources"], kind["labels"]) for kind in types.values() for _ in range(kind["max_workers"])]
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    room = Room(cluster.num_workers, each, "", "", "", cluster.accelerator_type, cluster.worker_labels)
    assert room.on(pods) >= cluster.num_workers
    for_data = [pod.resources for pod in pods if fits_selector(pod.labels, cluster.data_labels)]
    assert for_data
    assert fits(for_data, {"CPU": 1}) > 0
    assert not any("GPU" in resources for resources in for_data)
    for path in (config.model.model, *config.data.dataset, config.run.output_dir):
        assert str(path).startswith("/shared/")


def test_both_commands_are_the_same_run() -> None:
    job, cluster = SHOWN
    assert job == cluster


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").iterdir()), ids=lambda path: path.name)
def test_the_head_of_a_file_names_files_that_exist(path: Path) -> None:
    assert path.suffix == ".yaml"
    assert len(list(yaml.safe_load_all(path.read_text()))) == 1
    named = re.findall(r"deploy/[\w./]*\w", path.read_text())
    assert all((DEPLOY.parent / word).exists() for word in named)
