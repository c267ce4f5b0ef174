"""The benchmarks run: the smallest case of each, as its users start it."""

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


def assert_spread(values: dict[str, float]) -> None:
    assert 0 < values["min"] <= values["median"] <= values["max"]


def test_step_compares_with_trl_and_reports_time_and_memory_of_all_sides(tmp_path: Path) -> None:
    finished = run("step.py", "--case", "tiny", "--rounds", "2", "--output", str(tmp_path / "step.json"))

    report: dict[str, Any] = json.loads((tmp_path / "step.json").read_text())
    assert set(report) == {"machine", "cases"}
    assert set(report["machine"]) >= {"cpu", "cores", "threads", "load_average", "system", "versions", "date"}
    assert set(report["machine"]["versions"]) >= {"rayalign", "torch", "transformers", "peft", "trl"}
    (case,) = report["cases"]
    assert (case["case"], case["algorithm"], case["dtype"]) == ("tiny", "dpo", "float32")
    assert case["batch"]["pairs"] == 2
    assert all(0 < i < p for i, p in zip(case["batch"]["image_tokens"], case["batch"]["prompt_tokens"], strict=True))
    # Not the loss that any code gives for a fresh adapter.
    assert abs(case["agreement"]["trl"]["loss"] - math.log(2)) > 1e-3
    for side in ("rayalign", "rayalign-stored"):
        # The same to float32 rounding.
        assert case["agreement"][side]["loss_difference"] < 1e-4
        assert case["agreement"][side]["gradient_difference_of_largest"] < 1e-3
        for ratio in ("times_as_fast", "times_as_fast_in_cpu_seconds"):
            assert_spread(case["time"][ratio][side])
        assert case["memory"]["times_less_memory"][side] > 0
    for side in ("trl", "rayalign", "rayalign-stored"):
        assert_spread(case["time"]["pairs_per_second"][side])
        assert case["memory"][side]["step_peak_mib"] > 0
    table = finished.stdout.splitlines()
    assert table[0].startswith("| case | prompt (image) tokens |")
    assert [line.split(" | ")[3] for line in table[2:4]] == ["rayalign", "rayalign-stored"]


def test_step_compares_cpo_and_orpo_with_trls_text_trainers_in_bfloat16(tmp_path: Path) -> None:
    arguments = ["--case", "tiny", "--algorithm", "cpo", "orpo", "--dtype", "bfloat16", "--rounds", "1", "--no-memory"]
    run("step.py", *arguments, "--output", str(tmp_path / "step.json"))

    cases = json.loads((tmp_path / "step.json").read_text())["cases"]
    assert [(case["algorithm"], case["dtype"]) for case in cases] == [("cpo", "bfloat16"), ("orpo", "bfloat16")]
    for case in cases:
        assert set(case["agreement"]) == {"trl", "rayalign"}
        # A likelihood over a vocabulary of 1,000, near log 1,000.
        assert 5 < case["agreement"]["trl"]["loss"] < 10
        assert case["agreement"]["rayalign"]["loss_difference"] < 1e-2
        assert_spread(case["time"]["times_as_fast"]["rayalign"])


def test_peak_counts_a_steps_products_and_profiles_it(tmp_path: Path) -> None:
    finished = run("peak.py", "--case", "tiny", "--dtype", "float32", "--rounds", "1", "--output", str(tmp_path / "peak.json"))

    (step,) = json.loads((tmp_path / "peak.json").read_text())["steps"]
    # Both policies' forward and a backward: the head alone is 3 products for each of the 30 responses' tokens or so.
    assert step["needed_gflop"] > 3 * 2 * 26 * 64 * 1000 / 1e9
    for share in ("share_of_peak", "products_share_of_step"):
        assert_spread(step[share])
        assert step[share]["max"] < 1
    in_step = sum(product["seconds_of_step"] for product in step["products"])
    assert math.isclose(in_step, step["products_alone_seconds"]["median"], rel_tol=1e-2)
    assert math.isclose(sum(step["profile"]["percent"].values()), 100, abs_tol=0.1)
    assert min(step["profile"]["percent"].values()) > 0
    assert "| tiny, float32 | " in finished.stdout


def test_reference_times_both_steps_and_the_pass() -> None:
    table = run("reference.py", "--case", "tiny", "--rounds", "1").stdout.splitlines()
    assert table[0].startswith("| case | reference computed, pairs/s | stored, pairs/s |")
    assert table[2].startswith("| tiny | ")
