"""Which evaluation of a run was its best, and whether the run should stop since none was better for long.

The best so far travels in every checkpoint, so that a run that goes on decides as one that was never interrupted. `NOTE`, in
the run's folder, names the checkpoint that is kept for it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rayalign.config.flags import did_you_mean
from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training.metric_names import EVALUATED, high_is_good

NOTE = "best.json"

DEFAULTS = ("eval_accuracy/likelihood", "eval_rewards/accuracies", "eval_loss")
"""Without --metric_for_best_model: the first of these that an evaluation has."""

TIE_BREAKER = "eval_rewards/margins"
"""Decides between equal values, where an evaluation has it: an accuracy on few records often stays the same."""


@dataclass(frozen=True)
class Verdict:
    """What an evaluation means for the run: whether a checkpoint of its step is needed, and whether the run stops there."""

    saves: bool = False
    stops: bool = False


GOES_ON = Verdict()


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: the `value` of `metric` at `step`, its `tie`-breaker, and how many evaluations came `since`.
    Before the first one all are None and 0."""

    metric: str | None = None
    step: int | None = None
    value: float | None = None
    tie: float | None = None
    since: int = 0
    judged_by: str | None = field(default=None, compare=False)
    """The flags that said what is better."""

    def after(self, step: int, metrics: Mapping[str, float], run: RunConfig) -> "Best":
        """What is the best after one more evaluation. A value that is not finite is never better.

        Raises ValueError where there is no such metric as --metric_for_best_model asks for.
        """
        metric = metric_name(run.metric_for_best_model, metrics)
        if metric is None:
            return self
        value, tie = metrics[metric], metrics.get(TIE_BREAKER)
        sign = 1 if is_greater_better(metric, run) else -1
        known = self if self.metric == metric else Best(metric, judged_by=_judged_by(run))
        is_better = math.isfinite(value) and (
            known.value is None
            or sign * value > sign * known.value
            or (value == known.value and tie is not None and known.tie is not None and tie > known.tie)
        )
        return Best(metric, step, value, tie, judged_by=known.judged_by) if is_better else replace(known, since=known.since + 1)

    def verdict(self, step: int, run: RunConfig) -> Verdict:
        """What the evaluation at `step`, the last one that `after` has seen, means."""
        stops = self.stops(run)
        return Verdict(saves=stops or self.step == step, stops=stops)

    def stops(self, run: RunConfig) -> bool:
        """Whether none was better for --early_stopping_patience evaluations."""
        return run.early_stopping_patience is not None and self.since >= run.early_stopping_patience

    @property
    def words(self) -> str:
        """The best so far, as a sentence names it."""
        return f"{self.metric} {self.value:.4g} at step {self.step}" if self.value is not None else f"no finite {self.metric}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, in a checkpoint."""
        return asdict(self)


def best_from(state: Any, run: RunConfig) -> Best:
    """What `to_dict` made. A checkpoint of a version without it knows no best, nor does one of a run that went by another
    --metric_for_best_model or --greater_is_better, or on other records (--max_eval_records)."""
    if not isinstance(state, dict) or {*state, "judged_by"} != set(asdict(Best())):
        return Best()
    best = Best(**state)
    return best if best.judged_by in (None, _judged_by(run)) else Best()


def _judged_by(run: RunConfig) -> str:
    return f"{run.metric_for_best_model}, {run.greater_is_better}, {run.max_eval_records}"


def metric_name(asked: str | None, metrics: Mapping[str, float]) -> str | None:
    """The metric that decides; None where an evaluation has none of the usual ones and none is asked for. A name may be given
    with or without its `eval_`."""
    if asked is None:
        return next((name for name in DEFAULTS if name in metrics), None)
    for name in (f"eval_{asked}", asked):
        if name in metrics:
            return name
    held_out = sorted(name for name in metrics if name.startswith(EVALUATED))
    raise ValueError(
        f"--metric_for_best_model {asked}: an evaluation has no such metric.{did_you_mean(asked, held_out)} It has "
        f"{', '.join(held_out)}."
    )


def is_of_benchmark(run: RunConfig) -> bool:
    """Whether --metric_for_best_model is a metric of one of --eval_benchmarks, so that not the workers find the best checkpoint
    but who judges it beside the training."""
    named = (run.metric_for_best_model or "").removeprefix(EVALUATED).partition("/")[0]
    return named in {argument.partition(":")[0].replace("-", "_").lower() for argument in run.eval_benchmarks}


def is_greater_better(metric: str, run: RunConfig) -> bool:
    """As --greater_is_better says, else by the metric's name."""
    if run.greater_is_better is not None:
        return run.greater_is_better
    return high_is_good(metric)


def write_note(folder: Store, best: Best, checkpoint: str) -> None:
    """Marks a checkpoint in the run's folder as the best one, once it is whole."""
    note = {"step": best.step, "metric": best.metric, "value": best.value, "checkpoint": checkpoint}
    (folder / NOTE).write_json(note)


def best_checkpoint(folder: Store) -> Store | None:
    """The checkpoint of a run's folder that is marked as the best one; None where there is none or the mark is damaged."""
    try:
        name = (folder / NOTE).read_json_object().get("checkpoint")
    except (FileNotFoundError, ValueError):
        return None
    checkpoint = folder / "checkpoints" / name if isinstance(name, str) and "/" not in name else None
    return checkpoint if checkpoint is not None and checkpoint.exists() else None
