"""The pipelines as a person runs them: SFT, then DPO from its result, with two workers, and what stands in the folder."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.cluster import ROOT, Cluster

SMALL = (
    *("--num_workers", 2, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--dataset_test_ratio", 0.1),
    *("--learning_rate", 1e-3, "--logging_steps", 2, "--eval_steps", 4, "--save_steps", 4),
)


@pytest.fixture(scope="module")
def sft_run(cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    words = ("--model", model, "--dataset", records, "--output_dir", folder, "--num_train_epochs", 2)
    cluster_of_four_cpus.run("pipelines/sft.py", *words, *SMALL)
    return folder


@pytest.fixture(scope="module")
def dpo_run(cluster_of_four_cpus: Cluster, sft_run: Path, good_records: Path) -> Path:
    """The guide's command, flag by flag, from the SFT adapter."""
    folder = sft_run.parent / "dpo"
    words = (
        *("--rlhf_type", "dpo", "--model", sft_run / "model", "--sft_type", "lora", "--dataset", f"{good_records}#40"),
        *("--num_train_epochs", 2, "--lora_target_modules", "DEFAULT", "--gradient_checkpointing", "true"),
        *("--beta", 0.1, "--rpo_alpha", 0.1, "--warmup_ratio", 0.03, "--save_total_limit", 2, "--output_dir", folder),
        *("--profile_steps", "2:3"),
    )
    log = cluster_of_four_cpus.run("pipelines/rlhf.py", *words, *SMALL)
    (folder.parent / "log.txt").write_text(log)
    with urllib.request.urlopen(cluster_of_four_cpus.metrics, timeout=10) as page:  # before Ray forgets the workers
        (folder.parent / "exported.txt").write_bytes(page.read())
    return folder


def test_a_sharded_run_ends_with_the_adapter_of_a_run_that_is_not(
    cluster_of_four_cpus: Cluster, sft_run: Path, model: Path, records: Path
) -> None:
    folder = sft_run.parent / "sharded"
    words = ("--model", model, "--dataset", records, "--output_dir", folder, "--num_train_epochs", 2, "--strategy", "fsdp")
    cluster_of_four_cpus.run("pipelines/sft.py", *words, *SMALL)
    one, other = (load_file(run / "model" / "adapter_model.safetensors") for run in (sft_run, folder))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_leaves_the_whole_folder(dpo_run: Path) -> None:
    names = {path.name for path in dpo_run.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "dropped.jsonl", "origin.json", "reference.json", "checkpoints", "model", "report.html",
        "answers.json", "held_out_scores.json", "times.json", "best.json", "summary.json", "tensorboard", "profile",
    }  # fmt: skip
    summary = json.loads((dpo_run / "summary.json").read_text())
    assert summary["training_records"] == 36
    assert summary["held_out_records"] == 4
    assert summary["steps"] == 6  # 36 records in global batches of 16: three steps an epoch
    assert len(list((dpo_run / "checkpoints").glob("step_*"))) == 2
    page = (dpo_run / "report.html").read_text()
    assert "<html" in page
    assert "Not finished" not in page


def test_the_dashboard_shows_what_ray_exports_of_a_run(dpo_run: Path) -> None:
    exported = (dpo_run.parent / "exported.txt").read_text()
    names = set(re.findall(r'^(ray_rayalign_\w+)\{.*rank="\d",run="dpo"', exported, re.MULTILINE))
    dashboard = (ROOT / "deploy" / "grafana" / "rayalign.json").read_text()
    shown = set(re.findall(r'"expr": "(\w+)\{', dashboard))
    assert shown - names == {"ray_rayalign_train_mfu"}  # on GPUs only


def test_tensorboard_gets_the_lines_of_the_metrics(dpo_run: Path) -> None:
    lines = [json.loads(line) for line in (dpo_run / "metrics.jsonl").read_text().splitlines()]
    (file,) = (dpo_run / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in ("train/loss", "train/rewards/margins", "eval/loss"):
        metric = name.replace("train/", "").replace("eval/", "eval_")
        assert content.count(f"{name}\x15".encode()) == sum(metric in line for line in lines)  # 0x15: a float follows


def test_every_worker_traces_the_steps_that_were_asked_for(dpo_run: Path) -> None:
    assert {path.name for path in (dpo_run / "profile").iterdir()} == {f"rank_{rank}_step_2.json.gz" for rank in (0, 1)}


def test_every_line_of_the_log_says_when_without_colours(dpo_run: Path) -> None:
    lines = (dpo_run.parent / "log.txt").read_text().splitlines()
    steps = [line for line in lines if " Step " in line]
    assert len(steps) == 3
    assert all(re.match(r"\d\d:\d\d:\d\d Step \d/6  loss ", line) for line in steps)
    assert not [line for line in lines if "\x1b" in line]


def test_a_run_tells_where_its_time_went(dpo_run: Path) -> None:
    summary = json.loads((dpo_run / "summary.json").read_text())
    stages = {"ray_start", "encoding", "reference", "model_loading", "training", "evaluation", "checkpoints", "saving", "other"}
    assert set(summary["stage_seconds"]) == stages
    assert sum(summary["stage_seconds"].values()) == pytest.approx(summary["seconds"], abs=0.5)  # each is rounded


def test_the_model_answers_before_and_after_with_what_each_of_two_workers_was_asked(dpo_run: Path) -> None:
    answers = json.loads((dpo_run / "answers.json").read_text())
    assert len(answers["before"]) == 4  # of 4 held-out records
    assert answers["before"].keys() == answers["after"].keys()
    assert answers["failed"] == ""


def test_metrics_have_the_names_of_the_field(dpo_run: Path) -> None:
    lines = [json.loads(line) for line in (dpo_run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6]
    assert [line["step"] for line in evaluation] == [0, 4, 6]
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    others = {
        "grad_norm",
        "learning_rate",
        "epoch",
        "num_tokens",
        "pairs_per_second",
        "tokens_per_second",
        "data_wait_fraction",
        "padding_fraction",
    }
    assert rewards | others | {"nll_loss", "loss"} <= set(training[0])
    assert {f"eval_{name}" for name in rewards} <= set(evaluation[0])


def test_bad_records_are_listed_with_row_and_reason(sft_run: Path, records: Path) -> None:
    dropped = [json.loads(line) for line in (sft_run / "dropped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in dropped] == [(50, "broken JSON"), (51, "missing field")]
    assert {line["file"] for line in dropped} == {str(records)}


def test_the_loss_falls_and_the_sft_adapter_is_the_reference(sft_run: Path, dpo_run: Path) -> None:
    sft = [json.loads(line) for line in (sft_run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in sft if "loss" in line]
    assert losses[-1] < losses[0]
    start = next(line for line in map(json.loads, (dpo_run / "metrics.jsonl").read_text().splitlines()) if "loss" in line)
    # After one step at a warm-up rate rewards are still near 0, which they could not be against the model before SFT.
    assert abs(start["rewards/chosen"]) < 0.5
    learnt = load_file(dpo_run / "model" / "adapter_model.safetensors")
    before = load_file(sft_run / "model" / "adapter_model.safetensors")
    assert set(learnt) == set(before)
    assert any(not torch.equal(learnt[name], before[name]) for name in learnt)


def test_the_result_loads_with_transformers_and_with_peft(dpo_run: Path, model: Path) -> None:
    by_transformers = AutoModelForImageTextToText.from_pretrained(dpo_run / "model")
    by_peft = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), dpo_run / "model")
    processor = AutoProcessor.from_pretrained(dpo_run / "model")
    inputs = processor.tokenizer("Which colour is it?", return_tensors="pt")
    with torch.no_grad():
        outputs = [loaded(**inputs).logits for loaded in (by_transformers, by_peft)]
        plain = AutoModelForImageTextToText.from_pretrained(model)(**inputs).logits
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain)


def test_the_written_configuration_runs_again_and_finds_its_data_prepared(
    cluster_of_four_cpus: Cluster, dpo_run: Path, tmp_path: Path
) -> None:
    again = ("--config", dpo_run / "config.yaml", "--output_dir", tmp_path / "again", "--num_workers", 1)
    # One worker with twice the accumulation: the same global batches, so the same update up to float32 rounding.
    words = (*again, "--gradient_accumulation_steps", 4, "--cache_dir", dpo_run.parent / ".rayalign_cache")
    output = cluster_of_four_cpus.run("pipelines/dpo.py", *words)
    assert "encoded before" in output
    first = load_file(dpo_run / "model" / "adapter_model.safetensors")
    second = load_file(tmp_path / "again" / "model" / "adapter_model.safetensors")
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    # AdamW divides by the gradient's size, so rounding of tiny gradients shows at the scale of the learning rate.
    assert largest < 1e-4
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["beta"] == 0.1


def test_a_finished_folder_is_not_overwritten(cluster_of_four_cpus: Cluster, dpo_run: Path) -> None:
    output = cluster_of_four_cpus.run("pipelines/dpo.py", "--config", dpo_run / "config.yaml", code=2)
    assert (
        f"--output_dir {dpo_run} holds a finished run. Pass --overwrite true to delete it, or another --output_dir." in output
    )
    assert "Traceback" not in output


def test_too_many_bad_records_end_the_run_with_a_table(cluster_of_four_cpus: Cluster, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"query": "Which colour?", "response": "Red.", "rejected_response": "Blue."}
    same = good | {"rejected_response": "Red."}
    lost = good | {"images": ["nowhere.png"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [good] * 8 + [same, lost]))
    words = ("--model", model, "--dataset", path, "--output_dir", tmp_path / "run")
    output = cluster_of_four_cpus.run("pipelines/dpo.py", *words, code=2)
    assert "2 of 10 records dropped (20.0%):" in output
    assert "1  identical responses" in output
    assert "1  image missing" in output
    assert "--max_dropped_fraction 0.05" in output
    assert "Traceback" not in output
    dropped = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in dropped] == [8, 9]


def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    cluster_of_four_cpus: Cluster, model: Path, good_records: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--dataset", good_records, "--output_dir", tmp_path / "run", "--learning_rate", 1e30)
    output = cluster_of_four_cpus.run("pipelines/cpo.py", *words, "--logging_steps", 1, "--num_train_epochs", 3, code=2)
    assert "error: The loss is nan at step" in output
    assert "Traceback" not in output
    assert output.count("Training CPO from step") == 1


def test_workers_that_fit_nowhere_are_refused_with_the_numbers(
    cluster_of_four_cpus: Cluster, model: Path, records: Path, tmp_path: Path
) -> None:
    words = (
        "--model",
        model,
        "--dataset",
        records,
        "--output_dir",
        tmp_path / "run",
        "--num_workers",
        9,
        "--wait_for_nodes",
        2,
    )
    output = cluster_of_four_cpus.run("pipelines/dpo.py", *words, code=2)
    assert "Waiting for nodes, 2 s at most (--wait_for_nodes): there is room for 4 of 9 workers with 1 CPU each" in output
    assert "--num_workers 9 with 1 CPU and 0 GPUs each: the cluster has room for 4 (1 node with 4 CPUs and 0 GPUs)" in output
