"""How a command ends: a sentence and an exit code for each end that is not a mistake in the program.

| code | the end |
|---|---|
| 0 | done |
| 1 | a failure of the cluster or of its storage: the same command goes on (or, with a traceback, a mistake in the program) |
| 2 | what the user can mend: flags, data, a model's files, a loss that is no longer finite |
| 130 | Ctrl-C (SIGINT) |
| 143 | SIGTERM, as `ray job stop`, Kubernetes and batch systems send it |
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rayalign.retries import StorageFailed

STORAGE_TROUBLE = {
    errno.ENOSPC: ("a disk is full", "Free some space."),
    errno.EDQUOT: ("the quota of a disk is used up", "Free some space, or raise the quota."),
    errno.EFBIG: ("a file became larger than this process may write", "Raise the limit (ulimit -f)."),
    errno.EROFS: ("a file system is read-only", "Make it writable, or choose another --output_dir."),
    errno.EACCES: ("access to a file is refused", "Give this user the right to it, or choose another --output_dir."),
    errno.EPERM: ("access to a file is refused", "Give this user the right to it, or choose another --output_dir."),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
        ("there can't be such a file or folder", "Choose another --output_dir."),
    ),
    errno.EIO: ("a disk fails", "Choose another --output_dir, and copy there what is kept."),
}
"""What storage will answer again however often it is asked, by the system's number: what it is, and what helps."""

TRACEBACK_VARIABLE = "RAYALIGN_TRACEBACK"
"""1 shows the traceback of an end that is otherwise a sentence."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; like Ctrl-C, no `except Exception` stops it."""


class RunFailed(RuntimeError):
    """The cluster failed a run, and nobody's flags or data did: what happened, what is kept and how to go on."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with a sentence on stderr and one of this module's exit codes; with RAYALIGN_TRACEBACK=1 errors keep
    their traceback."""
    _raise_on_sigterm()
    try:
        yield
    except (ValueError, FloatingPointError, RunFailed, StorageFailed) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _end(f"error: {error}", 1 if isinstance(error, RunFailed | StorageFailed) else 2)
    except OSError as error:
        if os.environ.get(TRACEBACK_VARIABLE) or error.errno not in STORAGE_TROUBLE:
            raise
        what, helps = (words.replace("another --output_dir", "another place") for words in STORAGE_TROUBLE[error.errno])
        _end(f"error: {what} ({str(error).rstrip('.')}). {helps}", 1)
    except KeyboardInterrupt as stop:
        _end(str(stop) or "interrupted", exit_code_of(stop))


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """128 + the number of the signal that it stands for."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def _raise_on_sigterm() -> None:
    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _end(words: str, code: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.SIG_IGN)  # the end is on its way: what ends Ray's processes must not be cut short
    sys.stderr.write(f"{words}\n")
    raise SystemExit(code) from None
