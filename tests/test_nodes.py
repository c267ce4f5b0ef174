"""GPUs and room for the workers: what is asked for, waited for and refused."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import ray

from rayalign import nodes
from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from tests.watching import Clock


def node(cpus: float, gpus: float = 0, *, alive: bool = True, kind: str = "", **labels: str) -> dict[str, Any]:
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **({f"accelerator_type:{kind}": 1} if kind else {})}
    return {"Alive": alive, "Resources": resources, "Labels": {"ray.io/node-id": "7", **labels}}


def config(**flags: Any) -> Config:
    return Config(DPO(), cluster=ClusterConfig(**flags))


class FakeRay:
    """Ray's nodes, other ones at each look (the last for ever), and the placement groups that were asked for and given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: list[dict[str, Any]]) -> None:
        self.looks, self.asked, self.selectors, self.withdrawn = list(looks), [], [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(ray, "nodes", lambda: self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])

        def placement_group(bundles: list[Any], *, strategy: str, bundle_label_selector: list[Any] | None) -> str:
            self.asked.append(bundles)
            self.selectors.append(bundle_label_selector)
            return "group"

        monkeypatch.setattr(nodes, "placement_group", placement_group)
        monkeypatch.setattr(nodes, "remove_placement_group", self.withdrawn.append)
        monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.001)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """`cluster(nodes, nodes_at_the_next_look, ...)`: the cluster that a run has joined."""
    return lambda *looks: FakeRay(monkeypatch, *looks)


def never() -> str | None:
    raise AssertionError("the model need not be looked at")


@pytest.mark.parametrize(
    ("there", "flags", "reason", "gpus"),
    [
        ([node(4)], {}, lambda: None, 0),
        ([node(4), node(8, 2)], {}, never, 1),
        ([node(4), node(8, 2, alive=False)], {}, lambda: None, 0),
        ([node(8, 2)], {"gpus_per_worker": 0}, never, 0),
        ([node(8, 2)], {"gpus_per_worker": 0.5, "num_workers": 4}, never, 0.5),
        ([node(4)], {}, lambda: "m has about 7.2 billion parameters", 1),
        ([], {}, lambda: "m has about 7.2 billion parameters", 1),
        ([node(4)], {"gpus_per_worker": 0}, never, 0),
        ([node(4)], {"accelerator_type": "L4"}, never, 1),
        ([node(4), node(8, 2, pool="b")], {"label_selector": ("pool=a",)}, lambda: None, 0),
        ([node(4), node(8, 2, pool="b")], {"label_selector": ("pool=b",)}, never, 1),
    ],
)
def test_a_worker_gets_a_gpu_where_there_are_any_or_the_model_is_too_large_without(
    cluster: Callable[..., FakeRay],
    caplog: pytest.LogCaptureFixture,
    there: list[dict[str, Any]],
    flags: dict[str, Any],
    reason: Callable[[], str | None],
    gpus: float,
) -> None:
    cluster(there)
    with caplog.at_level(logging.INFO):
        assert nodes.resolve_cluster(config(**flags), reason).cluster.gpus_per_worker == gpus
    said = "Each worker asks for a GPU: m has about 7.2 billion parameters (--gpus_per_worker 0 trains on CPUs)"
    assert caplog.messages == ([said] if gpus and reason is not never else [])


def test_workers_that_the_nodes_have_room_for_are_not_waited_for(cluster: Callable[..., FakeRay]) -> None:
    found = cluster([node(4, 1), node(8, 2)])
    nodes.wait_for_workers(config(num_workers=3, cpus_per_worker=4, gpus_per_worker=1))
    nodes.wait_for_workers(config(num_workers=30, cpus_per_worker=0.1, gpus_per_worker=0.1))
    assert not found.asked


def test_an_elastic_run_begins_with_its_fewest_workers(cluster: Callable[..., FakeRay]) -> None:
    cluster([node(2)])
    nodes.wait_for_workers(config(num_workers="2:8"))
    with pytest.raises(ValueError, match=r"^--num_workers 3:8 with 1 CPU and 0 GPUs each: the cluster has room for 2 "):
        nodes.wait_for_workers(config(num_workers="3:8", wait_for_nodes=0))


def test_workers_that_no_nodes_could_hold_are_refused_at_once_where_nothing_is_waited_for(
    cluster: Callable[..., FakeRay],
) -> None:
    found = cluster([node(4, 1), node(7, 2)])
    with pytest.raises(ValueError) as caught:  # the larger node holds one, by its CPUs
        nodes.wait_for_workers(config(num_workers=3, cpus_per_worker=4, gpus_per_worker=1, wait_for_nodes=0))
    assert str(caught.value) == (
        "--num_workers 3 with 4 CPUs and 1 GPU each: the cluster has room for 2 (2 nodes, the largest with 7 CPUs and 2 GPUs). "
        "Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
    )
    assert not found.asked


def test_nodes_are_asked_for_and_waited_for_until_there_is_room(
    cluster: Callable[..., FakeRay], caplog: pytest.LogCaptureFixture
) -> None:
    head = node(0)
    found = cluster([head], [head], [head], [head, node(8, 1)], [head, node(8, 1), node(8, 1)])
    with caplog.at_level(logging.INFO):
        nodes.wait_for_workers(config(num_workers=2, gpus_per_worker=1, wait_for_nodes=600))
    assert found.asked == [[{"CPU": 1, "GPU": 1}] * 2]
    assert found.withdrawn == ["group"]
    assert caplog.messages == [
        "Waiting for nodes, 600 s at most (--wait_for_nodes): there is room for 0 of 2 workers with 1 CPU and 1 GPU each; the "
        "cluster has 1 node with 0 CPUs and 0 GPUs",
        "The nodes for 2 workers are there",
    ]


def test_nodes_that_do_not_come_are_given_up_with_what_is_missing(
    cluster: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "SAY_SECONDS", 0.05)
    found = cluster([node(4)])
    with pytest.raises(ValueError) as caught, caplog.at_level(logging.INFO):
        nodes.wait_for_workers(config(gpus_per_worker=1, wait_for_nodes=0.2))
    assert str(caught.value) == (
        "--num_workers 1 with 1 CPU and 1 GPU each: the cluster has room for 0 (1 node with 4 CPUs and 0 GPUs), and no more "
        "came in 0.2 s (--wait_for_nodes). Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes. "
        "--gpus_per_worker 0 trains on CPUs."
    )
    assert found.withdrawn == ["group"]
    assert len(caplog.messages) >= 3  # a line each SAY_SECONDS


def test_an_interrupted_wait_withdraws_what_it_asked_for(
    cluster: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cluster([node(0)])

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nodes.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nodes.wait_for_workers(config())
    assert found.withdrawn == ["group"]


def test_a_cluster_that_was_joined_is_waited_for_and_one_of_this_process_is_not(
    cluster: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cluster([node(1)], [node(1)], [node(4)])
    nodes.wait_for_workers(config(num_workers=4, gpus_per_worker=0))
    assert len(found.asked) == 1
    monkeypatch.setattr(nodes, "owns_cluster", lambda: True)
    cluster([node(1)])
    with pytest.raises(ValueError, match="the cluster has room for 1 "):
        nodes.wait_for_workers(config(num_workers=4, gpus_per_worker=0))


def test_nodes_that_a_training_has_lost_are_waited_for_in_words(
    cluster: Callable[..., FakeRay], caplog: pytest.LogCaptureFixture
) -> None:
    both, one = [node(4), node(4)], [node(4)]
    found = cluster(both, one, one, one, both, one)
    clock = Clock()
    watch = nodes.NodeWatch(config(num_workers=2, cpus_per_worker=4, gpus_per_worker=0), clock=clock)
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            clock.now += 31
            watch.check()
            watch.check()  # looks no oftener than each WATCH_SECONDS
        waiting = (
            "Waiting for nodes, {} s at most (--wait_for_nodes): there is room for 1 of 2 workers with 4 CPUs each; the {}"
        )
        has = "cluster has 1 node with 4 CPUs and 0 GPUs"
        assert caplog.messages == [waiting.format(600, has), waiting.format(538, has)]
        clock.now += 31
        watch.check()
        assert caplog.messages[2:] == ["The nodes for 2 workers are there"]
        clock.now += 600
        watch.check()  # another loss, another wait
    clock.now += 599
    watch.check()
    clock.now += nodes.WATCH_SECONDS
    with pytest.raises(nodes.NodesLost) as caught:
        watch.check()
    assert str(caught.value) == (
        "--num_workers 2 with 4 CPUs and 0 GPUs each: the cluster has room for 1 (1 node with 4 CPUs and 0 GPUs), and no more "
        "came in 600 s (--wait_for_nodes). Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
    )
    assert not found.asked  # Ray Train asks for them


def test_an_elastic_training_is_not_waited_for_while_its_fewest_workers_have_room(
    cluster: Callable[..., FakeRay], caplog: pytest.LogCaptureFixture
) -> None:
    cluster([node(4)])
    clock = Clock()
    watch = nodes.NodeWatch(config(num_workers="1:2", cpus_per_worker=4, wait_for_nodes=0), clock=clock)
    clock.now += 60
    with caplog.at_level(logging.INFO):
        watch.check()
    assert not caplog.messages


def test_records_are_encoded_where_a_node_has_a_cpu(cluster: Callable[..., FakeRay]) -> None:
    cluster([node(0, 1)], [node(0, 1)], [node(0, 1), node(1)])
    nodes.wait_for_cpus(config())
    cluster([node(0, 1)])
    with pytest.raises(ValueError) as caught:
        nodes.wait_for_cpus(config(wait_for_nodes=0))
    assert str(caught.value) == (
        "Records are encoded on 1 CPU at least: the cluster has room for 0 (1 node with 0 CPUs and 1 GPU). Add nodes."
    )


def test_workers_are_counted_on_nodes_of_their_kind_and_labels_only(cluster: Callable[..., FakeRay]) -> None:
    found = cluster(
        [node(8, 2, kind="A100", zone="a"), node(8, 2, kind="L4", zone="a"), node(8, 2, kind="L4"), node(8, zone="a")]
    )
    l4: dict[str, Any] = {"gpus_per_worker": 1, "accelerator_type": "L4", "wait_for_nodes": 0}
    nodes.wait_for_workers(config(num_workers=4, **l4))
    nodes.wait_for_workers(config(num_workers=2, label_selector=("zone=a",), **l4))
    nodes.wait_for_workers(config(num_workers=2, label_selector=("zone=!a",), **l4))
    nodes.wait_for_workers(config(num_workers=24, label_selector=("zone=in(a,b)",), wait_for_nodes=0))
    assert not found.asked
    with pytest.raises(ValueError) as caught:
        nodes.wait_for_workers(config(num_workers=3, label_selector=("zone=a", "pool=!spot"), **l4))
    assert str(caught.value) == (
        "--num_workers 3 with 1 CPU and 1 GPU each, --accelerator_type L4, --label_selector zone=a pool=!spot: the cluster has "
        "room for 2 (1 node with 8 CPUs and 2 GPUs of type A100, zone=a, no pool; 1 node with 8 CPUs and 2 GPUs of type L4, "
        "zone=a, no pool; 1 node with 8 CPUs and 2 GPUs of type L4, no zone, no pool; 1 node with 8 CPUs and 0 GPUs, zone=a, "
        "no pool). Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes. Without --accelerator_type and "
        "--label_selector, workers run on any node."
    )


def test_kinds_of_nodes_are_told_with_their_number_and_the_rarest_left_out(cluster: Callable[..., FakeRay]) -> None:
    cluster([*(node(4, zone="a") for _ in range(3)), *(node(cpus, zone="b") for cpus in range(8, 14))])
    with pytest.raises(ValueError, match=r"room for 0 \(3 nodes with 4 CPUs and 0 GPUs, zone=a; .*; 2 others\)\. "):
        nodes.wait_for_workers(config(gpus_per_worker=0, label_selector=("zone=c",), wait_for_nodes=0))


def test_nodes_of_a_kind_are_asked_for_and_waited_for(
    cluster: Callable[..., FakeRay], caplog: pytest.LogCaptureFixture
) -> None:
    found = cluster([node(8, 1)], [node(8, 1)], [node(8, 1)], [node(8, 1), node(8, 1, kind="L4", zone="a")])
    with caplog.at_level(logging.INFO):
        nodes.wait_for_workers(config(gpus_per_worker=1, accelerator_type="L4", label_selector=("zone=a",), wait_for_nodes=600))
    assert found.asked == [[{"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001}]]
    assert found.selectors == [[{"zone": "a"}]]
    assert found.withdrawn == ["group"]
    assert caplog.messages[0] == (
        "Waiting for nodes, 600 s at most (--wait_for_nodes): there is room for 0 of 1 workers with 1 CPU and 1 GPU of type L4 "
        "each on nodes with zone=a; the cluster has 1 node with 8 CPUs and 1 GPU of type unknown, no zone"
    )


def test_records_are_encoded_on_nodes_with_the_labels_for_it(cluster: Callable[..., FakeRay]) -> None:
    cluster([node(4)], [node(4)], [node(4), node(2, pool="cpu")])
    nodes.wait_for_cpus(config(data_label_selector=("pool=cpu",)))
    cluster([node(4)])
    with pytest.raises(ValueError) as caught:
        nodes.wait_for_cpus(config(data_label_selector=("pool=cpu",), wait_for_nodes=0))
    assert str(caught.value) == (
        "Records are encoded on 1 CPU at least, --data_label_selector pool=cpu: the cluster has room for 0 (1 node with 4 CPUs "
        "and 0 GPUs, no pool). Add nodes. Without --data_label_selector, they are encoded on any node."
    )
