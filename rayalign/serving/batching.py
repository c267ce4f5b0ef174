"""Jobs gathered into batches: one thread runs those that wait, as many at a time as fit together.

`engine` runs generations by it, `scorer` scores. A batch runs to its end before the next one begins.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Batcher(Generic[Job]):
    """Hands jobs to `run` in batches: the oldest that waits, and up to `max_batch_size` in all of those with the same `key`.
    Where nothing waited before, the first job waits `wait_seconds` for others.

    `run` must not raise: it says of each job itself how it ended.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], None],
        *,
        key: Callable[[Job], Hashable],
        max_batch_size: int,
        wait_seconds: float,
    ) -> None:
        self._run, self._key = run, key
        self._max_batch_size, self._wait_seconds = max_batch_size, wait_seconds
        self._waiting: list[Job] = []
        self._running = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="batches", daemon=True).start()

    @property
    def num_open(self) -> int:
        """Jobs that wait or run."""
        return len(self._waiting) + self._running

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            batch = self._next_batch()
            self._run(batch)
            with self._changed:
                self._running = 0

    def _next_batch(self) -> list[Job]:
        with self._changed:
            if not self._waiting:
                self._changed.wait_for(lambda: bool(self._waiting))
                deadline = time.monotonic() + self._wait_seconds
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self._max_batch_size, timeout=max(0.0, deadline - time.monotonic())
                )
            key = self._key(self._waiting[0])
            batch = [job for job in self._waiting if self._key(job) == key][: self._max_batch_size]
            taken = set(map(id, batch))
            self._waiting = [job for job in self._waiting if id(job) not in taken]
            self._running = len(batch)
            return batch
