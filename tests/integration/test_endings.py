"""Runs that are stopped, and two runs beside each other, as a person would do it in a terminal."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import ROOT, Cluster

SECONDS_TO_REACH_A_STEP = 150
SECONDS_TO_END = 60


def start(model: Path, records: Path, folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A long run in a session of its own, as a terminal gives it; its log lies beside its folder."""
    words = (
        *("--model", model, "--dataset", records, "--output_dir", folder, "--num_train_epochs", 400, "--num_workers", 1),
        *("--batch_size", 2, "--gradient_accumulation_steps", 2, "--logging_steps", 1, "--save_steps", 3, "--eval_steps", 1000),
    )
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "pipelines/dpo.py", *map(str, words)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(words: str, folder: Path, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_REACH_A_STEP
    while words not in folder.with_suffix(".log").read_text():
        assert run.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.2)


def test_two_runs_on_one_machine_do_not_meet_and_end_by_signals_with_a_sentence(
    cluster_of_four_cpus: Cluster, model: Path, good_records: Path, tmp_path: Path
) -> None:
    alone = {name: value for name, value in cluster_of_four_cpus.env.items() if name != "RAY_ADDRESS"}
    folders = tmp_path / "a", tmp_path / "b"
    # Sockets lie in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        runs = [start(model, good_records, folder, {**alone, "RAY_TMPDIR": sockets}) for folder in folders]
        try:
            for run, folder in zip(runs, folders, strict=True):
                wait_for("Step 4/", folder, run)
                assert "Ray: starting a cluster of this run's own on this machine" in folder.with_suffix(".log").read_text()
            for run, folder, number in zip(runs, folders, (signal.SIGINT, signal.SIGTERM), strict=True):
                os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
                assert run.wait(SECONDS_TO_END) == 128 + number
                log = folder.with_suffix(".log").read_text().splitlines()
                # Ray Train's cleaner of placement groups gives up where a machine has several clusters; the run goes on.
                lines = [line for line in log if "(PlacementGroupCleaner" not in line]
                assert not [line for line in lines if "Traceback" in line or "*** SIG" in line], lines[-30:]
                (said,) = (line for line in lines if line.startswith("interrupted at step "))
                assert said.endswith(" is kept, the same command goes on from it.")
        finally:
            for run in runs:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
                    run.wait()
