import math

from rayalign.report.health import curve, find_problems


def problems(*lines: dict[str, float], margins: tuple[float, ...] = (), length_correlation: float = 0.0) -> list[str]:
    numbered = [{"step": step, **line} for step, line in enumerate(lines, start=1)]
    return find_problems(numbered, margins=margins, length_correlation=length_correlation)


def test_a_healthy_run_has_no_problems() -> None:
    start = {"loss": 0.7, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5, "eval_logps/chosen": -100.0, "grad_norm": 1.0}
    end = {"loss": 0.4, "eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "eval_logps/chosen": -99.0, "grad_norm": 0.5}
    assert problems(start, end, margins=(1.0,) * 100, length_correlation=0.2) == []


def test_a_repeated_step_counts_once_with_its_later_value() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert curve(lines, "loss") == [(1, 3.0), (2, 1.0)]


def test_a_loss_that_is_not_finite_is_named_with_its_first_step() -> None:
    (words,) = problems({"loss": 1.0}, {"loss": math.nan}, {"loss": math.inf})
    assert words.startswith("Not finite (NaN or infinite): loss, at 2 of 3 logged steps, first at step 2.")


def test_a_zero_gradient_at_every_step_is_reported() -> None:
    assert "gradient was exactly zero" in problems({"grad_norm": 0.0}, {"grad_norm": 0.0})[0]
    assert problems({"grad_norm": 0.0}, {"grad_norm": 0.1}) == []


def test_an_accuracy_within_the_noise_of_a_coin_toss_is_reported() -> None:
    assert "(0.5 ± 0.25 with 16 pairs)" in problems({"eval_rewards/accuracies": 0.7}, margins=(1.0,) * 16)[0]
    assert problems({"eval_rewards/accuracies": 0.7}, margins=(1.0,) * 400) == []


def test_an_accuracy_far_below_a_half_asks_for_swapped_columns() -> None:
    assert "swapped" in problems({"eval_rewards/accuracies": 0.1}, margins=(-1.0,) * 400)[0]


def test_chosen_log_probs_that_fall_while_accuracy_rises_are_reported() -> None:
    start = {"eval_logps/chosen": -100.0, "eval_rewards/accuracies": 0.5}
    (words,) = problems(start, {"eval_logps/chosen": -150.0, "eval_rewards/accuracies": 0.9}, margins=(1.0,) * 400)
    assert "(log-prob -100 to -150) while accuracy rose (0.5 to 0.9)" in words
    assert problems(start, {"eval_logps/chosen": -101.0, "eval_rewards/accuracies": 0.9}, margins=(1.0,) * 400) == []


def test_training_values_serve_where_there_was_no_evaluation() -> None:
    falling = [{"logps/chosen": -100.0 - 10 * k, "rewards/accuracies": 0.5 + 0.04 * k} for k in range(10)]
    (words,) = problems(*falling)
    assert "became less likely" in words


def test_training_accuracy_far_above_the_held_out_one_is_reported() -> None:
    (words,) = problems({"rewards/accuracies": 0.97, "eval_rewards/accuracies": 0.7}, margins=(1.0,) * 400)
    assert words.startswith("Accuracy is 0.97 on training records but 0.7 on held-out ones")


def test_a_held_out_loss_past_its_minimum_is_reported() -> None:
    (words,) = problems({"eval_loss": 0.6}, {"eval_loss": 0.5}, {"eval_loss": 0.8})
    assert words.startswith("Held-out loss was lowest at step 2 (0.5) and has risen to 0.8")


def test_margins_that_follow_length_are_reported_from_twenty_pairs_on() -> None:
    assert "prefer longer" in problems(margins=(1.0,) * 20, length_correlation=0.7)[0]
    assert "prefer shorter" in problems(margins=(1.0,) * 20, length_correlation=-0.7)[0]
    assert problems(margins=(1.0,) * 19, length_correlation=0.7) == []
    assert problems(margins=(1.0,) * 20, length_correlation=math.nan) == []


def test_waiting_for_data_is_reported() -> None:
    assert "waited for data 45% of the time" in problems({"data_wait_fraction": 0.4}, {"data_wait_fraction": 0.5})[0]
