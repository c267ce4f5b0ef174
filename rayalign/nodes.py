"""The cluster's machines: what a run asks of them, and waiting for those that are still to come.

Nothing is guessed about whether a cluster grows: what is missing is asked for, waited for up to a limit, and then refused.
"""

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, remove_placement_group

from rayalign.cluster import owns_cluster
from rayalign.config.config import Config
from rayalign.config.labels import fits_selector, in_words

logger = logging.getLogger(__name__)

WAIT_SECONDS = 600
"""How long nodes of a cluster that was joined are waited for, where --wait_for_nodes does not say."""

LOOK_SECONDS, SAY_SECONDS = 1, 60
"""Between two looks at the nodes, and between two lines about what is missing."""

WATCH_SECONDS = 5
"""Between two looks at the nodes of a run that trains."""

ACCELERATOR = "accelerator_type:"
"""What Ray calls the resource that says which kind of GPU a node has, before the kind. A node has 1 of it."""

ACCELERATOR_SHARE = 0.001
"""How much of it Ray Train asks for."""

MOST_KINDS = 5
"""Kinds of nodes that a message tells."""

Resources = Mapping[str, float]


class NodesLost(Exception):
    """A run's nodes were lost, and none came in their place: what was missing, in a sentence or two with what helps."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray knows it."""

    resources: Resources
    labels: Mapping[str, str]

    @property
    def kind_of_gpu(self) -> str | None:
        return next((name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR)), None)


@dataclass(frozen=True)
class Room:
    """Room for `count` processes that need `each` (CPU, GPU) on nodes with some kind of GPU and labels: what they are called,
    and which flags ask for them."""

    count: int
    each: Resources
    name: str
    flags: str
    remedy: str
    kind_of_gpu: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def of_one(self) -> str:
        kind = f" of type {self.kind_of_gpu}" if self.kind_of_gpu else ""
        place = f" on nodes with {in_words(self.labels)}" if self.labels else ""
        return f"{_in_words(self.each)}{kind} each{place}"

    @property
    def bundle(self) -> dict[str, float]:
        """What one asks of Ray."""
        return {**self.each, **({f"{ACCELERATOR}{self.kind_of_gpu}": ACCELERATOR_SHARE} if self.kind_of_gpu else {})}

    def on(self, nodes: Sequence[Node]) -> int:
        """How many processes the nodes hold."""
        return fits([node.resources for node in nodes if fits_selector(node.labels, self.labels)], self.bundle)


def resolve_cluster(config: Config, needs_gpu: Callable[[], str | None] = lambda: None) -> Config:
    """The same configuration with the workers' GPUs resolved: as --gpus_per_worker says, else one where their kind is named, a
    node for workers has some, or `needs_gpu` gives a reason to ask for one."""
    cluster = config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        nodes = [node for node in _nodes() if fits_selector(node.labels, cluster.worker_labels)]
        has_gpus = cluster.accelerator_type is not None or any(node.resources.get("GPU", 0) for node in nodes)
        reason = None if has_gpus else needs_gpu()
        gpus = float(has_gpus or reason is not None)
        if reason is not None:
            logger.info("Each worker asks for a GPU: %s (--gpus_per_worker 0 trains on CPUs)", reason)
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, gpus_per_worker=gpus))


def wait_for_workers(config: Config) -> None:
    """Waits until the nodes have room for the train workers; raises ValueError where they don't within the limit.

    Room is what the nodes have, whoever uses it: a run waits for its turn without a limit, as before. An elastic run begins
    with its fewest workers.
    """
    _wait_for(_room_of(config), config)


class NodeWatch:
    """Looks from time to time, while a run trains, whether the nodes have room for its fewest workers.

    Ray Train itself asks for nodes in place of lost ones, but waits for them without a word and without an end.
    """

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self._limit, self._clock = _room_of(config), _limit_of(config), clock
        self._looked = clock()
        self._wait: _Wait | None = None

    def check(self) -> None:
        """Says what is missing, once a minute. Raises NodesLost where it was missing for all of --wait_for_nodes."""
        if self._clock() - self._looked < WATCH_SECONDS:
            return
        self._looked = self._clock()
        try:
            nodes = _nodes()
        except ray.exceptions.RayError:  # the training hears of it, too
            return
        if self._room.on(nodes) < self._room.count:
            self._wait = self._wait or _Wait(self._room, self._limit, clock=self._clock)
            if self._wait.is_over(nodes):
                raise NodesLost(_refusal(self._room, nodes, self._limit))
        elif self._wait is not None:
            logger.info("%s", _are_there(self._room))
            self._wait = None


def room_for_workers(config: Config) -> int:
    """How many of a run's workers the nodes hold, whoever uses them."""
    return _room_of(config).on(_nodes())


def _room_of(config: Config) -> Room:
    """Room for the fewest workers of a run."""
    cluster = config.cluster
    gpus = cluster.gpus_per_worker or 0
    each = {"CPU": cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    flags = f"--num_workers {cluster.num_workers} with {_in_words({'CPU': cluster.cpus_per_worker, 'GPU': gpus})} each"
    remedy = "Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
    kind, labels = cluster.accelerator_type, cluster.worker_labels
    places = [f"--accelerator_type {kind}"] * (kind is not None) + [f"--label_selector {in_words(labels)}"] * bool(labels)
    if places:
        named = " and ".join(place.partition(" ")[0] for place in places)
        remedy += f" Without {named}, workers run on any node."
    return Room(cluster.fewest_workers, each, "workers", ", ".join([flags, *places]), remedy, kind, labels)


def wait_for_cpus(config: Config) -> None:
    """Waits until some node for it has a CPU, which encoding records takes; raises ValueError where none has within the
    limit."""
    flags, remedy, labels = "Records are encoded on 1 CPU at least", "Add nodes.", config.cluster.data_labels
    if labels:
        flags += f", --data_label_selector {in_words(labels)}"
        remedy += " Without --data_label_selector, they are encoded on any node."
    _wait_for(Room(1, {"CPU": 1}, "tasks that encode records", flags, remedy, labels=labels), config)


def fits(nodes: Sequence[Resources], each: Resources) -> int:
    """How many processes the nodes hold that each need so much."""
    # A fraction of a GPU is no exact float: ten of 0.1 fit on one.
    return sum(int(min(node.get(name, 0) / amount for name, amount in each.items()) + 1e-6) for node in nodes)


def _wait_for(room: Room, config: Config) -> None:
    """Raises ValueError where the nodes lack room and none that bring it come within --wait_for_nodes."""
    if room.on(_nodes()) >= room.count:
        return
    wait = _Wait(room, _limit_of(config))
    with _asked_for(room) if wait.limit else contextlib.nullcontext():
        while room.on(nodes := _nodes()) < room.count:
            if wait.is_over(nodes):
                raise ValueError(_refusal(room, nodes, wait.limit))
            time.sleep(min(LOOK_SECONDS, max(0.01, wait.limit)))
    if wait.limit:
        logger.info("%s", _are_there(room))


def _limit_of(config: Config) -> float:
    """For how many seconds nodes are waited for."""
    limit = config.cluster.wait_for_nodes
    if limit is not None:
        return limit
    return 0 if owns_cluster() else WAIT_SECONDS


class _Wait:
    """A wait of `limit` seconds at most for nodes with some room; it begins when it is made."""

    def __init__(self, room: Room, limit: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self.limit, self._clock = room, limit, clock
        self._began = clock()
        self._said: float | None = None

    def is_over(self, nodes: Sequence[Node]) -> bool:
        """Whether no other nodes than these are waited for; says from time to time what is missing."""
        now = self._clock()
        left = self.limit - (now - self._began)
        if left <= 0:
            return True
        if self._said is None or now - self._said >= SAY_SECONDS:
            logger.info("%s", _waiting(self._room, nodes, left))
            self._said = now
        return False


@contextlib.contextmanager
def _asked_for(room: Room) -> Iterator[None]:
    """Within it, the cluster's autoscaler, if it has one, knows what is needed.

    A placement group that waits for its nodes is this run's own and goes with it. A request of ray.autoscaler.sdk would be the
    whole cluster's, and replace that of another run.
    """
    selectors = [dict(room.labels)] * room.count if room.labels else None
    group = placement_group([room.bundle] * room.count, strategy="PACK", bundle_label_selector=selectors)
    try:
        yield
    finally:
        remove_placement_group(group)


def _nodes() -> list[Node]:
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def _are_there(room: Room) -> str:
    return f"The nodes for {room.count} {room.name} are there"


def _waiting(room: Room, nodes: Sequence[Node], seconds: float) -> str:
    return (
        f"Waiting for nodes, {seconds:.0f} s at most (--wait_for_nodes): there is room for {room.on(nodes)} of "
        f"{room.count} {room.name} with {room.of_one}; the cluster has {_cluster_in_words(nodes, room)}"
    )


def _refusal(room: Room, nodes: Sequence[Node], waited: float) -> str:
    came = f", and no more came in {waited:g} s (--wait_for_nodes)" if waited else ""
    without_gpus = "GPU" in room.each and not room.kind_of_gpu and not any(node.resources.get("GPU") for node in nodes)
    on_cpus = " --gpus_per_worker 0 trains on CPUs." if without_gpus else ""
    there = _cluster_in_words(nodes, room)
    return f"{room.flags}: the cluster has room for {room.on(nodes)} ({there}){came}. {room.remedy}{on_cpus}"


def _cluster_in_words(nodes: Sequence[Node], room: Room) -> str:
    """The number of nodes and the largest one; where not every node will do, each kind of node with what the room asks for."""
    if not room.kind_of_gpu and not room.labels:
        largest = {name: max((node.resources.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
        return f"{'1 node with' if len(nodes) == 1 else f'{len(nodes)} nodes, the largest with'} {_in_words(largest)}"
    kinds = Counter(_node_in_words(node, room) for node in nodes).most_common()
    told = [f"{count} {'node' if count == 1 else 'nodes'} with {words}" for words, count in kinds[:MOST_KINDS]]
    others = sum(count for _, count in kinds[MOST_KINDS:])
    return "; ".join([*told, *([f"{others} others"] if others else [])]) or "no nodes"


def _node_in_words(node: Node, room: Room) -> str:
    has = _in_words({name: node.resources.get(name, 0) for name in ("CPU", "GPU")})
    kind = [f"of type {node.kind_of_gpu or 'unknown'}"] if room.kind_of_gpu and node.resources.get("GPU") else []
    labels = [f"{label}={node.labels[label]}" if label in node.labels else f"no {label}" for label in room.labels]
    return ", ".join([" ".join([has, *kind]), *labels])


def _in_words(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())
