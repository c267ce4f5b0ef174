"""Sharded policies beside whole ones: every algorithm on four processes, more and fewer workers, and whole runs on Ray."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rayalign.algorithms import SimPO
from rayalign.config.config import Config
from rayalign.config.sections import ClusterConfig, ModelConfig
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.store import EncodedPair
from rayalign.estimate.architecture import Blueprint
from rayalign.estimate.memory import MicroBatch
from rayalign.estimate.meter import tensors_of
from rayalign.estimate.shapes import PairShape
from rayalign.estimate.vision import VisionCosts
from rayalign.estimate.worker_memory import WorkerMemory
from rayalign.models.source import ModelSource
from rayalign.storage import Store
from rayalign.training.checkpoint import Snapshot, load_checkpoint, write_checkpoint
from rayalign.training.checkpoint_folder import checkpoint_name, fetch_newest
from tests.cluster import running_cluster
from tests.sharded_steps import (
    FULL,
    LORA,
    Case,
    LiveBytes,
    batches_of,
    differences,
    pairs_of,
    together,
    trainer_of,
    whole,
    whole_or_own,
)
from tests.sharded_table import FAMILIES, OF_FOUR, cases_of, of_workers
from tests.tiny_data import write_rows
from tests.tiny_families import TINY_FAMILIES, TinyFamily
from tests.tiny_models import counts_of, encode_pair, make_batch, noise_image, save_model, save_tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_model(tmp_path_factory.mktemp("model") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module", params=[2, 4])
def workers(
    request: pytest.FixtureRequest, folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Tensor]]:
    return of_workers(request.param, folders, tmp_path_factory.mktemp("workers"))


MOST = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The largest relative difference of gradients and their norms, whose sums are made in another order. Weights: AdamW's first
steps are gradient / |gradient|, which magnifies the last bits of gradients near its epsilon of 1e-8."""

MOST_OF_WEIGHTS = {torch.float64: 1e-10, torch.float32: 1e-3}


@pytest.mark.parametrize("name", OF_FOUR)
def test_steps_of_workers_are_those_of_one(folders: Mapping[str, Path], workers: list[dict[str, Tensor]], name: str) -> None:
    case = cases_of(len(workers))[name]
    for worker in workers:
        found = differences(case, name, worker, folders[case.family])
        assert found["metric"] < 1e-5  # kept as float32
        assert found["gradient"] < MOST[case.dtype]
        assert found["norm"] < MOST[case.dtype]
        assert found["weight"] < MOST_OF_WEIGHTS[case.dtype]


SAVED = Case(SimPO(), tuner=FULL)


def save_together(out: Path, group_size: int | None, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    case = dataclasses.replace(SAVED, group_size=group_size)
    trainer = trainer_of(case, folders["llava"], sharded=True, rank=rank)
    trainer.step(0, batches_of(SAVED, folders["llava"], SAVED.deals[rank]), counts_of(pairs_of(folders["llava"])))
    write_checkpoint(Store(str(out)), Snapshot.of(trainer.policy, trainer.optimizer, step=1, rank=rank))
    return {name: whole(p) for name, p in trainer.policy.trainable.items()}


def load_together(out: Path, group_size: int | None, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    case = dataclasses.replace(SAVED, group_size=group_size)
    trainer = trainer_of(case, folders["llava"], sharded=True, rank=rank)
    shards = group_size or torch.distributed.get_world_size()
    temporary = out.parent / f"fetched {rank}"
    temporary.mkdir()
    found = fetch_newest(Store(str(out)), temporary, shard=(rank % shards, shards))
    assert found is not None
    load_checkpoint(found, trainer.policy, trainer.optimizer)
    return {name: whole(p) for name, p in trainer.policy.trainable.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, None), (3, None)), ((3, None), (2, None)), ((4, None), (3, None)), ((4, 2), (3, None)), ((2, None), (4, 2))],
)
def test_any_number_of_workers_goes_on_from_shards(
    folders: Mapping[str, Path], tmp_path: Path, before: tuple[int, int | None], after: tuple[int, int | None]
) -> None:
    """Workers, and how many of them have a model between them."""
    meetings = [tmp_path / "save", tmp_path / "load"]
    for folder in meetings:
        folder.mkdir()
    place = tmp_path / "checkpoints" / checkpoint_name(1, "a")
    saved = together(functools.partial(save_together, place, before[1]), before[0], folders, meetings[0])
    load = functools.partial(load_together, tmp_path / "checkpoints", after[1])
    for worker in together(load, after[0], folders, meetings[1]):
        assert all(torch.equal(worker[name], value) for name, value in saved[0].items())


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
MANY_WORDS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 12000, **HEADS}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "many words": ("llava", MANY_WORDS),
    # Embeddings and output head are one.
    "many words, tied": ("gemma3", {**MANY_WORDS, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "wide layers": (
        "qwen2_vl",
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 3,
            "vocab_size": 1000,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "many layers": (
        "idefics3",
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 16,
            "vocab_size": 2000,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
    ),
}
"""Families and their language models' shapes."""

PLANNED = {
    f"{tuner.sft_type}, {checkpointing}": Case(SimPO(), tuner=tuner, dtype=torch.float32, checkpointing=checkpointing)
    for tuner in (LORA, FULL)
    for checkpointing in (True, False)
}
PLANNED |= {
    f"full, {checkpointing}, bfloat16": Case(SimPO(), tuner=FULL, dtype=torch.bfloat16, checkpointing=checkpointing)
    for checkpointing in (True, False)
}
PLANNED |= {
    f"full, {dtype}, once a step": Case(SimPO(), tuner=FULL, dtype=dtype, sync_each_batch=False)
    for dtype in (torch.float32, torch.bfloat16)
}


def long_pair(folder: Path) -> EncodedPair:
    return encode_pair(folder, "a", "Which digit is it? " * 40, "The digit is two. " * 20, "A cat sits on the mat. " * 20)


def bytes_of(
    cases: Mapping[str, Case], make_pair: Callable[[Path], EncodedPair], rank: int, folders: Mapping[str, Path]
) -> dict[str, Tensor]:
    """Of each shape and case the bytes of weights, gradients and AdamW's moments that a worker holds, and the most that
    forwards and backwards take beside them."""
    results = {}
    for (shape, folder), (name, case) in itertools.product(folders.items(), cases.items()):
        trainer = trainer_of(case, folder, sharded=True, rank=rank)
        pair = make_pair(folder)
        batch, counts = make_batch(folder, [pair], needs=case.algorithm.needs), counts_of([pair] * 2)
        trainer.gradients([batch], counts)  # from here on gradients are there
        batches = [batch]
        if not case.sync_each_batch:  # they're whole behind the first micro-batch of a step, and there are none before
            batches = [batch, batch]
            trainer.optimizer.zero_grad()
        held = [whole_or_own(tensor) for tensor in tensors_of(trainer.policy.model)]
        with LiveBytes(held) as live:
            trainer.gradients(batches, counts)
        trainer.step(0, iter([batch]), counts)
        moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values() if tensor.ndim]
        held += map(whole_or_own, moments)
        size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        results[f"{shape}: {name}"] = torch.tensor([size, live.peak])
    return results


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("shapes")
    return {shape: save_tiny_model(place / shape, family, text=text) for shape, (family, text) in SHAPES.items()}


@pytest.fixture(scope="module", params=[2, 4])
def measured(
    request: pytest.FixtureRequest, shaped: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Tensor]]:
    work = functools.partial(bytes_of, PLANNED, long_pair)
    return together(work, request.param, shaped, tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_knows_the_memory_of_a_sharded_step(
    shaped: Mapping[str, Path], measured: list[dict[str, Tensor]], shape: str, name: str
) -> None:
    found = [each[f"{shape}: {name}"] for each in measured]
    assert_planned(shaped[shape], PLANNED[name], long_pair(shaped[shape]), found)


def assert_planned(folder: Path, case: Case, pair: EncodedPair, measured: Sequence[Tensor]) -> None:
    dtype: Any = str(case.dtype).removeprefix("torch.")
    model = ModelConfig(dtype=dtype, gradient_checkpointing=case.checkpointing)
    cluster = ClusterConfig(strategy="fsdp", num_workers=len(measured), sync_each_batch=case.sync_each_batch)
    config = Config(case.algorithm, model=model, tuner=case.tuner, cluster=cluster)
    spec = EncoderSpec(str(folder), "both")
    blueprint = Blueprint(spec.model_config, ModelSource(str(folder)), model, case.tuner, case.algorithm.needs)
    worker = WorkerMemory(config, blueprint, has_images=bool(pair.images))
    longest = PairShape(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
    if pair.images:
        inputs = make_batch(folder, [pair]).image_inputs
        tokens = pair.prompt_ids.count(spec.layout.image_token_id)
        load = VisionCosts(worker.skeleton, blueprint.config).load(inputs, tokens)
        longest = dataclasses.replace(longest, image_tokens=tokens, images=(load,))
    memory = worker.of(MicroBatch(1, longest, longest), worker.most_recomputed)
    for found in measured:
        assert memory.tensors == pytest.approx(int(found.sum()), rel=0.1)


TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "image_size": 56}
SEEING = {
    f"{name}, {checkpointing}": Case(SimPO(), tuner=tuner, dtype=torch.float32, checkpointing=checkpointing)
    for name, tuner in {
        "frozen": FULL,
        "trained": dataclasses.replace(FULL, freeze_vit=False, freeze_aligner=False),
        "trained alone": dataclasses.replace(FULL, freeze_vit=False, freeze_aligner=False, freeze_llm=True),
    }.items()
    for checkpointing in (True, False)
}
SEEING |= {f"{name}, bfloat16": dataclasses.replace(case, dtype=torch.bfloat16) for name, case in SEEING.items()}


def seeing_pair(folder: Path) -> EncodedPair:
    question, picture = "Which digit is it? " * 10, noise_image(56, 56)
    return encode_pair(folder, "a", question, "The digit is two. " * 5, "A cat sits on the mat. " * 5, images=[picture])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model most of whose weights are the tower's."""
    tiny = TINY_FAMILIES["llava"]

    def processor() -> Any:
        made = tiny.processor()
        made.image_processor.size, made.image_processor.crop_size = {"shortest_edge": 56}, {"height": 56, "width": 56}
        return made

    def config(made: Any, text: Mapping[str, Any]) -> Any:
        known = tiny.config(made, text)
        for key, value in TOWER.items():
            setattr(known.vision_config, key, value)
        return known

    return save_model(tmp_path_factory.mktemp("seeing"), TinyFamily(processor, config))


@pytest.fixture(scope="module", params=[2, 4])
def measured_seeing(
    request: pytest.FixtureRequest, seeing: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Tensor]]:
    work = functools.partial(bytes_of, SEEING, seeing_pair)
    return together(work, request.param, {"seeing": seeing}, tmp_path_factory.mktemp("measured"))


@pytest.mark.parametrize("name", SEEING)
def test_a_plan_knows_what_a_sharded_tower_takes(seeing: Path, measured_seeing: list[dict[str, Tensor]], name: str) -> None:
    assert_planned(seeing, SEEING[name], seeing_pair(seeing), [found[f"seeing: {name}"] for found in measured_seeing])


WORDS = (
    *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 4, "--dataset_test_ratio", 0.2),
    *("--learning_rate", 1e-3, "--logging_steps", 1, "--eval_steps", 2, "--save_steps", 2),
)
TIMES = ("pairs_per_second", "tokens_per_second", "data_wait_fraction")


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_runs_on_ray_end_alike_whatever_the_strategy(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tuner: str
) -> None:
    model, data = save_tiny_model(tmp_path / "model", "llava"), write_rows(tmp_path / "data", 30, seed=1)
    given = ("pipelines/dpo.py", "--model", model, "--dataset", data, "--sft_type", tuner, *WORDS)
    with running_cluster(tmp_path_factory.mktemp("ray"), num_cpus=4) as cluster:
        for strategy in ("ddp", "fsdp"):
            places = ("--output_dir", tmp_path / strategy, "--cache_dir", tmp_path / f"cache of {strategy}")
            cluster.run(*given, "--strategy", strategy, *places)
    weights = {
        name: {
            key: value
            for file in sorted((tmp_path / name / "model").glob("*.safetensors"))
            for key, value in load_file(file).items()
        }
        for name in ("ddp", "fsdp")
    }
    assert weights["ddp"].keys() == weights["fsdp"].keys()
    for name, value in weights["ddp"].items():
        torch.testing.assert_close(weights["fsdp"][name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("ddp", "fsdp")
    ]
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        assert {n: v for n, v in other.items() if n not in TIMES} == pytest.approx(
            {n: v for n, v in one.items() if n not in TIMES}, rel=1e-4, abs=1e-5
        )
