"""Ways to hold a model on a GPU: sharded (of one worker, which takes every path but the wire), compiled, in 4 bits, and with
moments of 8 bits."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayalign.algorithms import SimPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.models.source import ModelSource
from rayalign.policy.loading import load_policy
from rayalign.policy.sharding import mesh_of_workers, shard_policy
from rayalign.training.lockstep import Fillers
from rayalign.training.loop import Trainer
from rayalign.training.metrics import MetricSums
from tests.gpu.test_gpu import FLOAT32, encode
from tests.tiny_models import counts_of, make_batch, wake_adapters

# torch's compiler and bitsandbytes warn of themselves, and fail where that is an error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ALGORITHM = SimPO()
ADAPTERS = TunerConfig(lora_target_modules=("ALL",))
ALL_WEIGHTS = TunerConfig(sft_type="full")
TUNERS = {
    "adapters": ADAPTERS,
    "all weights": ALL_WEIGHTS,
    "all weights and the tower's": dataclasses.replace(ALL_WEIGHTS, freeze_vit=False, freeze_aligner=False),
    "adapters over 4 bits": dataclasses.replace(ADAPTERS, quant_bits=4),
}
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")


@pytest.fixture
def one_worker(device: torch.device, tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainer_of(
    device: torch.device,
    folder: Path,
    tuner: TunerConfig,
    model: ModelConfig,
    *,
    sharded: bool = False,
    optim: str = "adamw_torch",
) -> Trainer:
    policy = load_policy(
        ModelSource(str(folder)), model=model, tuner=tuner, device=device, needs=ALGORITHM.needs, stay_on_cpu=sharded
    )
    wake_adapters(policy)
    fillers = None
    if sharded:
        shard_policy(policy, mesh_of_workers(device), device=device, needs=ALGORITHM.needs)
        fillers = Fillers(EncoderSpec(str(folder), "both"), ALGORITHM.needs)
    config = OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="constant", optim=optim)  # type: ignore[arg-type]
    return Trainer(policy, ALGORITHM, config, num_steps=12, fillers=fillers)


def gradients_of(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    pairs = encode(folder)
    trainer.gradients([make_batch(folder, pairs)], counts_of(pairs))
    found = {name: p.grad for name, p in trainer.policy.trainable.items() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=FLOAT32 * largest, rtol=0)


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("tuner", [pytest.param(name, marks=needs_bitsandbytes if "4 bits" in name else ()) for name in TUNERS])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_sharded_step_is_that_of_a_whole_policy(
    device: torch.device, model_folder: Callable[[str], Path], family: str, tuner: str, checkpointing: bool
) -> None:
    folder = model_folder(family)
    model = ModelConfig(dtype="float32", gradient_checkpointing=checkpointing)
    whole = gradients_of(trainer_of(device, folder, TUNERS[tuner], model), folder)
    trainer = trainer_of(device, folder, TUNERS[tuner], model, sharded=True)
    assert all(p.device.type == device.type for p in trainer.policy.model.parameters())
    assert_same(gradients_of(trainer, folder), whole)


@pytest.mark.parametrize("tuner", ["adapters", "all weights"])
def test_compiled_layers_compute_the_same(device: torch.device, model_folder: Callable[[str], Path], tuner: str) -> None:
    folder = model_folder("llava")
    model = ModelConfig(dtype="float32")
    whole = gradients_of(trainer_of(device, folder, TUNERS[tuner], model), folder)
    compiled = dataclasses.replace(model, torch_compile=True)
    assert_same(gradients_of(trainer_of(device, folder, TUNERS[tuner], compiled), folder), whole)


@needs_bitsandbytes
@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize(
    ("tuner", "sharded"),
    [("adapters", False), ("all weights", False), ("adapters over 4 bits", False), ("all weights", True)],
)
def test_training_with_moments_of_8_bits_lowers_the_loss(
    device: torch.device, model_folder: Callable[[str], Path], tuner: str, sharded: bool
) -> None:
    folder = model_folder("llava")
    pairs = encode(folder)
    model = ModelConfig(dtype="bfloat16", gradient_checkpointing=True)
    trainer = trainer_of(device, folder, TUNERS[tuner], model, optim="adamw_8bit", sharded=sharded)
    losses = []
    for step in range(12):
        result = trainer.step(step, [make_batch(folder, pairs)], counts_of(pairs))
        losses.append(MetricSums(result.outputs).reduce(steps=1)["loss"])
    assert losses[-1] < 0.9 * losses[0]
