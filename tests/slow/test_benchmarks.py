"""Benchmarks beside a training whose driver is killed on the way."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayalign.training.benchmark_results import RESULTS
from tests.cluster import Cluster, running_cluster
from tests.evaluation.benchmarks.twins import put_pictures, write_lines
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model

SECONDS = 120


@pytest.fixture
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=3) as cluster:
        yield cluster


def test_checkpoints_are_judged_beside_the_training_across_a_kill_and_its_weights_stay_the_same(
    small_cluster: Cluster, tmp_path: Path
) -> None:
    model, records, pope = save_tiny_model(tmp_path / "llava"), write_rows(tmp_path / "data", 60), tmp_path / "pope"
    rows = [
        {"question_id": n, "image": "a.jpg", "text": f"Is there a {what}?", "label": "yes" if n % 2 else "no"}
        for n, what in enumerate(("cat", "dog", "digit two", "red square"))
    ]
    write_lines(pope / "coco_pope_random.json", rows)
    put_pictures(pope / "val2014", "a.jpg")
    words = (
        *("pipelines/dpo.py", "--model", model, "--dataset", records, "--max_steps", 40, "--batch_size", 4),
        *("--gradient_accumulation_steps", 1, "--learning_rate", 1e-3, "--logging_steps", 10, "--dataset_test_ratio", 0),
        *("--save_steps", 10, "--save_total_limit", 1, "--report_to", "tensorboard"),
    )
    judged = ("--eval_benchmarks", f"pope:{pope}", "--metric_for_best_model", "pope/accuracy")
    small_cluster.run(*words, "--output_dir", tmp_path / "plain")

    folder, log = tmp_path / "judged", tmp_path / "log"
    driver = small_cluster.start(*words, *judged, "--output_dir", folder, log=log)
    deadline = time.monotonic() + SECONDS
    while not (before := results_in(folder)):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not (folder / "summary.json").exists()
    said = small_cluster.run(*words, *judged, "--output_dir", folder)

    assert "Benchmark at step 40  pope/accuracy" in said
    after = results_in(folder)
    assert [name.split("_")[1] for name in after] == ["00000010", "00000020", "00000030", "00000040"]
    assert {name: after[name] for name in before} == before  # not judged again
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line["eval_pope/accuracy"] for line in lines if "eval_pope/accuracy" in line}
    assert sorted(line["step"] for line in lines if "eval_pope/accuracy" in line) == [10, 20, 30, 40]
    note, summary = (json.loads((folder / name).read_text()) for name in ("best.json", "summary.json"))
    first_best = min(step for step, figure in figures.items() if figure == max(figures.values()))
    assert (note["step"], note["metric"], note["value"]) == (first_best, "eval_pope/accuracy", figures[first_best])
    assert summary["best"]["step"] == first_best
    assert summary["eval_pope/accuracy"] == figures[40]
    assert sorted(path.name.split("_")[1] for path in (folder / "checkpoints").glob("step_*")) == sorted(
        {f"{first_best:08d}", "00000040"}
    )
    plain, own = (load_file(place / "model" / "adapter_model.safetensors") for place in (tmp_path / "plain", folder))
    assert plain.keys() == own.keys()
    assert all(torch.equal(plain[name], own[name]) for name in plain)


def results_in(folder: Path) -> dict[str, int]:
    """The files of the checkpoints that were judged, with the times at which they were written."""
    return {file.name: file.stat().st_mtime_ns for file in sorted((folder / RESULTS).glob("step_*"))}
