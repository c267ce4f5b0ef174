"""What only a GPU can show: its attention kernels, bfloat16, the fused optimizer and copies from pinned memory.

`conftest` says how to run these tests, and how to run them without a GPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayalign.algorithms import DPO, KTO, MDPO, Needs
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.encode import Encoder
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord
from rayalign.models.source import ModelSource
from rayalign.policy.loading import load_policy
from rayalign.policy.policy import Policy
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests.tiny_models import REFERRED, counts_of, make_batch, noise_image, wake_adapters

# torch's compiler warns of itself, and fails where that is an error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
KERNELS: tuple[str, ...] = get_args(get_type_hints(ModelConfig)["attn_implementation"])
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "gemma3")
"""Images of one size and of several; positions in three dimensions; windows, and images seen in both directions."""

FLOAT32 = 1e-4
"""Of the largest entry: kernels sum a few hundred terms in orders of their own, through two layers and back. In TF32, with its
three digits, the difference would be ten times as large."""

BFLOAT16 = {"loss": 0.03, "gradient": 0.1}
"""bfloat16 has three digits; a step of two layers rounds some thirty times in a row, and log-probabilities add up. Gradients
are compared by the length of the difference over their own length."""


def record_of(
    number: int, question: str, chosen: str, rejected: str, sizes: Sequence[tuple[int, int]] = ()
) -> PreferenceRecord:
    """A record whose images, noise of these widths and heights, stand before the question."""
    images = tuple(noise_image(*size, seed=10 * number + i) for i, size in enumerate(sizes))
    message = Message(role="user", content=IMAGE_MARK * len(images) + question)
    return PreferenceRecord(id=str(number), messages=(message,), images=images, chosen=chosen, rejected=rejected)


RECORDS = [
    record_of(0, "Which digit is it?", "The digit is two.", "a cat", [(90, 30)]),
    record_of(1, "Which digit is it?", "two", "A cat sits on the mat."),
    record_of(2, "describe the image.", "A cat.", "The digit is a mat on the cat.", [(20, 47), (28, 28)]),
]


def images_of(record: PreferenceRecord) -> list[bytes]:
    return [image for image in record.images if isinstance(image, bytes)]


def encode(folder: Path) -> list[EncodedPair]:
    encoder = Encoder(EncoderSpec(str(folder), responses="both"))
    return [encoder.encode(record, images_of(record)) for record in RECORDS]


def policy_on(device: torch.device, folder: Path, *, needs: Needs = REFERRED, **model: Any) -> Policy:
    """A policy with adapters on all linears of the language model that change its outputs, the same ones each time."""
    config = ModelConfig(**{"dtype": "float32", "gradient_checkpointing": False, **model})
    tuner = TunerConfig(lora_target_modules=("ALL",))
    return wake_adapters(load_policy(ModelSource(str(folder)), model=config, tuner=tuner, device=device, needs=needs))


def two_plain_rows(policy: Policy, folder: Path, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B] of the responses of both sides, each in a row of its own and by the model's own forward."""
    encoder = Encoder(EncoderSpec(str(folder), responses="both"))

    def logp(record: PreferenceRecord, response: Sequence[int], side: str) -> Tensor:
        inputs = {name: tensor.to(policy.device) for name, tensor in encoder.plain_row(record, images_of(record), side).items()}
        prompt = inputs["input_ids"].shape[1] - len(response)
        logits = policy.model(**inputs, use_cache=False).logits[0, prompt - 1 : -1]
        targets = torch.tensor(response, device=policy.device)[:, None]
        total: Tensor = logits.log_softmax(-1).gather(1, targets).sum()
        return total

    chosen = [logp(record, pair.chosen_ids, "chosen") for record, pair in zip(RECORDS, pairs, strict=True)]
    rejected = [logp(record, pair.rejected_ids, "rejected") for record, pair in zip(RECORDS, pairs, strict=True)]
    return torch.stack(chosen), torch.stack(rejected)


def one_shared_row(policy: Policy, batch: PairBatch) -> tuple[Tensor, Tensor]:
    logps = policy.logps(batch, policy.image_features(batch))
    return logps.chosen.total, logps.rejected.total


def loss_and_gradient(policy: Policy, totals: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A loss in which every pair's responses depend on each other, and the gradient of all trainable weights as one vector."""
    chosen, rejected = totals
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum() - 0.05 * chosen.sum()
    gradients = torch.autograd.grad(loss, list(policy.trainable.values()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def dpo_step(policy: Policy, batch: PairBatch, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    loss = DPO(rpo_alpha=0.0).loss(policy, batch, counts_of(pairs)).loss
    gradients = torch.autograd.grad(loss, list(policy.trainable.values()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def skip_without_kernel(kernel: str, family: str, device: torch.device) -> None:
    if kernel == "flex_attention" and device.type == "cpu":
        pytest.skip("flex_attention has no backward pass on a CPU")
    if kernel == "flex_attention" and family == "qwen2_5_vl":
        pytest.skip("transformers has no flex_attention for Qwen2.5-VL")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_row_equals_two_plain_rows(
    device: torch.device, model_folder: Callable[[str], Path], family: str, kernel: str, checkpointing: bool
) -> None:
    skip_without_kernel(kernel, family, device)
    folder = model_folder(family)
    pairs = encode(folder)
    policy = policy_on(device, folder, attn_implementation=kernel, gradient_checkpointing=checkpointing)
    ours = loss_and_gradient(policy, one_shared_row(policy, make_batch(folder, pairs).to(device)))

    plain = policy_on(device, folder, attn_implementation="eager")
    expected = loss_and_gradient(plain, two_plain_rows(plain, folder, pairs))

    torch.testing.assert_close(ours[0], expected[0], atol=0, rtol=FLOAT32)
    largest = float(expected[1].abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(ours[1], expected[1], atol=FLOAT32 * largest, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16_is_close_to_one_in_float32(
    device: torch.device, model_folder: Callable[[str], Path], family: str, kernel: str
) -> None:
    skip_without_kernel(kernel, family, device)
    folder = model_folder(family)
    pairs = encode(folder)
    batch = make_batch(folder, pairs).to(device)
    exact = dpo_step(policy_on(device, folder), batch, pairs)
    rounded = dpo_step(policy_on(device, folder, dtype="bfloat16", attn_implementation=kernel), batch, pairs)
    assert float((rounded[0] - exact[0]).abs()) < BFLOAT16["loss"]
    distance = float((rounded[1] - exact[1]).norm() / exact[1].norm())
    assert 1e-4 < distance < BFLOAT16["gradient"]  # rounded, and not further away


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_with_the_fused_optimizer_lowers_the_loss(
    device: torch.device, model_folder: Callable[[str], Path], dtype: str
) -> None:
    folder = model_folder("llava_next")
    pairs = encode(folder)
    policy = policy_on(device, folder, dtype=dtype, gradient_checkpointing=True)
    config = OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="constant")
    trainer = Trainer(policy, DPO(rpo_alpha=0.0), config, num_steps=12)
    assert all(group["fused"] is (device.type == "cuda") for group in trainer.optimizer.param_groups)
    batch = make_batch(folder, pairs)
    losses = []
    for step in range(12):
        result = trainer.step(step, [batch], counts_of(pairs))
        losses.append(MetricSums(result.outputs).reduce(steps=1)["loss"])
        assert result.num_tokens == batch.num_tokens
        assert result.grad_norm > 0
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("needs", [DPO().needs, KTO().needs, MDPO().needs], ids=["dpo", "kto", "mdpo"])
def test_a_batch_copied_from_pinned_memory_is_the_same_batch(
    device: torch.device, model_folder: Callable[[str], Path], needs: Needs
) -> None:
    """On the CPU the batch is not pinned, which takes a GPU's driver."""
    folder = model_folder("llava_next")
    batch = make_batch(folder, encode(folder), needs=needs)
    batch = dataclasses.replace(batch, reference_logps=torch.randn(len(batch.targets)))
    pinned = batch.pin_memory() if device.type == "cuda" else batch
    copied = pinned.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    expected, there, arrived = (tensors_of(each) for each in (batch, pinned, copied))
    assert expected.keys() == there.keys() == arrived.keys()
    assert {"input_ids", "targets", "reference_logps", "pixel_values"} <= expected.keys()
    assert all(tensor.is_pinned() is (device.type == "cuda") for tensor in there.values())
    assert all(tensor.device.type == device.type for tensor in arrived.values())
    assert all(torch.equal(arrived[name].cpu(), expected[name]) for name in expected)
    if needs.companion and needs.companion.shares_images:  # they are not copied twice
        assert arrived["companion pixel_values"] is arrived["pixel_values"]


def tensors_of(batch: PairBatch, prefix: str = "") -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)} | dict(batch.image_inputs)
    found = {prefix + name: value for name, value in values.items() if isinstance(value, Tensor)}
    if batch.companion is not None:
        found |= tensors_of(batch.companion.batch, "companion ") | {"companion rows": batch.companion.rows}
    return found


def test_the_benchmark_rehearses_on_the_device(device: torch.device, tmp_path: Path) -> None:
    kernels = [kernel for kernel in KERNELS if kernel != "flex_attention" or device.type == "cuda"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--shape", "tiny", "--case", "small"]
    command += ["--device", device.type, "--dtype", "bfloat16", "--peak_tflops", "100", "--rounds", "1"]
    command += ["--attn_implementation", *kernels, "--output", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)

    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    (case,) = report["cases"]
    # With checkpointing and without: TRL's way in our types and in its own, ours with the reference computed and stored.
    assert len(case["ways"]) == 2 * (2 + 2 * len(kernels))
    assert len(report["agreement_in_float32"]) == 2 * (1 + 2 * len(kernels))
    assert all(way["gradient_distance"] < 1e-3 for way in report["agreement_in_float32"])
    for way in case["ways"]:
        assert way["pairs_per_second"]["min"] > 0
        assert way["mfu"]["median"] > 0
        assert way["above_model_gib"] > 0
        if way["attention"] != "flex_attention":
            assert way["done_of_needed"] > 1
        if way["side"] == "rayalign" and way["attention"] == "sdpa" and not way["checkpointing"]:
            assert way["done_of_needed"] < 1.3
    assert ("copy of a pinned batch" in case["milliseconds"]) is (device.type == "cuda")
    assert finished.stdout.startswith("| case | way | attention |")
