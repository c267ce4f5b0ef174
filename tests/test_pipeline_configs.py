"""The YAML files of pipelines/configs are complete, explained and up to date with the flags."""

from pathlib import Path

import pytest

from rayalign.algorithms import ALGORITHMS
from rayalign.config import command_line
from rayalign.config.yaml_files import to_yaml
from rayalign.sweeps.search_checks import check_search

PIPELINES = Path(__file__).parents[1] / "pipelines"
STALE = "the flags have changed: `make configs` rewrites the file, values kept"


FILES = sorted(file.stem for file in (PIPELINES / "configs").glob("*.yaml") if file.stem != "tune")


def test_there_is_a_file_for_every_algorithm():
    assert set(ALGORITHMS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_holds_exactly_the_flags_of_its_algorithm(name: str):
    file = PIPELINES / "configs" / f"{name}.yaml"
    config = command_line.parse(ALGORITHMS, ["--config", str(file)], prog="pipelines/rlhf.py", description="")
    assert config.algorithm.name == name or name not in ALGORITHMS
    assert config.data.dataset
    assert config.model.model_type
    assert to_yaml(config) == file.read_text(), STALE


def test_the_sweeps_file_holds_exactly_its_flags():
    file = PIPELINES / "configs" / "tune.yaml"
    config, tune = command_line.parse_sweep(
        ALGORITHMS, ["--config", str(file)], prog="pipelines/tune.py", description="", check=check_search
    )
    assert to_yaml(config, tune) == file.read_text(), STALE


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_the_name_of_an_algorithm_is_its_key_and_its_pipeline(name: str):
    assert ALGORITHMS[name].name == name
    assert (PIPELINES / f"{name}.py").exists()
