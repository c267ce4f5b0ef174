"""By which metric trials are ranked, and in which direction."""

import logging

import pytest

from rayalign.config.tune import TuneConfig
from rayalign.sweeps.ranking import mode_of, tell_odd_mode, with_whole_names


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("eval_rewards/accuracies", "max"),
        ("eval_accuracy/per_token", "max"),
        ("eval_loss", "min"),
        ("eval_nll_loss", "min"),
    ],
)
def test_a_metrics_name_tells_whether_a_high_or_a_low_value_is_good(metric: str, mode: str):
    assert mode_of(TuneConfig(metric=metric)) == mode
    assert [mode_of(TuneConfig(metric=metric, mode="max")), mode_of(TuneConfig(metric=metric, mode="min"))] == ["max", "min"]


def test_a_mode_that_contradicts_the_metrics_name_is_told(caplog: pytest.LogCaptureFixture):
    for sweep in (
        TuneConfig(),
        TuneConfig(mode="max"),
        TuneConfig(metric="eval_loss"),
        TuneConfig(metric="eval_loss", mode="min"),
    ):
        tell_odd_mode(sweep)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        tell_odd_mode(TuneConfig(metric="eval_loss", mode="max"))
    assert caplog.messages == [
        "--metric eval_loss with --mode max: by its name a low value of it is good, and the trial with the highest one will be "
        "the best, as asked. Leave --mode out unless this is meant"
    ]


@pytest.mark.parametrize(
    ("given", "whole"),
    [("loss", "eval_loss"), ("rewards/accuracies", "eval_rewards/accuracies"), ("eval_loss", "eval_loss")],
)
def test_trials_are_compared_by_evaluations_with_or_without_eval_in_the_name(given: str, whole: str):
    sweep = with_whole_names(TuneConfig(metric=given, cost_metric=given))
    assert (sweep.metric, sweep.cost_metric) == (whole, whole)
    assert with_whole_names(TuneConfig()).cost_metric is None
