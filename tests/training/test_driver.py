"""What the driver asks Ray Train for."""

from pathlib import Path
from typing import Any

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, RunConfig
from rayalign.storage import Store
from rayalign.training import driver
from rayalign.training.driver import _torch_trainer
from rayalign.training.run_times import Stopwatch


@pytest.mark.parametrize(
    ("flags", "resources", "kind", "labels"),
    [
        ({"num_workers": 2}, {"CPU": 1}, None, None),
        ({"num_workers": "1:2"}, {"CPU": 1}, None, None),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, {"CPU": 1, "GPU": 0.5}, None, None),
        (
            {"num_workers": 2, "gpus_per_worker": 1, "accelerator_type": "L4", "label_selector": ("zone=a", "pool=!spot")},
            {"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001},
            "L4",
            [{"zone": "a", "pool": "!spot"}] * 2,
        ),
    ],
)
def test_workers_are_asked_for_with_their_kind_of_gpu_and_labels(
    tmp_path: Path, flags: dict[str, Any], resources: dict[str, float], kind: str | None, labels: list[dict[str, str]] | None
) -> None:
    config: Any = Config(DPO(), cluster=ClusterConfig(**flags))
    nothing: Any = None
    scaling: Any = _torch_trainer(config, nothing, Store.at(str(tmp_path)), []).scaling_config
    assert scaling.num_workers == {2: 2, "1:2": (1, 2)}[flags["num_workers"]]
    assert scaling._resources_per_worker_not_none == resources
    assert scaling.accelerator_type == kind
    assert scaling._label_selector_per_worker(2) == labels


def test_each_start_of_an_elastic_run_gives_back_what_the_one_before_had_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(driver, "give_up_share", given_back.append)
    for share in ("train-1", "train-2", "train-3"):
        driver.replace_share(Store.at(str(tmp_path)) / "share.txt", share)
    assert given_back == ["train-1", "train-2"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_start_that_empties_the_folder_gives_back_what_the_one_before_had_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    given_back: list[str] = []

    def opened(config: Config) -> Store:
        assert given_back == ["train-1"]
        raise KeyboardInterrupt("far enough")

    monkeypatch.setattr(driver, "give_up_share", given_back.append)
    monkeypatch.setattr(driver, "join_cluster", lambda config: config)
    monkeypatch.setattr(driver, "open_run", opened)
    driver.replace_share(Store.at(str(tmp_path)) / "checkpoints" / "share.txt", "train-1")
    config: Any = Config(DPO(), run=RunConfig(output_dir=str(tmp_path), overwrite=overwrite))
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt, match="far enough"):
        driver._run(config, Stopwatch(), nothing)
