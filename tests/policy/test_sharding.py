"""What is sharded of each family's model; steps of sharded policies are in `training/test_lockstep.py`."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from rayalign.algorithms import Needs
from rayalign.config.sections import ModelConfig, TunerConfig
from rayalign.models.source import ModelSource
from rayalign.policy.saving import save_policy
from rayalign.policy.sharding import mesh_of_workers, shard_policy, vision_layers
from tests.tiny_families import NOT_ON_THE_SHELF, TINY_FAMILIES, TINY_TEXT_MODELS
from tests.tiny_models import encode_pair, make_batch, make_policy, noise_image, peft_adapter, save_model

ALL_WEIGHTS = TunerConfig(sft_type="full", freeze_vit=False, freeze_aligner=False)
WITHOUT_LAYERS = {"fast_vlm", "vipllava"}
"""A convolutional tower, and one of which it is not known that it runs once for all pictures."""


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *TINY_TEXT_MODELS, "vipllava"])
def test_all_matrices_of_a_model_are_sharded_and_make_the_same(
    model_folder: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Workers run a layer as often as each other, whatever the number of their pictures."""
    folder = save_model(tmp_path / "model", NOT_ON_THE_SHELF) if family == "vipllava" else model_folder(family)
    # Gemma 2 has no other kernel.
    model = ModelConfig(attn_implementation="eager" if family in TINY_TEXT_MODELS else "sdpa")
    policy = make_policy(folder, model=model, tuner=ALL_WEIGHTS)
    pictures = [] if family in TINY_TEXT_MODELS else [noise_image(30 + 20 * i, 60, seed=i) for i in range(3)]
    pairs = [encode_pair(folder, str(i), "What is it?", "a cat", "a dog", images=pictures[i : i + 1]) for i in range(3)]
    batches = [make_batch(folder, pairs), make_batch(folder, pairs[:1])]
    layers = vision_layers(policy.base)
    assert bool(layers) == (family not in {*TINY_TEXT_MODELS, *WITHOUT_LAYERS})

    def logps() -> list[torch.Tensor]:
        return [policy.token_logps(batch, policy.image_features(batch)) for batch in batches]

    runs: Counter[int] = Counter()
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *arguments, number=number: runs.update([number]))
    expected = logps()
    assert runs == dict.fromkeys(range(len(layers)), len(batches))
    cpu = torch.device("cpu")
    shard_policy(policy, mesh_of_workers(cpu), device=cpu, needs=Needs())
    assert all(isinstance(parameter, DTensor) == (parameter.ndim > 1) for parameter in policy.trainable.values())
    found = logps()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    sum(each.sum() for each in found).backward()
    assert all(p.grad is not None for layer in layers[:1] for p in layer.parameters())


def test_an_adapter_on_sharded_embeddings_is_saved_without_them(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llava")
    adapter = peft_adapter(folder, tmp_path / "adapter", ["q_proj", "embed_tokens"])
    policy = make_policy(ModelSource(str(folder), str(adapter)))
    save_policy(policy, tmp_path / "before")
    cpu = torch.device("cpu")
    shard_policy(policy, mesh_of_workers(cpu), device=cpu, needs=Needs())
    save_policy(policy, tmp_path / "sharded")
    before, sharded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "sharded"))
    assert before.keys() == sharded.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    assert all(torch.equal(value, sharded[name]) for name, value in before.items())
