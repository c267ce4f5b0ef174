"""How a run goes on after a failure of the cluster, and the sentences of runs that end early: stopped by a signal, by a failure
of the cluster or by storage. What is kept, and how to go on."""

import contextlib
import errno
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from rayalign.config.config import Config
from rayalign.config.endings import STORAGE_TROUBLE, TRACEBACK_VARIABLE, RunFailed, Terminated
from rayalign.nodes import NodesLost
from rayalign.ray_errors import RAY_ERRORS, cause_in_words, causes_of, is_lost_peer, user_error_in
from rayalign.ray_lines import TRACEBACK_LOGGER
from rayalign.retries import LASTING_WORDS, StorageFailed
from rayalign.storage import Store
from rayalign.training.checkpoint_folder import newest_complete
from rayalign.training.metrics import read_metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

OF_RAY = (0, signal.SIGTERM)
"""Exit codes with which Ray's own handlers of signals leave the program (in Ray Train's `fit`, and as `ray.init` sets one)."""

UNMISTAKABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Those that no code catches and goes on from: wherever one stands in a traceback, it is what ended the run."""

_LEFT: list[Future[Any]] = []
"""Of works that nobody waits for any more. Ray's own end has them raise an error, whose traceback holds handles of actors; a
process that lets go of one while Ray ends is ended by Ray at once, with Ray's code or by SIGSEGV."""


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
        trouble = storage_trouble(error)
        cause = f"its storage: {trouble}" if trouble else f"a failure of the cluster: {cause_in_words(error)}"
        raise _failed(cause, reached) from error
    except NodesLost as error:
        raise _failed(f"the loss of its nodes: {error}", reached) from error
    except OSError as error:
        trouble = storage_trouble(error)
        if trouble is None:
            raise
        raise _failed(f"its storage: {trouble}", reached) from error


def _failed(cause: str, reached: Callable[[], str]) -> RunFailed:
    try:
        ended = f"It ended {reached()}"
    except OSError as error:
        ended = f"What is kept can't be told ({error}); the same command goes on from it."
    return RunFailed(f"the run was ended by {cause} {ended} ({TRACEBACK_VARIABLE}=1 shows the traceback.)")


def storage_trouble(error: Exception) -> str | None:
    """What is wrong with storage, where that is behind an error and lasts, in a sentence or two with what helps."""
    for cause in causes_of(error):
        if isinstance(cause, StorageFailed):  # which is no disk, and says what it is
            return f"{str(cause).rstrip('.')}."
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
        text = lines[-1]
        found = [(cause.errno, text)] if isinstance(cause, OSError) and cause.errno else [(_number_in(text), text)]
        # A task's error is the text of a traceback, whose last lines may be of an error that followed.
        found += [(number, line) for line in reversed(lines) if (number := _number_in(line)) in UNMISTAKABLE]
        for number, words in found:
            if number in STORAGE_TROUBLE:
                what, helps = STORAGE_TROUBLE[number]
                return f"{what} ({words.rstrip('.')}). {helps}"
        if isinstance(cause, OSError) and any(words in text for words in LASTING_WORDS):
            return f"what it asks for is refused or not there ({text.rstrip('.')})."
    return None


def hide_known_tracebacks() -> None:
    """In a train worker: keeps out of the log what the driver has a sentence for, and what the other workers meet then."""
    logging.getLogger(TRACEBACK_LOGGER).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    lines = record.getMessage().splitlines()
    return not any(_number_in(line) in UNMISTAKABLE or is_lost_peer(line) for line in lines)


def _number_in(line: str) -> int | None:
    """The system's number of an error, as Python, Arrow or safetensors write it."""
    named = re.search(r"(?i)\[errno (\d+)\]|\(os error (\d+)\)", line)
    return int(named[1] or named[2]) if named else None


def with_restarts(work: Callable[[], T], *, max_failures: int, progress: Callable[[], int] = lambda: 0) -> T:
    """The result of some work on the cluster, which is begun again where the cluster fails it: a process or a machine is lost.

    What counts towards `max_failures` are failures in a row between which `progress` gave no higher number. What a user can
    fix, and storage that will fail again, are raised at once.
    """
    reached, failures = progress(), 0
    while True:
        try:
            return work()
        except RAY_ERRORS as error:
            if user_error_in(error) is not None or storage_trouble(error) is not None:
                raise
            now = progress()
            failures = 1 if now > reached else failures + 1
            reached = max(now, reached)
            if failures > max_failures:
                raise
            logger.warning("Restart %d of %d (--max_failures): %s", failures, max_failures, cause_in_words(error))


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
    try:
        while True:
            with contextlib.suppress(FutureTimeout):
                return done.result(timeout=0.5)
            if done.done():  # a TimeoutError of the work itself
                return done.result()
            check()
    except BaseException:
        if not done.done():
            _LEFT.append(done)
        raise


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
