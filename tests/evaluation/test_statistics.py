"""Statistics of evaluations, against values worked out by hand."""

import math

import numpy as np
import pytest

from rayalign.evaluation.statistics import (
    correlation,
    estimate,
    length_bias,
    macro_average,
    mcnemar,
    paired_difference,
    wins,
)


def test_a_tie_counts_one_half() -> None:
    assert wins([2.0, -1.0, 0.0, 0.5]).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert estimate(wins([2.0, -1.0, 0.0, 0.5]), seed=0).value == 0.625  # 2.5 of 4


def test_an_interval_holds_the_mean_and_has_the_width_of_theory() -> None:
    values = np.tile([1.0, 0.0], 200)
    found = estimate(values, seed=0)
    assert (found.value, found.records) == (0.5, 400)
    half_width = 1.96 * 0.5 / math.sqrt(400)  # normal approximation of a share of one half
    assert found.low == pytest.approx(0.5 - half_width, abs=0.01)  # 1,000 draws tell a quantile to about 0.003
    assert found.high == pytest.approx(0.5 + half_width, abs=0.01)


def test_an_interval_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    values = np.arange(50.0)
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3) != estimate(values, seed=4)


def test_values_that_are_all_equal_have_an_interval_without_width() -> None:
    found = estimate([1.0, 1.0, 1.0], seed=0)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(70.0)
    whole = estimate(values, seed=1)
    monkeypatch.setattr("rayalign.evaluation.statistics.BLOCK_VALUES", 100)
    assert estimate(values, seed=1) == whole


def test_no_records_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        estimate([], seed=0)
    assert str(caught.value) == "There are no records to average over."


def test_a_macro_average_counts_each_group_once() -> None:
    # general 3 of 4, reasoning 0 of 1, hallucination 1 of 2: (0.75 + 0 + 0.5) / 3, where the plain mean is 4 / 7.
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    groups = ["general"] * 4 + ["reasoning"] + ["hallucination"] * 2
    found = macro_average(values, groups, seed=0)
    assert found.value == pytest.approx(1.25 / 3)
    assert found.records == 7
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # 5 records of the first only, 0 of the second: 2 * 0.5^5 = 0.0625.
        ([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], (5, 0, 0.0625)),
        # 4 against 1: 2 * (C(5,0) + C(5,1)) / 2^5 = 12 / 32.
        ([1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1], (4, 1, 0.375)),
        # 1 against 1: both halves together are more than everything.
        ([1, 0], [0, 1], (1, 1, 1.0)),
        ([1, 0], [1, 0], (0, 0, 1.0)),
        # A tie beats a loss and loses to a win: 2 * 0.5^2.
        ([1, 0.5], [0.5, 0], (2, 0, 0.5)),
    ],
)
def test_mcnemars_test_is_exact(first: list[float], second: list[float], expected: tuple[int, int, float]) -> None:
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == expected[:2]
    assert found.p_value == pytest.approx(expected[2])


def test_mcnemars_test_takes_many_records() -> None:
    found = mcnemar([1.0] * 5100 + [0.0] * 4900, [0.0] * 5100 + [1.0] * 4900)
    # Normal approximation with continuity: z = (200 - 1) / sqrt(10000) = 1.99, two-sided 0.0466.
    assert found.p_value == pytest.approx(0.0466, abs=2e-4)


def test_a_paired_difference_sees_what_unpaired_intervals_would_hide() -> None:
    first = np.random.default_rng(0).normal(0, 10, 200)
    found = paired_difference(first + 0.1, first, seed=0)
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.p_value == pytest.approx(2 / 1001)  # none of 1,000 draws is at or below 0


def test_equal_models_do_not_differ() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], seed=0)
    assert (found.value, found.p_value) == (0.0, 1.0)


def test_few_records_prove_nothing() -> None:
    assert paired_difference([3.0], [1.0], seed=0).p_value == 1.0
    assert paired_difference([3.0, 4.0, 3.0], [1.0, 2.0, 2.0], seed=0).p_value == 0.25  # three tosses of one side: 2 / 8


def test_length_bias_is_told_apart_from_accuracy() -> None:
    # Margins follow length exactly: right where chosen is longer (2 pairs), wrong where it is shorter (2); one of equal length.
    found = length_bias([2.0, 1.0, -1.0, -2.0, 0.0], [2, 1, -1, -2, 0], seed=0)
    assert found.longer is not None
    assert found.longer.value == 1.0
    assert found.longer.records == 2
    assert found.shorter is not None
    assert found.shorter.value == 0.0
    assert found.correlation == pytest.approx(1.0)
    assert found.by_length_alone == 0.5  # (2 + 1/2) / 5


def test_pairs_of_one_kind_only_have_no_accuracy_of_the_other() -> None:
    found = length_bias([1.0, -1.0], [3, 4], seed=0)
    assert found.shorter is None
    assert found.longer is not None
    assert found.longer.value == 0.5


def test_a_correlation_needs_values_that_vary() -> None:
    assert math.isnan(correlation([1.0, 1.0], [1.0, 2.0]))
    assert correlation([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == pytest.approx(-1.0)
