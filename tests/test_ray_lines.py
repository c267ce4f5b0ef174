"""What is printed of the lines of Ray's processes."""

import logging
import sys
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError, WorkerGroupStartupTimeoutError

from rayalign import cluster, ray_lines


def test_lines_of_rays_processes_are_printed_tidily(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.COLOR_VARIABLE, "0")
    worker = {"is_err": True, "pid": 7, "ip": "here", "localhost": "here", "actor_name": "RayTrainWorker", "task_name": None}
    ours = ["12:00:01 Step 1/4  loss 0.5", "Where it is:", "12:00:02 Step 2/4  loss 0.25"]
    noise = [
        "[E] Actor 'PreemptionWatcher' has constructor arguments in the object store and max_restarts > 0. If",
        "USDT:2026",
        "[2026-11-28 02:05:06,943 E 18 18] (gcs_server) gcs_placement_group_scheduler.cc:273: Failed to remove 1 bundle(s)",
        "No available node types can fulfill placement group requests (detail=7:PACK|PENDING): {'CPU': 1.0}*1. Add suitable",
    ]
    ray_lines.print_worker_lines({**worker, "lines": [*ours, *noise]})
    ray_lines.print_worker_lines({**worker, "actor_name": "PlacementGroupCleaner", "lines": ["ConnectionError: several"]})
    assert capsys.readouterr().err.splitlines() == [ours[0], f"(RayTrainWorker pid=7) {ours[1]}", ours[2]]
    # Ray takes lines that differ in numbers only for one line of several processes, which it counts.
    for pid, line in enumerate(alike := [f"12:00:0{k} Trial {k}: Begins (beta={k})" for k in range(3)]):
        ray_lines.print_worker_lines({**worker, "pid": pid, "lines": [line]})
    assert capsys.readouterr().err.splitlines() == alike


def test_asking_anew_for_room_for_the_workers_is_not_printed_as_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.COLOR_VARIABLE, "0")
    controller = {
        "is_err": True,
        "pid": 7,
        "ip": "here",
        "localhost": "here",
        "actor_name": "TrainController",
        "task_name": None,
    }
    printed = []
    for error in (WorkerGroupStartupTimeoutError(2), InsufficientClusterResourcesError("2 GPUs")):
        record = logging.makeLogRecord({"msg": f"Error in control loop iteration: {error}", "exc_info": raised(error)})
        printed += ["before", *logging.Formatter("[date] %(message)s").format(record).splitlines(), "after"]
    ray_lines.print_worker_lines({**controller, "lines": printed})
    first, second, third, error_line, *_ = (line.partition(") ")[2] for line in capsys.readouterr().err.splitlines())
    assert (first, second, third) == ("before", "after", "before")
    assert error_line == "[date] Error in control loop iteration: 2 GPUs"


def test_workers_that_can_not_say_goodbye_to_a_lost_one_are_not_told(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.COLOR_VARIABLE, "0")

    class Lost:
        def on_shutdown(self, *group: Any) -> None:
            raise RayActorError

    setup = BackendSetupCallback.__new__(BackendSetupCallback)
    setup._backend, setup._backend_config = Lost(), None
    setup.before_execution_group_shutdown(None)
    (record,) = caplog.records
    lines = ["one line", *logging.Formatter("%(message)s").format(record).splitlines(), "another one"]
    assert len(lines) > 5
    controller = {"is_err": True, "pid": 7, "ip": "a", "localhost": "a", "actor_name": "TrainController", "task_name": None}
    ray_lines.print_worker_lines({**controller, "lines": lines})
    assert [line.partition(") ")[2] for line in capsys.readouterr().err.splitlines()] == ["one line", "another one"]


def raised(error: Exception) -> Any:
    """An error with the place in which it is raised, as loggers take it."""
    try:
        raise error
    except type(error):
        return sys.exc_info()
