"""What a run that ends early says: how far it came, what is kept and how it goes on."""

import errno
import functools
import gc
import json
import logging
import os
import signal
import threading
import weakref
from pathlib import Path

import pytest
import ray.exceptions
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from safetensors import SafetensorError

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.endings import RunFailed, Terminated
from rayalign.config.sections import RunConfig
from rayalign.nodes import NodesLost
from rayalign.ray_lines import TRACEBACK_LOGGER
from rayalign.retries import StorageFailed
from rayalign.storage import Store
from rayalign.training import endings
from rayalign.training.checkpoint_folder import Checkpoint
from rayalign.training.endings import hide_known_tracebacks, run_reached, told_endings, with_restarts

NOTHING = "before the first step; the same command starts from step 0, with the records that are encoded."


def told(error: BaseException, **flags: object) -> BaseException:
    config = Config(DPO(), run=RunConfig(**flags))  # type: ignore[arg-type]
    with pytest.raises(BaseException) as caught, told_endings(functools.partial(run_reached, config)):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (Terminated(), Terminated),
        (SystemExit(0), KeyboardInterrupt),  # as Ray Train answers Ctrl-C
        (SystemExit(15), Terminated),  # as ray.init answers SIGTERM
    ],
)
def test_a_signal_is_told_whoever_caught_it(tmp_path: Path, error: BaseException, kind: type[BaseException]) -> None:
    ended = told(error, output_dir=str(tmp_path))
    assert type(ended) is kind
    assert str(ended) == f"interrupted {NOTHING}"
    assert told(ended, output_dir="/elsewhere") is ended


def test_other_exits_pass() -> None:
    ended = SystemExit(2)
    assert told(ended) is ended


def test_the_step_and_the_checkpoint_that_is_kept_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 7, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 8, "lo')
    assert str(told(KeyboardInterrupt(), output_dir=str(tmp_path))) == (
        "interrupted at step 7, before the first checkpoint (--save_steps); the same command starts from step 0, with the "
        "records that are encoded."
    )
    checkpoint = Checkpoint(Store.at(str(tmp_path)), 5)
    monkeypatch.setattr(endings, "newest_complete", lambda folder: checkpoint)
    for flags, again in (
        ({}, "the same command"),
        ({"overwrite": True}, "the same command without --overwrite"),
        ({"resume": False}, "the same command with --resume true"),
    ):
        assert str(told(KeyboardInterrupt(), output_dir=str(tmp_path), **flags)) == (
            f"interrupted at step 7; the checkpoint of step 5 is kept, {again} goes on from it."
        )


def test_a_failure_of_the_cluster_becomes_one_sentence_and_keeps_what_is_behind_it(tmp_path: Path) -> None:
    error = WorkerGroupError("", {0: ray.exceptions.WorkerCrashedError()})
    ended = told(error, output_dir=str(tmp_path))
    assert isinstance(ended, RunFailed)
    assert ended.__cause__ is error
    assert str(ended).startswith(
        "the run was ended by a failure of the cluster: a process or machine of the cluster was lost (WorkerCrashedError: "
    )
    assert str(ended).endswith(f"It ended {NOTHING} (RAYALIGN_TRACEBACK=1 shows the traceback.)")
    assert "\n" not in str(ended)


def test_nodes_that_were_lost_are_told_with_what_is_kept(tmp_path: Path) -> None:
    ended = told(NodesLost("--num_workers 2: the cluster has room for 1. Add nodes."), output_dir=str(tmp_path))
    assert isinstance(ended, RunFailed)
    assert str(ended) == (
        "the run was ended by the loss of its nodes: --num_workers 2: the cluster has room for 1. Add nodes. It ended "
        f"{NOTHING} (RAYALIGN_TRACEBACK=1 shows the traceback.)"
    )


def test_the_users_mistake_behind_a_failure_of_the_cluster_is_told_as_such(tmp_path: Path) -> None:
    error = RayTaskError("loop", "Traceback ...", ValueError("bad flag"), proctitle="w", pid=1, ip="127.0.0.1")
    ended = told(error.as_instanceof_cause(), output_dir=str(tmp_path))
    assert type(ended) is ValueError
    assert str(ended) == "bad flag"


FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/a/checkpoints/x")


DATA_TASK = """Traceback (most recent call last):
  File "store.py", line 1, in write
OSError: [Errno 28] No space left on device: '/cache/shard'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
ray.data.exceptions.UserCodeException: UDF failed to process a data block."""


def in_a_worker(error: BaseException) -> Exception:
    """A failure as Ray Train reports it where a worker's function raised an error."""
    return WorkerGroupError("", {1: UserExceptionWithTraceback(error, "Traceback ...\nOSError: ..."), 0: RayActorError()})


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (FULL, "a disk is full ([Errno 28] No space left on device: '/runs/a/checkpoints/x'). Free some space."),
        (in_a_worker(FULL), "a disk is full ([Errno 28] No space left on device: '/runs/a/checkpoints/x'). Free some space."),
        (
            ControllerError(FULL),
            "a disk is full ([Errno 28] No space left on device: '/runs/a/checkpoints/x'). Free some space.",
        ),
        (
            in_a_worker(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
            "a disk is full (Error while serializing: I/O error: No space left on device (os error 28)). Free some space.",
        ),
        (
            RayTaskError(
                "write", "Traceback ...\nOSError: [Errno 122] Disk quota exceeded", OSError(122, "Disk quota exceeded")
            ),
            "the quota of a disk is used up (OSError: [Errno 122] Disk quota exceeded). Free some space, or raise the quota.",
        ),
        (
            RayTaskError("write", DATA_TASK, UserCodeException("UDF failed to process a data block.")),
            "a disk is full (OSError: [Errno 28] No space left on device: '/cache/shard'). Free some space.",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/a"),
            "a file system is read-only ([Errno 30] Read-only file system: '/a'). Make it writable, or choose another "
            "--output_dir.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a"),
            "access to a file is refused ([Errno 13] Permission denied: '/a'). Give this user the right to it, or choose "
            "another --output_dir.",
        ),
        (
            OSError(errno.EFBIG, "File too large"),
            "a file became larger than this process may write ([Errno 27] File too large). Raise the limit (ulimit -f).",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "/a"),
            "there can't be such a file or folder ([Errno 17] File exists: '/a'). Choose another --output_dir.",
        ),
        (
            OSError("When uploading: AWS Error ACCESS_DENIED during PutObject operation: Access Denied."),
            "what it asks for is refused or not there (When uploading: AWS Error ACCESS_DENIED during PutObject operation: "
            "Access Denied).",
        ),
        (
            StorageFailed("s3://data/a.png: the storage failed 6 times in 49 s, the last time with 503."),
            "s3://data/a.png: the storage failed 6 times in 49 s, the last time with 503.",
        ),
    ],
    ids=[
        "here",
        "worker",
        "controller",
        "safetensors",
        "task",
        "data task",
        "read-only",
        "refused",
        "limit",
        "a file there",
        "object store",
        "object store that fails",
    ],
)
def test_storage_that_fails_for_good_ends_a_run_with_one_sentence_and_no_restart(
    tmp_path: Path, error: Exception, trouble: str
) -> None:
    starts = []

    def work() -> None:
        starts.append(1)
        raise error

    config = Config(DPO(), run=RunConfig(output_dir=str(tmp_path)))
    with pytest.raises(RunFailed) as caught, told_endings(functools.partial(run_reached, config)):
        with_restarts(work, max_failures=3)
    assert len(starts) == 1
    assert str(caught.value) == (
        f"the run was ended by its storage: {trouble} It ended {NOTHING} (RAYALIGN_TRACEBACK=1 shows the traceback.)"
    )


def test_an_error_of_the_system_that_is_none_of_storage_is_raised_as_it_is() -> None:
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), ConnectionResetError(errno.ECONNRESET, "reset")):
        assert told(error) is error


def test_storage_that_does_not_even_tell_what_is_kept_is_told(tmp_path: Path) -> None:
    def reached() -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/a")

    with pytest.raises(RunFailed) as caught, told_endings(reached):
        raise FULL
    assert "What is kept can't be told ([Errno 13] Permission denied: '/a'); the same command" in str(caught.value)


LOST = WorkerGroupError("", {0: RayActorError()})


def runs_until(steps: list[int], *, max_failures: int) -> int:
    """Work that loses its cluster at each of some steps and then is done; returns how often it was started."""
    starts, newest = 0, 0

    def work() -> int:
        nonlocal starts, newest
        starts += 1
        if starts > len(steps):
            return starts
        newest = steps[starts - 1]
        raise LOST

    return with_restarts(work, max_failures=max_failures, progress=lambda: newest)


def test_failures_count_as_long_as_no_new_checkpoint_is_between_them() -> None:
    assert runs_until([], max_failures=0) == 1
    assert runs_until([0, 0, 0], max_failures=3) == 4
    assert runs_until([10, 10, 20, 20, 30], max_failures=2) == 6
    for steps, limit in (([0], 0), ([10], 0), ([0, 0], 1), ([10, 10], 1), ([10, 20, 20, 20], 2), ([10, 5, 5], 2)):
        with pytest.raises(WorkerGroupError):
            runs_until(steps, max_failures=limit)


def test_a_workers_log_has_no_traceback_of_what_the_driver_tells_in_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    hide_known_tracebacks()
    log = logging.getLogger(TRACEBACK_LOGGER)
    for last in (
        str(FULL),
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:25504.",
        "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:5546: Connection reset by peer.",
        "TypeError: a mistake in the program",
    ):
        log.error("Error in training function:\nTraceback ...\n%s", last)
    (said,) = caplog.messages
    assert said.endswith("TypeError: a mistake in the program")


def test_a_restart_is_said_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    runs_until([0], max_failures=3)
    (said,) = caplog.messages
    assert said.startswith("Restart 1 of 3 (--max_failures): a process or machine of the cluster was lost (RayActorError")


def test_what_a_user_can_mend_is_met_only_once() -> None:
    starts = []

    def work() -> None:
        starts.append(1)
        raise in_a_worker(ValueError("no such column"))

    with pytest.raises(ValueError, match="no such column"), told_endings(str):
        with_restarts(work, max_failures=3)
    assert len(starts) == 1


def test_what_is_checked_ends_the_wait_for_the_work_of_a_thread() -> None:
    def check() -> None:
        raise RunFailed("taken")

    ended = threading.Event()
    with pytest.raises(RunFailed, match="taken"):
        endings.beside_signals(lambda: ended.wait(20), check=check)
    ended.set()


def test_a_signal_reaches_the_program_while_it_waits_for_the_work_of_a_thread() -> None:
    ended = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        endings.beside_signals(lambda: ended.wait(20))
    ended.set()


def test_what_a_work_held_that_nobody_waits_for_any_more_stays_until_the_program_ends() -> None:
    """Handles of actors: Ray ends a process that lets go of one while Ray itself ends."""

    class Handle:
        pass

    held: list[weakref.ref[Handle]] = []
    ended = threading.Event()

    def work() -> None:
        handle = Handle()
        held.append(weakref.ref(handle))
        ended.wait(20)
        raise RuntimeError("Ray is gone")

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endings.beside_signals(work, check=check)
    (thread,) = (each for each in threading.enumerate() if each.name == "beside-signals")
    ended.set()
    thread.join()
    gc.collect()
    assert held[0]() is not None


def test_the_work_of_a_thread_has_a_result_or_an_error() -> None:
    def fail() -> None:
        raise TimeoutError("its own")

    assert endings.beside_signals(lambda: threading.current_thread().name) == "beside-signals"
    with pytest.raises(TimeoutError, match="its own"):
        endings.beside_signals(fail)
