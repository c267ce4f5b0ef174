"""Processes killed for real, on nodes with a worker each: the run that goes on ends with exactly the weights of one that was
left alone on one node."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.conftest import FLAGS
from tests.soak.processes import Nodes

SECONDS_TO_REACH_A_STEP = 240


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A head without CPUs, and two nodes with one each, so that each has a worker."""
    with Nodes({}, num_cpus=1) as nodes:
        yield nodes


def test_a_run_whose_node_controller_and_driver_are_killed_ends_with_the_weights_of_one_left_alone(
    nodes: Nodes, model: Path, records: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    paths = ("--model", model, "--dataset", records, "--output_dir", folder, "--cache_dir", records.parent / "cache")
    words = ("pipelines/dpo.py", *paths, *FLAGS)
    driver = nodes.head.start(*words, log=log)
    wait_for(lambda: steps_logged(folder) >= 7 and whole_checkpoints(folder), driver, log)
    nodes.kill_node(0)
    wait_for(lambda: starts_of(folder) == 2 and steps_logged(folder) >= 14 and newest_step(folder) >= 10, driver, log)
    os.kill(nodes.pids("controller")[-1], signal.SIGKILL)
    wait_for(lambda: starts_of(folder) == 3 and steps_logged(folder) >= 22, driver, log)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder / "summary.json").exists()
    wait_for_end_of_workers(nodes)
    # The first two came after a new checkpoint each, so that each is the first in a row.
    restarts = [line for line in log.read_text().splitlines() if "Restart" in line]
    assert all("Restart 1 of 2 (--max_failures): a process or machine" in line for line in restarts), restarts
    assert len(restarts) == 2, restarts
    # What a kill in the middle of an upload leaves: a checkpoint, and Ray's own list of them, that end too early.
    *_, older, newest = sorted(whole_checkpoints(folder), key=lambda path: path.name)
    weights = newest / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (folder / "checkpoints" / "checkpoint_manager_snapshot.json").write_text('{"cut sho')
    output = nodes.head.run(*words)
    assert f"Lease: process {driver.pid} on " in output
    assert "Continuing the unfinished run" in output
    assert f"Passing over checkpoint {newest}: trainable.safetensors has 100 of" in output
    assert f"Training DPO from step {int(older.name.split('_')[1])} to 36" in output
    assert_same_run(undisturbed, folder)
    assert (folder / "answers.json").read_bytes() == (undisturbed / "answers.json").read_bytes()
    assert len(json.loads((folder / "times.json").read_text())) == 2
    assert "Added up over 2 starts of the command" in (folder / "report.html").read_text()


def starts_of(folder: Path) -> int:
    """How often the training has begun: each start writes events to a file of its own. (Lines of workers' logs come late.)"""
    return len(list((folder / "tensorboard").glob("events.*")))


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def whole_checkpoints(folder: Path) -> list[Path]:
    return [path.parent for path in (folder / "checkpoints").glob("step_*/manifest.json")]


def newest_step(folder: Path) -> int:
    """Of the newest whole checkpoint."""
    return max((int(path.name.split("_")[1]) for path in whole_checkpoints(folder)), default=0)


def wait_for(condition: Callable[[], bool], driver: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_REACH_A_STEP
    while not condition():
        assert driver.poll() is None, f"The run ended early:\n{log.read_text()[-5000:]}"
        assert time.monotonic() < deadline, f"The run got nowhere:\n{log.read_text()[-5000:]}"
        time.sleep(0.05)


def wait_for_end_of_workers(nodes: Nodes) -> None:
    deadline = time.monotonic() + 60
    while nodes.pids("train worker") and time.monotonic() < deadline:
        time.sleep(0.1)


def assert_same_run(one: Path, other: Path) -> None:
    """Same final weights, bit by bit, and the same metrics at every step: so the same records, too."""
    weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (one, other)]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert learning_curve(one) == learning_curve(other)


def learning_curve(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["logps/chosen"]) for line in lines if "loss" in line]
