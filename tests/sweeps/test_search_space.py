from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from rayalign.algorithms import DPO, SFT, Needs, SimPO
from rayalign.config.config import Config
from rayalign.config.flags import check_bounds, flag
from rayalign.config.sections import DataConfig, OptimizerConfig, TunerConfig
from rayalign.config.tune import TuneConfig
from rayalign.models.source import ModelSource
from rayalign.sweeps.search_checks import check_search, check_shape
from rayalign.sweeps.search_space import SearchRange, SearchSpace, parse_search

VAL = DataConfig(val_dataset=("held_out.jsonl",))


@dataclass(frozen=True)
class Toy:
    """Toy"""

    name: ClassVar[str] = "toy"
    needs: ClassVar[Needs] = Needs()
    beta: float = flag(0.1, "Strength.", above=0, at_most=10)

    __post_init__ = check_bounds


def test_entries_become_ranges():
    ranges = parse_search(["beta=grid:0.05,0.1", "lora_rank=choice:4,8", "warmup_ratio=uniform:0:0.1", "seed=grid:1"])
    assert ranges == {
        "beta": SearchRange("grid", ("0.05", "0.1")),
        "lora_rank": SearchRange("choice", ("4", "8")),
        "warmup_ratio": SearchRange("uniform", (0.0, 0.1)),
        "seed": SearchRange("grid", ("1",)),
    }
    assert [values.is_drawn for values in ranges.values()] == [False, True, True, False]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("beta", "--search beta: must look like beta=grid:0.05,0.1,0.5 or learning_rate=loguniform:1e-6:1e-4."),
        ("beta=0.1", "--search beta=0.1: must look like beta=grid:0.05,0.1,0.5 or learning_rate=loguniform:1e-6:1e-4."),
        (
            "beta=gird:1,2",
            "--search beta=gird:1,2: gird is not one of grid, choice, uniform, loguniform, quniform. Did you mean grid?",
        ),
        ("beta=grid:1,,2", "--search beta=grid:1,,2: grid takes different values with commas between, such as grid:0.1,0.5."),
        ("beta=uniform:1", "--search beta=uniform:1: uniform takes two numbers, such as uniform:0.01:1."),
        ("beta=uniform:2:1", "--search beta=uniform:2:1: uniform takes two finite numbers, the lower one first."),
        ("beta=uniform:0:inf", "--search beta=uniform:0:inf: uniform takes two finite numbers, the lower one first."),
        (
            "beta=quniform:0:2",
            "--search beta=quniform:0:2: quniform takes a low and a high number and a step, such as quniform:0:2:0.5.",
        ),
        (
            "beta=quniform:0:2:3",
            "--search beta=quniform:0:2:3: quniform takes finite numbers, the lower one first, and a step above 0 that fits "
            "between them.",
        ),
        (
            "beta=loguniform:0:1",
            "--search beta=loguniform:0:1: loguniform takes two finite numbers above 0, the lower one first.",
        ),
    ],
)
def test_a_malformed_entry_is_refused_in_words(entry: str, message: str):
    with pytest.raises(ValueError) as error:
        parse_search([entry])
    assert str(error.value) == message


def test_a_flag_is_searched_once():
    with pytest.raises(ValueError, match="beta is searched twice"):
        parse_search(["beta=grid:1,2", "beta=uniform:1:2"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "--search is empty: name at least one flag to search, such as --search beta=grid:0.05,0.1,0.5."),
        (("bata=grid:1,2",), "--search bata: there is no such flag. Did you mean beta?"),
        (("beta=grid:0.1,0",), "--search beta=grid: --beta 0.0: must be above 0."),
        (("beta=uniform:1:20",), "--search beta=uniform: --beta 20.0: must be at most 10."),
        (("lora_rank=uniform:4:64.5",), "--search lora_rank=uniform: --lora_rank takes whole numbers, and these are not."),
        (("lora_rank=quniform:4:16:0.5",), "--search lora_rank=quniform: --lora_rank takes whole numbers, and these are not."),
        (("lora_rank=uniform:0:8",), "--search lora_rank=uniform: --lora_rank 0: must be at least 1."),
        (("use_dora=uniform:0:1",), "--search use_dora=uniform: --use_dora takes no range of numbers; use grid or choice."),
        (("rlhf_type=uniform:0:1",), "--search rlhf_type=uniform: algorithms are names; use grid or choice."),
        (
            ("rlhf_type=grid:dpo,simp",),
            "--search rlhf_type=grid: simp is not one of sft, dpo, mdpo, rm, cpo, orpo, simpo, kto. Did you mean simpo?",
        ),
        (
            ("rlhf_type=grid:dpo,cpo", "simpo_gamma=grid:1"),
            "--search simpo_gamma: dpo, cpo have no such flag; simpo has. Leave it out, or try an algorithm that has it "
            "(--search rlhf_type=grid:dpo,cpo,simpo).",
        ),
        (
            ("lambda_orpo=grid:1,2",),
            "--search lambda_orpo: there is no such flag.",
        ),
        (("num_samples=grid:1,2",), "--search num_samples: is the same for all trials of a sweep; pass --num_samples itself."),
        (("num_workers=grid:1,2",), "--search num_workers: is the same for all trials of a sweep; pass --num_workers itself."),
    ],
)
def test_values_that_a_flag_does_not_take_are_refused_before_the_sweep(entries: tuple[str, ...], message: str):
    with pytest.raises(ValueError) as error:
        check_search(Config(Toy()), TuneConfig(search=entries))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("base", "sweep", "message"),
    [
        (
            Config(SFT()),
            TuneConfig(search=("learning_rate=grid:1e-3,1e-4",)),
            "--metric eval_rewards/accuracies: sft has no rewards. Pass --metric eval_loss.",
        ),
        (
            Config(DPO(), data=DataConfig(dataset_test_ratio=0)),
            TuneConfig(search=("beta=grid:1,2",)),
            "--metric eval_rewards/accuracies with --dataset_test_ratio 0: no record is held out, so that trials can't be "
            "compared. Hold some out, or pass --val_dataset.",
        ),
        (
            Config(SFT()),
            TuneConfig(search=("learning_rate=grid:1e-3,1e-4",), metric="rewards/margins"),
            "--metric eval_rewards/margins: sft has no rewards. Pass --metric eval_loss.",
        ),
        (
            Config(DPO(), tuner=TunerConfig(sft_type="full")),
            TuneConfig(search=("lora_rank=grid:4,8",)),
            "--search lora_rank with --sft_type full: full trains no adapter. Leave one of the two out.",
        ),
        (
            Config(DPO()),
            TuneConfig(search=("rlhf_type=grid:dpo,sft",)),
            "--metric eval_rewards/accuracies: sft has no rewards. Pass --metric eval_nll_loss, which all have.",
        ),
        (
            Config(SimPO()),
            TuneConfig(search=("beta=grid:1,2",), cost_metric="drift"),
            "--cost_metric eval_drift: simpo has no reference to drift from. Pass --cost_metric eval_nll_loss.",
        ),
        (
            Config(DPO()),
            TuneConfig(search=("reference_free=grid:true", "rlhf_type=grid:dpo,cpo"), metric="eval_drift"),
            "--metric eval_drift: cpo has no reference to drift from. Pass --metric eval_nll_loss.",
        ),
        (
            Config(DPO(), data=VAL),
            TuneConfig(search=("val_dataset=grid:a.jsonl,b.jsonl",)),
            "--search val_dataset: trials are compared on the same held-out records, and these would differ. Pass "
            "--val_dataset itself.",
        ),
        *(
            (
                Config(DPO()),
                TuneConfig(search=(f"{name}=grid:{values}",)),
                f"--search {name}: trials are compared on the same held-out records, and these would differ. Name them "
                "(--val_dataset), or leave it out.",
            )
            for name, values in {"dataset": "a.jsonl,b.jsonl", "dataset_test_ratio": "0.1,0.2", "data_seed": "1,2"}.items()
        ),
        (
            Config(DPO(), data=DataConfig(val_dataset=("a.jsonl#10",))),
            TuneConfig(search=("data_seed=grid:1,2",)),
            "--search data_seed: trials are compared on the same held-out records, and these would differ. --val_dataset "
            "a.jsonl#10 is drawn by it. Write them into a file of their own.",
        ),
    ],
)
def test_what_no_trial_could_have_is_refused_before_the_sweep(base: Config, sweep: TuneConfig, message: str):
    with pytest.raises(ValueError) as error:
        check_search(base, sweep)
    assert str(error.value) == message


def test_what_is_drawn_from_the_training_records_may_be_searched_where_others_are_held_out():
    ranges = ("dataset=grid:a.jsonl,b.jsonl", "dataset_test_ratio=grid:0,0.2", "data_seed=grid:1,2")
    check_search(Config(DPO(), data=VAL), TuneConfig(search=ranges, cost_metric="eval_drift"))
    check_search(Config(SFT(), data=VAL), TuneConfig(search=("rlhf_type=grid:sft,dpo",), metric="eval_loss"))


def test_the_shape_of_an_adapter_that_trials_continue_from_is_not_searched():
    going_on, new = ModelSource("base", adapter="runs/a/model"), ModelSource("base")
    space = space_of("lora_rank=grid:4,8")
    with pytest.raises(ValueError) as error:
        check_shape(space, going_on)
    assert str(error.value) == (
        "--search lora_rank: trials continue from the adapter runs/a/model, which keeps its shape. Leave it out, or train new "
        "adapters on top of it (--stack_adapter true)."
    )
    check_shape(space, new)
    check_shape(replace(space, base=space.base.replace({"stack_adapter": True})), going_on)
    check_shape(space_of("lora_dropout=grid:0,0.1"), going_on)


def test_a_sound_search_passes():
    space = space_of("beta=loguniform:0.01:1", "lora_target_modules=grid:DEFAULT,ALL")
    assert list(space.ranges) == ["beta", "lora_target_modules"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search_alg": "optuna", "search": ("beta=grid:1,2",)},
            "--search beta=grid with --search_alg optuna: a grid runs whole, and Optuna chooses. Use choice, or --search_alg "
            "random.",
        ),
        (
            {"num_seeds": 2, "search": ("seed=grid:1,2",)},
            "--num_seeds 2 with --search seed: both set the seed. Leave one of the two out.",
        ),
        (
            {"num_seeds": 2, "scheduler": "asha", "search": ("beta=grid:1,2",)},
            "--scheduler asha with --num_seeds 2: a setting is ranked by the mean of all its seeds, none of which may be "
            "stopped. Leave one of the two out.",
        ),
    ],
)
def test_flags_of_a_sweep_that_cannot_be_together_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        check_search(Config(Toy()), TuneConfig(**changes))
    assert str(error.value) == message


def space_of(*entries: str, base: Config | None = None) -> SearchSpace:
    return check_search(base or Config(Toy()), TuneConfig(search=entries))


def test_grids_run_whole_and_their_values_have_the_flags_types():
    space = space_of("beta=grid:0.05,0.1", "lora_target_modules=grid:ALL", "max_steps=grid:none,3")
    assert space.settings(8, seed=0) == [
        {"beta": 0.05, "lora_target_modules": ["ALL"], "max_steps": None},
        {"beta": 0.05, "lora_target_modules": ["ALL"], "max_steps": 3},
        {"beta": 0.1, "lora_target_modules": ["ALL"], "max_steps": None},
        {"beta": 0.1, "lora_target_modules": ["ALL"], "max_steps": 3},
    ]


def test_more_draws_begin_with_those_of_fewer():
    space = space_of(
        "beta=loguniform:0.01:1", "learning_rate=uniform:1e-6:1e-4", "lora_rank=choice:4,8", "warmup_ratio=grid:0,0.1"
    )
    many = space.settings(32, seed=3)
    assert len(many) == 64
    assert many[:32] == space.settings(16, seed=3)
    assert many[:32] != space.settings(16, seed=4)


def test_drawn_numbers_stay_in_their_range_and_keep_four_digits():
    space = space_of("beta=uniform:0.123456:0.1235", "adam_beta1=loguniform:0.5:0.9")
    for setting in space.settings(50, seed=0):
        assert 0.123456 <= setting["beta"] <= 0.1235
        assert 0.5 <= setting["adam_beta1"] <= 0.9
        assert setting["adam_beta1"] == round(setting["adam_beta1"], 4)


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_whole_number_flags_draw_whole_numbers_both_ends_included(kind: str):
    drawn = [setting["lora_rank"] for setting in space_of(f"lora_rank={kind}:1:4").settings(200, seed=0)]
    assert set(drawn) == {1, 2, 3, 4}
    assert {type(rank) for rank in drawn} == {int}


def test_quniform_draws_whole_steps_up_to_the_last_that_fits():
    assert {s["beta"] for s in space_of("beta=quniform:0.1:0.75:0.2").settings(100, seed=0)} == {0.1, 0.3, 0.5, 0.7}
    assert {s["lora_rank"] for s in space_of("lora_rank=quniform:4:12:4").settings(100, seed=0)} == {4, 8, 12}


def test_a_flag_of_some_algorithms_is_in_their_settings_only_and_equal_settings_are_one():
    space = space_of("rlhf_type=grid:dpo,simpo", "simpo_gamma=grid:0.5,1", base=Config(DPO()))
    assert space.settings(8, seed=0) == [
        {"rlhf_type": "dpo"},
        {"rlhf_type": "simpo", "simpo_gamma": 0.5},
        {"rlhf_type": "simpo", "simpo_gamma": 1.0},
    ]


def test_another_algorithm_keeps_its_own_defaults_and_gets_what_was_changed():
    space = space_of("rlhf_type=grid:dpo,simpo", base=Config(DPO(), optimizer=OptimizerConfig(learning_rate=1e-3)))
    simpo = space.config({"rlhf_type": "simpo"})
    assert simpo == Config(SimPO(), optimizer=OptimizerConfig(learning_rate=1e-3))
    assert simpo.algorithm.beta == 2.0  # that of DPO is 0.1
    changed = space_of("rlhf_type=grid:dpo,simpo", base=Config(DPO(beta=0.5)))
    assert changed.config({"rlhf_type": "simpo"}).algorithm == SimPO(beta=0.5)
    assert changed.config({"rlhf_type": "dpo"}) == Config(DPO(beta=0.5))


def test_a_changed_flag_that_no_searched_algorithm_has_is_refused():
    with pytest.raises(ValueError) as error:
        space_of("rlhf_type=grid:simpo,cpo", base=Config(DPO(ld_alpha=0.5)))
    assert str(error.value) == (
        "--ld_alpha: none of the algorithms that --search rlhf_type names has it (simpo, cpo). Leave it out."
    )


@pytest.mark.parametrize(
    "search",
    [
        ("loss_type=grid:exo_pair", "label_smoothing=grid:0.01,0.1"),
        ("f_divergence_type=grid:alpha_divergence", "f_alpha_divergence_coef=uniform:0.1:0.9"),
        ("label_smoothing=quniform:0:0.49:0.25",),  # whose last number is 0.25
    ],
)
def test_a_value_may_be_one_that_only_another_searched_one_allows(search: tuple[str, ...]):
    check_search(Config(DPO(rpo_alpha=0.0)), TuneConfig(search=search))


def test_a_value_that_nothing_searched_allows_is_refused():
    with pytest.raises(ValueError, match=r"--search loss_type=grid: .*exo_pair needs a --label_smoothing above 0"):
        check_search(Config(DPO(rpo_alpha=0.0)), TuneConfig(search=("loss_type=grid:exo_pair", "label_smoothing=grid:0")))
