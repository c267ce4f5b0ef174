"""A run with as many workers as there is room for, on nodes that join, are announced to go, and go. They are processes of this
machine."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from tests.cluster import Cluster, head_without_cpus, start_node
from tests.paced import PACED_DPO, PROGRAM
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

MOST_SECONDS = 200
MOST_STEPS = 100
"""Enough for a node to come and go meanwhile on a fast machine."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head_without_cpus(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Runs:
    """Commands of this file's run on one model and one set of records; DPO that is slow on a fast machine, too."""

    head: Cluster
    model: Path
    records: Path
    plugin: Path

    def words(self, folder: Path, num_workers: str, accumulation: int, *flags: object) -> tuple[object, ...]:
        return (
            *("rlhf", "--model", self.model, "--dataset", self.records, "--output_dir", folder, "--logging_steps", 5),
            *("--num_workers", num_workers, "--batch_size", 1, "--gradient_accumulation_steps", accumulation),
            *("--cpus_per_worker", 2, "--gpus_per_worker", 0, "--dataset_test_ratio", 0, "--save_steps", 10),
            *("--max_failures", 0, "--eval_answers", 0, "--precompute_ref_log_probs", "false"),
            *("--cache_dir", self.records.parent / "cache", *flags),
        )

    def start(self, log: Path, words: tuple[object, ...], **env: str) -> "subprocess.Popen[str]":
        paced = ("--plugin", self.plugin, "--rlhf_type", "paced")
        return self.head.start("-c", PROGRAM, *words, *paced, log=log, env=env)


@pytest.fixture(scope="module")
def runs(head: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "paced.py").write_text(PACED_DPO)
    return Runs(head, save_tiny_model(folder / "model"), write_rows(folder / "data", 40, seed=1), folder / "paced.py")


def said(log: Path, words: str) -> list[str]:
    """The lines with some words. (Nodes of one machine share a folder of logs, and each prints them.)"""
    return list(dict.fromkeys(line for line in log.read_text().splitlines() if words in line))


def starts_in(log: Path) -> list[str]:
    """With how many workers each start of the training was."""
    return [line.split()[-3] for line in said(log, "Training PACED from step")]


def first_steps_in(log: Path) -> list[int]:
    return [int(line.split()[-7]) for line in said(log, "Training PACED from step")]


def wait_for(condition: Callable[[], object], driver: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + MOST_SECONDS
    while not condition():
        assert driver.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.1)


@contextlib.contextmanager
def processes_to_end() -> Iterator[list["subprocess.Popen[Any]"]]:
    """A list for processes, which are ended at the end, the last one first."""
    started: list[subprocess.Popen[Any]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


def announce_end(head: Cluster, name: str, *, seconds: int) -> None:
    """Tells Ray that the node with a label `name` will be taken away, as a cloud's autoscaler does."""
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Labels"].get("name") == name)
    words = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}")
    program = str(Path(sys.executable).with_name("ray"))
    subprocess.run([program, "drain-node", f"--address={head.address}", f"--node-id={node}", *words], env=head.env, check=True)


def test_a_run_grows_and_shrinks_with_its_nodes_to_the_weights_of_one_worker(head: Cluster, runs: Runs, tmp_path: Path) -> None:
    """And one whose number of workers never changes has them to the bit."""
    log = tmp_path / "log.txt"
    with processes_to_end() as started:
        started.append(start_node(head, tmp_path / "first"))
        driver = runs.start(log, runs.words(tmp_path / "elastic", "1:3", 2, "--max_steps", MOST_STEPS))
        started.append(driver)
        wait_for(lambda: said(log, "Checkpoint of step 10:"), driver, log)
        second = start_node(head, tmp_path / "second", "--labels=name=second")
        started.append(second)
        wait_for(lambda: starts_in(log) == ["1", "2"], driver, log)
        started.append(start_node(head, tmp_path / "third"))
        wait_for(lambda: starts_in(log) == ["1", "2", "3"], driver, log)
        announce_end(head, "second", seconds=10)
        wait_for(lambda: said(log, "The machine of rank"), driver, log)
        second.terminate()
        wait_for(lambda: starts_in(log) == ["1", "2", "3", "2"], driver, log)
        assert driver.wait(MOST_SECONDS) == 0, log.read_text()[-5000:]
        # Two nodes are left, with room for two workers.
        for name, num_workers, accumulation in (("fixed", "1", 6), ("two", "2", 3), ("constant", "2:3", 2)):
            words = runs.words(tmp_path / name, num_workers, accumulation, "--max_steps", MOST_STEPS)
            head.run("-c", PROGRAM, *words, "--rlhf_type", "dpo")
    # None of it was a failure (--max_failures 0).
    (announced,) = said(log, "The machine of rank ")
    assert re.search(r"of rank [012] will be taken away in \d+ s: a checkpoint is written at once$", announced)
    first_steps = first_steps_in(log)
    assert first_steps[0] == 0 < 10 <= first_steps[1] < first_steps[2] < first_steps[3]
    elastic, fixed, two, constant = (
        load_file(tmp_path / run / "model" / "adapter_model.safetensors") for run in ("elastic", "fixed", "two", "constant")
    )
    for name, value in fixed.items():
        torch.testing.assert_close(elastic[name], value, atol=1e-6, rtol=0)  # float32, added in another order
        assert torch.equal(constant[name], two[name]), name


def test_a_run_whose_last_node_was_taken_away_says_so_and_goes_on_when_another_comes(
    head: Cluster, runs: Runs, tmp_path: Path
) -> None:
    """And although the new one comes later than Ray Train waits for its workers to be placed."""
    log = tmp_path / "log.txt"
    with processes_to_end() as started:
        first = start_node(head, tmp_path / "first", "--labels=name=spot")
        started.append(first)
        words = runs.words(tmp_path / "run", "1", 1, "--max_steps", 100)
        driver = runs.start(log, words, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3")
        started.append(driver)
        wait_for(lambda: said(log, "Checkpoint of step 10:"), driver, log)
        announce_end(head, "spot", seconds=10)
        wait_for(lambda: said(log, "The machine of rank 0 will be taken away"), driver, log)
        first.terminate()
        wait_for(lambda: said(log, "Waiting for nodes, 600 s at most"), driver, log)
        time.sleep(10)
        started.append(start_node(head, tmp_path / "second"))
        assert driver.wait(MOST_SECONDS) == 0, log.read_text()[-5000:]
    assert len(said(log, "The nodes for 1 workers are there")) == 1
    assert not said(log, "Traceback")  # one of Ray Train's controller each time
    first_steps = first_steps_in(log)
    assert first_steps[0] == 0 < 10 < first_steps[1]
    assert len(first_steps) == 2
