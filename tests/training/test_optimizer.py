"""The optimizer's groups, and the learning rate of each step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayalign.config.sections import OptimizerConfig, TunerConfig
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.training.optimizer import learning_rate, make_optimizer
from tests.tiny_models import make_policy


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "rates"),
    [
        # Two of ten steps rise, then the decay starts at the peak and would reach 0 at step 10.
        ("linear", 0.2, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("constant", 0.2, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("cosine", 0.2, [0.5, 1, *((1 + math.cos(math.pi * k / 8)) / 2 for k in range(8))]),
        ("linear", 0.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("cosine", 1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("linear", 0.01, [1, *(1 - k / 9 for k in range(9))]),  # a part of a step is a whole one
    ],
)
def test_the_learning_rate_of_each_step(schedule: Any, warmup_ratio: float, rates: list[float]) -> None:
    config = OptimizerConfig(learning_rate=2.0, lr_scheduler_type=schedule, warmup_ratio=warmup_ratio)
    assert [learning_rate(config, step, 10) for step in range(10)] == pytest.approx([2 * rate for rate in rates])


def test_weight_decay_spares_biases_and_norms(folder: Path) -> None:
    policy = make_policy(folder, tuner=TunerConfig(sft_type="full"))
    config = OptimizerConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-3)
    matrices, others = make_optimizer(policy, config).param_groups
    names = {id(p): name for name, p in policy.trainable.items()}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert (matrices["betas"], matrices["eps"]) == ((0.8, 0.7), 1e-3)
    spared = {names[id(p)] for p in others["params"]}
    assert spared == {name for name in names.values() if "norm" in name}
    assert len(spared) == 5  # two in each layer, one at the end
    assert len(matrices["params"]) + len(spared) == len(names)


def test_a_run_that_trains_no_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    tuner = TunerConfig(freeze_aligner=False, freeze_llm=True)
    save_policy(make_policy(folder, tuner=tuner), tmp_path)
    policy = make_policy(ModelSource(str(folder), adapter=str(tmp_path)))
    with pytest.raises(ValueError) as caught:
        make_optimizer(policy, OptimizerConfig())
    assert str(caught.value) == (
        "There is nothing to train: the adapter that training starts from is on frozen parts of the model only. Turn "
        "--freeze_vit, --freeze_aligner or --freeze_llm off."
    )
