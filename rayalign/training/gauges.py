"""A run's metrics as gauges of Ray, which Ray's own exporters offer to Prometheus: deploy/grafana/rayalign.json shows them."""

import re
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

EXPORTED = "ray_"
"""What Ray puts before the name of every metric."""

IDLE = "rayalign_worker_idle_seconds"
"""Seconds since a worker last moved; each worker has one."""

STEP = "rayalign_train_step"


def gauge_name(name: str) -> str:
    """The gauge of a metric, by its name in sinks: eval/rewards/margins is rayalign_eval_rewards_margins."""
    return "rayalign_" + re.sub(r"[^a-zA-Z0-9]+", "_", name)


class Gauges:
    """A sink: the newest value of each metric of the run, from the first worker. Each has the tags `run` and `rank`."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}

    def open(self, run: str, config: Mapping[str, Any]) -> bool:
        return False  # nothing of an earlier process is kept

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._set(STEP, step)
        for name, value in metrics.items():
            self._set(gauge_name(name), value)

    def idle(self, seconds: float) -> None:
        self._set(IDLE, seconds)

    def close(self) -> None:
        """Nothing: what Ray has collected it offers as long as the worker lives."""

    def _set(self, name: str, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, "Of a run of rayalign.", tag_keys=("run", "rank"))
        self._gauges[name].set(value, self._tags)
