"""Trials of two workers each, which start processes of their own: ASHA hears of their evaluations, and stops some."""

import json
from pathlib import Path

import pytest

from tests.cluster import running_cluster
from tests.tiny_data import write_rows
from tests.tiny_models import save_tiny_model


def test_trials_of_several_workers_are_stopped_and_make_room_for_the_next(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, records = save_tiny_model(tmp_path / "llava"), write_rows(tmp_path / "data", 60, seed=1)
    folder = tmp_path / "sweep"
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 9),
        *("--batch_size", 4, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.2, "--eval_steps", 3),
        *("--save_steps", 1, "--num_workers", 2, "--max_concurrent_trials", 1, "--scheduler", "asha", "--num_samples", 4),
        *("--metric", "eval_loss", "--mode", "min", "--search", "learning_rate=loguniform:1e-7:1e-2", "--search_seed", 3),
    )
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=4) as cluster:
        output = cluster.run("pipelines/tune.py", *words)
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    states = [trial["state"] for trial in trials]
    assert len(states) == 4, output[-3000:]
    assert set(states) == {"finished", "stopped"}
    assert states[0] == "finished"
    assert {trial["steps"] for trial in trials if trial["state"] == "stopped"} <= {3, 6}
    assert "no such metric" not in output
