"""What is printed of the lines of Ray's processes."""

import logging
import sys
from typing import Any

import pytest
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


def raised(error: Exception) -> Any:
    """An error with the place in which it is raised, as loggers take it."""
    try:
        raise error
    except type(error):
        return sys.exc_info()
