"""What a train worker hands to the driver. Ray Train's controller reads it on the way, so nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass

from rayalign.training.best import Best


@dataclass(frozen=True)
class WorkerResult:
    """A finished training: the last value of every metric, the number of steps and records, the best evaluation, the step that
    the model is of, and why the run stopped early, if it did. (`run_report.keep_scores` keeps what held-out pairs scored.)"""

    metrics: Mapping[str, float]
    num_steps: int
    num_training_records: int
    num_held_out_records: int
    best: Best
    model_step: int
    stopped: str | None
