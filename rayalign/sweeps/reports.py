"""What Ray Tune hears of a trial. Ray Train's controller imports this, so nothing heavy is imported here."""

from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback


class EvaluationReports(ray.train.UserCallback):
    """Hands each evaluation to Ray Tune. Of a checkpoint only the step: its metrics are those of an evaluation before, and a
    scheduler must not stop a trial that is about to write its model."""

    def __init__(self) -> None:
        self._to_tune = TuneReportCallback()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        told = metrics[0] if checkpoint is None else {"step": metrics[0]["step"]}
        self._to_tune.after_report(run_context, [told], None)
