"""Whether the machines of a run are about to change: then a checkpoint is written at once, from which the run goes on."""

import logging
import time
from collections.abc import Callable
from typing import Any

from rayalign.training.distributed import gather

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""About how often the workers look: Ray itself does no oftener. A look is an exchange of all workers, of some milliseconds."""


class Changes:
    """Looks, after a step, whether machines of the run's workers will be taken away (spot instances, `ray drain-node`, an
    autoscaler), as `find` has heard, and whether there is room for more workers (`has_room`), with whom Ray Train goes on."""

    def __init__(
        self,
        *,
        has_room: Callable[[], bool],
        find: Callable[[], Any],
        gather: Callable[[Any], list[Any]] = gather,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._has_room, self._find, self._gather, self._clock = has_room, find, gather, clock
        self._known: frozenset[str] = frozenset()
        self._had_room = False
        self._next_step: int | None = None
        self._last: tuple[int, float] | None = None

    def are_near(self, step: int) -> bool:
        """Whether a change is known that was not at the last look. Every worker calls it after each step, and gets the same."""
        if self._next_step is not None and step < self._next_step:
            return False
        info = self._find()
        # Clocks of workers differ, and what they see of the cluster: the first one says for all.
        steps, has_room = self._gather((self._steps_to_next(step), self._has_room()))[0]
        self._next_step = step + steps
        nodes = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        goes, comes = not nodes <= self._known, has_room and not self._had_room
        self._known, self._had_room = self._known | nodes, has_room
        if goes:
            ranks = ", ".join(map(str, info.preempted_ranks))
            seconds = f" in {info.deadline_ms / 1000 - time.time():.0f} s" if info.deadline_ms else ""
            logger.warning("The machine of rank %s will be taken away%s: a checkpoint is written at once", ranks, seconds)
        return goes or comes

    def _steps_to_next(self, step: int) -> int:
        now = self._clock()
        before, self._last = self._last, (step, now)
        if before is None or step == before[0] or now <= before[1]:
            return 1
        return max(1, int(LOOK_SECONDS * (step - before[0]) / (now - before[1])))
