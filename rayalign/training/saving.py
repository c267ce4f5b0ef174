"""Checkpoints that are written beside the training. It stands still while what they hold is copied to the CPU's memory, one
tensor after the other; hashing, writing and uploading happen in a thread, of one checkpoint at a time."""

import concurrent.futures
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from rayalign.storage import Store
from rayalign.training.best import best_checkpoint, write_note
from rayalign.training.checkpoint import Snapshot, write_checkpoint
from rayalign.training.checkpoint_folder import Checkpoint, checkpoint_name, prune_checkpoints
from rayalign.training.distributed import gather, group_beside

logger = logging.getLogger(__name__)

LEFT_FREE = 0.1
"""The share of the machine's free memory that a copy leaves."""

LAST_SECONDS = 120.0
"""How long a run that fails waits for the checkpoint that is being written."""


class CheckpointWriter:
    """Writes the checkpoints of a run's folder, in one worker of it; `keep` of them stay, the best one, and those that somebody
    `waits` for.

    `copies`: how many workers on its machine copy what they have at the same time. A context: within it checkpoints are saved,
    and at its end the last one is whole. What fails in the thread is raised by the next call.
    """

    def __init__(
        self,
        folder: Store,
        *,
        attempt: str,
        keep: int,
        rank: int,
        is_sharded: bool,
        copies: int = 1,
        waits: Callable[[Checkpoint], bool] = lambda checkpoint: False,
    ) -> None:
        self._folder, self._attempt, self._keep, self._rank, self._copies = folder, attempt, keep, rank, copies
        self._waits = waits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._group: dist.ProcessGroup | None = group_beside() if is_sharded else None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._writing is not None:
            concurrent.futures.wait([self._writing], LAST_SECONDS)
        self._thread.shutdown(wait=False)

    def save(self, snapshot: Snapshot, *, is_best: bool) -> None:
        """Copies what a worker has of a checkpoint and begins to write it, once the one before is whole. Every worker calls it
        that has some of it. Where the machine's memory has no room for a copy, the training waits until all is written."""
        began = time.monotonic()
        self.wait()
        if snapshot.num_bytes * self._copies < (1 - LEFT_FREE) * free_memory():
            snapshot = snapshot.copied()
            stood = time.monotonic() - began
            self._writing = self._thread.submit(self._write, snapshot, is_best, stood)
        else:
            self._write(snapshot, is_best, None)

    def wait(self) -> None:
        """Until what was saved is whole."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def whole(self, step: int) -> Store:
        """The checkpoint that was saved after some steps, once it is whole."""
        self.wait()
        return self._folder / "checkpoints" / checkpoint_name(step, self._attempt)

    def check(self) -> None:
        """Raises what the thread has failed with."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self, snapshot: Snapshot, is_best: bool, stood: float | None) -> None:
        began = time.monotonic()
        name = checkpoint_name(snapshot.step, self._attempt)
        together = functools.partial(gather, group=self._group)
        write_checkpoint(self._folder / "checkpoints" / name, snapshot, gather=together)
        if self._rank == 0:
            seconds = time.monotonic() - began
            words = "Checkpoint of step %d: written in %.2f s; the training stood still for %.2f s"
            logger.info(words, snapshot.step, seconds, seconds if stood is None else stood)
            if is_best:
                write_note(self._folder, snapshot.best, name)
            best = best_checkpoint(self._folder)
            prune_checkpoints(self._folder / "checkpoints", keep=self._keep, best=best, waits=self._waits)
        if snapshot.is_sharded:
            together(None)  # until then what another worker writes next would seem damaged, and be deleted


def free_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that can be had on this machine and in this container; infinite where Linux does not tell."""
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, KeyError):
        available = 1024.0 * _numbers(root / "proc/meminfo")["MemAvailable:"]
        with contextlib.suppress(OSError, KeyError, ValueError):  # no limit: the file says max
            cached = _numbers(group / "memory.stat")["inactive_file"]
            used = int((group / "memory.current").read_text()) - cached
            available = min(available, int((group / "memory.max").read_text()) - used)
        return available
    return math.inf


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file of the kernel, which has lines of a name and a number."""
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}
