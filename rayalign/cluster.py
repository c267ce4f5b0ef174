"""Ray itself: joining a cluster or starting one, what its processes log, errors that cross it, and its undocumented names.

Every name of Ray that its documentation does not promise is here, with its place in Ray's source (read in version 2.60.0) and
when it can go. tests/test_cluster.py compares each with the installed Ray.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
import ray.data
import transformers

from rayalign.config.config import Config

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

PROGRESS_LOGGER = "ray.data._internal.progress"
"""Warns in each process that progress bars are switched off, once they are. Can go when it no longer does.
https://github.com/ray-project/ray/tree/ray-2.60.0/python/ray/data/_internal/progress"""

USER_ERRORS = (ValueError, FloatingPointError)
"""What a user can fix: flags, data, a model's files; a loss that is no longer finite."""

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


def user_error_in(failures: Mapping[int, Exception]) -> ValueError | FloatingPointError | None:
    """The first error that a user can fix among those of Ray Train's workers (`WorkerGroupError.worker_failures`)."""
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)  # a RayTaskError has one
        if isinstance(cause, USER_ERRORS):
            return cause
    return None


def start_ray(config: Config) -> None:
    """Joins the cluster that the job was submitted to or the one on this machine; without any, starts a local one with room for
    the workers."""
    quiet_ray()
    set_ray_variables()
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.WARNING)
        except ConnectionError:
            cluster = config.cluster
            # One more than the workers take: preparation and fetches must find room beside them.
            cpus = max(os.cpu_count() or 1, int(cluster.num_workers * cluster.cpus_per_worker) + 1)
            # Ray Train asks the dashboard whether a run that vanished still holds its resources.
            ray.init(num_cpus=cpus, include_dashboard=True, logging_level=logging.WARNING)


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
