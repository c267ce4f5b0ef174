"""How long each stage of a run takes, over all starts of its command: measured by stopwatches, kept in the run's folder.

The driver begins a start and ends it; in between, the first worker brings it up to date at every evaluation. What a start that
is cut short does after that is lost.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rayalign.report.page import STAGES, Times
from rayalign.storage import Store

logger = logging.getLogger(__name__)

RUN_TIMES = "times.json"
"""The file of a run's folder: a list of the command's starts, each with the times (seconds since 1970) at which it began and
was last seen, and the seconds of its stages in the driver and in the workers."""


class Stopwatch:
    """Seconds of the stages of a process; what happens in a stage within another counts for the inner one alone. `before` are
    those of an earlier process; `began`: seconds since 1970."""

    def __init__(
        self,
        before: Mapping[str, float] | None = None,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.began = time.time() if began is None else began
        self._seconds = Counter(before)
        self._clock = clock
        self._open: list[str] = []
        self._since = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        assert name in STAGES, name
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, up to now."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since  # type: ignore[assignment]  # a Counter of fractions
        self._since = now


def begin_start(folder: Store, watch: Stopwatch) -> None:
    """Notes that the command was started, with what the driver has done so far."""
    start = {"began": watch.began, "seen": time.time(), "driver": watch.seconds, "workers": {}}
    _keep(folder, [*_starts(folder), start])


def workers_before(folder: Store) -> dict[str, float]:
    """The stages of workers that this start has lost."""
    starts = _starts(folder)
    return dict(starts[-1]["workers"]) if starts else {}


def note_workers(folder: Store, seconds: Mapping[str, float]) -> Times:
    """Brings the newest start up to date with a worker's stages; returns the times of all starts."""
    return _note(folder, "workers", seconds)


def end_start(folder: Store, watch: Stopwatch) -> Times:
    """The same with the driver's stages."""
    return _note(folder, "driver", watch.seconds)


def _note(folder: Store, who: str, seconds: Mapping[str, float]) -> Times:
    starts = _starts(folder)
    if starts:
        starts[-1] |= {"seen": time.time(), who: dict(seconds)}
        _keep(folder, starts)
    return times_of(starts)


def times_of(starts: Sequence[Mapping[str, Any]]) -> Times:
    """The seconds of some starts together, and of their stages by name; what no stage accounts for is the last one's."""
    total = sum(max(0.0, start["seen"] - start["began"]) for start in starts)
    stages: Counter[str] = Counter()
    for start in starts:
        stages.update(start["driver"])
        stages.update(start["workers"])
    stages["other"] += max(0.0, total - sum(stages.values()))
    return Times(round(total, 1), {name: round(stages[name], 1) for name in STAGES if name in stages}, len(starts))


def _keep(folder: Store, starts: list[dict[str, Any]]) -> None:
    try:
        (folder / RUN_TIMES).write_json(starts)
    except OSError as error:  # no run ends over its times
        logger.warning("The run's times could not be kept: %s", error)


def _starts(folder: Store) -> list[dict[str, Any]]:
    """The starts that are noted; a file that can't be read, or is something else, counts as none."""
    file = folder / RUN_TIMES
    try:
        found = file.read_json() if file.exists() else []
    except (OSError, ValueError) as error:
        logger.warning("The run's times can't be read: %s", error)
        return []
    starts = found if isinstance(found, list) else []
    return [start for start in starts if isinstance(start, dict) and {"began", "seen", "driver", "workers"} <= start.keys()]
