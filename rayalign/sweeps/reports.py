"""What Ray Tune hears of a trial. Ray Train's controller imports this, so nothing heavy is imported here."""

from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback


class EvaluationReports(ray.train.UserCallback):
    """Hands each evaluation to Ray Tune, and of each checkpoint the step."""

    def __init__(self) -> None:
        self._to_tune = TuneReportCallback()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._to_tune.after_report(run_context, [metrics[0]], None)
