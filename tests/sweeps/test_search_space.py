from dataclasses import dataclass
from typing import ClassVar

import pytest

from rayalign.config.config import Config
from rayalign.config.flags import check_bounds, flag
from rayalign.config.sections import TuneConfig
from rayalign.sweeps.search_space import SearchRange, check_search, parse_search


@dataclass(frozen=True)
class Toy:
    """Toy"""

    name: ClassVar[str] = "toy"
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
        ("beta=gird:1,2", "--search beta=gird:1,2: gird is not one of grid, choice, uniform, loguniform. Did you mean grid?"),
        ("beta=grid:1,,2", "--search beta=grid:1,,2: grid takes different values with commas between, such as grid:0.1,0.5."),
        ("beta=uniform:1", "--search beta=uniform:1: uniform takes two numbers, such as uniform:0.01:1."),
        ("beta=uniform:2:1", "--search beta=uniform:2:1: uniform takes two finite numbers, the lower one first."),
        ("beta=uniform:0:inf", "--search beta=uniform:0:inf: uniform takes two finite numbers, the lower one first."),
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
        (("lora_rank=uniform:4:64",), "--search lora_rank=uniform: --lora_rank takes no fractions; use grid or choice."),
        (("num_workers=grid:1,2",), "--search num_workers: is the same for all trials of a sweep; pass --num_workers itself."),
    ],
)
def test_values_that_a_flag_does_not_take_are_refused_before_the_sweep(entries: tuple[str, ...], message: str):
    with pytest.raises(ValueError) as error:
        check_search(Config(Toy()), TuneConfig(search=entries))
    assert str(error.value) == message


def test_a_sound_search_passes():
    ranges = check_search(Config(Toy()), TuneConfig(search=("beta=loguniform:0.01:1", "lora_target_modules=grid:DEFAULT,ALL")))
    assert list(ranges) == ["beta", "lora_target_modules"]
