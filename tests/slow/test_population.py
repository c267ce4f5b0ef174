"""Population-based training on a cluster of its own: the worse trial goes on from the weights of the better one."""

import json
from pathlib import Path

import pytest

from tests.cluster import running_cluster
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model


def losses(trial: Path) -> dict[int, float]:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def chosen_logps(trial: Path, step: int) -> float:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return next(float(line["logps/chosen"]) for line in lines if line["step"] == step and "logps/chosen" in line)


def test_the_worse_trial_takes_over_the_weights_of_the_better_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, records = save_tiny_model(tmp_path / "llava"), write_rows(tmp_path / "data", 60, seed=1)
    folder = tmp_path / "sweep"
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 9),
        *("--batch_size", 8, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.2, "--eval_steps", 3),
        *("--logging_steps", 1, "--scheduler", "pbt", "--num_samples", 2, "--metric", "eval_rewards/margins"),
        *("--search", "learning_rate=loguniform:1e-6:1e-2", "beta=uniform:0.1:0.5", "--search_seed", 3),
    )
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=2) as cluster:
        output = cluster.run("pipelines/tune.py", *words)
    trials = sorted((folder / "trials").iterdir())
    handed = {
        trial: json.loads((trial / "handed_over.json").read_text()) for trial in trials if (trial / "handed_over.json").exists()
    }
    assert handed, output[-3000:]
    taker, lines = next(iter(handed.items()))
    (giver,) = set(trials) - {taker}
    first = lines[0]
    assert first["from"] == giver.name
    assert f"Takes over the weights of {giver.name} at step {first['step']}" in output
    # Both read the same pairs next, and before that step's update they have the same weights; a step before they had not.
    step = first["step"]
    assert chosen_logps(taker, step + 1) == pytest.approx(chosen_logps(giver, step + 1), rel=1e-6)
    assert chosen_logps(taker, step) != pytest.approx(chosen_logps(giver, step), rel=1e-6)
    # It goes on from there: the flags of the note are the run's, and its steps before are its own.
    assert f"learning_rate: {lines[-1]['flags']['learning_rate']}" in (taker / "config.yaml").read_text()
    assert all((trial / "summary.json").exists() for trial in trials)
    assert set(losses(taker)) == set(range(1, 10))
    assert losses(taker)[1] == pytest.approx(losses(giver)[1], rel=1e-3)  # log 2 at the start, whatever beta is
    table = json.loads((folder / "sweep.json").read_text())["trials"]
    assert {line["trial"] for line in table} == {trial.name for trial in trials}
    of_taker = next(line for line in table if line["trial"] == taker.name)
    assert of_taker["learning_rate"] == lines[-1]["flags"]["learning_rate"]
