"""Full fine-tuning with DPO and its stored reference, with two workers: computed once, found again, the rest of it added."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rayalign.data.reference_store import SHARD_ROWS
from tests.cluster import Cluster

NUM_RECORDS = 60

WORDS = (
    *("--sft_type", "full", "--num_workers", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--rpo_alpha", 0),
    *("--learning_rate", 1e-4, "--warmup_ratio", 0, "--logging_steps", 1, "--dataset_test_ratio", 0.1),
)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_full_fine_tuning_computes_its_reference_once_and_finds_it_again(
    cluster_of_four_cpus: Cluster, model: Path, good_records: Path, tmp_path: Path
) -> None:
    def run(name: str) -> str:
        words = ("--model", model, "--dataset", good_records, "--output_dir", tmp_path / name)
        return cluster_of_four_cpus.run("pipelines/dpo.py", *words, *WORDS)

    first = run("first")
    stages = (
        f"Data: encoding {NUM_RECORDS} records of {good_records}",
        f"Data: {NUM_RECORDS} records encoded in ",
        f"Reference: computing log-probs of {NUM_RECORDS} records",
        f"Reference: log-probs of {NUM_RECORDS} records in ",
        "Starting 2 train workers",
        f"Loading {model}",
        "Training DPO from step 0 to ",
    )
    places = [first.index(stage) for stage in stages]  # each is named as it begins
    assert places == sorted(places)
    (folder,) = (tmp_path / ".rayalign_cache").glob("*/*/reference_*")
    parts = {part: part.stat().st_mtime_ns for part in folder.iterdir()}
    assert len(parts) == -(-NUM_RECORDS // SHARD_ROWS)
    assert f"Reference: log-probs of {NUM_RECORDS} records, computed before, from {folder}" in run("second")
    assert {part: part.stat().st_mtime_ns for part in folder.iterdir()} == parts

    lines, again = metrics_of(tmp_path / "first"), metrics_of(tmp_path / "second")
    # The policy is its reference until the first update; float32.
    first = next(line for line in lines if "loss" in line)
    assert abs(first["loss"] - 0.693147) < 1e-4
    assert abs(first["rewards/margins"]) < 1e-4
    assert abs(lines[0]["eval_loss"] - 0.693147) < 1e-4
    assert lines[-2]["eval_loss"] != first["loss"]  # the last line is about shuffled images
    for name in ("loss", "rewards/margins", "eval_loss", "grad_norm"):
        assert [line[name] for line in lines if name in line] == [line[name] for line in again if name in line]
    weights, others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    start = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    moved = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
