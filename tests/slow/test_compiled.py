"""Compiled layers, whose compilation takes minutes."""

from pathlib import Path

import pytest
import torch

from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.policy.generation import generate_answers
from rayalign.training.loop import Trainer
from tests.tiny_models import (
    REFERRED,
    counts_of,
    encode_pair,
    make_batch,
    make_policy,
    noise_image,
    save_tiny_model,
    wake_adapters,
)


@pytest.mark.filterwarnings("ignore")  # of all kinds, in torch's compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_loss_and_gradients_for_rows_of_any_length(tmp_path: Path, checkpointing: bool) -> None:
    folder = save_tiny_model(tmp_path, "llava_next")
    pairs = [
        encode_pair(
            folder, str(n), "Which digit is it? " * n, "The digit is two.", "A cat", images=[noise_image(40, 40, seed=n)]
        )
        for n in (1, 7, 3)
    ]
    found = []
    for compiled in (False, True):
        model = ModelConfig(torch_compile=compiled, gradient_checkpointing=checkpointing)
        policy = wake_adapters(
            make_policy(folder, model=model, tuner=TunerConfig(lora_target_modules=("ALL",)), needs=REFERRED)
        )
        losses = []
        for some in (pairs[:1], pairs[1:], pairs):
            loss = DPO().loss(policy, make_batch(folder, some), counts_of(some)).loss
            loss.backward()
            losses.append(loss.detach())
        found.append((torch.stack(losses), [parameter.grad for parameter in policy.trainable.values()]))
    (losses, gradients), (compiled_losses, compiled_gradients) = found
    # float32 in another order.
    torch.testing.assert_close(compiled_losses, losses, atol=1e-5, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    for ours, plain in zip(compiled_gradients, gradients, strict=True):
        assert ours is not None
        assert plain is not None
        torch.testing.assert_close(ours, plain, atol=1e-4 * largest, rtol=0)


@pytest.mark.filterwarnings("ignore")  # of all kinds, in torch's compiler
def test_a_training_of_compiled_layers_is_the_same_to_the_bit_with_answers_in_between(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llava_next")
    pairs = [
        encode_pair(folder, str(n), "Which digit is it? " * n, "It is two.", "A cat", images=[noise_image(40, 40)])
        for n in (1, 5)
    ]
    spec, found, answers = EncoderSpec(str(folder), responses="both"), [], []
    for compiled, answers_between in ((True, False), (True, True), (False, True)):
        torch._dynamo.reset()
        policy = make_policy(folder, model=ModelConfig(torch_compile=compiled), needs=REFERRED)
        trainer = Trainer(policy, DPO(), OptimizerConfig(learning_rate=1e-2), num_steps=4)
        for step in range(4):
            if answers_between:
                answers.append(generate_answers(policy, spec, pairs, max_new_tokens=12))
            trainer.step(step, [make_batch(folder, pairs)], counts_of(pairs))
        found.append([parameter.detach().clone() for parameter in policy.trainable.values()])
    assert answers[0] == answers[4]
    assert all(torch.equal(without, between) for without, between in zip(found[0], found[1], strict=True))
