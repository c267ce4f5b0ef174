"""What Ray Tune's questions and reports do to the queue, the trials' folders and the log. No cluster is needed for it."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from rayalign.config.tune import TuneConfig
from rayalign.storage import Store
from rayalign.sweeps.searcher import TABLE_SECONDS, QueueSearcher, SweepLines
from rayalign.sweeps.trials import Outcome, Queue, Trial, read_outcome, trials_of
from tests.watching import Clock

SWEEP = TuneConfig(metric="eval_m")


def searcher_of(folder: Path, **limit: Callable[[], float]) -> tuple[QueueSearcher, Queue]:
    def read(trial: Trial) -> Outcome:
        return read_outcome(Store.at(f"{folder}/trials/{trial.name}"), trial, metric="eval_m", mode="max")

    queue = Queue(trials_of([{"beta": 1.0}, {"beta": 2.0}], first_seed=42, num_seeds=1), read)
    return QueueSearcher(queue, Store.at(str(folder)), SweepLines(queue, SWEEP, total=2), **limit), queue


def states(queue: Queue) -> list[str]:
    return [outcome.state for outcome in queue.outcomes.values()]


def test_trials_are_handed_out_once_and_noted_in_their_folders(tmp_path: Path):
    searcher, _ = searcher_of(tmp_path)
    assert searcher.suggest("a") == {"name": "001_beta=1", "flags": {"beta": 1.0}}
    assert searcher.suggest("b") == {"name": "002_beta=2", "flags": {"beta": 2.0}}
    assert searcher.suggest("c") == Searcher.FINISHED
    note = json.loads((tmp_path / "trials" / "001_beta=1" / "trial.json").read_text())
    assert note == {"number": 1, "flags": {"beta": 1.0}, "seed": None}


def test_no_trial_is_handed_out_beyond_the_limit_which_may_change(tmp_path: Path):
    limits = iter([1, 1, 2])
    searcher, _ = searcher_of(tmp_path, most=lambda: next(limits))
    assert searcher.suggest("a") is not None
    assert searcher.suggest("b") is None
    assert searcher.suggest("b") == {"name": "002_beta=2", "flags": {"beta": 2.0}}


def test_no_other_trial_begins_where_trials_lack_the_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    searcher, _ = searcher_of(tmp_path)
    searcher.suggest("a")
    with caplog.at_level(logging.INFO):
        searcher.on_trial_result("a", {"step": 1, "loss": 0.5, "eval_mm": 1.0})
        searcher.on_trial_result("a", {"step": 2, "loss": 0.5, "eval_mm": 1.0})
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "--metric eval_m: the evaluations have no such metric. Did you mean eval_mm? Those that run go on to their end, "
        "and no other begins"
    ]
    assert searcher.suggest("b") == Searcher.FINISHED


def test_no_other_trial_begins_where_one_ended_without_the_metric_of_its_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    _, queue = searcher_of(tmp_path)
    lines = SweepLines(queue, replace(SWEEP, cost_metric="eval_drfit"), total=2)
    trial = next(iter(queue.outcomes.values())).trial
    lines.ended(Outcome(trial, "failed", error="The loss is nan."))
    lines.ended(Outcome(trial, "stopped", value=0.5))  # its note has no metrics of the end
    assert not lines.lack_metric
    lines.ended(Outcome(trial, "finished", value=0.5, sizes={"eval_m": 0.5, "eval_drift": 2.0}))
    assert lines.lack_metric
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "--cost_metric eval_drfit: the evaluations have no such metric. Did you mean eval_drift? Those that run go on to their "
        "end, and no other begins"
    ]


def test_a_trial_that_the_scheduler_ends_is_stopped(tmp_path: Path):
    searcher, queue = searcher_of(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"done": True, "step": 2, "num_steps": 9, "time_total_s": 3.5})
    assert states(queue) == ["stopped", "unfinished"]
    assert (queue.outcomes["001_beta=1"].num_steps, queue.outcomes["001_beta=1"].seconds) == (9, 3.5)


def test_a_trial_that_ends_with_the_sweep_goes_on_later(tmp_path: Path):
    searcher, queue = searcher_of(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"done": False, "step": 2})
    assert states(queue) == ["unfinished", "unfinished"]


def test_a_trial_that_fails_keeps_its_own_sentence_and_a_lost_one_gets_one(tmp_path: Path):
    searcher, queue = searcher_of(tmp_path)
    searcher.suggest("a")
    (tmp_path / "trials" / "001_beta=1" / "failed.json").write_text('{"error": "The loss is nan."}')
    searcher.on_trial_complete("a", error=True)
    searcher.suggest("b")
    searcher.on_trial_complete("b", error=True)
    assert [outcome.error for outcome in queue.outcomes.values()] == [
        "The loss is nan.",
        "its process was lost; the same command starts it again.",
    ]


def test_a_line_of_the_log_tells_what_a_trial_came_to(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    searcher, _ = searcher_of(tmp_path)
    searcher.suggest("a")
    (tmp_path / "trials" / "001_beta=1" / "summary.json").write_text('{"steps": 3, "seconds": 2.0, "eval_m": 0.75}')
    searcher.on_trial_complete("a", {"done": True})
    (line,) = caplog.messages
    assert line.startswith("Trial 1 (beta=1) finished, eval_m 0.75, best so far 0.75, 1 of 2 ended, about ")


def test_a_trial_that_noted_why_it_failed_is_not_taken_for_a_stopped_one(tmp_path: Path):
    searcher, queue = searcher_of(tmp_path)
    searcher.suggest("a")
    (tmp_path / "trials" / "001_beta=1" / "failed.json").write_text('{"error": "The loss is nan."}')
    searcher.on_trial_complete("a", {"done": True})
    assert [outcome.error for outcome in queue.outcomes.values()] == ["The loss is nan.", None]


def test_the_trials_that_run_are_shown_from_time_to_time(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    clock = Clock()
    queue = searcher_of(tmp_path)[1]
    lines = SweepLines(queue, SWEEP, total=2, clock=clock)
    first, second = (outcome.trial for outcome in queue.outcomes.values())
    lines.evaluated(first, {"step": 2, "num_steps": 9, "eval_m": 0.5})
    clock.now = TABLE_SECONDS
    lines.evaluated(second, {"step": 10, "num_steps": 90, "eval_m": 0.25})
    lines.evaluated(first, {"step": 4, "num_steps": 9, "eval_m": 0.75})
    assert [line.splitlines() for line in caplog.messages] == [
        ["Running:", "trial  beta  eval_m  step", "1      1     0.5     2/9", "2      2     0.25    10/90"]
    ]
    lines.ended(Outcome(first, "finished"))
    clock.now = 2 * TABLE_SECONDS
    lines.evaluated(second, {"step": 20})  # a checkpoint: what is known of it stays
    assert caplog.messages[-1].splitlines()[2:] == ["2      2     0.25    10/90"]
