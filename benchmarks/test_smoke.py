"""The benchmarks run: the smallest case of step.py, as its users start it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)


def test_step_compares_with_trl_and_reports_time_and_memory_of_both(tmp_path: Path) -> None:
    finished = run("step.py", "--case", "tiny", "--rounds", "2", "--output", str(tmp_path / "step.json"))

    report: dict[str, Any] = json.loads((tmp_path / "step.json").read_text())
    assert set(report) == {"machine", "cases"}
    assert set(report["machine"]) >= {"cpu", "cores", "threads", "load_average", "system", "versions", "date"}
    assert set(report["machine"]["versions"]) >= {"rayalign", "torch", "transformers", "peft", "trl"}
    (case,) = report["cases"]
    assert case["case"] == "tiny"
    # The same loss to float32 rounding, and not the one that any code gives for a fresh adapter.
    assert case["agreement"]["loss_difference"] < 1e-4
    assert case["agreement"]["gradient_difference_of_largest"] < 1e-3
    assert abs(case["agreement"]["loss_trl"] - math.log(2)) > 1e-3
    assert case["batch"]["pairs"] == 2
    assert all(0 < i < p for i, p in zip(case["batch"]["image_tokens"], case["batch"]["prompt_tokens"], strict=True))
    for side in ("trl", "rayalign"):
        rate = case["time"]["pairs_per_second"][side]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert case["memory"][side]["step_peak_mib"] > 0
    for ratio in ("times_as_fast", "times_as_fast_in_cpu_seconds"):
        assert 0 < case["time"][ratio]["min"] <= case["time"][ratio]["median"] <= case["time"][ratio]["max"]
    table = finished.stdout.splitlines()
    assert table[0].startswith("| case | prompt (image) tokens |")
    assert table[2].startswith("| tiny | ")


def test_reference_times_both_steps_and_the_pass() -> None:
    table = run("reference.py", "--case", "tiny", "--rounds", "1").stdout.splitlines()
    assert table[0].startswith("| case | reference computed, pairs/s | stored, pairs/s |")
    assert table[2].startswith("| tiny | ")
