"""How far a long stage of a run is, its rate, and how long the rest will take."""

import time
from collections.abc import Callable

LINE_SECONDS = 5.0
"""A stage says how far it is at most this often."""


class Progress:
    """Counts what is done of `total`.

    The rate is the mean since the first count came in. What passed before it is mostly the start of processes or the loading of
    a model, so the first count has no rate, nor has one within LINE_SECONDS of it: several processes that started together
    finish their first work together, which says nothing about a rate.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._started = clock()
        self._first: tuple[int, float] | None = None
        """What was done with the first count, and when."""
        self._now = self._last_line = self._started

    def add(self, count: int) -> bool:
        """Counts more as done. Returns whether a line is due: with the first count and then every LINE_SECONDS, until all is
        done."""
        self.done += count
        self._now = self._clock()
        is_first = self._first is None
        if self._first is None:
            self._first = (self.done, self._now)
        is_due = (is_first or self._now - self._last_line >= LINE_SECONDS) and self.done < self.total
        if is_due:
            self._last_line = self._now
        return is_due

    @property
    def seconds(self) -> float:
        """Since the stage began, up to the last count."""
        return self._now - self._started

    @property
    def rate(self) -> float | None:
        """Done per second; None where it is not known yet."""
        if self._first is None:
            return None
        done, since = self.done - self._first[0], self._now - self._first[1]
        return done / since if done and since >= LINE_SECONDS else None

    @property
    def time_to_go(self) -> str | None:
        """As words, "40 s to go"; None where the rate is not known yet."""
        rate = self.rate
        return f"{(self.total - self.done) / rate:.0f} s to go" if rate else None

    def line(self, what: str) -> str:
        """As words, "512 of 1500 WHAT, 17/s, 58 s to go", or "256 of 1500 WHAT after 52 s" as long as there is no rate."""
        counted = f"{self.done} of {self.total} {what}"
        if self.rate is None:
            return f"{counted} after {self.seconds:.0f} s"
        return f"{counted}, {per_second(self.rate)}, {self.time_to_go}"


def per_second(rate: float) -> str:
    """A rate as a person reads it: "9.4/s", "1250/s"."""
    return f"{rate:.1f}/s" if rate < 10 else f"{rate:.0f}/s"
