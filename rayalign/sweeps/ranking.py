"""By which metric a sweep's trials are ranked, and whether a high or a low value of it is good."""

import dataclasses
import logging
from typing import Literal

from rayalign.config.tune import TuneConfig
from rayalign.training.metric_names import EVALUATED, high_is_good

logger = logging.getLogger(__name__)

Mode = Literal["max", "min"]


def with_whole_names(sweep: TuneConfig) -> TuneConfig:
    """The same sweep whose metrics have their `eval_`, with or without which they may be given: trials are compared on held-out
    records, and the metrics of a step's training records have the same names without it."""
    return dataclasses.replace(
        sweep, metric=_whole_name(sweep.metric), cost_metric=sweep.cost_metric and _whole_name(sweep.cost_metric)
    )


def mode_of(sweep: TuneConfig) -> Mode:
    """Whether a high or a low --metric is good: as --mode says, else by the metric's name."""
    return sweep.mode or _mode_by_name(sweep.metric)


def tell_odd_mode(sweep: TuneConfig) -> None:
    """Says where --mode ranks first what the metric's name calls the worst."""
    by_name = _mode_by_name(sweep.metric)
    if sweep.mode not in (None, by_name):
        logger.warning(
            "--metric %s with --mode %s: by its name a %s value of it is good, and the trial with the %s one will be the best, "
            "as asked. Leave --mode out unless this is meant",
            sweep.metric,
            sweep.mode,
            *(("high", "lowest") if by_name == "max" else ("low", "highest")),
        )


def _whole_name(metric: str) -> str:
    return metric if metric.startswith(EVALUATED) else f"{EVALUATED}{metric}"


def _mode_by_name(metric: str) -> Mode:
    return "max" if high_is_good(metric) else "min"
