"""A run with as many workers as there is room for, on nodes that join, are announced to go, and go. They are processes of this
machine."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from tests.cluster import Cluster, head_without_cpus, start_node
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

PROGRAM = """
import sys
from rayalign.training import driver
driver.RESIZE_SECONDS = 2.0  # a user's nodes come more slowly
from rayalign.main import main
sys.exit(main())
"""

PACED_DPO = """
import time
from dataclasses import dataclass
from typing import ClassVar

from rayalign.algorithms import DPO


@dataclass(frozen=True)
class Paced(DPO):
    '''DPO that is slow on a fast machine, too'''

    name: ClassVar[str] = "paced"

    def loss(self, *arguments, **named):
        time.sleep(0.1)
        return super().loss(*arguments, **named)


ALGORITHMS = (Paced,)
"""

MOST_SECONDS = 150


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head_without_cpus(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


def words_for(model: Path, records: Path, folder: Path, num_workers: str, accumulation: int) -> tuple[object, ...]:
    return (
        *("rlhf", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 150, "--logging_steps", 5),
        *("--num_workers", num_workers, "--batch_size", 1, "--gradient_accumulation_steps", accumulation),
        *("--cpus_per_worker", 2, "--gpus_per_worker", 0, "--dataset_test_ratio", 0, "--save_steps", 10, "--max_failures", 0),
        *("--eval_answers", 0, "--cache_dir", records.parent / "cache"),
    )


def said(log: Path, words: str) -> list[str]:
    """The lines with some words. (Nodes of one machine share a folder of logs, and each prints them.)"""
    return list(dict.fromkeys(line for line in log.read_text().splitlines() if words in line))


def starts_in(log: Path) -> list[str]:
    """With how many workers each start of the training was."""
    return [line.split()[-3] for line in said(log, "Training PACED from step")]


def wait_for(condition: Callable[[], object], driver: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + MOST_SECONDS
    while not condition():
        assert driver.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.1)


def announce_end(head: Cluster, node: str, *, seconds: int) -> None:
    """Tells Ray that a node will be taken away, as a cloud's autoscaler does."""
    words = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}")
    program = str(Path(sys.executable).with_name("ray"))
    subprocess.run([program, "drain-node", f"--address={head.address}", f"--node-id={node}", *words], env=head.env, check=True)


def test_a_run_grows_and_shrinks_with_its_nodes_to_the_weights_of_one_worker(head: Cluster, tmp_path: Path) -> None:
    model, records = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "data", 40, seed=1)
    folder, log, plugin = tmp_path / "elastic", tmp_path / "log.txt", tmp_path / "paced.py"
    plugin.write_text(PACED_DPO)
    paced = ("--plugin", plugin, "--rlhf_type", "paced")
    started: list[subprocess.Popen[Any]] = [start_node(head, tmp_path / "node 0")]
    try:
        driver = head.start("-c", PROGRAM, *words_for(model, records, folder, "1:2", 2), *paced, log=log)
        started.append(driver)
        wait_for(lambda: starts_in(log) == ["1"], driver, log)
        second = start_node(head, tmp_path / "node 1", "--labels=name=second")
        started.append(second)
        wait_for(lambda: starts_in(log) == ["1", "2"] and said(log, "Checkpoint of step 10:"), driver, log)
        announce_end(head, next(node["NodeID"] for node in ray.nodes() if node["Labels"].get("name") == "second"), seconds=15)
        wait_for(lambda: said(log, "The machine of rank"), driver, log)
        second.terminate()
        wait_for(lambda: starts_in(log) == ["1", "2", "1"], driver, log)
        assert driver.wait(MOST_SECONDS) == 0, log.read_text()[-5000:]
        head.run("-c", PROGRAM, *words_for(model, records, tmp_path / "fixed", "1", 4), "--rlhf_type", "dpo")
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()
    # None of it was a failure (--max_failures 0).
    (announced,) = said(log, "The machine of rank ")
    assert re.search(r"of rank [01] will be taken away in \d+ s: a checkpoint is written at once$", announced)
    from_steps = [int(line.split()[-7]) for line in said(log, "Training PACED from step")]
    assert from_steps[0] == 0 < from_steps[1] < from_steps[2]
    weights = [load_file(run / "model" / "adapter_model.safetensors") for run in (folder, tmp_path / "fixed")]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=0)  # float32, over 150 steps of AdamW
