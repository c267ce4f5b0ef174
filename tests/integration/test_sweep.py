"""A sweep over beta with Ray Tune, all trials on one prepared data set with one reference."""

import csv
import json
import re
from pathlib import Path

import yaml

from tests.cluster import Cluster


def lines_of(run: Path) -> list[dict[str, float]]:
    """A run's lines of metrics that tell of training steps."""
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def test_a_sweep_ranks_its_trials_stops_the_worse_and_goes_on(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 3),
        *("--batch_size", 8, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.1, "--eval_steps", 1),
        # The higher rate is the better one at each step, and the first to run: the other one is stopped at the first.
        *("--search", "learning_rate=grid:1e-3,1e-5", "--scheduler", "asha", "--max_concurrent_trials", 1),
        *("--metric", "eval_rewards/margins"),
    )
    output = cluster_of_four_cpus.run("pipelines/tune.py", *words)
    first, second = json.loads((folder / "sweep.json").read_text())["trials"]
    assert (first["trial"], first["state"], first["steps"]) == ("001_learning_rate=0.001", "finished", 3)
    assert (second["trial"], second["state"]) == ("002_learning_rate=1e-05", "stopped")
    assert second["steps"] < 3
    assert first["eval_rewards/margins"] > second["eval_rewards/margins"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (best["learning_rate"], best["output_dir"]) == (1e-3, str(folder / "best"))
    assert (folder / "model" / "adapter_model.safetensors").read_bytes() == (
        folder / "trials" / first["trial"] / "model" / "adapter_model.safetensors"
    ).read_bytes()
    assert [line["state"] for line in csv.DictReader((folder / "trials.csv").read_text().splitlines())] == [
        "finished",
        "stopped",
    ]
    assert "The scheduler stopped 1 of 2 trials" in output
    # One data set is prepared, by the driver, and one reference; both trials find them.
    (prepared,) = (tmp_path / ".rayalign_cache").iterdir()
    assert output.count("records encoded in") == 1
    assert output.count("Reference: log-probs of 50 records in ") == 1
    trials = sorted((folder / "trials").iterdir())
    began = min((trial / "trial.json").stat().st_mtime for trial in trials)
    assert all(file.stat().st_mtime < began for file in prepared.rglob("*") if file.is_file())

    # Each trial has its line as it begins and as it ends, and none is missing because it is like another one's.
    assert re.findall(r"^\S+ (Trial \d): Begins \(learning_rate=[^)]*\)$", output, re.MULTILINE) == ["Trial 1", "Trial 2"]
    assert re.findall(r"^\S+ (Trial \d) \(learning_rate=[^)]*\) (finished|stopped)", output, re.MULTILINE) == [
        ("Trial 1", "finished"),
        ("Trial 2", "stopped"),
    ]
    assert "Saving the checkpoint" not in output
    assert "run_trial pid=" not in output

    # Both ran in processes that Tune hands on, and yet as the same flags run alone.
    assert "Each trial starts processes of its own" not in output
    assert "View detailed results here" not in output  # Ray Tune's own lines
    assert "Trial run_trial_" not in output
    cluster_of_four_cpus.run("pipelines/dpo.py", "--config", folder / "best.yaml")
    alone, of_trial = folder / "best", folder / "trials" / first["trial"]
    assert [line["loss"] for line in lines_of(alone)] == [line["loss"] for line in lines_of(of_trial)]
    adapter = Path("model") / "adapter_model.safetensors"
    assert (alone / adapter).read_bytes() == (of_trial / adapter).read_bytes()

    # The same command trains nothing; another metric ranks the same trials.
    again = cluster_of_four_cpus.run("pipelines/tune.py", *words[:-1], "eval_loss", "--mode", "min")
    assert "2 trials in" in again
    assert "Begins" not in again
    assert json.loads((folder / "sweep.json").read_text())["metric"] == "eval_loss"
