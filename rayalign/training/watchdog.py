"""Says which worker waits for what when a run no longer moves. It ends nothing."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

LEAST_SECONDS = 600.0
"""How long a worker may stand still before that is said, at least."""

TIMES_LONGEST = 3.0
"""And how many times the longest pause between two signs so far: a run of long steps or uploads is given more."""

LOOK_SECONDS = 15.0

STACK_LINES = 12
"""Calls that are shown, the innermost ones."""

WAITS = {
    ("rayalign.data.stream", "taken"): "the next batch of data",
    ("rayalign.training.distributed", "sum_over_workers"): "the gradients of the other workers",
    ("rayalign.training.distributed", "gather"): "the other workers",
    ("rayalign.training.distributed", "start_alike"): "the first worker's weights",
    ("rayalign.training.saving", "wait"): "the checkpoint before, which is still being written",
    ("rayalign.training.changes", "are_near"): "the other workers",
    ("rayalign.training.worker", "_save"): "a checkpoint, which is copied or written",
    ("rayalign.training.worker", "_write_model"): "the writing of the model",
    ("rayalign.training.checkpoint_folder", "fetch_newest"): "the newest checkpoint, to go on from",
    ("rayalign.policy.loading", "load_policy"): "the loading of the model",
    ("rayalign.training.reference_pass", "_compute"): "a forward pass of the reference",
    ("rayalign.training.answers", "ask"): "the model's own answers to held-out prompts",
    ("rayalign.training.loop", "evaluate"): "a forward pass of an evaluation",
    ("rayalign.training.loop", "evaluate_shuffled"): "a forward pass of an evaluation",
    ("rayalign.training.loop", "gradients"): "a forward or backward pass",
}
"""What a worker waits for, by the module and name of the innermost function of these that it is in."""


class Watchdog:
    """Watches the thread that makes it, from a thread of its own; `say` is told once for each time that it stands still, `idle`
    at every look for how many seconds it has."""

    def __init__(
        self,
        rank: int,
        say: Callable[[str], None],
        *,
        idle: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._say, self._idle, self._clock = rank, say, idle, clock
        self._watched = threading.current_thread()
        self._last = clock()
        self._longest = 0.0
        self._has_said = False
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._look_on, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def tick(self) -> None:
        """The watched thread moves: a batch, a step, an evaluation or a checkpoint is done or begins."""
        now = self._clock()
        self._longest = max(self._longest, now - self._last)
        self._last, self._has_said = now, False

    def watched(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; each that arrives is a sign."""
        for item in items:
            self.tick()
            yield item

    def look(self) -> None:
        """Says where the watched thread stands, if it has stood still for too long and that is not said yet."""
        seconds = self._clock() - self._last
        self._idle(seconds)
        if self._has_said or seconds < max(LEAST_SECONDS, TIMES_LONGEST * self._longest):
            return
        self._has_said = True
        frame = sys._current_frames().get(self._watched.ident or 0)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame)[-STACK_LINES:])
            self._say(
                f"Rank {self._rank} has not moved for {seconds / 60:.0f} min: it waits for {waits_for(frame)}. The run goes on "
                f"waiting. Where it is:\n{stack}".rstrip()
            )

    def _look_on(self) -> None:
        self.look()
        while not self._ended.wait(LOOK_SECONDS) and self._watched.is_alive():
            self.look()


def waits_for(frame: FrameType | None) -> str:
    """What a thread waits for, by its stack; of a function that nobody has named, where it is."""
    place = "nothing that is known"
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if (module, name) in WAITS:
            return WAITS[module, name]
        if module.startswith("rayalign.") and place == "nothing that is known":
            place = f"{module}.{name}"
        frame = frame.f_back
    return place
