"""The benchmarks run: the smallest case of each, as its users start it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_reference_times_both_steps_and_the_pass(tmp_path: Path) -> None:
    arguments = ["--case", "tiny", "--rounds", "1", "--output", str(tmp_path / "reference.json")]
    table = run("reference.py", *arguments).stdout.splitlines()

    (case,) = json.loads((tmp_path / "reference.json").read_text())["cases"]
    assert set(case["pairs_per_second"]) == {"computed", "stored", "pass"}
    for values in case["pairs_per_second"].values():
        assert_spread(values)
    assert table[0].startswith("| case | reference computed, pairs/s | stored, pairs/s |")
    assert table[2].startswith("| tiny | ")


def test_estimate_is_compared_with_memory_and_operations_of_every_kind_of_run(tmp_path: Path) -> None:
    table = run("estimate.py", "--case", "tiny", "--output", str(tmp_path / "estimate.json")).stdout

    cases = json.loads((tmp_path / "estimate.json").read_text())["cases"]
    assert len(cases) == 5
    for case in cases:
        # Near enough to tell that a part of the model is missing.
        assert 0.9 < case["estimate"]["gflop"] / case["measured"]["gflop"] < 1.1
        assert 0.9 < case["estimate"]["mib"] / case["measured"]["tensors"] < 1.1
        assert case["measured"]["process"] >= 0
        assert f"| {case['case']} | " in table


def test_gpu_rehearses_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shape", "tiny", "--case", "small", "--rounds", "1"]
    table = run("gpu.py", *arguments, "--output", str(tmp_path / "gpu.json")).stdout

    (case,) = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    # With checkpointing and without: TRL's way, and ours with the reference computed and stored.
    assert len(case["ways"]) == len(case["agreement"]) == 2 * 3
    assert case["out_of_memory"] == []
    for way in case["agreement"]:
        # The same to float32 rounding, and not the loss that any code gives for a fresh adapter.
        assert way["gradient_distance"] < 1e-3
        assert abs(way["loss"] - math.log(2)) > 1e-3
    for way in case["ways"]:
        assert_spread(way["step_seconds"])
        assert_spread(way["times_as_fast_as_trl"])
        assert way["above_model_gib"] > 0
    assert table.startswith("| case | way | attention |")


def test_full_steps_on_a_gpu_rehearse_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shape", "tiny", "--rounds", "1"]
    table = run("gpu_full.py", *arguments, "--output", str(tmp_path / "gpu_full.json")).stdout

    strategies = json.loads((tmp_path / "gpu_full.json").read_text())["strategies"]
    assert [line["strategy"] for line in strategies] == ["fsdp", "ddp"]
    for line in strategies:
        assert_spread(line["step_seconds"])
        # Weights, gradients and moments, of 4 bytes each.
        assert line["gib"] > 4 * 4 * 0.7 * line["parameters"] / 2**30
    assert table.startswith("| --strategy | seconds a step |")


def test_scale_measures_the_driver_the_workers_and_the_fetches(tmp_path: Path) -> None:
    sizes = ["--rows", "5000", "--fetch-rows", "1024", "--delay", "0.001"]
    run("scale.py", *sizes, "--output", str(tmp_path / "scale.json"))

    report = json.loads((tmp_path / "scale.json").read_text())
    (size,) = report["sizes"]
    assert (size["rows"], size["prepare"]["tasks"], size["prepare"]["tasks_of_a_draw"]) == (5000, 20, 20)
    first, following = (size[f"{which} worker of a node, now"] for which in ("first", "next"))
    assert first["mb_read_at_the_start"] > 0
    assert following["mb_read_for_an_evaluation"] < first["mb_read_at_the_start"]
    assert report["fetches"]["now"]["pairs_per_second"] > 0


def test_generate_compares_responses_and_scores_with_plain_transformers(tmp_path: Path) -> None:
    table = run("generate.py", "--case", "tiny", "--rounds", "1", "--output", str(tmp_path / "generate.json")).stdout

    (case,) = json.loads((tmp_path / "generate.json").read_text())["cases"]
    assert [work["work"] for work in case["works"]] == ["generate", "score by likelihood", "score by reward_model"]
    for work in case["works"]:
        assert set(work["rows_per_second"]) == {"transformers", "rayalign"}
        for ratio in ("times_as_fast", "times_as_fast_in_cpu_seconds"):
            assert_spread(work[ratio])
    assert max(case["score_differences_of_largest"].values()) < 1e-4  # float32 rounding
    assert table.startswith("| case | work | transformers, rows/s | ours, rows/s |")


def test_serve_tells_rates_and_first_tokens_of_clients_at_once_and_behind_a_long_response(tmp_path: Path) -> None:
    arguments = ["--case", "tiny", "--rounds", "1", "--clients", "4", "--requests", "8", "--tokens", "4", "--long", "16"]
    arguments += ["--repeats", "1", "--no-ray", "--output", str(tmp_path / "serve.json")]
    table = run("serve.py", *arguments).stdout

    report = json.loads((tmp_path / "serve.json").read_text())
    assert list(report["loads"]) == ["one after another", "4 at once", "short, alone", "short, behind 16 tokens"]
    for figures in report["loads"].values():
        for values in figures.values():
            assert_spread(values)
        assert figures["first_token_p50"]["median"] <= figures["first_token_p95"]["median"]
    assert report["loads"]["4 at once"]["tokens_per_second"]["median"] > 0
    assert "| short, behind 16 tokens | - | - | " in table


def test_swift_step_says_why_a_side_ended(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run("swift_step.py", "--case", "tiny", "--swift_python", sys.executable)

    error = capfd.readouterr().err
    assert "The side ms-swift ended instead of answering 'facts'. The end of its log:" in error
    assert "No module named 'swift'" in error
