"""Which trials share processes, and what one of them holds. That they train alike is tests/integration/test_sweep.py's."""

from dataclasses import replace
from typing import Any

import pytest

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, ModelConfig
from rayalign.config.tune import TuneConfig
from rayalign.sweeps.in_place import resources_of, why_apart
from rayalign.sweeps.search_checks import check_search
from rayalign.sweeps.search_space import SearchSpace

ROOM = ": trials may need other records or another reference, for which there must be room"


def space_of(*search: str, **sections: Any) -> SearchSpace:
    return check_search(replace(Config(DPO()), **sections), TuneConfig(search=search))


@pytest.mark.parametrize(
    ("search", "sections", "words"),
    [
        (("beta=grid:1,2", "rlhf_type=grid:dpo,simpo", "lora_rank=grid:4,8", "learning_rate=uniform:0.1:1"), {}, None),
        (("beta=grid:1,2",), {"cluster": ClusterConfig(num_workers=2)}, "--num_workers is 2, and a process is one worker"),
        (
            ("beta=grid:1,2",),
            {"cluster": ClusterConfig(strategy="fsdp")},
            "--strategy is fsdp, and a process has a whole model on one device",
        ),
        (
            ("beta=grid:1,2",),
            {"cluster": ClusterConfig(gpus_per_worker=2)},
            "--strategy is auto, and a process has a whole model on one device",
        ),
        (
            ("beta=grid:1,2",),
            {"model": ModelConfig(torch_compile=True)},
            "--torch_compile compiles for the first shapes that a process meets",
        ),
        (("max_length=grid:100,200",), {}, f"--search max_length{ROOM}"),
        (("max_steps=grid:1,2",), {}, f"--search max_steps{ROOM}"),
        (("lora_target_modules=grid:DEFAULT,ALL",), {}, f"--search lora_target_modules{ROOM}"),
    ],
)
def test_trials_share_processes_where_each_needs_only_what_is_prepared(
    search: tuple[str, ...], sections: dict[str, Any], words: str | None
):
    assert why_apart(space_of(*search, **sections)) == words


def test_a_trials_process_holds_what_a_train_worker_would_on_the_same_nodes():
    cluster = ClusterConfig(cpus_per_worker=2, gpus_per_worker=0.5, accelerator_type="L4", label_selector=("zone=a",))
    held = resources_of(replace(Config(DPO()), cluster=cluster))
    assert held.bundles == [{"CPU": 2.0, "GPU": 0.5, "accelerator_type:L4": 0.001}]
    assert held._kwargs == {"bundle_label_selector": [{"zone": "a"}]}
    assert resources_of(Config(DPO())).bundles == [{"CPU": 1.0}]
