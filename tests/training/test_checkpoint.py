import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rayalign.algorithms import DPO
from rayalign.config.sections import ModelConfig, OptimizerConfig, TunerConfig
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts
from rayalign.storage import Store
from rayalign.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
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
        write_checkpoint(place, trained.policy, trained.optimizer, step=step)
    return Store(str(tmp_path / "checkpoints"))


def newest_of(checkpoints: Store) -> Checkpoint:
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    return newest


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
    write_checkpoint(tmp_path, fresh.policy, fresh.optimizer, step=0)
    load_checkpoint(Checkpoint(Store(str(tmp_path)), 0), other.policy, other.optimizer)
    assert equal(weights_of(fresh), weights_of(other))


def test_a_checkpoint_holds_only_safetensors_and_json(checkpoints: Store, trained: Trainer) -> None:
    place = newest_of(checkpoints).store.local_path
    assert place is not None
    assert sorted(file.name for file in place.iterdir()) == FILES
    with safe_open(place / "trainable.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(trained.policy.trainable)
    with safe_open(place / "optimizer.safetensors", framework="pt") as moments:
        assert len(list(moments.keys())) == 3 * len(trained.policy.trainable)
    assert json.loads((place / "state.json").read_text()) == {"step": 20, "torch": torch.__version__}
    assert sorted(json.loads((place / "manifest.json").read_text())) == FILES[1:]


def test_the_newest_is_the_one_with_the_most_steps_whatever_else_lies_there(checkpoints: Store) -> None:
    (checkpoints / "step_99_notes.txt").write_bytes(b"")
    (checkpoints / "step_x_a" / "manifest.json").write_json({})
    (checkpoints / "old" / "manifest.json").write_json({})
    with_later_attempt = checkpoints / checkpoint_name(3, "z")
    shutil.copytree((checkpoints / checkpoint_name(3, "a")).location, with_later_attempt.location)
    (checkpoints / "step_99_notes.txt").delete()
    assert newest_of(checkpoints) == Checkpoint(checkpoints / "step_00000020_a", 20)


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(Store(str(tmp_path))) is None
    assert newest_checkpoint(Store(str(tmp_path / "nothing"))) is None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("no manifest", "it has no manifest, so it was never finished"),
        ("half a manifest", "its manifest is cut short"),
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
    with caplog.at_level(logging.WARNING, logger="rayalign.training.checkpoint"):
        assert newest_of(checkpoints).step == 3
    assert caplog.messages == [f"Passing over checkpoint {store.location}: {problem.format(size=size)}."]


def test_a_flipped_bit_is_found_out_before_anything_is_restored(folder: Path, checkpoints: Store) -> None:
    newest = newest_of(checkpoints)
    file = Path((newest.store / "trainable.safetensors").location)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other = trainer_of(folder, seed=2)
    before = weights_of(other)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(newest, other.policy, other.optimizer)
    assert str(caught.value) == (
        f"The checkpoint {newest.store.location} is damaged: trainable.safetensors does not have the hash it was saved with. "
        "Delete its folder; the same command then continues from an earlier checkpoint, or from the start."
    )
    assert equal(weights_of(other), before)


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
    write_checkpoint(tmp_path, one.policy, one.optimizer, step=0, scaler=one.scaler)
    before = weights_of(other)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(Checkpoint(Store(str(tmp_path)), 0), other.policy, other.optimizer, scaler=other.scaler)
    assert str(caught.value) == f"The checkpoint {tmp_path} {types}. Pass the same --dtype."
    assert equal(weights_of(other), before)
    load_checkpoint(Checkpoint(Store(str(tmp_path)), 0), one.policy, one.optimizer, scaler=one.scaler)


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


def test_an_upload_that_was_cut_short_does_not_count(checkpoints: Store, tmp_path: Path) -> None:
    whole = newest_of(checkpoints).store
    remote = Store.at(f"file://{tmp_path}/remote")
    (remote / checkpoint_name(20, "a")).upload(Path(whole.location))
    newest = newest_of(remote)
    assert newest.step == 20
    (newest.store / "optimizer.safetensors").delete()
    assert newest_checkpoint(remote) is None
