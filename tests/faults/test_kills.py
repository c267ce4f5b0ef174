"""Processes killed for real: the run that goes on ends with exactly the weights of one that was left alone."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster import Cluster

SECONDS_TO_REACH_A_STEP = 240


def words_for(model: Path, records: Path, folder: Path) -> tuple[object, ...]:
    return (
        *("pipelines/dpo.py", "--model", model, "--dataset", records, "--output_dir", folder, "--num_train_epochs", 6),
        *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
        *("--learning_rate", 1e-3, "--logging_steps", 1, "--save_steps", 5, "--eval_steps", 1000),
        *("--cache_dir", records.parent / "cache", "--max_failures", 2),
    )


@pytest.fixture(scope="module")
def undisturbed(cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    cluster_of_four_cpus.run(*words_for(model, records, folder))
    return folder


def test_a_run_whose_driver_was_killed_resumes_to_the_same_weights_past_a_checkpoint_cut_short(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = words_for(model, records, folder)
    driver = cluster_of_four_cpus.start(*words, log=tmp_path / "log.txt")
    wait_for(lambda: len(whole_checkpoints(folder)) >= 2, driver, tmp_path / "log.txt")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (folder / "summary.json").exists()
    wait_for_end_of_workers()
    # What a kill in the middle of an upload leaves: a checkpoint, and Ray's own list of them, that end too early.
    # A third one may have been whole before the kill.
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


def test_a_killed_worker_and_a_killed_controller_are_replaced_and_the_weights_stay_the_same(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    driver = cluster_of_four_cpus.start(*words_for(model, records, folder), log=tmp_path / "log.txt")
    wait_for(lambda: steps_logged(folder) >= 12, driver, tmp_path / "log.txt")
    os.kill(newest_process("RayTrainWorker"), signal.SIGKILL)
    wait_for(lambda: starts_in(tmp_path / "log.txt") == 2 and steps_logged(folder) >= 22, driver, tmp_path / "log.txt")
    os.kill(newest_process("TrainController"), signal.SIGKILL)
    assert driver.wait(timeout=300) == 0, (tmp_path / "log.txt").read_text()[-5000:]
    assert starts_in(tmp_path / "log.txt") == 3
    # Each came after a new checkpoint, so that each is the first in a row.
    assert (tmp_path / "log.txt").read_text().count("Restart 1 of 2 (--max_failures): a process or machine") == 2
    assert_same_run(undisturbed, folder)


def starts_in(log: Path) -> int:
    return log.read_text().count("Training DPO from step")


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def whole_checkpoints(folder: Path) -> list[Path]:
    return [path.parent for path in (folder / "checkpoints").glob("step_*/manifest.json")]


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
