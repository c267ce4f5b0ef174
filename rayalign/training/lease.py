"""The lease on a run's folder: of two runs that want the same one, the second is told who holds it.

The holder writes a small file every few seconds. What others go by is whether that file still changes while they look at it, on
their own clock: clocks of machines differ. On the holder's own machine a process that has ended gives way at once.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rayalign.config.endings import RunFailed
from rayalign.storage import Store

logger = logging.getLogger(__name__)

LEASE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A holder that gives no sign of life for so long has lost the folder. Long beside a beat: a busy store may delay some."""

SETTLE_SECONDS = 1.0
"""Between writing a lease and reading it back: the longest that another run may take between finding the folder free and
writing its own. (On a disk the first lease is made in one go.)"""

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder: `token` is this holding's own, `machine` tells machines and containers apart, `started` is
    the process's start on that machine, `since` and `beat` are seconds of its wall clock, `number` counts the beats."""

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: float
    beat: float
    number: int = 0

    @property
    def is_dead(self) -> bool:
        """Whether it certainly has ended: it ran on this machine, and no such process is left."""
        return self.machine == _machine() and _started(self.pid) != self.started

    @property
    def words(self) -> str:
        """Who it is, and since when."""
        return f"process {self.pid} on {self.host}, since {_time(self.since)}"


class Lease:
    """A folder held by this process. A thread gives signs of life and finds out when the folder was taken or deleted."""

    def __init__(self, folder: Store, holder: Holder) -> None:
        """`holder` stands in the folder's lease already."""
        self._file = folder / LEASE
        self._holder = holder
        self._ended = threading.Event()
        self._owner = os.getpid()
        self._waits_in_main_thread = threading.current_thread() is threading.main_thread()
        self.lost: str | None = None
        """What happened to the folder, in a sentence, once it is no longer this process's."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunFailed where the folder is no longer this process's."""
        if self.lost is not None:
            raise RunFailed(self.lost)

    def release(self) -> None:
        """Gives the folder up, where it is still this process's. (A forked child has nothing to give up.)"""
        if os.getpid() != self._owner:
            return
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if self.lost is None and _token(_read(self._file)) == self._holder.token:
                self._file.delete()

    def _beat(self) -> None:
        missing, failed = 0, False
        while not self._ended.wait(BEAT_SECONDS if not missing else LOOK_SECONDS):
            try:
                found = _read(self._file)
                if found is None:
                    missing += 1
                    if missing > 1:  # not a moment in which some file system shows neither the old nor the new file
                        self._lose(self._why_gone())
                        return
                    continue
                missing = 0
                if _token(found) != self._holder.token:
                    self._lose(self._why_taken(found))
                    return
                self._holder = replace(self._holder, beat=time.time(), number=self._holder.number + 1)
                self._file.write_json(asdict(self._holder))
                failed = False
            except OSError as error:
                if not failed:
                    logger.warning("Lease: no sign of life can be written to %s (%s)", self._file.location, error)
                failed = True

    def _lose(self, why: str) -> None:
        if self._ended.is_set():
            return
        self.lost = why
        if self._waits_in_main_thread and os.getpid() == self._owner:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _why_taken(self, found: bytes) -> str:
        holder = _parse(found)
        return (
            f"--output_dir {self._file.parent.location} was taken over by {holder.words if holder else 'something else'}: this "
            f"run had given no sign of life for {STALE_SECONDS:.0f} s. It ends here and writes nothing more."
        )

    def _why_gone(self) -> str:
        folder = self._file.parent
        if folder.list():
            return (
                f"{self._file.location} was deleted, so --output_dir {folder.location} is no longer held by this run. It ends "
                "here and writes nothing more; the same command goes on from what is kept."
            )
        return (
            f"--output_dir {folder.location} was deleted or moved while the run wrote into it. It ends here. Where nothing of "
            "it is left, the same command starts from step 0, with the records that are encoded."
        )


@contextlib.contextmanager
def held(folder: Store, *, patience: float = 0) -> Iterator[Lease]:
    """Holds a folder for this process. `patience` is for how many seconds a holder that is alive is waited for.

    Raises ValueError where another process holds the folder, and RunFailed in place of whatever ends the work inside once the
    folder was lost. A holder that gives no sign of life is waited for, and the folder then taken: a run that goes on after its
    machine was lost must not be refused.
    """
    is_new = not folder.exists()
    lease = Lease(folder, _acquire(folder, patience))
    try:
        yield lease
    except BaseException as error:
        if lease.lost is None or isinstance(error, RunFailed):
            raise
        raise RunFailed(lease.lost) from None
    finally:
        lease.release()
        if is_new and folder.local_path is not None:
            with contextlib.suppress(OSError):
                folder.local_path.rmdir()  # a run that was refused leaves no empty folder


def _acquire(folder: Store, patience: float) -> Holder:
    file = folder / LEASE
    now = time.time()
    mine = Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), now, now)
    deadline, is_first = time.monotonic() + patience, file.local_path is not None
    while True:
        if not _wait_until_free(file, deadline) and is_first and file.local_path is not None:
            if _create(file.local_path, mine):
                return mine
            is_first = False
            continue
        file.write_json(asdict(mine))
        time.sleep(SETTLE_SECONDS)
        if _token(_read(file)) == mine.token:
            return mine


def _create(file: Path, holder: Holder) -> bool:
    """Writes a lease where there is none; False where another process was quicker."""
    partial = Store(f"{file}.{holder.token}")
    partial.write_json(asdict(holder))
    try:
        os.link(partial.location, file)
    except FileExistsError:
        return False
    finally:
        partial.delete()
    return True


def _wait_until_free(file: Store, deadline: float) -> bool:
    """Returns once nobody holds the folder, or its holder has ended or been silent for STALE_SECONDS, whether there is such a
    holder's lease. Raises ValueError where it gives a sign of life after `deadline`."""
    seen, changed, said = _read(file), time.monotonic(), False
    while seen is not None:
        holder = _parse(seen)
        if holder is not None and holder.is_dead:
            logger.info("Lease: %s held %s and has ended", holder.words, file.parent.location)
            return True
        if not said:
            who = holder.words if holder else f"a damaged {file.name}"
            logger.info(
                "Lease: %s is held by %s. Waiting up to %.0f s for a sign of life; without one, this run takes it over",
                *(file.parent.location, who, STALE_SECONDS),
            )
            said = True
        time.sleep(LOOK_SECONDS if file.local_path is not None else BEAT_SECONDS / 2)
        found = _read(file)
        if found != seen:
            if found is not None and time.monotonic() > deadline:
                raise ValueError(_refusal(file.parent, _parse(found)))
            seen, changed = found, time.monotonic()
        elif time.monotonic() - changed > STALE_SECONDS:
            logger.info("Lease: no sign of life for %.0f s: taking over %s", STALE_SECONDS, file.parent.location)
            return True
    return False


def _refusal(folder: Store, holder: Holder | None) -> str:
    who = holder.words if holder else "something that writes no proper lease"
    last = f" Its last sign of life was at {_time(holder.beat)}." if holder else ""
    return (
        f"--output_dir {folder.location} is in use by another run ({who}).{last} Wait for its end or stop it, or pass another "
        f"--output_dir. (One that was killed gives way by itself: on its own machine at once, elsewhere {STALE_SECONDS:.0f} s "
        "after its last sign of life.)"
    )


def _read(file: Store) -> bytes | None:
    """The file's bytes, None where there is none. Only what is no file there is told from storage that fails."""
    try:
        return file.read_bytes() if file.local_path is None else file.local_path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Holder | None:
    try:
        fields: dict[str, Any] = json.loads(content)
        holder = Holder(**fields)
        _time(holder.since), _time(holder.beat)
        return holder if isinstance(holder.pid, int) else None
    except (ValueError, TypeError, OverflowError, OSError, RecursionError):
        return None


def _token(content: bytes | None) -> str | None:
    holder = _parse(content) if content is not None else None
    return holder.token if holder else None


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _machine() -> str:
    """What process ids are of: a start of a machine, and on Linux the container in it; by its name alone where there is no
    more to tell it by."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process of this machine started; '' where there is no such process, '?' where that can't be told."""
    try:
        # The name, in brackets, may hold anything; the start is the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "?"
    return "?"
