"""A sweep over beta with Ray Tune, all trials on one prepared data set with one reference."""

import json
from pathlib import Path

import yaml

from tests.cluster import Cluster


def test_a_sweep_ranks_its_trials_and_writes_the_best_configuration(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = (
        *("--rlhf_type", "dpo", "--model", model, "--dataset", records, "--output_dir", folder, "--max_steps", 2),
        *("--batch_size", 8, "--gradient_accumulation_steps", 1, "--dataset_test_ratio", 0.1, "--num_samples", 1),
        *("--search", "beta=grid:0.05,0.5", "learning_rate=loguniform:1e-4:1e-3", "--metric", "eval_rewards/margins"),
    )
    output = cluster_of_four_cpus.run("pipelines/tune.py", *words)
    sweep = json.loads((folder / "sweep.json").read_text())
    margins = [trial["eval_rewards/margins"] for trial in sweep["trials"]]
    assert sorted(trial["beta"] for trial in sweep["trials"]) == ["0.05", "0.5"]
    assert margins == sorted(margins, reverse=True)
    assert all(1e-4 <= trial["learning_rate"] <= 1e-3 for trial in sweep["trials"])
    assert yaml.safe_load((folder / "best.yaml").read_text())["beta"] == float(sweep["trials"][0]["beta"])
    # One data set is prepared, by the driver, and one reference; both trials find them.
    assert len(list((tmp_path / ".rayalign_cache").iterdir())) == 1
    assert output.count("records encoded in") == 1
    assert output.count("Reference: log-probs of 50 records in ") == 1
    assert output.count("records, computed before, from") == 2
    for trial in sweep["trials"]:
        assert (folder / "trials" / trial["trial"] / "summary.json").exists()
