"""Whole runs with Ray on a GPU: its worker, its evaluation, answers and checkpoint, and a second life after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_data import write_rows

pytest.importorskip("ray")
pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SECONDS = 180
STEPS = 8


def command(device: torch.device, algorithm: str, model: Path, records: Path, folder: Path, *words: object) -> list[str]:
    on_cpu = () if device.type == "cuda" else ("--gpus_per_worker", 0)  # on a GPU by the default
    flags = (
        *("--model", model, "--dataset", records, "--output_dir", folder, "--cache_dir", folder.parent / "cache"),
        *("--num_workers", 1, "--cpus_per_worker", 1, "--batch_size", 4, *on_cpu),
        *("--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.2, "--learning_rate", 1e-3, "--max_steps", STEPS),
        *("--logging_steps", 1, "--eval_steps", 4, "--save_steps", 4, "--lora_target_modules", "ALL"),
    )
    return [sys.executable, str(ROOT / "pipelines" / f"{algorithm}.py"), *map(str, (*flags, *words))]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}


def run(words: list[str]) -> str:
    """What the command printed; fails with it where the command did."""
    finished = subprocess.run(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
    )
    assert finished.returncode == 0, finished.stdout[-5000:]
    return finished.stdout


def run_and_kill(words: list[str], folder: Path) -> None:
    """Ends the driver, and Ray with it, once the first checkpoint is whole."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + SECONDS
    while not [*(folder / "checkpoints").glob("step_*/manifest.json")]:
        assert process.poll() is None, "The run ended before it could be killed."
        assert time.monotonic() < deadline, "There was no checkpoint."
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), 40, seed=1)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "mdpo", "cpo", "kto", "rm"])
def test_a_run_trains_evaluates_and_answers(
    device: torch.device, model_folder: Callable[[str], Path], records: Path, tmp_path: Path, algorithm: str
) -> None:
    folder = tmp_path / "run"
    output = run(command(device, algorithm, model_folder("llava_next"), records, folder))

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, STEPS]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    assert f"from step 0 to {STEPS}, on 1 x {name}" in output
    if algorithm != "rm":
        answers = json.loads((folder / "answers.json").read_text())
        assert answers["failed"] == ""
        assert answers["before"].keys() == answers["after"].keys() != set()


def test_a_killed_run_ends_in_the_same_weights(
    device: torch.device, model_folder: Callable[[str], Path], records: Path, tmp_path: Path
) -> None:
    """To float32's last digits: a GPU adds some sums in an order of its own."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(device, "dpo", model_folder("llava_next"), records, whole))
    words = command(device, "dpo", model_folder("llava_next"), records, killed)
    run_and_kill(words, killed)
    output = run(words)
    assert "from step 4" in output

    expected, found = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
