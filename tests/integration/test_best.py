"""A run, of ORPO, that stops since nothing gets better: what it keeps, writes and says, and its checkpoints as models."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from rayalign.config.serving import ExportConfig
from rayalign.training import checkpoint_export
from tests.cluster import Cluster


def test_a_run_stops_early_and_leaves_its_best_checkpoint_and_model(
    cluster_of_four_cpus: Cluster, model: Path, good_records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # The loss falls, so that with high ones taken for good the first evaluation stays the best.
    words = (
        *("pipelines/orpo.py", "--model", model, "--dataset", good_records, "--output_dir", folder, "--num_train_epochs", 20),
        *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-3),
        *("--dataset_test_ratio", 0.1, "--logging_steps", 1, "--eval_steps", 3, "--save_steps", 4, "--save_total_limit", 1),
        *("--metric_for_best_model", "loss", "--greater_is_better", "true", "--early_stopping_patience", 3),
        *("--load_best_model_at_end", "true"),
    )
    output = cluster_of_four_cpus.run(*words)
    assert "Stopped at step 12: nothing better in 3 evaluations than eval_loss" in output
    assert "Back to the best: eval_loss" in output
    note, summary = (json.loads((folder / name).read_text()) for name in ("best.json", "summary.json"))
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert [name.split("_")[1] for name in checkpoints] == ["00000003", "00000012"]
    assert note == {"step": 3, "metric": "eval_loss", "value": note["value"], "checkpoint": checkpoints[0]}
    assert summary["steps"] == 12
    assert summary["model_step"] == 3
    assert summary["best"] == {"step": 3, "metric": "eval_loss", "value": note["value"]}
    assert summary["stopped_early"].startswith("stopped at step 12: nothing better in 3 evaluations than eval_loss")
    # The figures are those of the model that was written.
    assert summary["eval_loss"] == note["value"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line and line["step"]] == [3, 6, 9, 12]
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/margins"} <= lines[1].keys()
    assert not (folder / "lease.json").exists()

    weights = {"model": load_file(folder / "model" / "adapter_model.safetensors")}
    for name in ("best", "last"):
        out = tmp_path / name
        checkpoint_export.run(ExportConfig(checkpoint=name, run_dir=str(folder), output_dir=str(out)))
        weights[name] = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(weights["best"][name], tensor) for name, tensor in weights["model"].items())
    assert any(not torch.equal(weights["last"][name], tensor) for name, tensor in weights["model"].items())
