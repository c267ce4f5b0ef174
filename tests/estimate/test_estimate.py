"""The memory and operations of the estimate, against steps that are really made, at a size where the language model
outweighs everything else; and the figures of the models whose configs come along."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayalign.algorithms import ALGORITHMS
from rayalign.config.config import Config
from rayalign.config.plan import PlanConfig
from rayalign.config.sections import ClusterConfig, ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.estimate import Estimate
from rayalign.estimate.lengths import ImageLook
from rayalign.estimate.memory import GB
from rayalign.estimate.meter import MORE_FLOPS, Meter, tensors_of
from rayalign.estimate.shapes import DataShapes, PairShape
from rayalign.estimate.table import plan_text
from rayalign.estimate.vision import VisionCosts
from rayalign.estimate.worker_memory import SPARE, WorkerMemory
from rayalign.models.processors import process_images
from rayalign.models.source import ModelSource
from rayalign.policy.prepare import recompute_layers
from rayalign.policy.saving import save_policy
from rayalign.training.loop import Trainer
from tests.tiny_models import counts_of, encode_pair, make_batch, make_policy, noise_image

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4000,
}
WITHIN = 0.1
"""What the planner promises; measured here, it is nearer by far."""

FULL = TunerConfig(sft_type="full")
ALL = TunerConfig(lora_target_modules=("ALL",))


def pairs_with(folder: Path, num_images: int) -> list[EncodedPair]:
    """Two pairs of about 300 tokens."""
    question = "Which digit is it? " * (20 if num_images else 40)
    images = [noise_image(56, 56, seed=seed) for seed in range(num_images)]
    answers = "The digit is two. " * 8, "A cat sits on the mat. " * 5
    return [
        encode_pair(folder, "a", question, *answers, images=images),
        encode_pair(folder, "b", question, *reversed(answers), images=images[::-1]),
    ]


def estimate_of(folder: Path, config: Config, pairs: list[EncodedPair]) -> Estimate:
    """The estimate of a run whose data are these pairs."""
    spec = EncoderSpec(str(folder), responses="both")
    needs = config.algorithm.needs
    blueprint = Blueprint(spec.model_config, ModelSource(str(folder)), config.model, config.tuner, needs)
    look = ImageLook(
        lambda image: process_images(spec.processor, spec.family, spec.model_config, [image], alone=[True]).tensors,
        spec.family,
        spec.model_config,
        VisionCosts(blueprint.build(), spec.model_config),
        max_pixels=None,
    )
    shapes = tuple(
        PairShape(
            len(pair.prompt_ids),
            len(pair.chosen_ids),
            0 if needs.responses == "chosen" else len(pair.rejected_ids),
            pair.prompt_ids.count(spec.model_config.image_token_id),
            tuple(look(content) for content in pair.images),
        )
        for pair in pairs
    )
    return Estimate(config, PlanConfig(), blueprint, DataShapes(shapes, len(shapes), 0, 0, ""), "tiny", "")


@pytest.mark.parametrize(
    ("algorithm", "tuner", "checkpointing", "num_images", "dtype"),
    [
        ("dpo", TunerConfig(), True, 1, "float32"),
        ("dpo", ALL, False, 3, "float32"),
        ("simpo", FULL, True, 0, "bfloat16"),
        ("mdpo", TunerConfig(freeze_vit=False), True, 2, "float32"),
        ("kto", TunerConfig(), False, 0, "float32"),
        ("rm", ALL, True, 1, "float32"),
    ],
)
def test_memory_and_operations_of_a_step_are_estimated(
    model_folder: Callable[..., Path], algorithm: str, tuner: TunerConfig, checkpointing: bool, num_images: int, dtype: Any
):
    folder = model_folder("llava_next", **TEXT)
    model = ModelConfig(gradient_checkpointing=checkpointing, dtype=dtype)
    config = Config(ALGORITHMS[algorithm](), model=model, tuner=tuner, optimizer=OptimizerConfig(batch_size=2))
    needs = config.algorithm.needs
    pairs = pairs_with(folder, num_images)
    batch, totals = make_batch(folder, pairs, needs=needs), counts_of(pairs)
    policy = make_policy(folder, model=model, tuner=tuner, needs=needs)
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=4)
    trainer.gradients([batch], totals)  # from here on gradients are there
    held = {id(tensor): tensor for tensor in tensors_of(policy.model)}
    head = [] if policy.value_head is None else tensors_of(policy.value_head)
    images = [*batch.image_inputs.values(), *(batch.companion.batch.image_inputs.values() if batch.companion else ())]
    with Meter([*held.values(), *head, *images]) as meter:
        trainer.gradients([batch], totals)
    counter = FlopCounterMode(display=False, custom_mapping=MORE_FLOPS)
    with counter:
        trainer.gradients([batch], totals)
    found = estimate_of(folder, config, pairs)
    memory = found.memory
    # Buffers (positions, rotations) are left out, and are 1 % here.
    assert memory.weights + memory.trainable + memory.gradients == pytest.approx(_bytes(held.values()), rel=0.02)
    assert memory.kept + memory.working + memory.images == pytest.approx(meter.peak + _bytes(images), rel=WITHIN)
    assert len(pairs) * found.flops().total == pytest.approx(counter.get_total_flops(), rel=WITHIN)


@pytest.mark.parametrize("recomputed", [2, 4])
def test_memory_of_a_step_that_recomputes_some_layers_is_estimated(model_folder: Callable[..., Path], recomputed: int):
    folder = model_folder("llava_next", **TEXT)
    config = Config(ALGORITHMS["simpo"](), model=ModelConfig(gradient_checkpointing="auto", dtype="float32"), tuner=ALL)
    pairs = pairs_with(folder, 0)[:1]
    policy = make_policy(folder, model=config.model, tuner=ALL, needs=config.algorithm.needs)
    recompute_layers(policy.base, recomputed)
    trainer = Trainer(policy, config.algorithm, config.optimizer, num_steps=4)
    batch, counts = make_batch(folder, pairs, needs=config.algorithm.needs), counts_of(pairs)
    trainer.gradients([batch], counts)
    with Meter(tensors_of(policy.model)) as meter:
        trainer.gradients([batch], counts)
    found = estimate_of(folder, config, pairs)
    memory = WorkerMemory(config, found.blueprint, has_images=False).of(found.batch, recomputed)
    assert memory.kept + memory.working == pytest.approx(meter.peak, rel=WITHIN)


def test_as_few_layers_run_again_as_fit_a_gpu(model_folder: Callable[..., Path]):
    folder = model_folder("llava_next", **TEXT)
    given = Config(ALGORITHMS["simpo"](), model=ModelConfig(dtype="float32"), tuner=ALL)
    found = estimate_of(folder, given.replace({"gradient_checkpointing": "auto"}), pairs_with(folder, 0))
    worker = WorkerMemory(given, found.blueprint, has_images=False)
    needed = [worker.of(found.batch, count).total / GB / (1 - SPARE) for count in range(6)]
    assert needed[0] > needed[1] > needed[2] >= needed[3] >= needed[4] >= needed[5]
    on = {size: dataclasses.replace(found, plan=PlanConfig(gpu_memory_gb=size + 1e-6)) for size in needed}
    assert [on[size].recomputed for size in needed] == [needed.index(size) for size in needed]
    two = on[needed[2]]
    assert two.memory == worker.of(found.batch, 2)
    assert two.options.checkpointing == 2 / 5
    assert two.flops().recomputation == pytest.approx(
        estimate_of(folder, given, pairs_with(folder, 0)).flops().recomputation * 2 / 5
    )
    assert (
        "  --gradient_checkpointing auto: 2 of 5 layers run again; 10% of a GPU's memory stay free"
        in plan_text(two).splitlines()
    )
    assert dataclasses.replace(found, plan=PlanConfig(gpu_memory_gb=1)).recomputed == 5  # it fits none, and all is the nearest


def test_moments_of_8_bits_take_a_quarter(model_folder: Callable[..., Path]):
    folder = model_folder("llava_next", **TEXT)
    found = estimate_of(folder, Config(ALGORITHMS["simpo"](), tuner=FULL), pairs_with(folder, 0))
    small = estimate_of(folder, found.config.replace({"optim": "adamw_8bit"}), pairs_with(folder, 0))
    assert found.memory.moments == 2 * found.memory.trainable
    assert small.memory.moments / found.memory.moments == pytest.approx(0.25 * (1 + 4 / 256), rel=0.01)  # small tensors stay
    assert ("moments (8 bits) " in plan_text(small), "moments (8 bits) " in plan_text(found)) == (True, False)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("window", [None, 4096, 64])
def test_rows_longer_than_a_sliding_window_are_not_packed_as_in_the_policy(
    model_folder: Callable[..., Path], window: int | None
):
    without, folder = model_folder("llava_next", **TEXT), model_folder("llava_next", **{**TEXT, "sliding_window": window})
    pairs = pairs_with(folder, 0)
    pairs[0] = dataclasses.replace(pairs[0], prompt_ids=pairs[0].prompt_ids[:99])  # so that there is padding
    batch, config = make_batch(folder, pairs), Config(ALGORITHMS["dpo"](), optimizer=OptimizerConfig(batch_size=2))
    found, unbounded = estimate_of(folder, config, pairs), estimate_of(without, config, pairs)
    packs = make_policy(folder).num_tokens_with_padding(batch) < batch.input_ids.numel()
    assert packs == (window != 64)
    assert all(found.blueprint.packs(pair.num_tokens) == packs for pair in pairs)
    assert (found.flops().forward == unbounded.flops().forward) == packs
    assert (found.memory.working == unbounded.memory.working) == packs


def test_a_reference_that_comes_with_the_data_is_left_out_of_the_step(model_folder: Callable[..., Path]):
    folder = model_folder("llava_next", **TEXT)
    found = estimate_of(folder, Config(ALGORITHMS["dpo"]()), pairs_with(folder, 0))
    in_step, known = found.flops(), found.flops(reference_known=True)
    assert known.others == 0
    assert in_step.others == in_step.forward
    assert known.backward == in_step.backward
    assert found.reference_flops == in_step.total - known.total


def test_each_saving_is_what_its_work_would_be(model_folder: Callable[..., Path]):
    """By hand, without attention: rows of a pair are [p + c + r], apart they are [p + c] and [p + r]."""
    folder = model_folder("llava_next", **TEXT)
    pairs = pairs_with(folder, 1)[:1]
    found = estimate_of(folder, Config(ALGORITHMS["dpo"]()), pairs)
    now = found.flops()
    prompt, chosen, rejected = (len(ids) for ids in (pairs[0].prompt_ids, pairs[0].chosen_ids, pairs[0].rejected_ids))
    row = prompt + chosen + rejected
    # Two rows hold the prompt twice; what attention adds to it is small here.
    assert found.flops(shared_prompt=False).forward / now.forward == pytest.approx((row + prompt) / row, rel=0.03)
    assert found.flops(images_once=False).vision == 4 * now.vision
    assert found.flops(responses_only=False).head / now.head == pytest.approx(row / (chosen + rejected))
    assert found.flops(checkpointing=False).recomputation == 0
    assert now.recomputation < now.forward  # the last product of a layer whose weights are frozen is not made again


@pytest.mark.parametrize("stack", [False, True])
def test_a_run_that_goes_on_from_an_adapter_is_told_what_a_new_one_would_train(
    model_folder: Callable[..., Path], tmp_path: Path, stack: bool
):
    folder = model_folder("llava")
    save_policy(make_policy(folder), tmp_path)
    plain = estimate_of(folder, Config(ALGORITHMS["dpo"]()), pairs_with(folder, 0))
    tuner = dataclasses.replace(plain.config.tuner, stack_adapter=stack)
    source = dataclasses.replace(plain.blueprint.source, adapter=str(tmp_path))
    blueprint = dataclasses.replace(plain.blueprint, tuner=tuner, source=source)
    config = dataclasses.replace(plain.config, tuner=tuner)
    assert dataclasses.replace(plain, config=config, blueprint=blueprint).adapters == plain.adapters


def test_products_that_name_their_results_type_are_counted() -> None:
    """As kernels on a GPU call them; torch's own table fails on them."""
    total = torch.zeros(4, 6, device="meta")
    left, right = (torch.zeros(*size, device="meta", dtype=torch.bfloat16) for size in ((4, 5), (5, 6)))
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        torch.mm(left, right, out_dtype=torch.float32)
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 6)


def test_attention_of_fewer_heads_of_keys_than_of_queries_is_counted() -> None:
    """As flash attention on a GPU is given them."""
    query, key = (torch.zeros(1, heads, 16, 64, device="meta", requires_grad=True) for heads in (8, 2))
    with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention(query, key, key)[0].sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (8 * 16 * 16 * 64)


def test_a_model_that_is_sharded_is_planned_by_a_worker_s_share(model_folder: Callable[..., Path]):
    folder = model_folder("llava_next", **TEXT)
    given = Config(ALGORITHMS["simpo"](), model=ModelConfig(dtype="float32"), tuner=FULL, cluster=ClusterConfig(num_workers=8))
    found = estimate_of(folder, given, pairs_with(folder, 0))
    shared = dataclasses.replace(found, config=given.replace({"strategy": "fsdp"}))
    assert shared.memory.moments < found.memory.moments / 4  # the tower's weights are not trained
    assert found.memory.kept == shared.memory.kept  # activations are not shared
    limit = (shared.memory.total + 1) / GB
    small, enough = (dataclasses.replace(e, plan=PlanConfig(gpu_memory_gb=limit)) for e in (found, shared))
    assert ("--strategy fsdp", shared.memory) in small.remedies
    assert machines(enough)[1].startswith("  strategy: fsdp over 8 workers, one GPU per worker (")
    two = dataclasses.replace(enough, config=enough.config.replace({"num_workers": 2}))
    assert machines(two)[2] == "  strategy: fsdp over 2 workers; --num_workers 8 would do"
    never = dataclasses.replace(enough, plan=PlanConfig(gpu_memory_gb=1))
    assert machines(never)[2] == "  strategy: fsdp over 8 workers; no number of workers would do"
    alone = dataclasses.replace(small, config=given.replace({"num_workers": 1}))
    assert ("--strategy fsdp --num_workers 8", shared.memory) in alone.remedies
    assert all(words.count("--strategy") == 0 for words, _ in dataclasses.replace(never, config=alone.config).remedies)
    spread = dataclasses.replace(alone, config=alone.config.replace({"gpus_per_worker": 2}))
    assert not any("fsdp" in words for words, _ in spread.remedies)  # refused with a model over a worker's GPUs


def machines(found: Estimate) -> list[str]:
    """What a plan says of GPUs and workers."""
    told = plan_text(found).splitlines()
    return told[next(number for number, line in enumerate(told) if line.startswith("On GPUs of")) :]
