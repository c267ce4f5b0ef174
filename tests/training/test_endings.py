"""What a run that ends early says: how far it came, what is kept and how it goes on."""

import functools
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import ray.exceptions
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from rayalign.algorithms import DPO
from rayalign.config.config import Config
from rayalign.config.endings import RunFailed, Terminated
from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training import endings
from rayalign.training.checkpoint import Checkpoint
from rayalign.training.endings import run_reached, told_endings

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


def test_the_users_mistake_behind_a_failure_of_the_cluster_is_told_as_such(tmp_path: Path) -> None:
    error = RayTaskError("loop", "Traceback ...", ValueError("bad flag"), proctitle="w", pid=1, ip="127.0.0.1")
    ended = told(error.as_instanceof_cause(), output_dir=str(tmp_path))
    assert type(ended) is ValueError
    assert str(ended) == "bad flag"


def test_a_signal_reaches_the_program_while_it_waits_for_the_work_of_a_thread() -> None:
    ended = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        endings.beside_signals(lambda: ended.wait(20))
    ended.set()


def test_the_work_of_a_thread_has_a_result_or_an_error() -> None:
    def fail() -> None:
        raise TimeoutError("its own")

    assert endings.beside_signals(lambda: threading.current_thread().name) == "beside-signals"
    with pytest.raises(TimeoutError, match="its own"):
        endings.beside_signals(fail)
