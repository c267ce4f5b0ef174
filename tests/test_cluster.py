"""Names of Ray that its documentation does not promise, against the installed Ray; errors that cross it; folders of jobs."""

import importlib
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from rayalign import cluster, joining, ray_errors, ray_lines
from rayalign.retries import StorageFailed


@pytest.mark.parametrize(
    ("ours", "module", "theirs"),
    [
        (cluster.TRAIN_POLL_VARIABLE, "ray.train.v2._internal.constants", "HEALTH_CHECK_INTERVAL_S_ENV_VAR"),
        (cluster.TRAIN_START_VARIABLE, "ray.train.v2._internal.constants", "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR"),
        (cluster.CHECKPOINT_LIST, "ray.train.v2._internal.constants", "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME"),
        (cluster.JOB_VARIABLE, "ray._private.runtime_env.constants", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
        (joining.ADDRESS_VARIABLE, "ray._private.ray_constants", "RAY_ADDRESS_ENVIRONMENT_VARIABLE"),
        (
            cluster.HEAD_NODE,
            "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
            "HEAD_NODE_RESOURCE_LABEL",
        ),
        (ray_lines.PROGRESS_LOGGER, "ray.data._internal.progress", "__name__"),
        (ray_lines.TRACEBACK_LOGGER, "ray.train.v2._internal.util", "__name__"),
        (ray_lines.ANALYSIS_LOGGER, "ray.tune.analysis.experiment_analysis", "__name__"),
        (ray_lines.TOKEN_LOGGER, "ray._private.authentication.authentication_token_setup", "__name__"),
    ],
)
def test_an_undocumented_name_is_still_the_one_that_ray_uses(ours: str, module: str, theirs: str) -> None:
    assert vars(importlib.import_module(module))[theirs] == ours


@pytest.mark.parametrize(
    ("ours", "module", "around"),
    [
        # Without a constant in Ray: what it does with the name, as its source says it.
        (cluster.TUNE_METRIC_CHECK_VARIABLE, "ray.tune.execution.tune_controller", 'int(os.environ.get("{}", 0)) != 1'),
        (cluster.TUNE_SIGINT_VARIABLE, "ray.tune.tune", 'int(os.getenv("{}", "0"))'),
        (cluster.TUNE_LOGGERS_VARIABLE, "ray.tune.utils.callback", 'os.environ.get("{}", "0") != "1"'),
        (cluster.TUNE_OUTPUT_VARIABLE, "ray.tune.experimental.output", 'os.environ.get("{}", "1") == "0"'),
        (cluster.TUNE_THREAD_VARIABLE, "ray.tune.trainable.function_trainable", 'int(os.environ.get("{}", 2))'),
        ("sys.exit(0)", "ray.train.v2.api.data_parallel_trainer", "process still exits with 1.\n                    {}\n"),
        ("sys.exit(signum)", "ray._private.worker", "    def sigterm_handler(signum, frame):\n        {}\n"),
        (cluster.TEMPORARY_FOLDERS.strip("/"), "ray._private.ray_constants", '= "{}"'),
        (
            "head=False",
            "ray._private.worker",
            "_global_node = ray._private.node.Node(\n                ray_params,\n                {},",
        ),
        ("logger", "ray.data._internal.progress", '{}.warning(\n                "Progress bars disabled.'),
        ("worker_failures", "ray.train.v2.api.exceptions", "self.{} = worker_failures"),
        (
            "Error in control loop iteration",
            "ray.train.v2._internal.execution.controller.controller",
            'logger.exception("{}: %s", e)',
        ),
        ("logger.error", "ray.train.v2._internal.util", '{}(f"Error in training function:'),
        (cluster.COLOR_VARIABLE, "ray._private.worker", 'if os.getenv("{}") == "0":'),
        (ray_lines.LOG_HANDLER, "ray._private.worker", 'dispatcher.add_handler(\n                "{}",'),
        (ray_lines.SILENT_ACTORS[0], "ray.train.v2._internal.execution.controller.placement_group_cleaner", "class {}:"),
        (
            cluster.COORDINATOR,
            "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
            'name="{0}",\n        namespace="{0}",',
        ),
        (
            "requester_id",
            "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
            "def cancel_request(\n        self,\n        {}:",
        ),
        (
            "train_run_context.run_id",
            "ray.train.v2._internal.execution.scaling_policy.scaling_policy",
            'self._requester_id = f"train-{{{}}}"',
        ),
        (ray_errors.HEALTH_ERROR, "ray.train.v2._internal.exceptions", "self.{} = failure"),
        (ray_errors.WORKERS_ERROR, "ray.train.v2._internal.exceptions", "self.{} = exc"),
    ],
)
def test_ray_still_does_what_an_undocumented_name_is_used_for(ours: str, module: str, around: str) -> None:
    assert around.format(ours) in inspect.getsource(importlib.import_module(module))


def refuse() -> int:
    raise ValueError("--beta 0: must be above 0.")


def overflow() -> int:
    raise FloatingPointError("The loss is nan at step 3.")


class NotPlain(ValueError):
    """Pickles, and can't be loaded again: as errors of other libraries that take two arguments."""

    def __init__(self, words: str, number: int) -> None:
        super().__init__(f"{words} {number}")


def refuse_in_its_own_class() -> int:
    raise NotPlain("number", 7)


def break_down() -> int:
    raise RuntimeError("our own mistake")


def test_the_result_of_work_that_succeeds_comes_back_as_it_is() -> None:
    assert cluster.result_of(cluster.outcome_of(lambda: 7)) == 7


@pytest.mark.parametrize(
    ("work", "kind", "words"),
    [
        (refuse, ValueError, "--beta 0: must be above 0."),
        (overflow, FloatingPointError, "The loss is nan at step 3."),
        (refuse_in_its_own_class, ValueError, "number 7"),
    ],
)
def test_what_a_user_can_fix_crosses_processes_with_its_text(
    work: Callable[[], int], kind: type[Exception], words: str
) -> None:
    outcome = pickle.loads(pickle.dumps(cluster.outcome_of(work)))
    assert isinstance(outcome, cluster.Stopped)
    with pytest.raises(kind) as caught:
        cluster.result_of(outcome)
    assert (type(caught.value), str(caught.value)) == (kind, words)


def test_our_own_mistakes_and_errors_that_are_not_asked_for_are_raised_where_they_happen() -> None:
    with pytest.raises(RuntimeError):
        cluster.outcome_of(break_down)
    with pytest.raises(ValueError):
        cluster.outcome_of(refuse, errors=(FloatingPointError,))


SCHEMA = pa.schema([("rows", pa.int64())])


@dataclass(frozen=True)
class Tasks:
    """What of a Ray Data set is read: the tables that its tasks hand back."""

    tables: tuple[pa.Table, ...]

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        yield from self.tables


def test_reports_of_tasks_arrive_in_order_without_what_only_ray_needs() -> None:
    tasks: Any = Tasks(tuple(cluster.report(lambda n=n: [{"rows": n}] * n, SCHEMA) for n in (1, 0, 2)))
    tables = list(cluster.reports_of(tasks, SCHEMA))
    assert [table["rows"].to_pylist() for table in tables] == [[1], [], [2, 2]]
    assert all(table.schema == SCHEMA for table in tables)


def test_a_task_that_stopped_ends_the_stage_with_its_words() -> None:
    def lines() -> Iterator[dict[str, int]]:
        yield {"rows": 1}
        refuse()

    tasks: Any = Tasks((cluster.report(lambda: [{"rows": 1}], SCHEMA), cluster.report(lines, SCHEMA)))
    reports = cluster.reports_of(tasks, SCHEMA)
    assert next(reports)["rows"].to_pylist() == [1]
    with pytest.raises(ValueError) as caught:
        next(reports)
    assert str(caught.value) == "--beta 0: must be above 0."


def test_the_failure_that_a_user_can_fix_is_found_among_those_of_the_workers() -> None:
    ray_wraps = RayTaskError("loop", "Traceback ...", ValueError("bad flag"), proctitle="w", pid=1, ip="127.0.0.1")
    lost = WorkerGroupError("", {0: RuntimeError("a peer was lost"), 1: ray_wraps})
    assert str(ray_errors.user_error_in(lost)) == "bad flag"
    assert str(ray_errors.user_error_in(ControllerError(ray_wraps))) == "bad flag"
    assert str(ray_errors.user_error_in(ray_wraps.as_instanceof_cause())) == "bad flag"
    assert ray_errors.user_error_in(WorkerGroupError("", {0: RuntimeError("a peer was lost")})) is None


class OutOfMemoryError(RuntimeError):
    """As torch's."""


LOST_PEER = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:25504.")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            WorkerGroupError(
                "", {1: ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")}
            ),
            "Ray ended a process because its machine's memory was full. Fewer --num_workers on a machine, a smaller "
            "--batch_size with more --gradient_accumulation_steps, or a lower --max_pixels or --max_length need less.",
        ),
        (
            WorkerGroupError("", {0: RayTaskError("loop", "Traceback", OutOfMemoryError("CUDA out of memory.\nmore"))}),
            "a GPU's memory was full (CUDA out of memory). A smaller --batch_size with more "
            "--gradient_accumulation_steps makes the same update in less; `rayalign plan` tells what fits.",
        ),
        (
            ControllerError(ray.exceptions.ActorDiedError()),
            "a process or machine of the cluster was lost (ActorDiedError: The actor died unexpectedly before",
        ),
        (
            ray.exceptions.ObjectStoreFullError("no room"),
            "a machine's disk or Ray's shared memory was full (no room). Free some, on every node.",
        ),
        (
            WorkerGroupError("", {0: RayTaskError("loop", "Traceback", StorageFailed("s3://bucket/a: the storage failed."))}),
            "s3://bucket/a: the storage failed.",
        ),
        (WorkerGroupError("", {0: RayTaskError("loop", "Traceback", KeyError("a"))}), "KeyError: 'a'."),
        *(
            (
                WorkerGroupError(str(failures), failures),
                f"a process or machine of the cluster was lost ({first}",
            )
            for failures, first in (
                ({0: ray.exceptions.ActorDiedError(), 1: LOST_PEER}, "ActorDiedError: "),
                ({0: LOST_PEER, 1: ray.exceptions.ActorDiedError()}, "ActorDiedError: "),
                ({0: LOST_PEER, 1: LOST_PEER}, "RuntimeError: [pair.cc:553] Connection closed by peer"),
                ({0: ray.exceptions.ActorDiedError(), 1: RuntimeError("Write error: Broken pipe")}, "ActorDiedError: "),
            )
        ),
        (WorkerGroupError("", {0: LOST_PEER, 1: KeyError("a")}), "KeyError: 'a'."),
        (WorkerGroupError("", {0: OSError("Connection reset by peer")}), "OSError: Connection reset by peer."),
    ],
)
def test_a_failure_of_the_cluster_is_put_into_words(error: Exception, words: str) -> None:
    assert isinstance(error, ray_errors.RAY_ERRORS)
    assert ray_errors.cause_in_words(error).startswith(words.removesuffix(")."))


def test_a_job_needs_a_place_for_its_results_that_outlives_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for anywhere in (None, "runs/first", "/shared/runs"):
        cluster.require_lasting_folder(anywhere)
    monkeypatch.setenv(cluster.JOB_VARIABLE, "{}")
    for lasting in ("/shared/runs", "s3://bucket/runs", "file:///shared/runs", "~/runs"):
        cluster.require_lasting_folder(lasting)
    for lost, given in ((None, "--output_dir is not given"), ("runs/first", "--output_dir runs/first")):
        with pytest.raises(ValueError) as caught:
            cluster.require_lasting_folder(lost)
        assert str(caught.value) == (
            f"{given}: the results would lie in {tmp_path}/{lost or 'output'}, in the folder that Ray made for this job and "
            "deletes. Pass an absolute path that all nodes see, or a URL such as s3://bucket/runs/first."
        )


def test_results_in_a_folder_that_ray_unpacked_are_refused_without_a_job_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unpacked = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    unpacked.mkdir(parents=True)
    monkeypatch.delenv(cluster.JOB_VARIABLE, raising=False)
    monkeypatch.chdir(unpacked)
    for lost in (None, "runs", "./runs", f"{unpacked}/runs"):
        with pytest.raises(ValueError, match="Ray made for this job and deletes"):
            cluster.require_lasting_folder(lost)
