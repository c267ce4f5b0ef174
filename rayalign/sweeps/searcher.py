"""The queue of trials as Ray Tune asks for it, and a line of the log as each trial ends."""

import logging
import time
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from rayalign.config.sections import TuneConfig
from rayalign.progress import duration
from rayalign.storage import Store
from rayalign.sweeps.trials import FAILED_NOTE, STOPPED_NOTE, TRIAL_NOTE, TRIALS, Outcome, Queue, Trial

logger = logging.getLogger(__name__)


class QueueSearcher(Searcher):
    """The queue as Ray Tune asks for it: Tune's trials are its next ones, and what became of them is noted in their folders."""

    def __init__(self, queue: Queue, folder: Store, told: Callable[[Outcome], None]) -> None:
        super().__init__()
        self._queue, self._folder, self._told = queue, folder, told
        self._running: dict[str, Trial] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        trial = self._queue.next()
        if trial is None:
            return Searcher.FINISHED
        self._running[trial_id] = trial
        (self._folder / TRIALS / trial.name / TRIAL_NOTE).write_json(trial.to_dict())
        return {"name": trial.name, "flags": trial.flags}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id)
        of_trial, result = self._folder / TRIALS / trial.name, result or {}
        if error and not (of_trial / FAILED_NOTE).exists():
            (of_trial / FAILED_NOTE).write_json({"error": "its process was lost; the same command starts it again."})
        elif not error and result.get("done") and not (of_trial / "summary.json").exists():
            note = {"step": result.get("step"), "num_steps": result.get("num_steps"), "seconds": result.get("time_total_s")}
            (of_trial / STOPPED_NOTE).write_json(note)
        self._told(self._queue.ended(trial))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `save`."""


class TrialLines:
    """Says what each trial came to as it ends, the best so far and the time to go."""

    def __init__(self, queue: Queue, sweep: TuneConfig, *, total: int) -> None:
        self._queue, self._sweep, self._total = queue, sweep, total
        self._started, self._ended = time.monotonic(), 0

    def __call__(self, outcome: Outcome) -> None:
        self._ended += 1
        outcomes = self._queue.outcomes.values()
        ended = sum(outcome.has_ended or outcome.state == "failed" for outcome in outcomes)
        words = [f"{outcome.trial.words} {outcome.state}"]
        words += [f"at step {outcome.steps}"] if outcome.state == "stopped" else []
        words += [f"{self._sweep.metric} {outcome.value:.4g}"] if outcome.value is not None else []
        words += [outcome.error.rstrip(".")] if outcome.error else []
        values = [other.value for other in outcomes if other.state == "finished" and other.value is not None]
        if values:
            words.append(f"best so far {max(values) if self._sweep.mode == 'max' else min(values):.4g}")
        left = self._total - ended
        if left > 0:
            seconds = (time.monotonic() - self._started) / self._ended * left
            words.append(f"{ended} of {self._total} ended, about {duration(seconds)} to go")
        logger.info("%s", ", ".join(words))
