"""Gradient checkpointing of some layers: which run again, and that no number changes a gradient."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.policy.prepare import recompute_layers
from rayalign.training.loop import Trainer
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, noise_image, wake_adapters

DEPTH = 3


def gradients_of(folder: Path, tuner: TunerConfig, count: int) -> tuple[dict[str, Tensor], list[int]]:
    """The gradients of a step whose first `count` layers run again, and how often each layer runs."""
    policy = wake_adapters(make_policy(folder, model=ModelConfig(gradient_checkpointing="auto"), tuner=tuner))
    recompute_layers(policy.base, count)
    runs: Counter[int] = Counter()
    for number, layer in enumerate(policy.base.get_decoder().layers):
        layer.mlp.register_forward_pre_hook(functools.partial(lambda number, *_: runs.update([number]), number))
    pairs = [
        encode_pair(folder, "a", "Which?", "two cats", "a", images=[noise_image(30, 30)]),
        encode_pair(folder, "b", "It?", "yes", "no"),
    ]
    batch = make_batch(folder, pairs)
    batch = dataclasses.replace(batch, reference_logps=-1.0 - 0.1 * batch.targets.float() % 2)
    trainer = Trainer(policy, DPO(), OptimizerConfig(), num_steps=1)
    trainer.gradients([batch], counts_of(pairs))
    gradients = {name: p.grad for name, p in policy.trainable.items() if p.grad is not None}
    return gradients, [runs[number] for number in range(DEPTH)]


@pytest.mark.parametrize(
    "tuner", [TunerConfig(lora_target_modules=("ALL",)), TunerConfig(sft_type="full")], ids=["lora", "full"]
)
def test_gradients_are_the_same_for_any_number_of_layers_that_run_again(
    model_folder: Callable[..., Path], tuner: TunerConfig
) -> None:
    folder = model_folder("llava", num_hidden_layers=DEPTH)
    expected, runs = gradients_of(folder, tuner, 0)
    assert runs == [1, 1, 1]
    for count in range(1, DEPTH + 1):
        gradients, runs = gradients_of(folder, tuner, count)
        assert runs == [2] * count + [1] * (DEPTH - count)
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], value) for name, value in expected.items())
