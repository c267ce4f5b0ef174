"""Processes killed for real: the run that goes on ends with exactly the weights of one that was left alone."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cluster import Cluster
from tests.faults.conftest import FLAGS

SECONDS_TO_REACH_A_STEP = 240


def test_a_run_whose_worker_controller_and_driver_are_killed_ends_with_the_weights_of_one_left_alone(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    paths = ("--model", model, "--dataset", records, "--output_dir", folder, "--cache_dir", records.parent / "cache")
    words = ("pipelines/dpo.py", *paths, *FLAGS)
    driver = cluster_of_four_cpus.start(*words, log=log)
    wait_for(lambda: steps_logged(folder) >= 7 and whole_checkpoints(folder), driver, log)
    os.kill(newest_process("RayTrainWorker"), signal.SIGKILL)
    wait_for(lambda: starts_of(folder) == 2 and steps_logged(folder) >= 14 and newest_step(folder) >= 10, driver, log)
    os.kill(newest_process("TrainController"), signal.SIGKILL)
    wait_for(lambda: starts_of(folder) == 3 and steps_logged(folder) >= 22, driver, log)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder / "summary.json").exists()
    wait_for_end_of_workers()
    # The first two came after a new checkpoint each, so that each is the first in a row.
    restarts = [line for line in log.read_text().splitlines() if "Restart" in line]
    assert all("Restart 1 of 2 (--max_failures): a process or machine" in line for line in restarts), restarts
    assert len(restarts) == 2, restarts
    # What a kill in the middle of an upload leaves: a checkpoint, and Ray's own list of them, that end too early.
    *_, older, newest = sorted(whole_checkpoints(folder), key=lambda path: path.name)
    weights = newest / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (folder / "checkpoints" / "checkpoint_manager_snapshot.json").write_text('{"cut sho')
    output = cluster_of_four_cpus.run(*words)
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


def processes(name: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"^ray::{name}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def newest_process(name: str) -> int:
    return max(processes(name))


def wait_for_end_of_workers() -> None:
    deadline = time.monotonic() + 60
    while processes("RayTrainWorker") and time.monotonic() < deadline:
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
