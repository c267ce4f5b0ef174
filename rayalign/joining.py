"""Joining the cluster that a run is meant for, or starting one of its own on this machine."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

import ray
import ray._private.utils

from rayalign.cluster import set_ray_variables
from rayalign.config.config import Config
from rayalign.ray_lines import quiet_ray, tidy_worker_logs

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "RAY_ADDRESS"

SERVE_NAMESPACE = "serve"
"""Of all actors of Ray Serve. Can go together with REPLICA_NAME.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/serve/_private/constants.py"""

REPLICA_NAME = "SERVE_REPLICA::{}#"
"""How the names of an application's replicas begin. Can go when Ray Serve can be told not to wait for requests.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/serve/_private/common.py (`ReplicaID.to_full_id_str`)"""

ANSWER_SECONDS = 20
"""How long the head that RAY_ADDRESS names may take to answer."""


def start_ray(config: Config) -> None:
    """Joins the cluster that RAY_ADDRESS names (in a job: the job's) or that `ray start` made on this machine; without any,
    starts one of this process's own, with room for the workers, which no other run finds. Says which.

    Raises ValueError where nobody answers at RAY_ADDRESS, and where the cluster there doesn't let this process in.
    """
    quiet_ray()
    set_ray_variables()
    if ray.is_initialized():
        return
    address = _address_given()
    with _own_sigterm_handler(), contextlib.ExitStack() as then:
        then.callback(tidy_worker_logs)
        if address or _started_here():
            _join(address)
            nodes = sum(node["Alive"] for node in ray.nodes())
            logger.info("Ray: joined the cluster at %s (%d nodes)", ray.get_runtime_context().gcs_address, nodes)
            return
        cluster = config.cluster
        # One more than the workers take: preparation and fetches must find room beside them.
        cpus = max(os.cpu_count() or 1, int(cluster.most_workers * cluster.cpus_per_worker) + 1)
        logger.info("Ray: starting a cluster of this run's own on this machine, for %d CPUs", cpus)
        # Ray Train asks the dashboard whether a run that vanished still holds its resources.
        ray.init(address="local", num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)


def _join(address: str | None) -> None:
    """Joins the cluster at an address, or the one that `ray start` made here."""
    try:
        # None is the cluster of `ray start`; "auto" would find the private one of any other process, too.
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        where = f"{ADDRESS_VARIABLE}={address}" if address else "The cluster that `ray start` made on this machine"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{where}: a cluster answers there, and does not let this process in ({first}). Where it asks for a token, export "
            "RAY_AUTH_MODE=token, and give the cluster's own in ~/.ray/auth_token or RAY_AUTH_TOKEN."
        ) from error


def _address_given() -> str | None:
    """The address in RAY_ADDRESS, where somebody answers; None where it names none. Ray itself would try for minutes."""
    address = os.environ.get(ADDRESS_VARIABLE, "").strip()
    if address in ("", "auto", "local"):
        return None
    form = re.fullmatch(r"(?:ray://)?(?P<host>\[[^]]+\]|[^/:]+):(?P<port>[0-9]{1,5})/?", address)
    if form is None or int(form["port"]) > 65535:
        jobs = " An http address is for `ray job submit`." if address.startswith("http") else ""
        raise ValueError(
            f"{ADDRESS_VARIABLE}={address}: must be the head's HOST:PORT, such as 10.0.0.1:6379.{jobs} Unset it to run on this "
            "machine alone."
        )
    problem = _problem_with(form["host"].strip("[]"), int(form["port"]), seconds=ANSWER_SECONDS)
    if problem:
        raise ValueError(
            f"{ADDRESS_VARIABLE}={address}: no Ray cluster answers there ({problem}). Start its "
            "head again, give the address of another, or unset it to run on this machine alone."
        )
    return address


def _started_here() -> bool:
    """Whether a cluster of `ray start` answers on this machine."""
    if os.environ.get(ADDRESS_VARIABLE) == "local":
        return False
    address = ray._private.utils.read_ray_address()
    if not address:
        return False
    host, _, port = address.rpartition(":")
    problem = _problem_with(host.strip("[]"), int(port), seconds=2) if port.isdecimal() else "no address"
    if problem:
        logger.info("Ray: the cluster that `ray start` made at %s is gone (%s)", address, problem)
    return not problem


def _problem_with(host: str, port: int, *, seconds: float) -> str | None:
    """Why nobody can be reached at a host and port, tried again until some seconds are over; None where somebody answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())) as connection:
                return "a web server answers, as the dashboard does" if _is_web_server(connection) else None
        except OSError as error:
            problem = (error.strerror or str(error)).lower()
        if time.monotonic() + 1 > deadline:
            return problem
        time.sleep(1)


def _is_web_server(connection: socket.socket) -> bool:
    """Whether HTTP is spoken at the other end, as at the dashboard's port, which is often taken for the head's."""
    connection.settimeout(2)
    try:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keeps what SIGTERM does in this process, where that is the program's own: `ray.init` would have it leave with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def end_replicas(application: str) -> None:
    """Ends the replicas of an application of Ray Serve at once, with the requests that they have."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].startswith(REPLICA_NAME.format(application)):
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(actor["name"], namespace=SERVE_NAMESPACE))


@contextlib.contextmanager
def ray_as_found() -> Iterator[None]:
    """Leaves Ray as it was before: what is joined or started within is left or ended, so that a caller's next run finds a
    cluster of the size that it asks for."""
    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()
