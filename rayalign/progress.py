"""How far a long stage of a run is, its rate, and how long the rest will take."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

LINE_SECONDS = 5.0
"""A stage says how far it is at most this often."""

RECENT_STEPS = 20
"""Optimizer steps whose mean is the rate that a run tells."""


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


class StepProgress:
    """How fast a training run is: the mean of its last steps, the first one of a start left out, in which kernels are chosen
    and data begin to flow.

    `every` names what comes between steps, each after so many of them and after the last. How long the last one took counts
    into the time to go; one that has not come yet does not.
    """

    def __init__(self, first: int, last: int, *, every: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._last, self._every, self._clock = first, last, every, clock
        self._done = first
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        """Seconds and pairs."""
        self._pauses: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, pairs: int) -> Iterator[None]:
        """A step of so many pairs of all workers happens within."""
        began = self._clock()
        yield
        if self._done > self._first:
            self._recent.append((self._clock() - began, pairs))
        self._done += 1

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """One of `every` happens within."""
        began = self._clock()
        yield
        self._pauses[name] = self._clock() - began

    @property
    def pairs_per_second(self) -> float | None:
        """None as long as there was only the first step."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(pairs for _, pairs in self._recent) / seconds if seconds else None

    @property
    def seconds_to_go(self) -> float | None:
        """None as long as there was only the first step."""
        if not self._recent:
            return None
        step = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        return (self._last - self._done) * step + sum(
            seconds * self._still_to_come(self._every[name]) for name, seconds in self._pauses.items()
        )

    def _still_to_come(self, every: int) -> int:
        return self._last // every - self._done // every + (self._last % every > 0)

    @property
    def words(self) -> str:
        """Such as "30.6 pairs/s, 12 min to go"; empty as long as there was only the first step."""
        rate, seconds = self.pairs_per_second, self.seconds_to_go
        return f"{rate:.1f} pairs/s, {duration(seconds)} to go" if rate is not None and seconds is not None else ""


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "58 s", "12 min", "3 h 20 min"."""
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
