"""The sentences of runs that end early: stopped by a signal, or by a failure of the cluster. What is kept, and how to go on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from rayalign.cluster import RAY_ERRORS, cause_in_words, user_error_in
from rayalign.config.config import Config
from rayalign.config.endings import TRACEBACK_VARIABLE, RunFailed, Terminated
from rayalign.storage import Store
from rayalign.training.checkpoint import newest_complete
from rayalign.training.metrics import read_metrics

T = TypeVar("T")

OF_RAY = (0, signal.SIGTERM)
"""Exit codes with which Ray's own handlers of signals leave the program (in Ray Train's `fit`, and as `ray.init` sets one)."""


@contextlib.contextmanager
def told_endings(reached: Callable[[], str]) -> Iterator[None]:
    """Raises, in place of what ends a run: the user's error where one is behind it, else KeyboardInterrupt (or Terminated) or
    RunFailed with a sentence, in which `reached` says how far the run came and how it goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        told_before = isinstance(stop, KeyboardInterrupt) and stop.args
        if told_before or (isinstance(stop, SystemExit) and stop.code not in OF_RAY):
            raise
        terminated = isinstance(stop, Terminated) or (isinstance(stop, SystemExit) and stop.code == signal.SIGTERM)
        kind = Terminated if terminated else KeyboardInterrupt
        raise kind(f"interrupted {reached()}") from None
    except RAY_ERRORS as error:
        mended = user_error_in(error)
        if mended is not None:
            raise mended from None
        raise RunFailed(
            f"the run was ended by a failure of the cluster: {cause_in_words(error)} It ended {reached()} "
            f"({TRACEBACK_VARIABLE}=1 shows the traceback.)"
        ) from error


def beside_signals(work: Callable[[], T], *, check: Callable[[], None] = lambda: None) -> T:
    """The result of some work, which a thread does while this one waits for it, for signals, and for what `check` raises.

    In the main thread Ray Train's `fit` would handle Ctrl-C itself, by leaving the program with code 1 and without a word.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            done.set_exception(error)

    threading.Thread(target=run, name="beside-signals", daemon=True).start()
    while True:
        with contextlib.suppress(FutureTimeout):
            return done.result(timeout=0.5)
        if done.done():  # a TimeoutError of the work itself
            return done.result()
        check()


def run_reached(config: Config) -> str:
    """How far a run came, what is kept and how it goes on: what follows the words `interrupted` or `It ended`."""
    folder = Store.at(str(config.run.output_dir))
    again = _same_command(config)
    checkpoint = newest_complete(folder / "checkpoints")
    step = max((int(line["step"]) for line in read_metrics(folder / "metrics.jsonl") if "step" in line), default=0)
    if checkpoint is None:
        reached = f"at step {step}, before the first checkpoint (--save_steps)" if step else "before the first step"
        return f"{reached}; {again} starts from step 0, with the records that are encoded."
    return f"at step {max(step, checkpoint.step)}; the checkpoint of step {checkpoint.step} is kept, {again} goes on from it."


def _same_command(config: Config) -> str:
    if config.run.overwrite:
        return "the same command without --overwrite"
    return "the same command" if config.run.resume else "the same command with --resume true"
