"""Sharded policies beside whole ones: every algorithm on four processes, more and fewer workers, and whole runs on Ray."""

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rayalign.algorithms import CPO, DPO, KTO, MDPO, ORPO, RM, SFT, SimPO
from rayalign.storage import Store
from rayalign.training.checkpoint import Snapshot, checkpoint_name, fetch_newest, load_checkpoint, write_checkpoint
from tests.cluster import running_cluster
from tests.sharded_steps import FULL, LORA, Case, Deal, batches_of, differences, pairs_of, steps_of, together, trainer_of, whole
from tests.tiny_data import write_rows
from tests.tiny_models import counts_of, save_tiny_model

FAMILIES = ("llava", "qwen2_vl")
DEALS: tuple[tuple[Deal, ...], ...] = ((((3,), (0,)), ((1,),), ((2,),), ()), ((), ((0, 1, 2, 3),), (), ()))
ALGORITHMS = (
    *(DPO(), DPO(rpo_alpha=0.0, loss_type=("aot", "aot_unpaired")), MDPO(), CPO(), ORPO(), SimPO(), KTO(), RM(), SFT()),
)
CASES = {
    f"{number} {algorithm.name} {tuner.sft_type} {family}": Case(
        algorithm, family, tuner, DEALS[number % 2], checkpointing=number % 3 > 0
    )
    for number, (family, tuner, algorithm) in enumerate(itertools.product(FAMILIES, (LORA, FULL), ALGORITHMS))
    if not (algorithm.needs.dropout and tuner is LORA)  # every worker draws numbers of its own
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_model(tmp_path_factory.mktemp("model") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def workers(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return together(functools.partial(steps_of, CASES), 4, folders, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("name", CASES)
def test_steps_of_four_workers_are_those_of_one(
    folders: Mapping[str, Path], workers: list[dict[str, Tensor]], name: str
) -> None:
    case = CASES[name]
    for worker in workers:
        found = differences(case, name, worker, folders[case.family])
        assert found.pop("metric") < 1e-5  # kept as float32
        assert found["gradient"] < 1e-12
        assert found["norm"] < 1e-12
        # AdamW's first steps are gradient / |gradient|, which magnifies the last bits of gradients near its epsilon of 1e-8.
        assert found["weight"] < 1e-10


SAVED = Case(SimPO(), tuner=FULL)


def save_together(out: Path, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    trainer = trainer_of(SAVED, folders["llava"], sharded=True, rank=rank)
    trainer.step(0, batches_of(SAVED, folders["llava"], SAVED.deals[rank]), counts_of(pairs_of(folders["llava"])))
    write_checkpoint(Store(str(out)), Snapshot.of(trainer.policy, trainer.optimizer, step=1, rank=rank))
    return {name: whole(p) for name, p in trainer.policy.trainable.items()}


def load_together(out: Path, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    trainer = trainer_of(SAVED, folders["llava"], sharded=True, rank=rank)
    temporary = out.parent / f"fetched {rank}"
    temporary.mkdir()
    found = fetch_newest(Store(str(out)), temporary, shard=(rank, torch.distributed.get_world_size()))
    assert found is not None
    load_checkpoint(found, trainer.policy, trainer.optimizer)
    return {name: whole(p) for name, p in trainer.policy.trainable.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 3)])
def test_any_number_of_workers_goes_on_from_shards(
    folders: Mapping[str, Path], tmp_path: Path, before: int, after: int
) -> None:
    meetings = [tmp_path / "save", tmp_path / "load"]
    for folder in meetings:
        folder.mkdir()
    place = tmp_path / "checkpoints" / checkpoint_name(1, "a")
    saved = together(functools.partial(save_together, place), before, folders, meetings[0])
    for worker in together(functools.partial(load_together, tmp_path / "checkpoints"), after, folders, meetings[1]):
        assert all(torch.equal(worker[name], value) for name, value in saved[0].items())


WORDS = (
    *("--num_workers", 2, "--batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 4, "--dataset_test_ratio", 0.2),
    *("--learning_rate", 1e-3, "--logging_steps", 1, "--eval_steps", 2, "--save_steps", 2),
)
TIMES = ("pairs_per_second", "tokens_per_second", "data_wait_fraction")


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_runs_on_ray_end_alike_whatever_the_strategy(tmp_path: Path, tuner: str) -> None:
    model, data = save_tiny_model(tmp_path / "model", "llava"), write_rows(tmp_path / "data", 30, seed=1)
    (tmp_path / "ray").mkdir()
    given = ("pipelines/dpo.py", "--model", model, "--dataset", data, "--sft_type", tuner, *WORDS)
    with running_cluster(tmp_path / "ray", num_cpus=4) as cluster:
        for strategy in ("ddp", "fsdp"):
            cluster.run(*given, "--strategy", strategy, "--output_dir", tmp_path / strategy)
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
