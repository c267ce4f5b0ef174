from typing import Any

import pytest
import yaml

from rayalign.algorithms import ALGORITHMS, DPO
from rayalign.config.command_line import parse
from rayalign.config.config import Config, config_from_mapping
from rayalign.config.sections import ClusterConfig
from rayalign.config.workers import workers_of
from rayalign.config.yaml_files import to_yaml


@pytest.mark.parametrize(
    ("value", "fewest_and_most"), [(1, (1, 1)), (8, (8, 8)), ("3", (3, 3)), ("2:8", (2, 8)), ("4:4", (4, 4))]
)
def test_a_number_is_the_fewest_and_the_most_workers(value: int | str, fewest_and_most: tuple[int, int]) -> None:
    assert workers_of(value) == fewest_and_most
    cluster = ClusterConfig(num_workers=value)
    assert (cluster.fewest_workers, cluster.most_workers) == fewest_and_most
    assert cluster.is_elastic == (":" in str(value))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "--num_workers 0: must be at least 1."),
        ("0:2", "--num_workers 0:2: must be at least 1."),
        ("4:2", "--num_workers 4:2: MIN is above MAX. Pass 2:4."),
        ("two", "--num_workers two: must be a whole number, or two as MIN:MAX."),
        ("1:2:3", "--num_workers 1:2:3: must be a whole number, or two as MIN:MAX."),
        ("-1", "--num_workers -1: must be a whole number, or two as MIN:MAX."),
        (2.5, "--num_workers 2.5: must be a whole number, or two as MIN:MAX."),
        (True, "--num_workers True: must be a whole number, or two as MIN:MAX."),
        (None, "--num_workers None: must be a whole number, or two as MIN:MAX."),
    ],
)
def test_what_is_no_number_of_workers_is_refused(value: Any, words: str) -> None:
    for make in (lambda: ClusterConfig(num_workers=value), lambda: config_from_mapping(DPO, {"num_workers": value})):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == words


def test_words_of_the_command_line_are_numbers_where_they_can_be() -> None:
    for word, value in (("2", 2), ("1:4", "1:4")):
        config = parse(ALGORITHMS, ["--num_workers", word], prog="dpo", description="", algorithm="dpo")
        assert config.cluster.num_workers == value
        again = yaml.safe_load(to_yaml(config))
        assert again["num_workers"] == value  # YAML reads 1:4 as 64, unless it is quoted
        assert config.replace({}) == config


def test_the_global_batch_of_an_elastic_run_is_that_of_its_most_workers() -> None:
    flags = {"batch_size": 2, "gradient_accumulation_steps": 3}
    assert config_from_mapping(DPO, {**flags, "num_workers": "1:4"}).global_batch_size == 24
    assert config_from_mapping(DPO, {**flags, "num_workers": 4}).global_batch_size == 24


def test_an_elastic_run_chooses_no_nodes_by_their_labels() -> None:
    with pytest.raises(ValueError) as caught:
        Config(DPO(), cluster=ClusterConfig(num_workers="1:2", label_selector=("zone=a", "pool=!spot")))
    assert str(caught.value) == (
        "--num_workers 1:2 with --label_selector zone=a pool=!spot: Ray Train counts the room for an elastic run's workers on "
        "nodes of any label. Pass one number of workers, or leave --label_selector out."
    )
    ClusterConfig(num_workers="1:2", data_label_selector=("zone=a",))
