"""The pipelines of four algorithms as subprocesses with two workers, and their models loaded again. DPO and CPO run in
test_pipelines.py, ORPO in test_best.py."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayalign.algorithms import ALGORITHMS
from rayalign.config.config import config_from_mapping
from rayalign.config.sections import OptimizerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.sampler import StepCounts, cut_micro_batches, hold_out
from rayalign.data.store import PreparedData
from rayalign.data.stream import held_out_pairs
from rayalign.models.source import ModelSource
from rayalign.policy.loading import load_policy
from rayalign.storage import Store
from rayalign.training.loop import Trainer
from tests.cluster import Cluster

NAMES = ("rm", "simpo", "kto", "mdpo")
WORDS = (
    *("--num_workers", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 4, "--dataset_test_ratio", 0.2),
    *("--learning_rate", 1e-3, "--logging_steps", 2, "--eval_steps", 4, "--save_steps", 4),
)

REWARDS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
LOGPS = {"logps/chosen", "logps/rejected"}
METRICS = {
    "rm": REWARDS,
    "simpo": REWARDS | LOGPS | {"nll_loss"},
    "kto": REWARDS | LOGPS | {"kl", "nll_loss"},
    "mdpo": REWARDS | LOGPS | {"conditional/margins", "conditional/accuracies", "nll_loss"},
}
"""What each logs beside the loss and what every training logs."""

LIKELIHOOD = {"accuracy/likelihood", "accuracy/per_token", "nll_loss", "mean_token_accuracy", "exact_match"}
EVALUATED = {
    "rm": {"accuracy/reward_model"},
    "simpo": LIKELIHOOD,
    "kto": LIKELIHOOD | {"drift"},
    "mdpo": LIKELIHOOD | {"drift"},
}
"""What the held-out records tell beside METRICS."""


def on_shuffled_images(name: str) -> set[str]:
    """What the last evaluation tells besides."""
    accuracies = {metric for metric in EVALUATED[name] if metric.startswith("accuracy/")}
    accuracies |= {"rewards/accuracies"} if name in ("kto", "mdpo") else set()
    reliance = {"image_reliance", "image_reliance/stderr", "image_reliance/pairs"}
    return reliance | {f"{metric}/shuffled" for metric in accuracies}


@pytest.fixture(scope="module")
def labelled_records(good_records: Path) -> Path:
    """The good records for KTO: a third stays pairs, the others keep one response, labelled."""
    lines = []
    for i, text in enumerate(good_records.read_text().splitlines()):
        row = json.loads(text)
        if i % 3 == 1:
            del row["rejected_response"]
            row["label"] = True
        elif i % 3 == 2:
            row["response"] = row.pop("rejected_response")
            row["label"] = False
        lines.append(json.dumps(row) + "\n")
    path = good_records.with_name("labelled.jsonl")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def runs(
    cluster_of_four_cpus: Cluster,
    model: Path,
    good_records: Path,
    labelled_records: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Path]:
    """The folder of each algorithm's run. Two run at a time, as jobs on a cluster do."""
    folder = tmp_path_factory.mktemp("algorithms")

    def run(name: str) -> Path:
        data = labelled_records if name == "kto" else good_records
        words = ("--model", model, "--dataset", data, "--output_dir", folder / name, *WORDS)
        cluster_of_four_cpus.run(f"pipelines/{name}.py", *words)
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(run, NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_every_algorithm_logs_its_metrics_and_leaves_a_model_that_learnt(runs: Mapping[str, Path], name: str) -> None:
    lines = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
    of_all = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens"}
    of_all |= {"pairs_per_second", "tokens_per_second", "data_wait_fraction", "padding_fraction"}
    evaluated = {"step", "eval_loss"} | {f"eval_{metric}" for metric in METRICS[name] | EVALUATED[name]}
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 4]
    assert set(lines[1]) == METRICS[name] | of_all
    assert set(lines[0]) == set(lines[3]) == evaluated
    assert set(lines[4]) == {"step"} | {f"eval_{metric}" for metric in on_shuffled_images(name)}
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)
    learnt = load_file(runs[name] / "model" / "adapter_model.safetensors")
    assert all(weight.any() for weight in learnt.values())  # LoRA's B starts at zero
    assert (runs[name] / "dropped.jsonl").read_text() == ""
    assert "<html" in (runs[name] / "report.html").read_text()


@pytest.mark.parametrize("name", ["rm", "simpo"])
def test_the_model_on_disk_scores_the_held_out_pairs_as_the_run_did(runs: Mapping[str, Path], model: Path, name: str) -> None:
    """The algorithms without a reference: loaded again, the adapter would be its own reference."""
    folder = runs[name]
    values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    config = config_from_mapping(ALGORITHMS[values.pop("rlhf_type")], values)
    summary = json.loads((folder / "summary.json").read_text())
    data = PreparedData.find(Store.at(str(folder.parent / ".rayalign_cache")) / summary["data_key"])
    assert data is not None
    spec = EncoderSpec(str(model), responses="both")
    policy = load_policy(
        ModelSource(str(model), adapter=str(folder / "model")),
        model=config.model,
        tuner=config.tuner,
        device=torch.device("cpu"),
        needs=config.algorithm.needs,
    )
    token_counts = data.token_counts()
    _, rows = hold_out(token_counts.num_rows, ratio=config.data.dataset_test_ratio, seed=config.data.data_seed)
    batches = cut_micro_batches(rows, token_counts, batch_size=5, rank=0, num_workers=1)
    trainer = Trainer(policy, config.algorithm, OptimizerConfig(), num_steps=1)
    metrics, _ = trainer.evaluate(lambda: held_out_pairs(data, batches, spec), StepCounts.of(token_counts.take(rows)))
    expected = {metric: summary[f"eval_{metric}"] for metric in metrics}
    assert set(expected) == METRICS[name] | EVALUATED[name] | {"loss"}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)  # float32, in other micro-batches
    assert metrics["rewards/chosen"] != 0


def test_a_reward_model_leaves_its_head_beside_the_adapter(runs: Mapping[str, Path]) -> None:
    head = load_file(runs["rm"] / "model" / "value_head.safetensors")
    assert {name: tuple(weight.shape) for name, weight in head.items()} == {
        "v_head.summary.weight": (1, 64),
        "v_head.summary.bias": (1,),
    }
    assert head["v_head.summary.weight"].any()
    assert not (runs["simpo"] / "model" / "value_head.safetensors").exists()


def test_kto_trains_on_pairs_and_on_labelled_responses_alike(runs: Mapping[str, Path]) -> None:
    summary = json.loads((runs["kto"] / "summary.json").read_text())
    assert summary["training_records"] + summary["held_out_records"] == 60
    assert {"eval_rewards/chosen", "eval_rewards/rejected", "eval_kl"} <= set(summary)
