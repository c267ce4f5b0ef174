"""The reference's log-probs of a sharded model, by its workers together: those that one process with the whole model stores."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayalign.algorithms import DPO, KTO, MDPO, Algorithm
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.checked import noted, require_undamaged
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData
from rayalign.data.reference_store import ReferenceLogps, drop_damaged, missing_shards, shard_name, write_reference_shard
from rayalign.data.shards import shard_name as pairs_name
from rayalign.data.store import EncodedPair, PreparedData, from_batch
from rayalign.data.stream import sampler_of
from rayalign.models.source import ModelSource
from rayalign.reference.precompute import ShardScorer
from rayalign.storage import Store
from rayalign.training.ready import ready_policy
from rayalign.training.reference_pass import compute_reference, missing_reference
from tests.prepared_pairs import prepared
from tests.sharded_steps import together
from tests.tiny_models import encode_pair, noise_image, wake_adapters

SHARDED, WHOLE = "reference_sharded_by_2", "reference_whole_by_2"
TEXTS = ("two", "a cat", "The digit is two.", "yes", "A cat sits on the mat.")
CASES: dict[str, tuple[Algorithm, str, dict[str, Any]]] = {
    "dpo, adapters": (DPO(), "llava", {"lora_target_modules": ["ALL"]}),
    "mdpo, all weights": (MDPO(), "qwen2_vl", {"sft_type": "full"}),
    "kto, all weights": (KTO(), "llava", {"sft_type": "full"}),
}
Job = tuple[Config, RunData]


def pairs_of(folder: Path, algorithm: Algorithm) -> list[EncodedPair]:
    """Five pairs, which are three shards; the second shard has no image."""
    images = {i: [noise_image(30, 20 + 10 * i, seed=i)] for i in (0, 4)}
    pairs = [
        encode_pair(folder, f"pair {i}", "Which? " * (i + 1), text, TEXTS[i - 1], images=images.get(i, ()))
        for i, text in enumerate(TEXTS)
    ]
    if algorithm.needs.responses == "either":
        pairs[1] = dataclasses.replace(pairs[1], rejected_ids=[])
    return pairs


def job_of(name: str, folder: Path, records: PreparedData) -> Job:
    algorithm, _, flags = CASES[name]
    cluster = {"strategy": "fsdp", "num_workers": 2, "gpus_per_worker": 0.0}
    config = config_from_mapping(type(algorithm), {"batch_size": 1, "max_steps": 9, **cluster, **flags})
    spec = EncoderSpec(str(folder), responses=algorithm.needs.responses)
    return config, RunData(ModelSource(str(folder)), spec, dataclasses.replace(records, reference=SHARDED), None)


def compute(job: Job, rank: int) -> int:
    """One worker of two; returns the number of shards that were missing."""
    config, data = job
    policy, _ = ready_policy(config, data, device=torch.device("cpu"), rank=rank, say=lambda *words: None)
    wake_adapters(policy)
    missing = missing_reference(config, data, sampler_of(config, data))
    compute_reference(policy, config, data, missing, rank=rank, num_workers=2, say=lambda *words: None)
    return sum(len(shards) for _, shards in missing)


def work_of(jobs: Mapping[str, Job], unread: Job, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    counts = {name: torch.tensor(compute(job, rank)) for name, job in jobs.items()}
    with pytest.raises(ValueError) as caught:
        compute(unread, rank)
    told = torch.tensor(list(str(caught.value).encode()))
    if rank == 0:
        for _, data in jobs.values():
            (data.training.folder / SHARDED / shard_name(2)).delete()
    torch.distributed.barrier()
    again = {f"{name}, again": torch.tensor(compute(job, rank)) for name, job in jobs.items()}
    return counts | again | {"told": told}


@pytest.fixture(scope="module")
def jobs(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    found = {}
    for name, (algorithm, family, _) in CASES.items():
        folder = model_folder(family)
        records = prepared(pairs_of(folder, algorithm), tmp_path_factory.mktemp("records"))
        found[name] = job_of(name, folder, records)
    return found


@pytest.fixture(scope="module")
def unread(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Pairs of which the last one, which the first worker meets in its second round, is damaged."""
    folder = model_folder("llava")
    pairs, store = pairs_of(folder, DPO()), tmp_path_factory.mktemp("damaged")
    records = prepared(pairs, store)
    file = store / "one" / pairs_name(0)
    content = file.read_bytes()
    place = content.rindex(b"pair 4")
    file.write_bytes(content[:place] + b"p4ir" + content[place + 4 :])
    return job_of("dpo, adapters", folder, records)


@pytest.fixture(scope="module")
def workers(jobs: dict[str, Job], unread: Job, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return together(functools.partial(work_of, jobs, unread), 2, {}, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("name", CASES)
def test_workers_that_share_a_model_store_what_one_with_the_whole_model_does(
    workers: list[dict[str, Tensor]], jobs: dict[str, Job], name: str
) -> None:
    config, data = jobs[name]
    scorer = ShardScorer(config.replace({"strategy": "ddp"}), data, data.training, WHOLE)
    every = np.arange(data.training.num_rows)
    for shard in missing_shards(data.training.folder / WHOLE, every):
        scorer.write(shard)
    sharded, whole = (rows_of(data.training, folder) for folder in (SHARDED, WHOLE))
    for row, expected in zip(sharded, whole, strict=True):
        assert row.id == expected.id
        for side in ("chosen", "rejected", "companion"):
            ours, theirs = (getattr(pair.reference, side) for pair in (row, expected))
            assert ours == pytest.approx(theirs, abs=1e-5)
    assert any(pair.reference.companion for pair in whole) == (config.algorithm.name == "mdpo")


def rows_of(records: PreparedData, folder: str) -> list[Any]:
    reader = dataclasses.replace(records, reference=folder).reader()
    return from_batch(reader.read(np.arange(records.num_rows)))


@pytest.mark.parametrize("name", CASES)
def test_a_pass_of_workers_computes_what_is_missing_alone(workers: list[dict[str, Tensor]], name: str) -> None:
    for worker in workers:
        assert int(worker[name]) == 3
        assert int(worker[f"{name}, again"]) == 1


def test_all_workers_are_told_of_a_record_that_one_cannot_read(workers: list[dict[str, Tensor]], unread: Job) -> None:
    folder = unread[1].training.folder
    for worker in workers:
        told = bytes(worker["told"].tolist()).decode()
        assert told.startswith(f"{folder.location}/{pairs_name(0)} is damaged")
    # The first round's shards are whole, and there is no part of the last one.
    assert missing_shards(folder / SHARDED, np.arange(5)) == [2]


def test_damaged_shards_are_missing_once_they_are_dropped(tmp_path: Path) -> None:
    folder = Store(str(tmp_path)) / SHARDED
    for shard in range(2):
        write_reference_shard(folder / shard_name(shard), ["a"], [ReferenceLogps([-1.0], [-2.0], [])])
    noted(folder / shard_name(1), "is damaged")
    drop_damaged(folder)
    assert missing_shards(folder, np.arange(4)) == [1]
    require_undamaged(folder)
