"""The cluster's machines: what a run asks of them, and waiting for those that are still to come.

Nothing is guessed about whether a cluster grows: what is missing is asked for, waited for up to a limit, and then refused.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rayalign.cluster import owns_cluster
from rayalign.config.config import Config

logger = logging.getLogger(__name__)

WAIT_SECONDS = 600
"""How long nodes of a cluster that was joined are waited for, where --wait_for_nodes does not say."""

LOOK_SECONDS, SAY_SECONDS = 1, 60
"""Between two looks at the nodes, and between two lines about what is missing."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Room:
    """Room on nodes for `count` processes that need `each` (CPU, GPU): what they are called, and which flags ask for them."""

    count: int
    each: Resources
    name: str
    flags: str
    remedy: str

    @property
    def of_one(self) -> str:
        return _in_words(self.each)


def resolve_cluster(config: Config, needs_gpu: Callable[[], str | None] = lambda: None) -> Config:
    """The same configuration with the workers' GPUs resolved: as --gpus_per_worker says, else one where a node has some, or
    where `needs_gpu` gives a reason to ask for one."""
    cluster = config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        has_gpus = any(node.get("GPU", 0) for node in _nodes())
        reason = None if has_gpus else needs_gpu()
        gpus = float(has_gpus or reason is not None)
        if reason is not None:
            logger.info("Each worker asks for a GPU: %s (--gpus_per_worker 0 trains on CPUs)", reason)
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, gpus_per_worker=gpus))


def wait_for_workers(config: Config) -> None:
    """Waits until the nodes have room for the train workers; raises ValueError where they don't within the limit.

    Room is what the nodes have, whoever uses it: a run waits for its turn without a limit, as before.
    """
    cluster = config.cluster
    gpus = cluster.gpus_per_worker or 0
    each = {"CPU": cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    flags = f"--num_workers {cluster.num_workers} with {_in_words({'CPU': cluster.cpus_per_worker, 'GPU': gpus})} each"
    remedy = "Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
    _wait_for(Room(cluster.num_workers, each, "workers", flags, remedy), config)


def wait_for_cpus(config: Config) -> None:
    """Waits until some node has a CPU, which encoding records takes; raises ValueError where none has within the limit."""
    _wait_for(Room(1, {"CPU": 1}, "tasks that encode records", "Records are encoded on 1 CPU at least", "Add nodes."), config)


def fits(nodes: Sequence[Resources], each: Resources) -> int:
    """How many processes the nodes hold that each need so much."""
    # A fraction of a GPU is no exact float: ten of 0.1 fit on one.
    return sum(int(min(node.get(name, 0) / amount for name, amount in each.items()) + 1e-6) for node in nodes)


def _wait_for(room: Room, config: Config) -> None:
    """Raises ValueError where the nodes lack room and none that bring it come within --wait_for_nodes."""
    if fits(_nodes(), room.each) >= room.count:
        return
    limit = config.cluster.wait_for_nodes
    if limit is None:
        limit = 0 if owns_cluster() else WAIT_SECONDS
    started = said = time.monotonic()
    with _asked_for(room) if limit else contextlib.nullcontext():
        while fits(_nodes(), room.each) < room.count:
            now = time.monotonic()
            if now - started >= limit:
                raise ValueError(_refusal(room, _nodes(), limit))
            if said == started or now - said >= SAY_SECONDS:
                logger.info("%s", _waiting(room, _nodes(), limit - (now - started)))
                said = now
            time.sleep(min(LOOK_SECONDS, max(0.01, limit - (now - started))))
    if limit:
        logger.info("The nodes for %d %s are there", room.count, room.name)


@contextlib.contextmanager
def _asked_for(room: Room) -> Iterator[None]:
    """Within it, the cluster's autoscaler, if it has one, knows what is needed.

    A placement group that waits for its nodes is this run's own and goes with it. A request of ray.autoscaler.sdk would be the
    whole cluster's, and replace that of another run.
    """
    group = placement_group([dict(room.each)] * room.count, strategy="PACK")
    try:
        yield
    finally:
        remove_placement_group(group)


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _waiting(room: Room, nodes: Sequence[Resources], seconds: float) -> str:
    return (
        f"Waiting for nodes, {seconds:.0f} s at most (--wait_for_nodes): there is room for {fits(nodes, room.each)} of "
        f"{room.count} {room.name} with {room.of_one} each; the cluster has {_cluster_in_words(nodes)}"
    )


def _refusal(room: Room, nodes: Sequence[Resources], waited: float) -> str:
    came = f", and no more came in {waited:g} s (--wait_for_nodes)" if waited else ""
    on_cpus = " --gpus_per_worker 0 trains on CPUs." if "GPU" in room.each and not any(n.get("GPU") for n in nodes) else ""
    return (
        f"{room.flags}: the cluster has room for {fits(nodes, room.each)} ({_cluster_in_words(nodes)}){came}. "
        f"{room.remedy}{on_cpus}"
    )


def _cluster_in_words(nodes: Sequence[Resources]) -> str:
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    single = "1 node with" if len(nodes) == 1 else f"{len(nodes)} nodes, the largest with"
    return f"{single} {_in_words(largest)}"


def _in_words(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())
