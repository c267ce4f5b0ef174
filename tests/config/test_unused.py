"""Flags that change nothing beside the others of a run are told."""

import pytest

from rayalign.algorithms import DPO, SFT
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.sections import RunConfig
from rayalign.config.unused import unused_flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, []),
        ({"lora_rank": 16}, []),
        (
            {"sft_type": "full", "lora_rank": 16, "lora_target_modules": ["q_proj", "v_proj"]},
            [
                "--lora_target_modules q_proj v_proj changes nothing: --sft_type full trains no adapter.",
                "--lora_rank 16 changes nothing: --sft_type full trains no adapter.",
            ],
        ),
        (
            {"lora_dropout": 0.1},
            ["--lora_dropout 0.1 changes nothing: dpo compares log-probs, which dropout would blur, so that none is used."],
        ),
        ({"lora_dropout": 0.0}, []),  # off is what it asks for
        (
            {"val_dataset": ["a.jsonl"], "dataset_test_ratio": 0.2},
            ["--dataset_test_ratio 0.2 changes nothing: --val_dataset names what is held out."],
        ),
        (
            {"max_steps": 9, "num_train_epochs": 3},
            ["--num_train_epochs 3.0 changes nothing: --max_steps tells the run's end."],
        ),
        (
            {"strategy": "fsdp", "sync_each_batch": False},
            [
                "--sync_each_batch false changes nothing: adapters are not sharded, and their gradients are added up once a "
                "step."
            ],
        ),
        ({"max_eval_questions": 9}, ["--max_eval_questions 9 changes nothing: there are no --eval_benchmarks."]),
    ],
    ids=str,
)
def test_a_flag_that_changes_nothing_is_told(flags: dict[str, object], words: list[str]):
    assert [unused.words for unused in unused_flags(config_from_mapping(DPO, flags))] == words


def test_the_dropout_of_sft_is_used():
    assert unused_flags(config_from_mapping(SFT, {"lora_dropout": 0.1})) == []


def test_a_direction_without_its_metric_is_refused():
    with pytest.raises(ValueError) as error:
        Config(DPO(), run=RunConfig(greater_is_better=False))
    assert str(error.value) == (
        "--greater_is_better false without --metric_for_best_model: it says so of a metric that you name. Name one "
        "(--metric_for_best_model eval_loss), or leave this flag out."
    )
