import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rayalign.storage import Store
from rayalign.training import saving
from rayalign.training.best import Best, best_checkpoint
from rayalign.training.checkpoint import Snapshot
from rayalign.training.checkpoint_folder import whole_checkpoints
from rayalign.training.saving import CheckpointWriter, free_memory

GIB = 2**30


def snapshot_at(step: int, weights: Tensor | None = None) -> Snapshot:
    weights = torch.full((3,), float(step)) if weights is None else weights
    tensors = {"trainable.safetensors": {"w": weights}, "optimizer.safetensors": {"w|step": torch.tensor(1.0)}}
    return Snapshot(step, tensors, {"step": step}, Best("eval_loss", step, 0.5), rank=0, is_sharded=False)


def writer_in(folder: Path, *, keep: int = 9) -> CheckpointWriter:
    return CheckpointWriter(Store(str(folder)), attempt="a", keep=keep, rank=0, is_sharded=False)


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in whole_checkpoints(Store(str(folder)) / "checkpoints")]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no checkpoint is written."""
    opened, write = threading.Event(), saving.write_checkpoint

    def write_behind_gate(*arguments: object, **named: object) -> None:
        assert opened.wait(30)
        write(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_checkpoint", write_behind_gate)
    yield opened
    opened.set()


def test_what_is_written_beside_the_training_is_of_the_step_at_which_it_was_saved(
    tmp_path: Path, gate: threading.Event
) -> None:
    weights = torch.ones(3)
    with writer_in(tmp_path) as writer:
        writer.save(snapshot_at(5, weights), is_best=False)
        weights.fill_(7)  # the training goes on
        writer.check()
        assert not steps_in(tmp_path)
        gate.set()
    assert steps_in(tmp_path) == [5]
    (file,) = (tmp_path / "checkpoints").glob("*/trainable.safetensors")
    assert load_file(file)["w"].tolist() == [1, 1, 1]


def test_without_memory_for_a_copy_the_training_waits_until_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: 17.0)  # for 16 bytes: too little is left
    monkeypatch.setattr(Snapshot, "copied", lambda snapshot: pytest.fail("there is no room for a copy"))
    with writer_in(tmp_path) as writer:
        writer.save(snapshot_at(5), is_best=False)
        assert steps_in(tmp_path) == [5]


def test_checkpoints_are_written_one_after_the_other_and_the_newest_and_best_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), writer_in(tmp_path, keep=1) as writer:
        for step in (1, 2, 3):
            writer.save(snapshot_at(step), is_best=step == 1)
    assert steps_in(tmp_path) == [3, 1]
    best = best_checkpoint(Store(str(tmp_path)))
    assert best is not None
    assert best.name == "step_00000001_a"
    assert [message.partition(":")[0] for message in caplog.messages] == [f"Checkpoint of step {step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("call", ["save", "check", "wait", "leave"])
def test_what_the_writing_fails_with_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    failed = threading.Event()

    def fail(*arguments: object, **named: object) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_checkpoint", fail)

    def run() -> None:
        with writer_in(tmp_path) as writer:
            writer.save(snapshot_at(1), is_best=False)
            assert failed.wait(30)
            if call == "save":
                writer.save(snapshot_at(2), is_best=False)
            while call == "check":
                writer.check()
            if call == "wait":
                writer.wait()

    with pytest.raises(OSError, match="No space left on device"):
        run()


def test_a_run_that_fails_leaves_the_checkpoint_whole_that_was_being_written(tmp_path: Path, gate: threading.Event) -> None:
    def run() -> None:
        with writer_in(tmp_path) as writer:
            writer.save(snapshot_at(4), is_best=False)
            threading.Timer(0.2, gate.set).start()
            raise RuntimeError("a worker is lost")

    with pytest.raises(RuntimeError, match="a worker is lost"):
        run()
    assert steps_in(tmp_path) == [4]


def test_free_memory_is_that_of_the_machine_or_what_its_container_leaves(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == float("inf")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable:    {32 * 2**20} kB\nHugePages_Free: 0\n")
    assert free_memory(tmp_path) == 32 * GIB
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text(f"anon 12\ninactive_file {2 * GIB}\n")
    (group / "memory.current").write_text(f"{5 * GIB}\n")
    for limit, free in (("max", 32), (f"{8 * GIB}", 5), (f"{80 * GIB}", 32)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert free_memory(tmp_path) == free * GIB
