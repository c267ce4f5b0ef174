"""The queue of trials as Ray Tune asks for it, and what the log says of them: a line as each trial ends, and from time to time
a table of those that run."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from rayalign.config.flags import did_you_mean
from rayalign.config.tune import TuneConfig
from rayalign.progress import duration
from rayalign.storage import Store
from rayalign.sweeps.ranking import mode_of
from rayalign.sweeps.results import aligned, figure
from rayalign.sweeps.search_space import ALGORITHM
from rayalign.sweeps.trials import FAILED_NOTE, STOPPED_NOTE, TRIAL_NOTE, TRIALS, Outcome, Queue, Trial, short
from rayalign.training.metric_names import EVALUATED

logger = logging.getLogger(__name__)

TABLE_SECONDS = 30.0
"""Between two tables of the trials that run, at least."""


class QueueSearcher(Searcher):
    """The queue as Ray Tune asks for it: Tune's trials are its next ones, as long as fewer are under way than `most` tells, and
    what became of them is noted in their folders."""

    def __init__(
        self, queue: Queue, folder: Store, lines: "SweepLines", *, most: Callable[[], float] = lambda: math.inf
    ) -> None:
        super().__init__()
        self._queue, self._folder, self._lines = queue, folder, lines
        self._running: dict[str, Trial] = {}
        self._most = most

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        """A trial's name and flags, None for now, or `FINISHED`."""
        if self._lines.lack_metric:
            return Searcher.FINISHED
        if len(self._running) >= self._most():
            return None
        trial = self._queue.next()
        if trial is None:
            return Searcher.FINISHED
        self._running[trial_id] = trial
        (self._folder / TRIALS / trial.name / TRIAL_NOTE).write_json(trial.to_dict())
        return {"name": trial.name, "flags": trial.flags}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._lines.evaluated(self._running[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id)
        of_trial, result = self._folder / TRIALS / trial.name, result or {}
        if error and not (of_trial / FAILED_NOTE).exists():
            (of_trial / FAILED_NOTE).write_json({"error": "its process was lost; the same command starts it again."})
        elif not error and result.get("done") and not any((of_trial / name).exists() for name in ("summary.json", FAILED_NOTE)):
            note = {"step": result.get("step"), "num_steps": result.get("num_steps"), "seconds": result.get("time_total_s")}
            (of_trial / STOPPED_NOTE).write_json(note)
        self._lines.ended(self._queue.ended(trial))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as in `save`."""


class SweepLines:
    """Says what each trial came to as it ends, the best so far and the time to go; and where those stand that run."""

    def __init__(self, queue: Queue, sweep: TuneConfig, *, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._sweep, self._total, self._clock = queue, sweep, total, clock
        self._started = self._table_at = clock()
        self._ended = 0
        self._running: dict[str, tuple[Trial, Mapping[str, Any]]] = {}
        self.lack_metric = False
        """Whether a trial was evaluated without the metric that ranks them, or ended without that of its cost: then none has
        it."""

    def evaluated(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """A trial that runs was evaluated."""
        if self._sweep.metric in result:
            self._running[trial.name] = (trial, result)
        else:
            self._lacks("metric", self._sweep.metric, trial, result)
        now = self._clock()
        if now - self._table_at >= TABLE_SECONDS and self._running:
            self._table_at = now
            logger.info("Running:\n%s", self._table())

    def _lacks(self, flag: str, metric: str, trial: Trial, metrics: Iterable[str]) -> None:
        """A trial has been found without a metric; another algorithm's may have it."""
        if ALGORITHM not in trial.setting and not self.lack_metric:
            self.lack_metric = True
            logger.warning(
                "--%s %s: the evaluations have no such metric.%s Those that run go on to their end, and no other begins",
                flag,
                metric,
                did_you_mean(metric, sorted(name for name in metrics if name.startswith(EVALUATED))),
            )

    def _table(self) -> str:
        """A line for each trial that has been evaluated and goes on."""
        found = self._running.values()
        names = list(dict.fromkeys(name for trial, _ in found for name in trial.flags))
        rows = [["trial", *names, self._sweep.metric, "step"]]
        for trial, result in found:
            values = [short(trial.flags[name]) if name in trial.flags else "-" for name in names]
            steps = f"{result['step']}/{result['num_steps']}" if "num_steps" in result else str(result["step"])
            rows.append([str(trial.number), *values, figure(result[self._sweep.metric]), steps])
        return aligned(rows)

    def ended(self, outcome: Outcome) -> None:
        """A trial has ended."""
        self._running.pop(outcome.trial.name, None)
        self._ended += 1
        cost = self._sweep.cost_metric
        if cost is not None and outcome.state == "finished" and outcome.value is not None and cost not in outcome.sizes:
            self._lacks("cost_metric", cost, outcome.trial, outcome.sizes)
        outcomes = self._queue.outcomes.values()
        ended = sum(outcome.has_ended or outcome.state == "failed" for outcome in outcomes)
        words = [f"{outcome.trial.words} {outcome.state}"]
        words += [f"at step {outcome.steps}"] if outcome.state == "stopped" else []
        words += [f"{self._sweep.metric} {outcome.value:.4g}"] if outcome.value is not None else []
        words += [outcome.error.rstrip(".")] if outcome.error else []
        values = [other.value for other in outcomes if other.state == "finished" and other.value is not None]
        if values:
            words.append(f"best so far {max(values) if mode_of(self._sweep) == 'max' else min(values):.4g}")
        left = self._total - ended
        if left > 0:
            seconds = (self._clock() - self._started) / self._ended * left
            words.append(f"{ended} of {self._total} ended, about {duration(seconds)} to go")
        logger.info("%s", ", ".join(words))
