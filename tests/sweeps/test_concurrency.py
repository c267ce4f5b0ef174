"""How many trials run or wait at a time, by what the cluster has and may get."""

from collections.abc import Callable
from typing import Any

import pytest
import ray

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig
from rayalign.config.tune import TuneConfig
from rayalign.sweeps import concurrency
from rayalign.sweeps.concurrency import LOOK_SECONDS, MOST_WAITING, Concurrency, trials_that_fit
from tests.watching import Clock

Nodes = list[dict[str, Any]]


def node(cpus: float, gpus: float = 0, **labels: str) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}, "Labels": labels}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Nodes]:
    """`cluster(*nodes, own=False)`: the cluster that there is from now on; nodes added to the list have come to it."""

    def there(*first: dict[str, Any], own: bool = False) -> Nodes:
        nodes = list(first)
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(n["Resources"]["CPU"] for n in nodes)})
        monkeypatch.setattr(concurrency, "owns_cluster", lambda: own)
        return nodes

    return there


def config(**flags: Any) -> Config:
    return Config(DPO(), cluster=ClusterConfig(**flags))


@pytest.mark.parametrize(
    ("nodes", "flags", "spare", "fits"),
    [
        ([node(4)], {}, 0, 4),
        ([node(4)], {}, 1, 3),
        ([node(3), node(3)], {"cpus_per_worker": 2}, 0, 2),  # a worker has its CPUs on one node
        ([node(8), node(96, 8)], {"gpus_per_worker": 1}, 1, 8),
        ([node(96, 8)], {"gpus_per_worker": 1, "num_workers": 3}, 1, 2),
        ([node(96, 8)], {"gpus_per_worker": 1, "num_workers": "1:4"}, 1, 2),
        ([node(8, pool="cpu"), node(8, pool="train")], {"label_selector": ("pool=train",)}, 0, 8),
        ([node(1)], {}, 1, 1),  # never none
    ],
)
def test_as_many_trials_fit_as_the_nodes_hold_the_workers_of(
    cluster: Callable[..., Nodes], nodes: Nodes, flags: dict[str, Any], spare: int, fits: int
):
    cluster(*nodes)
    assert trials_that_fit(config(**flags), spare_cpus=spare) == fits


def test_as_many_trials_wait_as_fit_and_more_where_nodes_have_come(cluster: Callable[..., Nodes]):
    nodes, clock = cluster(node(96, 2)), Clock()
    found = Concurrency(config(gpus_per_worker=1), TuneConfig(), spare_cpus=0, clock=clock)
    assert (found.most(), found.words) == (4, "up to 2 at a time, more where the cluster grows")
    nodes.append(node(96, 2))
    assert found.most() == 4  # it has just looked
    clock.now += LOOK_SECONDS
    assert found.most() == 8
    nodes.extend([node(96, 8)] * 4)
    clock.now += LOOK_SECONDS
    assert found.most() == 36 + MOST_WAITING
    assert Concurrency(config(gpus_per_worker=1), TuneConfig(search_alg="optuna"), spare_cpus=0).most() == 37


def test_nothing_waits_where_nobody_adds_nodes_or_the_user_has_said_how_many(cluster: Callable[..., Nodes]):
    cluster(node(2), own=True)
    found = Concurrency(config(), TuneConfig(), spare_cpus=0)
    assert (found.most(), found.words) == (2, "up to 2 at a time")
    cluster(node(2))
    found = Concurrency(config(), TuneConfig(max_concurrent_trials=7), spare_cpus=0)
    assert (found.most(), found.words) == (7, "up to 7 at a time")
