"""What Ray Tune hears of trials that Ray Train runs."""

from types import SimpleNamespace
from typing import Any

import pytest

from rayalign.sweeps import reports
from rayalign.sweeps.reports import EvaluationReports


def test_ray_tune_hears_of_evaluations_and_of_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    to_tune = SimpleNamespace(after_report=lambda context, metrics, checkpoint: told.append((metrics, checkpoint)))
    monkeypatch.setattr(reports, "TuneReportCallback", lambda: to_tune)
    callback = EvaluationReports()
    evaluation = {"step": 4, "num_steps": 12, "eval_loss": 0.5}
    callback.after_report(None, [evaluation, {"step": 4}], None)
    callback.after_report(None, [{"step": 4}, {"step": 4}], None)  # of a checkpoint
    assert told == [([evaluation], None)]
