"""Runs that are stopped, and two runs beside each other, as a person would do it in a terminal."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import ROOT, Cluster

SECONDS_TO_REACH_A_LINE = 240
SECONDS_TO_END = 60


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder for the clusters of all runs; its path must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def start(model: Path, records: Path, folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A long run in a session of its own, as a terminal gives it; its log lies beside its folder."""
    words = (
        *("--model", model, "--dataset", records, "--output_dir", folder, "--num_train_epochs", 400, "--num_workers", 1),
        *("--batch_size", 2, "--gradient_accumulation_steps", 2, "--logging_steps", 1, "--save_steps", 3),
        *("--dataset_test_ratio", 0, "--eval_answers", 0, "--cache_dir", folder.parent / "cache"),
    )
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "pipelines/simpo.py", *map(str, words)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(words: str, folder: Path, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_REACH_A_LINE
    while words not in folder.with_suffix(".log").read_text():
        assert run.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.2)


def last_words(folder: Path) -> str:
    """The sentence with which a run ended, which nothing else of the kind goes before."""
    log = folder.with_suffix(".log").read_text().splitlines()
    # Ray Train's cleaner of placement groups gives up where a machine has several clusters, and a process of Ray that has
    # neither a task nor an actor, so that it is named by its number alone, at times crashes when Ray ends it; the run goes on.
    lines = [line for line in log if not line.startswith(("(PlacementGroupCleaner", "(pid="))]
    assert not [line for line in lines if "Traceback" in line or "*** SIG" in line], lines[-30:]
    (said,) = (line for line in lines if line.startswith("interrupted "))
    return said


def test_two_runs_on_one_machine_do_not_meet_and_end_by_signals_with_a_sentence(
    cluster_of_four_cpus: Cluster, model: Path, good_records: Path, tmp_path: Path, sockets: Path
) -> None:
    """The first is interrupted in its training, the second before it."""
    env = {name: value for name, value in cluster_of_four_cpus.env.items() if name != "RAY_ADDRESS"}
    env["RAY_TMPDIR"] = str(sockets)
    trains, prepares = folders = tmp_path / "trains", tmp_path / "prepares"
    runs = []
    try:
        for folder in folders:
            runs.append(start(model, good_records, folder, env))
            wait_for("Ray: starting a cluster of this run's own on this machine", folder, runs[-1])
        wait_for("Data: ", prepares, runs[1])
        runs[1].send_signal(signal.SIGTERM)
        assert runs[1].wait(SECONDS_TO_END) == 128 + signal.SIGTERM
        assert last_words(prepares) == (
            "interrupted before the first step; the same command starts from step 0, with the records that are encoded."
        )
        wait_for("Step 4/", trains, runs[0])
        os.killpg(runs[0].pid, signal.SIGINT)
        assert runs[0].wait(SECONDS_TO_END) == 128 + signal.SIGINT
        assert last_words(trains).startswith("interrupted at step ")
        assert last_words(trains).endswith(" is kept, the same command goes on from it.")
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
