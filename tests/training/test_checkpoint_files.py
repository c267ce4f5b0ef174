import dataclasses
import functools
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from rayalign.algorithms import SimPO
from rayalign.config.sections import TunerConfig
from rayalign.policy.policy import Policy
from rayalign.policy.saving import gather_weights, save_policy
from rayalign.storage import Store
from rayalign.training.checkpoint import Snapshot, load_checkpoint, load_weights, write_checkpoint
from rayalign.training.checkpoint_files import (
    DTYPES,
    WEIGHTS,
    SavedTensors,
    num_shards,
    rows_of,
    shard_file,
    whole_file,
    write_tensors,
)
from rayalign.training.checkpoint_folder import ALL_SHARDS, FetchedCheckpoint, checkpoint_name, fetch_newest
from rayalign.training.checkpoint_folder import fetch_weights as fetch_weights_of
from rayalign.training.distributed import gather
from rayalign.training.loop import Trainer
from tests.sharded_steps import Case, batches_of, pairs_of, together, trainer_of, whole
from tests.tiny_models import counts_of

CASE = Case(SimPO(), tuner=TunerConfig(sft_type="full", freeze_aligner=False), dtype=torch.float32)
"""Trained weights of which some are sharded, and some (the aligner's) are not."""

NAME = checkpoint_name(1, "a")


def take_step(trainer: Trainer, folder: Path, step: int, rank: int, num_workers: int) -> None:
    pairs = range(4)[rank::num_workers]
    trainer.step(step, batches_of(CASE, folder, [pairs] if pairs else []), counts_of(pairs_of(folder)))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and moments, whole."""
    named = trainer.policy.trainable
    moments = {f"{name} {key}": whole(value) for name, p in named.items() for key, value in trainer.optimizer.state[p].items()}
    return {name: whole(p) for name, p in named.items()} | moments


def blank(*, sharded: bool, folder: Path, rank: int = 0) -> Trainer:
    """A trainer with other weights than those of any checkpoint."""
    trainer = trainer_of(CASE, folder, sharded=sharded, rank=rank)
    with torch.no_grad():
        for parameter in trainer.policy.trainable.values():
            parameter.fill_(0.5)
    return trainer


def restore(trainer: Trainer, checkpoints: Path, temporary: Path, shard: tuple[int, int]) -> set[str]:
    """Restores the newest checkpoint; returns the files that were fetched for it."""
    temporary.mkdir()
    found = fetch_newest(Store(str(checkpoints)), temporary, shard=shard)
    assert found is not None
    load_checkpoint(found, trainer.policy, trainer.optimizer)
    return {file.name for file in found.folder.iterdir()}


def save_model(policy: Policy, folder: Path, *, rank: int = 0) -> None:
    gathered = gather_weights(policy, keep=rank == 0)
    if rank == 0:
        save_policy(policy, folder, gathered=gathered)
    else:
        assert not gathered


def work_of(out: Path, rank: int, folders: Mapping[str, Path]) -> dict[str, Tensor]:
    """Saves in the middle of two steps and goes on; goes on again from what was saved, and from what one process saved."""
    folder = folders["llava"]
    trainer = trainer_of(CASE, folder, sharded=True, rank=rank)
    take_step(trainer, folder, 0, rank, 2)
    snapshot = Snapshot.of(trainer.policy, trainer.optimizer, step=1, rank=rank)
    write_checkpoint(Store(str(out / "together" / NAME)), snapshot)
    saved = {f"saved {name}": value for name, value in state_of(trainer).items()}
    take_step(trainer, folder, 1, rank, 2)
    undisturbed = {f"undisturbed {name}": value for name, value in state_of(trainer).items()}
    gather(None)
    resumed = blank(sharded=True, folder=folder, rank=rank)
    fetched = restore(resumed, out / "together", out / f"fetched by {rank}", (rank, 2))
    assert num_shards(fetched) == 2
    assert len(fetched) == 4 + 2  # the other worker's shards stay where they are
    take_step(resumed, folder, 1, rank, 2)
    save_model(resumed.policy, out / "model", rank=rank)
    rounded = trainer_of(dataclasses.replace(CASE, dtype=torch.bfloat16), folder, sharded=True, rank=rank)
    save_model(rounded.policy, out / "rounded", rank=rank)
    one = blank(sharded=True, folder=folder, rank=rank)
    restore(one, out / "alone", out / f"of one, fetched by {rank}", (rank, 2))
    return (
        saved
        | undisturbed
        | {f"resumed {name}": value for name, value in state_of(resumed).items()}
        | {f"of one {name}": value for name, value in state_of(one).items()}
    )


def part(results: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind} "): value for name, value in results.items() if name.startswith(f"{kind} ")}


def equal(some: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[name], other[name]) for name in some)


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path, out: Path) -> Trainer:
    """One process after a step, and its checkpoint in `alone`."""
    trainer = trainer_of(CASE, folder, sharded=False)
    take_step(trainer, folder, 0, 0, 1)
    (out / "alone" / NAME).mkdir(parents=True)
    write_checkpoint(Store(str(out / "alone" / NAME)), Snapshot.of(trainer.policy, trainer.optimizer, step=1))
    return trainer


@pytest.fixture(scope="module")
def workers(folder: Path, out: Path, alone: Trainer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return together(functools.partial(work_of, out), 2, {"llava": folder}, tmp_path_factory.mktemp("workers"))


def test_as_many_workers_go_on_to_the_bit_and_read_their_own_shards_only(workers: list[dict[str, Tensor]]) -> None:
    for worker in workers:
        assert equal(part(worker, "resumed"), part(worker, "undisturbed"))
        assert not equal(part(worker, "resumed"), part(worker, "saved"))


def test_one_worker_goes_on_from_what_two_have_saved(
    folder: Path, out: Path, workers: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trainer = blank(sharded=False, folder=folder)
    restore(trainer, out / "together", tmp_path / "fetched", ALL_SHARDS)
    assert equal(state_of(trainer), part(workers[0], "saved"))


def test_two_workers_go_on_from_what_one_has_saved(alone: Trainer, workers: list[dict[str, Tensor]]) -> None:
    for worker in workers:
        assert equal(part(worker, "of one"), state_of(alone))


def test_a_sharded_model_is_saved_as_a_whole_one_is(
    folder: Path, out: Path, workers: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    trainer = blank(sharded=False, folder=folder)
    with torch.no_grad():
        for name, parameter in trainer.policy.trainable.items():
            parameter.copy_(part(workers[0], "resumed")[name])
    save_model(trainer.policy, tmp_path / "model")
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert {file.name for file in (out / "model").iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (out / "model" / name).read_text() == (tmp_path / "model" / name).read_text()
    assert equal(*(load_file(place / "model" / "model.safetensors") for place in (out, tmp_path)))


def test_the_type_that_a_sharded_model_is_saved_in_is_told(
    folder: Path, out: Path, workers: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    whole = trainer_of(dataclasses.replace(CASE, dtype=torch.bfloat16), folder, sharded=False)
    save_model(whole.policy, tmp_path / "model")
    assert (out / "rounded" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()
    found = load_file(out / "rounded" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(out / "rounded").dtype == torch.bfloat16


def test_a_model_can_be_made_of_shards(folder: Path, out: Path, workers: list[dict[str, Tensor]], tmp_path: Path) -> None:
    weights = fetch_weights_of(Store(str(out / "together")) / NAME, tmp_path)
    assert not any(file.name.startswith("optimizer") for file in weights.iterdir())
    trainer = blank(sharded=False, folder=folder)
    load_weights(weights, trainer.policy)
    saved = part(workers[0], "saved")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.policy.trainable.items())


def test_without_one_of_its_shards_a_checkpoint_does_not_count(
    out: Path, workers: list[dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = shard_file("optimizer", 1, 2)
    for number, change in enumerate((lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1]))):
        checkpoints = tmp_path / f"damaged {number}"
        shutil.copytree(out / "together", checkpoints)
        change(checkpoints / NAME / lost)
        with caplog.at_level(logging.WARNING):
            assert fetch_newest(Store(str(checkpoints)), tmp_path, shard=(0, 2)) is None  # though its own are whole
        assert lost in caplog.messages[-1]


def test_shards_of_another_model_are_refused(
    model_folder: Callable[..., Path], out: Path, workers: list[dict[str, Tensor]]
) -> None:
    wider = trainer_of(CASE, model_folder("llava", intermediate_size=96), sharded=False)
    place = out / "together" / NAME
    with pytest.raises(ValueError, match=r"has model.language_model.layers.0.mlp.* and this run trains one of"):
        load_checkpoint(FetchedCheckpoint(Store(str(place)), 1, place), wider.policy, wider.optimizer)


def test_a_shard_does_not_stand_for_a_whole_tensor(tmp_path: Path) -> None:
    """As where another version sharded other weights, and a worker has read its own shard only."""
    save_file({}, tmp_path / whole_file(WEIGHTS))
    save_file({"norm": torch.ones(3)}, tmp_path / shard_file(WEIGHTS, 0, 2))
    with (
        SavedTensors(tmp_path, WEIGHTS) as saved,
        pytest.raises(ValueError, match="hold 3 of the 6 rows of norm that it needs"),
    ):
        saved.own_part("norm", torch.zeros(6))


def test_files_are_what_safetensors_reads_with_the_hash_of_their_content(tmp_path: Path) -> None:
    tensors = {
        f"{name} {shape}": torch.arange(math.prod(shape)).reshape(shape).to(kind)
        for kind, name in DTYPES.items()
        for shape in ((), (0, 3), (5,), (3, 7))
    }
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    for number, some in enumerate((tensors, {"one": torch.ones(3)}, {})):
        file = tmp_path / f"{number}.safetensors"
        content_of = write_tensors(some, file)
        assert content_of == {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        found = load_file(file)
        assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in some.items()}
        assert equal(found, some)
        save_file({name: tensor.contiguous() for name, tensor in some.items()}, tmp_path / "theirs.safetensors")
        theirs = (tmp_path / "theirs.safetensors").read_bytes()
        assert file.stat().st_size == len(theirs)
        assert number == 0 or file.read_bytes() == theirs  # types of one size stand in another order


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_are_shared_out_as_torch_does_it(rows: int, count: int) -> None:
    chunks = torch.arange(rows).chunk(count)
    expected = [chunk.tolist() for chunk in chunks] + [[]] * (count - len(chunks))
    assert [list(rows_of(rows, number, count)) for number in range(count)] == expected
