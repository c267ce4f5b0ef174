"""Names of Ray that its documentation does not promise, against the installed Ray; errors that cross it; the workers' GPUs."""

import contextlib
import http.server
import importlib
import inspect
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from rayalign import cluster
from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig


@pytest.mark.parametrize(
    ("ours", "module", "theirs"),
    [
        (cluster.TRAIN_POLL_VARIABLE, "ray.train.v2._internal.constants", "HEALTH_CHECK_INTERVAL_S_ENV_VAR"),
        (cluster.CHECKPOINT_LIST, "ray.train.v2._internal.constants", "CHECKPOINT_MANAGER_SNAPSHOT_FILENAME"),
        (cluster.JOB_VARIABLE, "ray._private.runtime_env.constants", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
        (cluster.ADDRESS_VARIABLE, "ray._private.ray_constants", "RAY_ADDRESS_ENVIRONMENT_VARIABLE"),
        (cluster.KUBERAY_VARIABLE, "ray._common.usage.usage_constants", "KUBERAY_ENV"),
        (
            cluster.HEAD_NODE,
            "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
            "HEAD_NODE_RESOURCE_LABEL",
        ),
        (cluster.PROGRESS_LOGGER, "ray.data._internal.progress", "__name__"),
        (cluster.TRACEBACK_LOGGER, "ray.train.v2._internal.util", "__name__"),
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
        ("sys.exit(0)", "ray.train.v2.api.data_parallel_trainer", "process still exits with 1.\n                    {}\n"),
        ("sys.exit(signum)", "ray._private.worker", "    def sigterm_handler(signum, frame):\n        {}\n"),
        (cluster.TEMPORARY_FOLDERS.strip("/"), "ray._private.ray_constants", '= "{}"'),
        (cluster.LAUNCHER_CONFIG, "ray.tune.execution.cluster_info", 'Path("{}").expanduser().exists()'),
        ("logger", "ray.data._internal.progress", '{}.warning(\n                "Progress bars disabled.'),
        ("worker_failures", "ray.train.v2.api.exceptions", "self.{} = worker_failures"),
        ("logger.error", "ray.train.v2._internal.util", '{}(f"Error in training function:'),
        (cluster.HEALTH_ERROR, "ray.train.v2._internal.exceptions", "self.{} = failure"),
        (cluster.WORKERS_ERROR, "ray.train.v2._internal.exceptions", "self.{} = exc"),
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
    assert str(cluster.user_error_in(lost)) == "bad flag"
    assert str(cluster.user_error_in(ControllerError(ray_wraps))) == "bad flag"
    assert str(cluster.user_error_in(ray_wraps.as_instanceof_cause())) == "bad flag"
    assert cluster.user_error_in(WorkerGroupError("", {0: RuntimeError("a peer was lost")})) is None


class OutOfMemoryError(RuntimeError):
    """As torch's."""


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
        (WorkerGroupError("", {0: RayTaskError("loop", "Traceback", KeyError("a"))}), "KeyError: 'a'."),
    ],
)
def test_a_failure_of_the_cluster_is_put_into_words(error: Exception, words: str) -> None:
    assert isinstance(error, cluster.RAY_ERRORS)
    assert cluster.cause_in_words(error).startswith(words.removesuffix(")."))


@pytest.fixture
def addressed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`addressed(address)`: what a run says that finds this RAY_ADDRESS, which nobody answers."""
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.1)

    def run(address: str) -> str:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError) as caught:
            cluster.start_ray(Config(DPO()))
        assert not ray.is_initialized()
        return str(caught.value)

    return run


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}"])
def test_a_head_that_is_gone_is_said_at_once_and_not_after_minutes(addressed: Callable[[str], str], form: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])
        assert addressed(address) == (
            f"RAY_ADDRESS={address}: no Ray cluster answers there (connection refused). Start its head again, "
            "give the address of another, or unset it to run on this machine alone."
        )


def test_the_dashboards_port_is_not_taken_for_the_heads(addressed: Callable[[str], str]) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with contextlib.closing(server.socket):
        assert "(a web server answers, as the dashboard does)" in addressed(f"127.0.0.1:{server.server_port}")


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:", "head:ray", "10.0.0.1:99999", "s3://bucket/head", "a:b:6379"])
def test_an_address_that_names_no_head_is_refused(addressed: Callable[[str], str], address: str) -> None:
    assert addressed(address) == (
        f"RAY_ADDRESS={address}: must be the head's HOST:PORT, such as 10.0.0.1:6379. Unset it to run on this machine alone."
    )


def test_the_address_of_jobs_is_told_from_that_of_drivers(addressed: Callable[[str], str]) -> None:
    assert "such as 10.0.0.1:6379. An http address is for `ray job submit`." in addressed("http://127.0.0.1:8265")


def test_a_cluster_of_ray_start_is_joined_only_where_it_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not cluster._started_here()  # whatever private clusters run on this machine
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        ray._private.utils.write_ray_address(f"127.0.0.1:{head.getsockname()[1]}")
        assert cluster._started_here()
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert not cluster._started_here()
        monkeypatch.delenv("RAY_ADDRESS")
    assert not cluster._started_here()


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


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClusterConfig]:
    """`resolve(nodes, **flags)`: the cluster section of a run on these nodes."""
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv(cluster.KUBERAY_VARIABLE, raising=False)

    def run(nodes: list[dict[str, Any]], **flags: Any) -> ClusterConfig:
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        return cluster.resolve_cluster(Config(DPO(), cluster=ClusterConfig(**flags))).cluster

    return run


@pytest.mark.parametrize(
    ("nodes", "flags", "gpus"),
    [
        ([node(4)], {}, 0),
        ([node(4), node(8, 2)], {}, 1),
        ([node(4), node(8, 2, alive=False)], {}, 0),
        ([node(8, 2)], {"gpus_per_worker": 0}, 0),
        ([node(8, 2)], {"gpus_per_worker": 0.5, "num_workers": 4}, 0.5),
    ],
)
def test_a_worker_gets_a_gpu_where_there_are_any_and_the_flag_says_nothing(
    resolve: Callable[..., ClusterConfig], nodes: list[dict[str, Any]], flags: dict[str, Any], gpus: float
) -> None:
    assert resolve(nodes, **flags).gpus_per_worker == gpus


def test_workers_that_no_nodes_could_hold_are_refused(resolve: Callable[..., ClusterConfig]) -> None:
    assert resolve([node(4, 1), node(8, 2)], num_workers=3, cpus_per_worker=4).num_workers == 3
    with pytest.raises(ValueError) as caught:  # the larger node holds one, by its CPUs
        resolve([node(4, 1), node(7, 2)], num_workers=3, cpus_per_worker=4)
    assert str(caught.value) == (
        "--num_workers 3 with 4 CPUs and 1 GPUs each: the cluster has room for 2 (2 nodes, the largest with 7 CPUs and 2 GPUs) "
        "and does not scale. Lower --num_workers, --cpus_per_worker or --gpus_per_worker, or add nodes."
    )


def test_workers_that_nodes_still_to_come_may_hold_are_not_refused(
    resolve: Callable[..., ClusterConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.KUBERAY_VARIABLE, "1")
    assert resolve([node(4)], num_workers=9).num_workers == 9
