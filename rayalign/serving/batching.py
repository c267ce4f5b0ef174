"""Jobs gathered into batches: one thread runs those that wait, as many at a time as there may be.

`scorer` scores by it. While a batch runs, the next one gathers.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Batcher(Generic[Job]):
    """Hands jobs to `run` in batches: those that wait, the oldest first, and up to `max_batch_size` at a time.

    `run` must not raise: it says of each job itself how it ended.
    """

    def __init__(self, run: Callable[[Sequence[Job]], None], *, max_batch_size: int) -> None:
        self._run, self._max_batch_size = run, max_batch_size
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
            self._changed.wait_for(lambda: bool(self._waiting))
            batch, self._waiting = self._waiting[: self._max_batch_size], self._waiting[self._max_batch_size :]
            self._running = len(batch)
            return batch
