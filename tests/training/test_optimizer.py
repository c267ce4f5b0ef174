"""The optimizer's groups, and the learning rate of each step."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayalign.algorithms import DPO, SimPO
from rayalign.config.sections import OptimizerConfig, TunerConfig
from rayalign.data.sampler import StepCounts
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.storage import Store
from rayalign.training.checkpoint import Snapshot, load_checkpoint, write_checkpoint
from rayalign.training.checkpoint_folder import FetchedCheckpoint
from rayalign.training.loop import Trainer
from rayalign.training.optimizer import learning_rate, make_optimizer
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy


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


def test_parts_of_the_model_have_rates_of_their_own(folder: Path) -> None:
    tuner = TunerConfig(sft_type="full", freeze_vit=False, freeze_aligner=False)
    policy = make_policy(folder, tuner=tuner)
    config = OptimizerConfig(learning_rate=1e-3, vit_lr=1e-5, aligner_lr=1e-4, warmup_ratio=0, lr_scheduler_type="linear")
    trainer = Trainer(policy, DPO(), config, num_steps=2)
    names = {id(p): name for name, p in policy.trainable.items()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    by_part = {rate: {name.split(".")[1] for name, its in rates.items() if its == rate} for rate in rates.values()}
    assert by_part == {1e-3: {"language_model", "weight"}, 1e-5: {"vision_tower"}, 1e-4: {"multi_modal_projector"}}
    counts = StepCounts(1, 1, 1, 1)
    for step, factor in enumerate((1, 0.5)):
        trainer.step(step, [], counts)  # nothing but the decay
        rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert {*rates.values()} == {factor * rate for rate in (1e-3, 1e-5, 1e-4)}


def test_a_rate_for_a_part_without_trained_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError) as caught:
        make_optimizer(make_policy(folder), OptimizerConfig(vit_lr=1e-5))
    assert str(caught.value) == "--vit_lr 1e-05: no weight of the model's vision tower is trained. Leave the rate out."


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


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='bitsandbytes is not installed (pip install "rayalign[qlora]")'
)
# Its import compiles with torch.jit, which torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_moments_of_8_bits_come_back_from_a_checkpoint_and_go_on_to_the_bit(folder: Path, tmp_path: Path) -> None:
    pairs = [encode_pair(folder, "a", "Which?", "two", "a cat"), encode_pair(folder, "b", "It?", "yes", "no")]
    batch, counts = make_batch(folder, pairs, needs=SimPO().needs), counts_of(pairs)
    tuner = TunerConfig(lora_target_modules=("ALL",), lora_rank=64)

    def trainer(seed: int, optim: Any = "adamw_8bit") -> Trainer:
        config = OptimizerConfig(learning_rate=1e-2, optim=optim)
        return Trainer(make_policy(folder, tuner=tuner, needs=SimPO().needs, seed=seed), SimPO(), config, num_steps=6)

    def weights(of: Trainer) -> Tensor:
        return torch.cat([p.detach().flatten() for p in of.policy.trainable.values()])

    trained, whole = trainer(1), trainer(1, "adamw_torch")
    for step in range(3):
        trained.step(step, [batch], counts)
        whole.step(step, [batch], counts)
    kinds = {state["state1"].dtype for state in trained.optimizer.state.values()}
    assert kinds == {torch.uint8, torch.float32}  # small tensors' stay as they are
    moved = weights(whole) - weights(trainer(1))
    assert 0 < (weights(trained) - weights(whole)).norm() < 0.2 * moved.norm()
    write_checkpoint(Store(str(tmp_path)), Snapshot.of(trained.policy, trained.optimizer, step=3))
    restored = trainer(2)
    load_checkpoint(FetchedCheckpoint(Store(str(tmp_path)), 3, tmp_path), restored.policy, restored.optimizer)
    for step in range(3, 6):
        trained.step(step, [batch], counts)
        restored.step(step, [batch], counts)
    assert torch.equal(weights(trained), weights(restored))
