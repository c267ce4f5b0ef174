"""Ray itself: joining a cluster or starting one, what its processes log, errors that cross it, and its undocumented names.

Every name of Ray that its documentation does not promise is here, with its place in Ray's source (read in version 2.60.0) and
when it can go. tests/test_cluster.py compares each with the installed Ray.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
import ray._private.utils
import ray.data
import ray.exceptions
import ray.train
import ray.util.state
import transformers
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rayalign.config.config import Config

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRAIN_POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""How often Ray Train's controller looks at its workers; read on the driver. Every report of a worker waits for the next look,
2 s by default. Can go when a report no longer waits.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/constants.py"""

POLL_SECONDS = "0.2"

TUNE_METRIC_CHECK_VARIABLE = "TUNE_DISABLE_STRICT_METRIC_CHECKING"
"""1 lets a trial report before its first evaluation, when it does not have the metric that ranks trials. Can go when Ray Tune
no longer fails such a trial, or when every report has the metric.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/execution/tune_controller.py"""

TUNE_SIGINT_VARIABLE = "TUNE_DISABLE_SIGINT_HANDLER"
"""1 keeps Ray Tune from taking Ctrl-C for the regular end of a sweep. Documented, among Ray Tune's environment variables."""

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the process that `ray job submit` starts. Can go when Ray documents how a driver knows that it is a job.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/runtime_env/constants.py"""

TEMPORARY_FOLDERS = "/runtime_resources/"
"""In the path of what Ray unpacks for a job, and deletes. Can go together with JOB_VARIABLE.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py"""

ADDRESS_VARIABLE = "RAY_ADDRESS"
ANSWER_SECONDS = 20
"""How long the head that RAY_ADDRESS names may take to answer."""

HEAD_NODE = "node:__internal_head__"
"""A resource that only the head node has. Can go when Ray documents a way to keep a process on the head node.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py"""

LAUNCHER_CONFIG = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster's configuration on the head node. Can go, as KUBERAY_VARIABLE can, when Ray says whether a
cluster scales.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/execution/cluster_info.py"""

KUBERAY_VARIABLE = "RAY_USAGE_STATS_KUBERAY_IN_USE"
"""Set in the pods of KubeRay.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/usage/usage_constants.py"""

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints, a file beside them. It is written in place, so that a kill may cut it short, and a short
one ends the next run. Can go when Ray writes it whole.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/constants.py"""

WORKERS_ERROR = "_base_exc"
"""Where Ray Train keeps the exception that a worker's function raised, in the failure that it reports of the worker. Can go
when Ray Train documents a way to it.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/exceptions.py"""

HEALTH_ERROR = "health_check_failure"
"""The same, where a worker no longer answers. Can go when WORKERS_ERROR can."""

TRACEBACK_LOGGER = "ray.train.v2._internal.util"
"""Logs the traceback of what a train worker's function raised. Can go when Ray Train leaves that to the driver, which gets it.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/util.py"""

PROGRESS_LOGGER = "ray.data._internal.progress"
"""Warns in each process that progress bars are switched off, once they are. Can go when it no longer does.
https://github.com/ray-project/ray/tree/ray-2.60.0/python/ray/data/_internal/progress"""

USER_ERRORS = (ValueError, FloatingPointError)
"""What a user can fix: flags, data, a model's files; a loss that is no longer finite."""

RAY_ERRORS = (ray.exceptions.RayError, ray.train.TrainingFailedError)
"""How Ray says that a task, an actor or a training run failed."""

STOPPED_COLUMN = "stopped"
"""The column of a task's report that says what stopped it; null in all other lines."""


@dataclass(frozen=True)
class Stopped:
    """The error that ended a process's work, where a restart would meet it again. It is returned and not raised: Ray Train
    starts its workers again after an exception, and Ray Data loses the exception's own type and text."""

    error: ValueError | FloatingPointError


def outcome_of(work: Callable[[], T], *, errors: tuple[type[Exception], ...] = USER_ERRORS) -> T | Stopped:
    """The result of some work in a process of the cluster, or the error that stopped it, if it is one of `errors`."""
    try:
        return work()
    except errors as error:
        # Of the plain type: an exception of another library may not pickle.
        plain = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
        return Stopped(plain(str(error)))


def result_of(outcome: T | Stopped) -> T:
    """The result of `outcome_of`, on the driver; raises what stopped it."""
    if isinstance(outcome, Stopped):
        raise outcome.error
    return outcome


def report(work: Callable[[], Iterable[Mapping[str, Any]]], schema: pa.Schema) -> pa.Table:
    """What a task of Ray Data hands to `reports_of`: the lines that its work makes, or one that says what stopped it."""
    outcome = outcome_of(lambda: list(work()), errors=(ValueError,))
    lines = [{STOPPED_COLUMN: str(outcome.error)}] if isinstance(outcome, Stopped) else outcome
    return pa.Table.from_pylist(lines, schema=schema.append(pa.field(STOPPED_COLUMN, pa.string())))


def reports_of(tasks: ray.data.Dataset, schema: pa.Schema) -> Iterator[pa.Table]:
    """The lines of tasks that `report`, in tables as they arrive; raises ValueError for what stopped one."""
    reported = schema.append(pa.field(STOPPED_COLUMN, pa.string()))
    for batch in tasks.iter_batches(batch_size=None, batch_format="pyarrow"):
        table = cast(pa.Table, batch).cast(reported)
        for words in table[STOPPED_COLUMN].drop_null().to_pylist():
            result_of(Stopped(ValueError(words)))
        yield table.select(schema.names)


def user_error_in(error: Exception) -> ValueError | FloatingPointError | None:
    """The first error that a user can fix among those behind one of RAY_ERRORS."""
    for cause in causes_of(error):
        if isinstance(cause, USER_ERRORS) and not isinstance(cause, RAY_ERRORS):
            return cause
    return None


def cause_in_words(error: Exception) -> str:
    """What is behind one of RAY_ERRORS, in a sentence or two with what helps."""
    causes = list(causes_of(error))
    texts = " ".join(map(str, causes))
    if any(isinstance(c, ray.exceptions.OutOfMemoryError) for c in causes) or "low on memory" in texts:
        return (
            "Ray ended a process because its machine's memory was full. Fewer --num_workers on a machine, a smaller "
            "--batch_size with more --gradient_accumulation_steps, or a lower --max_pixels or --max_length need less."
        )
    innermost = causes[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()] or [""]
    first = lines[0].rstrip(".:")
    if type(innermost).__name__ == "OutOfMemoryError":  # torch's, whose class differs with the kind of device
        return (
            f"a GPU's memory was full ({first}). A smaller --batch_size with more --gradient_accumulation_steps makes the same "
            "update in less; `rayalign plan` tells what fits."
        )
    if isinstance(innermost, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError):
        return f"a machine's disk or Ray's shared memory was full ({first}). Free some, on every node."
    if isinstance(innermost, ray.exceptions.RayError):
        return f"a process or machine of the cluster was lost ({type(innermost).__name__}: {first})."
    return f"{type(innermost).__name__}: {first}."


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error and those that Ray says are behind it, the outermost first."""
    yield error
    inner: list[Any] = list(getattr(error, "worker_failures", {}).values())
    inner += [getattr(error, name, None) for name in ("controller_failure", "cause", WORKERS_ERROR, HEALTH_ERROR)] + [
        error.__cause__
    ]
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from causes_of(cause)


def free_lost_workers(*, seconds: float = 15) -> None:
    """Gives back what dead train workers still hold, after their controller was lost, too: the helper of Ray Train that should
    do so gives up where a machine has several clusters, and the next workers would wait for ever.

    Can go when Ray Train itself finds its cluster there.
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/execution/controller/placement_group_cleaner.py
    """
    context = ray.get_runtime_context()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = ray.util.state.list_actors(
                address=context.gcs_address, filters=[("job_id", "=", context.get_job_id())], detail=True, limit=10_000
            )
        except ray.util.state.exception.RayStateApiException as error:
            logger.info("Ray: what lost workers held can't be told (%s)", error)
            return
        held: dict[str, set[str]] = {}
        for actor in found:
            if actor.placement_group_id:
                held.setdefault(actor.placement_group_id, set()).add(actor.state)
        lost = [group for group, states in held.items() if states == {"DEAD"}]
        for group in lost:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
        if lost:
            return
        time.sleep(1)


def start_ray(config: Config) -> None:
    """Joins the cluster that RAY_ADDRESS names (in a job: the job's) or that `ray start` made on this machine; without any,
    starts one of this process's own, with room for the workers, which no other run finds. Says which.

    Raises ValueError where nobody answers at RAY_ADDRESS.
    """
    quiet_ray()
    set_ray_variables()
    if ray.is_initialized():
        return
    address = _address_given()
    with _own_sigterm_handler():
        if address or _started_here():
            # None is the cluster of `ray start`; "auto" would find the private one of any other process, too.
            ray.init(address=address, logging_level=logging.WARNING)
            nodes = sum(node["Alive"] for node in ray.nodes())
            logger.info("Ray: joined the cluster at %s (%d nodes)", ray.get_runtime_context().gcs_address, nodes)
            return
        cluster = config.cluster
        # One more than the workers take: preparation and fetches must find room beside them.
        cpus = max(os.cpu_count() or 1, int(cluster.num_workers * cluster.cpus_per_worker) + 1)
        logger.info("Ray: starting a cluster of this run's own on this machine, for %d CPUs", cpus)
        # Ray Train asks the dashboard whether a run that vanished still holds its resources.
        ray.init(address="local", num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)


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


def require_lasting_folder(output_dir: str | None) -> None:
    """Raises ValueError for an --output_dir that Ray would delete: in a job, one inside the folder that the job runs in."""
    if output_dir and "://" in output_dir:
        return
    given = f"--output_dir {output_dir}" if output_dir else "--output_dir is not given"
    whole = os.path.abspath(os.path.expanduser(output_dir or "output"))
    relative = not (output_dir and os.path.isabs(os.path.expanduser(output_dir)))
    if TEMPORARY_FOLDERS in os.path.realpath(whole) or (relative and JOB_VARIABLE in os.environ):
        raise ValueError(
            f"{given}: the results would lie in {whole}, in the folder that Ray made for this job and deletes. Pass an "
            "absolute path that all nodes see, or a URL such as s3://bucket/runs/first."
        )


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


def set_ray_variables() -> None:
    """Sets what Ray Train and Ray Tune read from the environment of the process that starts them."""
    os.environ.setdefault(TRAIN_POLL_VARIABLE, POLL_SECONDS)
    os.environ[TUNE_METRIC_CHECK_VARIABLE] = "1"
    os.environ[TUNE_SIGINT_VARIABLE] = "1"


def resolve_cluster(config: Config) -> Config:
    """The same configuration with the workers' GPUs resolved; raises ValueError for workers that no node could ever hold."""
    cluster = config.cluster
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = cluster.gpus_per_worker if cluster.gpus_per_worker is not None else float(has_gpus)
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": gpus}
    fits = sum(int(min(node.get(name, 0) // amount for name, amount in wanted.items() if amount)) for node in nodes)
    if fits < cluster.num_workers and not _autoscales():
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        raise ValueError(
            f"--num_workers {cluster.num_workers} with {wanted['CPU']:g} CPUs and {gpus:g} GPUs each: the cluster has room "
            f"for {fits} ({len(nodes)} nodes, the largest with {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs) and does "
            "not scale. Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
        )
    return dataclasses.replace(config, cluster=dataclasses.replace(cluster, gpus_per_worker=gpus))


def _autoscales() -> bool:
    """Whether nodes may still join."""
    return Path(LAUNCHER_CONFIG).expanduser().exists() or KUBERAY_VARIABLE in os.environ


def configure_ray_data() -> None:
    """Ray Data's settings for the data sets that this process builds next."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # the sampler decides the order, timing must not change it
    context.enable_progress_bars = False  # they flood job logs; `progress` says a line from time to time


def quiet_logging() -> None:
    """In a process of Ray or of the command: rayalign's own lines, and of Ray and other libraries only what goes wrong."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayalign").setLevel(logging.INFO)
    quiet_ray()
    # It recommends a kernel for CPUs each time it is imported, which peft does.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # peft uses transformers' old name of this; the line can go when a peft release uses the new one.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def quiet_ray() -> None:
    """Lets Ray's libraries log warnings only, in this process."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.ERROR)
