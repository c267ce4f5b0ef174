"""Ray's processes: settings, results that cross them, and undocumented names. `joining` joins or starts the cluster that they
run on, `nodes` looks at its machines, `ray_lines` at what is printed, `ray_errors` at what is raised.

Names of Ray that its documentation does not promise are in these files, with their place in Ray's source
(read in version 2.60.0) and when they can go. tests/test_cluster.py compares each with the installed Ray.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import pyarrow as pa
import ray
import ray._private.ray_logging
import ray._private.worker
import ray.data
import ray.exceptions
import ray.train
import ray.util.state
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rayalign.ray_errors import USER_ERRORS

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRAIN_POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""How often Ray Train's controller looks at its workers; read on the driver. Every report of a worker waits for the next look,
2 s by default. Can go when a report no longer waits.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/constants.py"""

POLL_SECONDS = "0.2"

TRAIN_START_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""After how many seconds without room for its workers Ray Train's controller asks anew, for as many as an elastic run then has
room for; read on the driver. 60 s by default, in which a run that could go on with fewer waits for a node that has just gone.
Can go when Ray Train looks at the nodes before it asks.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/constants.py"""

TRAIN_START_SECONDS = "30"
"""A little more than the 20 s that Ray may take to see that a node has gone."""

TUNE_METRIC_CHECK_VARIABLE = "TUNE_DISABLE_STRICT_METRIC_CHECKING"
"""1 lets a trial report before its first evaluation, when it does not have the metric that ranks trials. Can go when Ray Tune
no longer fails such a trial, or when every report has the metric.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/execution/tune_controller.py"""

TUNE_SIGINT_VARIABLE = "TUNE_DISABLE_SIGINT_HANDLER"
"""1 keeps Ray Tune from taking Ctrl-C for the regular end of a sweep. Documented, among Ray Tune's environment variables."""

TUNE_LOGGERS_VARIABLE = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
"""1 keeps Ray Tune from writing what trials report once more, as CSV, JSON and TensorBoard events under its own names; trials'
folders have it. Documented, among Ray Tune's environment variables."""

TUNE_OUTPUT_VARIABLE = "RAY_AIR_NEW_OUTPUT"
"""0 keeps Ray Tune from printing a box and the place of its own files at the start of a sweep, as it does with verbose=0, too;
rayalign's lines tell both. Can go when verbose=0 prints nothing.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/tune/experimental/output.py (`experiment_started`)"""

TUNE_THREAD_VARIABLE = "TUNE_FUNCTION_THREAD_TIMEOUT_S"
"""How long a process that goes on with another trial waits for the thread of the last one, which closes its files; then the new
trial is failed. 2 s by default. Documented, among Ray Tune's environment variables."""

TUNE_THREAD_SECONDS = "120"

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the process that `ray job submit` starts. Can go when Ray documents how a driver knows that it is a job.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/runtime_env/constants.py"""

TEMPORARY_FOLDERS = "/runtime_resources/"
"""In the path of what Ray unpacks for a job, and deletes. Can go together with JOB_VARIABLE.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py"""

HEAD_NODE = "node:__internal_head__"
"""A resource that only the head node has. Can go when Ray documents a way to keep a process on the head node.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py"""

COORDINATOR = "AutoscalingCoordinator"
"""Ray's actor, and its namespace, that shares the cluster's nodes out. What a run asks for it keeps for three minutes after the
run's controller was killed, with its driver or without, and an elastic run finds no room as long. Can go when Ray Train gives
back what lost controllers had.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/data/_internal/cluster_autoscaler/default_autoscaling_coordinator.py"""

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints, a file beside them. It is written in place, so that a kill may cut it short, and a short
one ends the next run. Can go when Ray writes it whole.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/train/v2/_internal/constants.py"""

COLOR_VARIABLE = "RAY_COLOR_PREFIX"
"""0 prints the names of Ray's processes without escape codes, which Ray writes into files, too. Can go when it doesn't.
https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py (`print_worker_logs`)"""

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


def attempts_before() -> int:
    """How often Ray began the task that this process is at before, in processes that ended, or on machines that were lost.

    Can go when Ray's runtime context tells it.
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx (`get_current_task_attempt_number`)
    """
    worker: Any = ray._private.worker.global_worker
    return int(worker.core_worker.get_current_task_attempt_number())


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


def share_of(trainer: Any) -> str:
    """The name under which Ray keeps what a TorchTrainer (whose import takes seconds) asks for."""
    return f"train-{trainer.train_run_context.run_id}"


def give_up_share(share: str) -> None:
    """Gives back the nodes that a lost controller had asked for."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # there is no such actor, or it is lost as well
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        ray.get(coordinator.cancel_request.remote(requester_id=share), timeout=10)


def owns_cluster() -> bool:
    """Whether this process started the cluster that it is connected to, so that nobody adds nodes to it.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py (`_global_node`), 2.60.0. Can go when Ray
    says whether a cluster was started or joined.
    """
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def require_lasting_folder(folder: str | None, flag: str = "--output_dir") -> None:
    """Raises ValueError for a folder of results that Ray would delete: in a job, one inside the folder that the job runs in."""
    if folder and "://" in folder:
        return
    given = f"{flag} {folder}" if folder else f"{flag} is not given"
    whole = os.path.abspath(os.path.expanduser(folder or "output"))
    relative = not (folder and os.path.isabs(os.path.expanduser(folder)))
    if TEMPORARY_FOLDERS in os.path.realpath(whole) or (relative and JOB_VARIABLE in os.environ):
        raise ValueError(
            f"{given}: the results would lie in {whole}, in the folder that Ray made for this job and deletes. Pass an "
            "absolute path that all nodes see, or a URL such as s3://bucket/runs/first."
        )


def set_ray_variables() -> None:
    """Sets what Ray Train and Ray Tune read from the environment of the process that starts them."""
    os.environ.setdefault(TRAIN_POLL_VARIABLE, POLL_SECONDS)
    os.environ.setdefault(TRAIN_START_VARIABLE, TRAIN_START_SECONDS)
    os.environ[TUNE_METRIC_CHECK_VARIABLE] = "1"
    os.environ[TUNE_SIGINT_VARIABLE] = "1"
    os.environ[TUNE_LOGGERS_VARIABLE] = "1"
    os.environ[TUNE_OUTPUT_VARIABLE] = "0"
    os.environ.setdefault(TUNE_THREAD_VARIABLE, TUNE_THREAD_SECONDS)
    if not sys.stderr.isatty():
        os.environ.setdefault(COLOR_VARIABLE, "0")


def configure_ray_data() -> None:
    """Ray Data's settings for the data sets that this process builds next."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # the sampler decides the order, timing must not change it
    context.enable_progress_bars = False  # they flood job logs; `progress` says a line from time to time


def place_ray_data(labels: Mapping[str, str]) -> None:
    """The nodes of all tasks and actors of the data sets that this process builds next, by their labels; empty: any node."""
    ray.data.DataContext.get_current().execution_options.label_selector = dict(labels) or None
