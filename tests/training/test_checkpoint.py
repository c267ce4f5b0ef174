import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, RunConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts
from rayalign.storage import Store
from rayalign.training.best import Best
from rayalign.training.checkpoint import Snapshot, load_best, load_checkpoint, write_checkpoint
from rayalign.training.checkpoint_folder import (
    FetchedCheckpoint,
    checkpoint_name,
    delete_newer,
    fetch_newest,
    has_checkpoint,
    prune_checkpoints,
    settle_checkpoints,
    whole_at,
)
from rayalign.training.checkpoint_folder import fetch as fetch_one
from rayalign.training.loop import Trainer
from tests.tiny_models import REFERRED, encode_pair, make_batch, make_policy

CONFIG = OptimizerConfig(learning_rate=1e-2)
FILES = ["manifest.json", "optimizer.safetensors", "state.json", "trainable.safetensors"]


def trainer_of(
    folder: Path, *, seed: int, modules: tuple[str, ...] = ("DEFAULT",), rank: int = 8, dtype: Any = "float32"
) -> Trainer:
    tuner = TunerConfig(lora_target_modules=modules, lora_rank=rank)
    model = ModelConfig(dtype=dtype, gradient_checkpointing=False)
    policy = make_policy(folder, model=model, tuner=tuner, needs=REFERRED, seed=seed)
    return Trainer(policy, DPO(), CONFIG, num_steps=10)


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder("llava")


@pytest.fixture(scope="module")
def batch(folder: Path) -> PairBatch:
    return make_batch(
        folder, [encode_pair(folder, "a", "Which?", "two", "a cat"), encode_pair(folder, "b", "It?", "yes", "no")]
    )


def take_steps(trainer: Trainer, batch: PairBatch, steps: range) -> None:
    for step in steps:
        trainer.step(step, [batch], StepCounts(2, 4, 4, 5))


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.trainable.items()}


def moments_of(trainer: Trainer) -> dict[tuple[str, str], Tensor]:
    named = trainer.policy.trainable.items()
    return {(name, key): value for name, p in named for key, value in trainer.optimizer.state[p].items()}


def equal(some: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return some.keys() == other.keys() and all(torch.equal(some[name], other[name]) for name in some)


@pytest.fixture
def trained(folder: Path, batch: PairBatch) -> Trainer:
    trainer = trainer_of(folder, seed=1)
    take_steps(trainer, batch, range(3))
    return trainer


@pytest.fixture
def checkpoints(tmp_path: Path, trained: Trainer) -> Store:
    """Whole checkpoints after 3 and 20 steps (of the same weights)."""
    for step in (3, 20):
        place = tmp_path / "checkpoints" / checkpoint_name(step, "a")
        place.mkdir(parents=True)
        write_checkpoint(Store(str(place)), Snapshot.of(trained.policy, trained.optimizer, step=step))
    return Store(str(tmp_path / "checkpoints"))


def fetch(checkpoints: Store) -> FetchedCheckpoint | None:
    return fetch_newest(checkpoints, Path(tempfile.mkdtemp(dir=Path(checkpoints.location.removeprefix("file://")).parent)))


def newest_of(checkpoints: Store) -> FetchedCheckpoint:
    newest = fetch(checkpoints)
    assert newest is not None
    return newest


def flip_a_bit(file: Store) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def names_in(folder: Store) -> list[str]:
    return [store.name for store in folder.list()]


def test_weights_and_moments_come_back_bit_for_bit(folder: Path, trained: Trainer, checkpoints: Store) -> None:
    restored = trainer_of(folder, seed=2)
    assert not equal(weights_of(restored), weights_of(trained))
    load_checkpoint(newest_of(checkpoints), restored.policy, restored.optimizer)
    assert equal(weights_of(restored), weights_of(trained))
    moments, expected = moments_of(restored), moments_of(trained)
    assert {key for _, key in expected} == {"step", "exp_avg", "exp_avg_sq"}
    assert moments.keys() == expected.keys()
    assert all(torch.equal(moments[key], expected[key]) for key in expected)


def test_the_next_steps_from_a_checkpoint_equal_the_undisturbed_ones(
    folder: Path, batch: PairBatch, trained: Trainer, checkpoints: Store
) -> None:
    restored = trainer_of(folder, seed=2)
    take_steps(restored, batch, range(1))  # what an optimizer already holds is replaced
    load_checkpoint(newest_of(checkpoints), restored.policy, restored.optimizer)
    take_steps(trained, batch, range(3, 6))
    take_steps(restored, batch, range(3, 6))
    assert equal(weights_of(restored), weights_of(trained))


def test_a_checkpoint_before_the_first_step_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    fresh, other = trainer_of(folder, seed=1), trainer_of(folder, seed=2)
    write_checkpoint(Store(str(tmp_path)), Snapshot.of(fresh.policy, fresh.optimizer, step=0))
    load_checkpoint(FetchedCheckpoint(Store(str(tmp_path)), 0, tmp_path), other.policy, other.optimizer)
    assert equal(weights_of(fresh), weights_of(other))


def test_a_checkpoint_holds_only_safetensors_and_json(checkpoints: Store, trained: Trainer) -> None:
    place = newest_of(checkpoints).folder
    assert sorted(file.name for file in place.iterdir()) == FILES
    with safe_open(place / "trainable.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(trained.policy.trainable)
    with safe_open(place / "optimizer.safetensors", framework="pt") as moments:
        assert len(list(moments.keys())) == 3 * len(trained.policy.trainable)
    assert json.loads((place / "state.json").read_text()) == {"step": 20, "torch": torch.__version__}
    assert sorted(json.loads((place / "manifest.json").read_text())) == FILES[1:]


def test_the_newest_is_the_one_with_the_most_steps_whatever_else_lies_there(checkpoints: Store) -> None:
    (checkpoints / "step_99_notes.txt").write_bytes(b"")
    for name in ("step_x_a", "step_²_a"):
        (checkpoints / name / "manifest.json").write_json({})
    (checkpoints / "old" / "manifest.json").write_json({})
    with_later_attempt = checkpoints / checkpoint_name(3, "z")
    shutil.copytree((checkpoints / checkpoint_name(3, "a")).location, with_later_attempt.location)
    (checkpoints / "step_99_notes.txt").delete()
    newest = newest_of(checkpoints)
    assert (newest.store, newest.step) == (checkpoints / "step_00000020_a", 20)


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for folder in (Store(str(tmp_path / "nothing")), Store(str(tmp_path))):
        assert fetch_newest(folder, tmp_path) is None
        assert not has_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("no manifest", "it has no manifest, so it was never finished"),
        ("half a manifest", "its manifest is cut short or no JSON"),
        ("half the weights", "trainable.safetensors has 100 of {size} bytes"),
        ("no moments", "optimizer.safetensors has 0 of {size} bytes"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_with_the_reason(
    checkpoints: Store, caplog: pytest.LogCaptureFixture, damage: str, problem: str
) -> None:
    store = newest_of(checkpoints).store
    name = {"half the weights": "trainable.safetensors", "no moments": "optimizer.safetensors"}.get(damage, "manifest.json")
    file = Path((store / name).location)
    size = file.stat().st_size
    if damage.startswith("half"):
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING, logger="rayalign.training.checkpoint_folder"):
        assert newest_of(checkpoints).step == 3
    assert caplog.messages == [f"Passing over checkpoint {store.location}: {problem.format(size=size)}."]


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        (b"[]", "does not name trainable.safetensors, optimizer.safetensors and state.json"),
        (b"{}", "does not name trainable.safetensors, optimizer.safetensors and state.json"),
        (b"null", "does not name trainable.safetensors, optimizer.safetensors and state.json"),
        (
            b'{"../../secret": {"size": 0, "sha256": ""}}',
            "does not name trainable.safetensors, optimizer.safetensors and state.json",
        ),
        (b'{"trainable.safetensors": 1, "optimizer.safetensors": 2, "state.json": 3}', "lacks sizes and hashes"),
        (b"", "is cut short or no JSON"),
        (b"\xff\xfe\x00", "is cut short or no JSON"),
        (b"[" * 100_000, "is cut short or no JSON"),
    ],
    ids=["list", "empty", "null", "other files", "numbers", "nothing", "no text", "deep"],
)
def test_a_damaged_manifest_is_passed_over_with_the_reason(
    checkpoints: Store, caplog: pytest.LogCaptureFixture, manifest: bytes, problem: str
) -> None:
    store = newest_of(checkpoints).store
    (store / "manifest.json").write_bytes(manifest)
    with caplog.at_level(logging.WARNING, logger="rayalign.training.checkpoint_folder"):
        assert newest_of(checkpoints).step == 3
    assert caplog.messages == [f"Passing over checkpoint {store.location}: its manifest {problem}."]


@pytest.mark.parametrize("name", FILES[1:])
def test_after_a_flipped_bit_the_checkpoint_before_is_taken_and_only_then_are_newer_ones_deleted(
    folder: Path, trained: Trainer, checkpoints: Store, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    damaged = checkpoints / checkpoint_name(20, "a")
    flip_a_bit(damaged / name)
    with caplog.at_level(logging.WARNING, logger="rayalign.training.checkpoint_folder"):
        newest = newest_of(checkpoints)
    assert caplog.messages == [f"Passing over checkpoint {damaged.location}: {name} does not have the hash it was saved with."]
    assert newest.step == 3
    assert names_in(checkpoints) == ["step_00000003_a", "step_00000020_a"]
    other = trainer_of(folder, seed=2)
    load_checkpoint(newest, other.policy, other.optimizer)
    assert equal(weights_of(other), weights_of(trained))
    delete_newer(checkpoints, newest)
    assert names_in(checkpoints) == ["step_00000003_a"]


def test_where_no_checkpoint_is_whole_none_is_taken_and_none_is_deleted(checkpoints: Store) -> None:
    for store in checkpoints.list():
        flip_a_bit(store / "optimizer.safetensors")
    assert fetch(checkpoints) is None
    assert names_in(checkpoints) == ["step_00000003_a", "step_00000020_a"]
    assert has_checkpoint(checkpoints)


def test_a_checkpoint_that_one_worker_cannot_read_is_taken_by_none(checkpoints: Store, tmp_path: Path) -> None:
    def gather_with_a_worker_that_reads_badly(value: Any) -> list[Any]:
        if isinstance(value, list):
            return [value, []]  # its view of the folder doesn't count, either
        calls.append(value)
        return [value, "state.json does not have the hash it was saved with" if len(calls) == 1 else None]

    calls: list[Any] = []
    newest = fetch_newest(checkpoints, tmp_path, gather=gather_with_a_worker_that_reads_badly)
    assert newest is not None
    assert newest.step == 3
    assert calls == [None, None]


def test_checkpoints_that_nobody_can_read_do_not_outlast_new_ones(checkpoints: Store, tmp_path: Path) -> None:
    """As after a loss of power, which leaves files of the right size."""
    for checkpoint in checkpoints.list():
        weights = checkpoint / "trainable.safetensors"
        weights.write_bytes(bytes(weights.info().size))
    assert fetch_newest(checkpoints, tmp_path) is None
    settle_checkpoints(checkpoints.parent, RunConfig(), Best(), None)
    assert not checkpoints.list()


def test_what_is_fetched_stays_readable_when_storage_loses_it(folder: Path, trained: Trainer, checkpoints: Store) -> None:
    newest = newest_of(checkpoints)
    newest.store.delete()
    other = trainer_of(folder, seed=2)
    load_checkpoint(newest, other.policy, other.optimizer)
    assert equal(weights_of(other), weights_of(trained))


def test_a_run_has_a_checkpoint_once_one_was_finished(tmp_path: Path) -> None:
    checkpoints = Store(str(tmp_path))
    (checkpoints / checkpoint_name(3, "a") / "trainable.safetensors").write_bytes(b"half")
    assert not has_checkpoint(checkpoints)
    (checkpoints / checkpoint_name(3, "a") / "manifest.json").write_bytes(b"damaged since")
    assert has_checkpoint(checkpoints)


def test_a_checkpoint_of_another_adapter_is_refused(folder: Path, checkpoints: Store) -> None:
    other = trainer_of(folder, seed=2, modules=("o_proj",))
    newest = newest_of(checkpoints)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(newest, other.policy, other.optimizer)
    layer = "base_model.model.model.language_model.layers.0.self_attn"
    assert str(caught.value) == (
        f"The checkpoint {newest.store.location} trains other weights than this run "
        f"({layer}.k_proj.lora_A.default.weight, {layer}.k_proj.lora_B.default.weight, "
        f"{layer}.o_proj.lora_A.default.weight, ...). "
        "Continue the run with the flags that it began with, or choose another --output_dir."
    )


@pytest.mark.parametrize(
    ("saved", "resumed", "types"),
    [
        ("float16", "bfloat16", "was trained in float16, and this run trains in another type"),
        ("bfloat16", "float16", "was trained in another type, and this run trains in float16"),
    ],
)
def test_a_checkpoint_of_another_precision_is_refused(
    folder: Path, tmp_path: Path, saved: str, resumed: str, types: str
) -> None:
    one, other = trainer_of(folder, seed=1, dtype=saved), trainer_of(folder, seed=2, dtype=resumed)
    write_checkpoint(Store(str(tmp_path)), Snapshot.of(one.policy, one.optimizer, step=0, scaler=one.scaler))
    before = weights_of(other)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(
            FetchedCheckpoint(Store(str(tmp_path)), 0, tmp_path), other.policy, other.optimizer, scaler=other.scaler
        )
    assert str(caught.value) == f"The checkpoint {tmp_path} {types}. Pass the same --dtype."
    assert equal(weights_of(other), before)
    load_checkpoint(FetchedCheckpoint(Store(str(tmp_path)), 0, tmp_path), one.policy, one.optimizer, scaler=one.scaler)


def test_pruning_keeps_the_newest_whole_ones_and_no_incomplete_one(checkpoints: Store) -> None:
    whole = checkpoints / checkpoint_name(3, "a")
    for step in (7, 30):
        shutil.copytree(whole.location, (checkpoints / checkpoint_name(step, "b")).location)
    (checkpoints / checkpoint_name(30, "b") / "manifest.json").delete()  # the newest was never finished
    (checkpoints / "notes").make_dir()
    prune_checkpoints(checkpoints, keep=2)
    assert [store.name for store in checkpoints.list()] == ["notes", "step_00000007_b", "step_00000020_a"]
    prune_checkpoints(checkpoints, keep=2)
    assert [store.name for store in checkpoints.list()] == ["notes", "step_00000007_b", "step_00000020_a"]


def test_going_on_from_a_checkpoint_keeps_those_before_it(checkpoints: Store, tmp_path: Path) -> None:
    whole = checkpoints / checkpoint_name(3, "a")
    for step in (7, 30):
        shutil.copytree(whole.location, (checkpoints / checkpoint_name(step, "b")).location)
    delete_newer(checkpoints, FetchedCheckpoint(checkpoints / checkpoint_name(20, "a"), 20, tmp_path))
    assert names_in(checkpoints) == ["step_00000003_a", "step_00000007_b", "step_00000020_a"]


def test_pruning_keeps_the_best_one_beside_the_newest(checkpoints: Store) -> None:
    whole = checkpoints / checkpoint_name(3, "a")
    for step in (7, 30):
        shutil.copytree(whole.location, (checkpoints / checkpoint_name(step, "b")).location)
    prune_checkpoints(checkpoints, keep=1, best=whole)
    assert names_in(checkpoints) == ["step_00000003_a", "step_00000030_b"]
    newest = newest_of(checkpoints)
    assert newest.step == 30
    shutil.copytree(whole.location, (checkpoints / checkpoint_name(30, "c")).location)
    delete_newer(checkpoints, newest, best=whole)
    assert names_in(checkpoints) == ["step_00000003_a", "step_00000030_b"]
    prune_checkpoints(checkpoints, keep=1, best=newest.store)
    assert names_in(checkpoints) == ["step_00000030_b"]


def test_the_best_evaluation_travels_in_a_checkpoint(tmp_path: Path, trained: Trainer, checkpoints: Store) -> None:
    run = RunConfig()
    assert load_best(newest_of(checkpoints), run) == Best()
    best = Best("eval_loss", 2, 0.1 + 0.2, None, since=4)
    place = tmp_path / "with_best"
    place.mkdir()
    write_checkpoint(Store(str(place)), Snapshot.of(trained.policy, trained.optimizer, step=3, best=best))
    assert load_best(FetchedCheckpoint(Store(str(place)), 3, place), run) == best


def test_one_checkpoint_is_found_by_its_step_and_read_whole_or_refused(checkpoints: Store, tmp_path: Path) -> None:
    assert whole_at(checkpoints, 4) is None
    found = whole_at(checkpoints, 3)
    assert found is not None
    assert fetch_one(found.store, 3, tmp_path).folder == tmp_path / checkpoint_name(3, "a")
    flip_a_bit(found.store / "trainable.safetensors")
    with pytest.raises(ValueError) as caught:
        fetch_one(found.store, 3, Path(tempfile.mkdtemp(dir=tmp_path)))
    assert str(caught.value) == (
        f"The checkpoint {found.store.location} is damaged: trainable.safetensors does not have the hash it was saved with."
    )
    (found.store / "manifest.json").delete()
    assert whole_at(checkpoints, 3) is None


def test_an_upload_that_was_cut_short_does_not_count(checkpoints: Store, tmp_path: Path) -> None:
    whole = newest_of(checkpoints).store
    remote = Store.at(f"file://{tmp_path}/remote")
    (remote / checkpoint_name(20, "a")).upload(Path(whole.location))
    newest = newest_of(remote)
    assert newest.step == 20
    (newest.store / "optimizer.safetensors").delete()
    assert fetch(remote) is None
