import dataclasses
import pickle
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config, config_from_mapping, section_types
from rayalign.config.flags import check_bounds, did_you_mean, flag, flags_of, nearest
from rayalign.config.sections import ClusterConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.config.tune import TuneConfig


@dataclass(frozen=True)
class Toy:
    """Toy"""

    name: ClassVar[str] = "toy"

    beta: float = flag(0.1, "Strength.", above=0)
    loss_type: tuple[Literal["sigmoid", "hinge", "sft"], ...] = flag(("sigmoid",), "Losses.")
    loss_weights: tuple[float, ...] = flag((1.0,), "Weights.", at_least=0)

    __post_init__ = check_bounds


def test_words_become_values_of_the_flags_type():
    built = config_from_mapping(
        Toy, {"beta": "0.5", "batch_size": "4", "learning_rate": "1e-5", "resume": "false", "max_pixels": "none"}
    )
    assert built.algorithm == Toy(beta=0.5)
    assert (built.optimizer.batch_size, built.optimizer.learning_rate) == (4, 1e-5)
    assert built.run.resume is False
    assert built.data.max_pixels is None


def test_a_single_word_is_a_list_of_one():
    assert config_from_mapping(Toy, {"dataset": "a.jsonl#10"}).data.dataset == ("a.jsonl#10",)


def test_lists_of_choices_and_numbers_may_hold_commas_but_paths_keep_theirs():
    built = config_from_mapping(Toy, {"loss_type": ["sigmoid,sft"], "loss_weights": "0.8,0.2", "dataset": ["a,b.jsonl"]})
    assert built.algorithm == Toy(loss_type=("sigmoid", "sft"), loss_weights=(0.8, 0.2))
    assert built.data.dataset == ("a,b.jsonl",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": "0"}, "--beta 0.0: must be above 0."),
        ({"beta": "nan"}, "--beta nan: must be a number."),
        ({"beta": True}, "--beta True: must be a number."),
        ({"batch_size": "two"}, "--batch_size two: must be a whole number."),
        ({"batch_size": 1.5}, "--batch_size 1.5: must be a whole number."),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1."),
        ({"max_steps": "x"}, "--max_steps x: must be a whole number or none."),
        ({"adam_beta1": 1}, "--adam_beta1 1.0: must be at most 0.9999999."),
        ({"resume": "perhaps"}, "--resume perhaps: must be true or false."),
        ({"output_dir": 7}, "--output_dir 7: must be text or none."),
        ({"loss_weights": [1, -1]}, "--loss_weights -1.0: must be at least 0."),
        ({"loss_type": "sigmiod"}, "--loss_type sigmiod: must be one of sigmoid, hinge, sft. Did you mean sigmoid?"),
        ({"sft_type": "qqq"}, "--sft_type qqq: must be one of lora, full."),
        (
            {"report_to": ["none", "wandb"]},
            "--report_to none wandb: none is for no sink at all. Leave it out, or the others.",
        ),
        *(
            (
                {"lora_target_modules": empty},
                "--lora_target_modules is empty: there is no layer to put an adapter into. Pass DEFAULT, ALL, module names or "
                "a regular expression, or leave the flag out.",
            )
            for empty in ([], "", [""])
        ),
        ({"bata": 1}, "Unknown flag --bata. Did you mean --beta?"),
        ({"bata": 1, "qqqq": 1}, "Unknown flag --bata. Did you mean --beta? Unknown flag --qqqq."),
    ],
)
def test_a_bad_value_is_refused_in_words(values: dict, message: str):
    with pytest.raises(ValueError) as error:
        config_from_mapping(Toy, values)
    assert str(error.value) == message


def test_full_fine_tuning_needs_no_place_for_adapters():
    assert config_from_mapping(Toy, {"lora_target_modules": [], "sft_type": "full"}).tuner.lora_target_modules == ()


def test_replace_changes_flags_wherever_they_live():
    before = Config(Toy())
    after = before.replace({"beta": "0.3", "lora_rank": 16})
    assert (after.algorithm.beta, after.tuner.lora_rank) == (0.3, 16)
    assert after.replace({"beta": 0.1, "lora_rank": 8}) == before


def test_flat_values_rebuild_the_same_config():
    built = Config(Toy(beta=0.25, loss_type=("hinge", "sft")))
    assert config_from_mapping(Toy, built.to_dict()) == built
    assert pickle.loads(pickle.dumps(built)) == built


def test_global_batch_counts_workers_and_accumulation():
    built = config_from_mapping(Toy, {"batch_size": 2, "gradient_accumulation_steps": 3, "num_workers": 4})
    assert built.global_batch_size == 24


def test_sections_are_listed_in_one_order():
    assert tuple(type(section) for section in Config(Toy()).sections()) == section_types(Toy)


@pytest.mark.parametrize("section", [*section_types(Toy), TuneConfig])
def test_every_flag_has_help_and_a_default_that_it_accepts(section: type):
    for declared in flags_of(section):
        assert declared.help.endswith("."), declared.name
        assert declared.convert(declared.default) == declared.default


def test_no_flag_is_declared_twice():
    names = [declared.name for section in (*section_types(Toy), TuneConfig) for declared in flags_of(section)]
    assert len(names) == len(set(names))


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(Toy()).optimizer.batch_size = 2


FLAGS = ["learning_rate", "lora_rank", "seed", "data_seed", "dtype", "beta", "batch_size", "max_steps", "num_workers", "model"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("lora_rnak", "lora_rank"),  # two letters swapped
        ("batch", "batch_size"),  # its beginning
        ("bata", "beta"),
        ("Seed", "seed"),
        ("num_worker", "num_workers"),
        ("deepspeed", None),  # not seed
        ("bf16", None),
        ("report_to", None),
        ("lora", "lora_rank"),  # the only one that begins so
        ("da", None),
        ("max_step", "max_steps"),
        ("gamma", None),
        ("speed", "seed"),  # one letter too many
        ("m", None),
        ("", None),
    ],
)
def test_only_what_is_near_is_suggested(typed: str, meant: str | None):
    assert nearest(typed, FLAGS) == meant
    assert did_you_mean(typed, FLAGS, prefix="--") == (f" Did you mean --{meant}?" if meant else "")


def test_rows_at_a_time_keep_to_the_pairs_and_to_the_tokens_of_a_batch():
    by_pairs = OptimizerConfig(batch_size=8)
    by_tokens = OptimizerConfig(batch_size=8, max_tokens_per_batch=100)
    assert [by_pairs.rows_at_a_time(longest) for longest in (5, 30, 500)] == [8, 8, 8]
    assert [by_tokens.rows_at_a_time(longest) for longest in (5, 30, 500)] == [8, 3, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0}, "--beta 0.0: must be above 0."),
        ({"beta": "0.5"}, "--beta 0.5: must be a number."),  # a word is a number only where words are read
        ({"beta": True}, "--beta True: must be a number."),
        ({"loss_weights": (1.0, -1.0)}, "--loss_weights -1.0: must be at least 0."),
        ({"loss_weights": [1.0]}, "--loss_weights [1.0]: must be a tuple, each a number."),
        ({"loss_type": ("sft", "hnge")}, "--loss_type hnge: must be one of sigmoid, hinge, sft. Did you mean hinge?"),
    ],
)
def test_values_that_python_code_gives_are_held_to_type_and_bounds(wrong: dict, message: str):
    with pytest.raises(ValueError) as error:
        Toy(**wrong)
    assert str(error.value) == message


def test_equal_configs_have_one_hash_and_can_be_keys():
    assert {Config(Toy(beta=0.5)): 1}[Config(Toy()).replace({"beta": "0.5"})] == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": ModelConfig(torch_compile=True)},
            "--torch_compile true with --strategy fsdp: compiled layers are not sharded here.",
        ),
        (
            {"model": ModelConfig(dtype="float16")},
            "--dtype float16 with --strategy fsdp: its loss scale is not kept for sharded gradients.",
        ),
    ],
)
def test_what_a_sharded_model_can_not_do_is_refused(sections, message):
    with pytest.raises(ValueError) as caught:
        Config(DPO(), cluster=ClusterConfig(strategy="fsdp"), **sections)
    assert str(caught.value) == f"{message} Leave one of the two flags out."
    Config(DPO(), cluster=ClusterConfig(strategy="ddp"), **sections)


def test_a_worker_that_holds_a_shard_has_one_gpu():
    with pytest.raises(ValueError) as caught:
        ClusterConfig(strategy="fsdp", gpus_per_worker=2)
    assert str(caught.value) == (
        "--gpus_per_worker 2 with --strategy fsdp: a worker has one GPU there, and the model is sharded over workers. "
        "Pass --gpus_per_worker 1 and a higher --num_workers."
    )
    assert ClusterConfig(strategy="fsdp", gpus_per_worker=1).shards_models


def test_a_rate_for_a_part_that_is_frozen_is_refused():
    with pytest.raises(ValueError) as caught:
        Config(DPO(), optimizer=OptimizerConfig(vit_lr=1e-6))
    assert str(caught.value) == (
        "--vit_lr 1e-06: the vision tower is not trained here. Pass --freeze_vit false, too, or leave the rate out."
    )
    tuner = TunerConfig(freeze_vit=False)
    Config(DPO(), tuner=tuner, optimizer=OptimizerConfig(vit_lr=1e-6))
    with pytest.raises(ValueError, match=r"--aligner_lr 0\.001: the aligner is not trained here"):
        Config(DPO(), tuner=tuner, optimizer=OptimizerConfig(aligner_lr=1e-3))


@pytest.mark.parametrize(("strategy", "gpus"), [("ddp", 2), ("auto", 1.5), ("device_map", 1.5)])
def test_gpus_that_a_worker_would_not_use_are_refused(strategy, gpus):
    with pytest.raises(ValueError) as caught:
        ClusterConfig(strategy=strategy, gpus_per_worker=gpus)
    assert str(caught.value) == (
        f"--gpus_per_worker {gpus} with --strategy {strategy}: a worker has a share of one GPU, one, or several whole ones, "
        "which only --strategy device_map (or auto) makes use of. Pass --gpus_per_worker 1 and a higher --num_workers, or a "
        "whole number with device_map."
    )
    assert ClusterConfig(gpus_per_worker=2).spreads_models


def test_gradients_that_are_added_up_once_a_step_are_those_of_shards():
    with pytest.raises(ValueError) as caught:
        ClusterConfig(sync_each_batch=False)
    assert str(caught.value) == (
        "--sync_each_batch false with --strategy auto: gradients are added up once a step there anyway. Leave the flag out, or "
        "pass --strategy fsdp."
    )
    assert not ClusterConfig(strategy="fsdp", sync_each_batch=False).sync_each_batch


def test_groups_that_have_a_model_between_them_are_of_one_size():
    assert ClusterConfig(strategy="fsdp", num_workers=8, shard_group_size=4).num_shards == 4
    assert ClusterConfig(strategy="fsdp", num_workers=8).num_shards == 8
    assert ClusterConfig(strategy="fsdp", num_workers="4:8").num_shards == 4
    with pytest.raises(ValueError) as caught:
        ClusterConfig(strategy="fsdp", num_workers=8, shard_group_size=3)
    assert str(caught.value) == (
        "--shard_group_size 3 with --num_workers 8: workers are cut into groups of one size. Pass a size that divides the "
        "number of workers."
    )
    with pytest.raises(ValueError) as caught:
        ClusterConfig(strategy="fsdp", num_workers="4:8", shard_group_size=4)
    assert str(caught.value) == (
        "--shard_group_size 4 with --num_workers 4:8: not every number of workers can be cut into groups of one size. Pass one "
        "number of workers, or leave --shard_group_size out."
    )
    with pytest.raises(ValueError) as caught:
        ClusterConfig(num_workers=8, shard_group_size=4)
    assert str(caught.value) == (
        "--shard_group_size 4 with --strategy auto: no model is sharded there. Pass --strategy fsdp, or leave it out."
    )
