"""The best evaluation of a run, and the end of one in which none is better for long."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayalign.config.sections import RunConfig
from rayalign.storage import Store
from rayalign.training.best import NOTE, Best, Verdict, best_checkpoint, best_from, is_greater_better, write_note

LIKELIHOOD, ACCURACY, MARGIN, LOSS = "eval_accuracy/likelihood", "eval_rewards/accuracies", "eval_rewards/margins", "eval_loss"


def judged(evaluations: list[dict[str, float]], **flags: Any) -> tuple[Best, list[Verdict]]:
    """Evaluations at steps 10, 20 and so on: the best of them, and what each meant."""
    run, best, verdicts = RunConfig(**flags), Best(), []
    for number, metrics in enumerate(evaluations, start=1):
        best = best.after(10 * number, metrics, run)
        verdicts.append(best.verdict(10 * number, run))
    return best, verdicts


def values(metric: str, *numbers: float) -> list[dict[str, float]]:
    return [{metric: number, "loss": 1.0} for number in numbers]


def test_the_highest_accuracy_is_the_best_and_each_best_so_far_is_saved() -> None:
    best, verdicts = judged(values(LIKELIHOOD, 0.5, 0.7, 0.6, 0.8, 0.8))
    assert best == Best(LIKELIHOOD, 40, 0.8, None, since=1)
    assert [verdict.saves for verdict in verdicts] == [True, True, False, True, False]
    assert not any(verdict.stops for verdict in verdicts)


def test_the_lowest_loss_is_the_best() -> None:
    best, verdicts = judged(values(LOSS, 3.0, 2.0, 2.5), metric_for_best_model="eval_loss")
    assert (best.step, best.value) == (20, 2.0)
    assert [verdict.saves for verdict in verdicts] == [True, True, False]


@pytest.mark.parametrize(
    ("metrics", "metric"),
    [
        ({LIKELIHOOD: 0.5, ACCURACY: 0.9, LOSS: 1.0}, LIKELIHOOD),
        ({ACCURACY: 0.9, LOSS: 1.0}, ACCURACY),
        ({LOSS: 1.0, "loss": 2.0}, LOSS),
        ({"loss": 2.0}, None),
    ],
)
def test_without_a_flag_the_likelihood_decides_where_there_is_one(metrics: dict[str, float], metric: str | None) -> None:
    best, _ = judged([metrics])
    assert best.metric == metric


def test_equal_values_are_told_apart_by_the_margin() -> None:
    evaluations = [{LIKELIHOOD: 0.75, MARGIN: margin} for margin in (0.1, 0.3, 0.2, 0.3)]
    best, _ = judged(evaluations)
    assert (best.step, best.tie, best.since) == (20, 0.3, 2)
    best, _ = judged([*evaluations, {LIKELIHOOD: 0.8, MARGIN: -1.0}])
    assert (best.step, best.tie) == (50, -1.0)


@pytest.mark.parametrize("asked", ["eval_nll_loss", "nll_loss"])
def test_any_metric_may_be_asked_for_with_or_without_its_prefix(asked: str) -> None:
    best, _ = judged(
        [{"eval_nll_loss": loss, "nll_loss": -loss, LIKELIHOOD: 0.5} for loss in (2.0, 1.0, 3.0)], metric_for_best_model=asked
    )
    assert (best.metric, best.step) == ("eval_nll_loss", 20)


def test_a_metric_of_the_training_may_be_asked_for() -> None:
    best, _ = judged([{"grad_norm": norm, LOSS: 1.0} for norm in (2.0, 1.0)], metric_for_best_model="grad_norm")
    assert (best.metric, best.step) == ("grad_norm", 20)


def test_a_metric_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError) as caught:
        judged([{LIKELIHOOD: 0.5, LOSS: 1.0}], metric_for_best_model="eval_accuracy/likelyhood")
    assert str(caught.value) == (
        "--metric_for_best_model eval_accuracy/likelyhood: an evaluation has no such metric. Did you mean "
        "eval_accuracy/likelihood? It has eval_accuracy/likelihood, eval_loss."
    )


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        *((name, True) for name in (LIKELIHOOD, ACCURACY, MARGIN, "eval_logps/chosen", "eval_rewards/chosen")),
        *((name, False) for name in (LOSS, "eval_nll_loss", "eval_kl", "grad_norm", "eval_perplexity")),
    ],
)
def test_whether_high_is_good_is_told_by_the_name_unless_the_flag_says_it(metric: str, greater: bool) -> None:
    assert is_greater_better(metric, RunConfig()) is greater
    assert is_greater_better(metric, RunConfig(metric_for_best_model=metric, greater_is_better=False)) is False
    assert is_greater_better(metric, RunConfig(metric_for_best_model=metric, greater_is_better=True)) is True


def test_the_run_stops_after_as_many_evaluations_without_a_better_one() -> None:
    numbers = (0.5, 0.7, 0.6, 0.8, 0.7, 0.8, 0.1)
    _, verdicts = judged(values(LIKELIHOOD, *numbers), early_stopping_patience=3)
    assert [verdict.stops for verdict in verdicts] == [False] * 6 + [True]
    assert verdicts[-1] == Verdict(saves=True, stops=True)
    _, verdicts = judged(values(LIKELIHOOD, *numbers), early_stopping_patience=1)
    assert [verdict.stops for verdict in verdicts[:3]] == [False, False, True]


def test_what_is_not_finite_is_never_better() -> None:
    best, verdicts = judged(values(LOSS, math.nan, math.inf, -math.inf, 2.0, math.nan), early_stopping_patience=3)
    assert [verdict.stops for verdict in verdicts[:3]] == [False, False, True]
    assert (best.step, best.value, best.since) == (40, 2.0, 1)
    assert judged(values(LOSS, math.nan))[0].words == "no finite eval_loss"


def test_a_run_that_goes_on_decides_as_one_that_was_never_interrupted() -> None:
    run = RunConfig(early_stopping_patience=2)
    evaluations = [{LIKELIHOOD: value, MARGIN: 0.1 * value} for value in (0.1 + 0.2, 0.7, 0.7, 0.6)]
    best = Best()
    for number, metrics in enumerate(evaluations):
        best = best_from(json.loads(json.dumps(best.to_dict())), run).after(number, metrics, run)
    assert best == Best(LIKELIHOOD, 1, 0.7, 0.1 * 0.7, since=2)
    assert best.stops(run)
    assert not best.stops(RunConfig(early_stopping_patience=3))
    assert not best.stops(RunConfig())


@pytest.mark.parametrize("state", [None, {}, [], {"metric": "eval_loss"}, {**Best().to_dict(), "more": 1}])
def test_a_checkpoint_of_another_version_knows_no_best(state: Any) -> None:
    assert best_from(state, RunConfig()) == Best()


def test_a_best_is_that_of_the_flags_which_judged_it() -> None:
    run = RunConfig(metric_for_best_model="loss", early_stopping_patience=1)
    best = Best().after(10, {LOSS: 0.5}, run).after(20, {LOSS: 0.6}, run)
    state = json.loads(json.dumps(best.to_dict()))
    assert best_from(state, run) == Best(LOSS, 10, 0.5, None, since=1)
    assert best_from(state, RunConfig(metric_for_best_model="loss")).since == 1
    for other in (
        RunConfig(),
        RunConfig(metric_for_best_model="loss", greater_is_better=True),
        replace(run, max_eval_records=9),
    ):
        assert best_from(state, other) == Best()
    del state["judged_by"]  # as earlier versions wrote it
    assert best_from(state, RunConfig()) == best


def test_another_metric_begins_anew() -> None:
    best = Best(LIKELIHOOD, 10, 0.9, None, since=2)
    assert best.after(40, {LIKELIHOOD: 0.5, LOSS: 5.0}, RunConfig(metric_for_best_model="loss")) == Best(LOSS, 40, 5.0, None)


def test_the_note_names_the_checkpoint_that_is_kept(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    assert best_checkpoint(folder) is None
    write_note(folder, Best(LIKELIHOOD, 10, 0.9, 0.1), "step_00000010_a")
    assert json.loads((tmp_path / NOTE).read_text()) == {
        "step": 10,
        "metric": LIKELIHOOD,
        "value": 0.9,
        "checkpoint": "step_00000010_a",
    }
    assert best_checkpoint(folder) is None  # it is gone
    (tmp_path / "checkpoints" / "step_00000010_a").mkdir(parents=True)
    assert best_checkpoint(folder) == folder / "checkpoints" / "step_00000010_a"
    for damage in ("", "[]", '{"checkpoint": 1}', '{"checkpoint": "../.."}', '{"checkpoint": null}'):
        (tmp_path / NOTE).write_text(damage)
        assert best_checkpoint(folder) is None
