"""What Ray Tune hears of a trial. Ray Train's controller imports this, so nothing heavy is imported here."""

from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback

from rayalign.training.metric_names import EVALUATED


class EvaluationReports(ray.train.UserCallback):
    """Hands each evaluation to Ray Tune: what Ray Train hears of a checkpoint has no metric, by which trials are compared."""

    def __init__(self) -> None:
        self._to_tune = TuneReportCallback()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if any(name.startswith(EVALUATED) for name in metrics[0]):
            self._to_tune.after_report(run_context, [metrics[0]], None)
