"""Metrics of scored pairs, worked out by hand on four records."""

import math
from typing import Any

import pyarrow as pa
import pytest

from rayalign.evaluation.preferences import (
    Metric,
    compare,
    group_metrics,
    length_group,
    pairs_of,
    picture_group,
    preference_metrics,
)
from rayalign.evaluation.score_columns import SCHEMA, scored_schema
from rayalign.evaluation.statistics import Estimate

IDS = ("a.jsonl:0", "a.jsonl:1", "b.jsonl:0", "b.jsonl:1")
COLUMNS: dict[str, list[Any]] = {
    "chosen": [-10.0, -20.0, -30.0, -5.0],
    "rejected": [-12.0, -18.0, -30.0, -6.0],
    "reference_chosen": [-11.0, -20.0, -29.0, -5.0],
    "reference_rejected": [-11.0, -17.0, -32.0, -5.0],
    "chosen_tokens": [5, 10, 20, 2],
    "rejected_tokens": [6, 6, 10, 3],
    "num_images": [1, 1, 0, 4],
    # Two records had others to take pictures from.
    "shuffled_chosen": [-10.0, -20.0, None, None],
    "shuffled_rejected": [-9.0, -18.0, None, None],
    "kl": [1.0, None, 3.0, None],
}


def table(columns: dict[str, list[Any]] = COLUMNS, ids: tuple[str, ...] = IDS, *, is_reward_model: bool = False) -> pa.Table:
    """A pool's results."""
    lines = [
        {"id": own, "is_reward_model": is_reward_model} | {name: values[row] for name, values in columns.items()}
        for row, own in enumerate(ids)
    ]
    return pa.Table.from_pylist(lines, schema=pa.schema([("id", pa.string()), *SCHEMA]))


def value(metric: Metric) -> float:
    return metric.value if isinstance(metric, Estimate) else metric


def test_each_scorer_has_its_accuracy_and_its_margin() -> None:
    pairs = pairs_of(table())
    assert pairs.scorers == ("likelihood", "per_token", "implicit_reward")
    assert pairs.chief == "implicit_reward"
    found = {name: value(metric) for name, metric in preference_metrics(pairs, seed=0).items()}
    assert found["accuracy/likelihood"] == 0.625  # margins 2, -2, 0, 1
    assert found["margin/likelihood"] == 0.25
    assert found["accuracy/per_token"] == 0.625  # 0, 1, 1.5, -0.5
    assert found["margin/per_token"] == pytest.approx(0.5)
    assert found["accuracy/implicit_reward"] == 0.75  # 0.2, 0.1, -0.3, 0.1
    assert found["margin/implicit_reward"] == pytest.approx(0.025)
    assert found["drift"] == 0.0  # 1, 0, -1, 0
    assert found["kl"] == 2.0  # of two responses, 1 and 3


def test_a_reference_without_one_usable_score_is_not_left_out_without_a_word() -> None:
    damaged = table(COLUMNS | {"reference_chosen": [math.nan] * 4})
    with pytest.raises(ValueError, match=r"The reference has given no record a score that is a number\. Is it damaged\?"):
        pairs_of(damaged)
    assert "implicit_reward" not in pairs_of(table(COLUMNS | {"reference_chosen": [None] * 4})).scorers


def test_wrong_pictures_are_compared_on_the_records_that_have_some() -> None:
    pairs = pairs_of(table())
    found = preference_metrics(pairs, seed=0)
    shuffled, reliance = found["accuracy/likelihood/shuffled"], found["image_reliance/likelihood"]
    assert isinstance(shuffled, Estimate)
    assert isinstance(reliance, Estimate)
    # With their own pictures one of the two is right, with others' none.
    assert (shuffled.value, shuffled.records, reliance.value) == (0.0, 2, 0.5)
    assert "accuracy/likelihood/ablated" not in found
    assert "accuracy/implicit_reward/shuffled" not in found  # nothing says what the reference makes of these pictures


def test_length_bias_is_of_the_scorer_nearest_to_the_training() -> None:
    found = preference_metrics(pairs_of(table()), seed=0)
    # Chosen is longer in the second and third record, whose margins are 0.1 and -0.3, and shorter in the others.
    assert value(found["accuracy/implicit_reward/chosen_longer"]) == 0.5
    assert value(found["accuracy/implicit_reward/chosen_shorter"]) == 1.0
    assert found["accuracy/by_length_alone"] == 0.5
    assert -1 < value(found["length_correlation/implicit_reward"]) < 0


def test_groups_are_sources_lengths_and_numbers_of_pictures() -> None:
    groups = group_metrics(pairs_of(table()), seed=0)
    assert {kind: list(names) for kind, names in groups.items()} == {
        "source": ["a.jsonl", "b.jsonl"],
        "pictures": ["0", "1", "3 and more"],
    }  # all responses are among the shortest
    assert groups["source"]["a.jsonl"]["accuracy/likelihood"].value == 0.5
    assert groups["source"]["b.jsonl"]["accuracy/likelihood"].value == 0.75
    assert groups["pictures"]["1"]["accuracy/likelihood"].records == 2
    assert groups["source"]["a.jsonl"]["margin/likelihood"].value == 0.0  # 2 and -2
    assert groups["source"]["b.jsonl"]["margin/likelihood"].value == 0.5


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, "1 to 32"), (32, "1 to 32"), (33, "33 to 64"), (512, "257 to 512"), (513, "above 512")]
)
def test_a_length_is_in_one_group(tokens: int, expected: str) -> None:
    assert length_group(tokens) == expected


def test_a_number_of_pictures_is_in_one_group() -> None:
    assert [picture_group(number) for number in (0, 2, 3, 7)] == ["0", "2", "3 and more", "3 and more"]


def test_a_reward_model_has_one_scorer() -> None:
    pairs = pairs_of(table(is_reward_model=True))
    found = preference_metrics(pairs, seed=0)
    assert pairs.scorers == ("reward_model",)
    assert value(found["accuracy/reward_model"]) == 0.625
    assert "drift" not in found


def test_a_score_that_is_no_number_is_counted_and_in_no_mean() -> None:
    columns = COLUMNS | {"chosen": [-10.0, math.nan, -30.0, -math.inf]}
    pairs = pairs_of(table(columns))
    assert pairs.ids == ("a.jsonl:0", "b.jsonl:0")
    assert pairs.not_finite == ("a.jsonl:1", "b.jsonl:1")
    assert value(preference_metrics(pairs, seed=0)["accuracy/likelihood"]) == 0.75


def test_two_models_are_compared_on_the_records_that_both_scored() -> None:
    first = pairs_of(table())
    others = {name: values[1:] for name, values in COLUMNS.items()} | {"chosen": [-20.0, -31.0, -7.0]}
    second = pairs_of(table(others, IDS[1:]))
    found = compare(first, second, seed=0)
    assert found.records == 3
    # The first model's margins are -2, 0, 1, the second's -2, -1, -1.
    likelihood = found.accuracies["likelihood"]
    assert (likelihood.only_first, likelihood.only_second, likelihood.p_value) == (2, 0, 0.5)
    assert found.accuracy_differences["likelihood"].value == pytest.approx(0.5)
    assert found.margins["likelihood"].value == pytest.approx(1.0)


def test_models_without_a_common_scorer_are_compared_by_accuracy_alone() -> None:
    first = pairs_of(table())
    second = pairs_of(table(is_reward_model=True))
    found = compare(first, second, seed=0)
    assert list(found.accuracies) == ["implicit_reward against reward_model"]
    assert found.margins == {}


SCORED = {
    "python/chosen": [3.0, 2.0, 4.0, 1.0],
    "python/rejected": [1.0, 2.0, 5.0, 0.0],
    "judge/chosen": [8.0, 3.0, 6.0, 7.0],
    "judge/rejected": [9.0, 1.0, 2.0, 7.0],
    "chosen_characters": [100, 200, 10, 3000],
    "rejected_characters": [90, 300, 12, 40],
    "num_images": [1, 1, 1, 1],
}


@pytest.mark.parametrize(
    ("ensemble", "expected"),
    # Sums of both: 11 and 10, 5 and 3, 10 and 7, 8 and 7. The lower of both: 3 and 1, 2 and 1, 4 and 2, 1 and 0.
    [("mean", [0.5, 1.0, 1.5, 0.5]), ("min", [2.0, 1.0, 2.0, 1.0])],
)
def test_scorers_in_a_models_place_have_metrics_each_and_together(ensemble: str, expected: list[float]) -> None:
    schema = pa.schema([("id", pa.string()), *scored_schema(("python", "judge"))])
    lines = [{"id": own} | {name: values[row] for name, values in SCORED.items()} for row, own in enumerate(IDS)]
    pairs = pairs_of(pa.Table.from_pylist(lines, schema=schema), ensemble=ensemble)
    assert pairs.scorers == ("python", "judge", "ensemble")
    assert pairs.margins()["ensemble"].tolist() == expected
    found = preference_metrics(pairs, seed=0)
    # Margins: 2, 0, -1, 1 and -1, 2, 4, 0.
    accuracies = {name.partition("/")[2]: value(found[name]) for name in found if name.startswith("accuracy/")}
    assert {name: accuracies[name] for name in pairs.scorers} == {"python": 0.625, "judge": 0.625, "ensemble": 1.0}
    assert value(found["margin/judge"]) == 1.25
    assert value(found["accuracy/by_length_alone"]) == 0.5
    assert not any("shuffled" in name or name in ("drift", "kl") for name in found)
    groups = group_metrics(pairs, seed=0)
    assert list(groups) == ["source", "characters"]
    assert list(groups["characters"]) == ["1 to 128", "257 to 512", "above 2048"]


def test_models_that_share_no_record_are_refused() -> None:
    first = pairs_of(table())
    second = pairs_of(table(ids=("c:0", "c:1", "c:2", "c:3")))
    with pytest.raises(ValueError) as caught:
        compare(first, second, seed=0)
    assert str(caught.value) == "The two models have scored no record in common, so they can't be compared."
