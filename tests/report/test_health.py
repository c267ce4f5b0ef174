import math
from collections.abc import Sequence
from typing import Any

import pytest

from rayalign.report.health import curve, find_problems
from rayalign.report.pairs import ScoredPair

MANY = (1.0,) * 400


def problems(
    *lines: dict[str, float],
    margins: tuple[float, ...] = (),
    extra_tokens: tuple[int, ...] | None = None,
    is_finished: bool = True,
) -> dict[str, str]:
    """Lines of metrics, the first of step 0; pairs have these margins, and chosen responses that are so much longer."""
    numbered = [{"step": 10 * number, **line} for number, line in enumerate(lines)]
    longer = extra_tokens or (0,) * len(margins)
    pairs = [ScoredPair(str(i), margin, 0.0, 500 + longer[i], 500) for i, margin in enumerate(margins)]
    return find_problems(numbered, pairs=pairs, is_finished=is_finished)


def test_a_healthy_run_has_no_problems() -> None:
    start = {"loss": 0.7, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5, "eval_nll_loss": 1.0, "grad_norm": 1.0}
    end = {"loss": 0.4, "eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "eval_nll_loss": 0.9, "grad_norm": 0.5}
    assert problems(start, end, margins=MANY) == {}


def test_a_repeated_step_counts_once_with_its_later_value() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert curve(lines, "loss") == [(1, 3.0), (2, 1.0)]


def test_a_loss_that_is_not_finite_is_named_with_its_first_step() -> None:
    words = problems({"loss": 1.0}, {"loss": math.nan}, {"loss": math.inf})["not finite"]
    assert words.startswith("Not finite (NaN or infinite): loss, at 2 of 3 logged steps, first at step 10.")


@pytest.mark.parametrize("name", ["eval_rewards/margins", "eval_accuracy/likelihood", "rewards/chosen", "eval_nll_loss"])
def test_what_a_policy_says_of_responses_is_named_where_it_is_no_number(name: str) -> None:
    line = {"loss": 0.4, "eval_loss": 0.5, "grad_norm": 1.0, name: math.nan}
    words = problems({**line, name: 0.6}, line, margins=MANY)["not finite"]
    assert words.startswith(f"Not finite (NaN or infinite): {name}, at 1 of 2 logged steps, first at step 10.")


def test_a_zero_gradient_at_every_step_is_reported() -> None:
    assert "gradient was exactly zero" in problems({"grad_norm": 0.0}, {"grad_norm": 0.0})["no gradient"]
    assert problems({"grad_norm": 0.0}, {"grad_norm": 0.1}) == {}


def test_an_accuracy_within_the_noise_of_a_coin_toss_is_reported_once_the_run_has_ended() -> None:
    line = {"eval_rewards/accuracies": 0.7}
    assert "(0.5 ± 0.25 with 16 pairs)" in problems(line, margins=(1.0,) * 16)["coin toss"]
    assert problems(line, margins=MANY) == {}
    assert problems(line, margins=(1.0,) * 16, is_finished=False) == {}


def test_an_accuracy_far_below_a_half_asks_for_swapped_columns() -> None:
    assert "swapped" in problems({"eval_rewards/accuracies": 0.1}, margins=(-1.0,) * 400)["coin toss"]


# What runs of the quickstart's task logged before the first step and at the end, one seed, and the share of right greedy
# answers: DPO at the rate of its example and without the NLL term, KTO at five times its rate, SimPO. Then DPO without the NLL
# term at five times the rate, which no longer answers.
START = {"eval_nll_loss": 0.4356, "eval_mean_token_accuracy": 0.7719, "eval_rewards/margins": 0.0}
SOUND = {
    "dpo, 0 to 0.56": {"eval_nll_loss": 0.9489, "eval_mean_token_accuracy": 0.7738, "eval_rewards/margins": 0.5332},
    "dpo without nll, 0 to 0.20": {"eval_nll_loss": 1.6661, "eval_mean_token_accuracy": 0.7263, "eval_rewards/margins": 0.8177},
    "kto, 0 to 0.52": {"eval_nll_loss": 1.5209, "eval_mean_token_accuracy": 0.7679, "eval_rewards/margins": 0.8121},
    "simpo, 0 to 0.49": {"eval_nll_loss": 1.2519, "eval_mean_token_accuracy": 0.7691, "eval_rewards/margins": 1.4222},
}
HARMED = {"eval_nll_loss": 4.968, "eval_mean_token_accuracy": 0.2149, "eval_rewards/margins": 1.0527}


@pytest.mark.parametrize("end", SOUND.values(), ids=SOUND)
def test_chosen_responses_that_become_less_likely_within_bounds_are_no_problem(end: dict[str, float]) -> None:
    assert problems(START, end, margins=MANY) == {}


def test_a_policy_that_would_seldom_write_the_chosen_responses_is_reported_below_the_bound_of_perplexity_too() -> None:
    start = {"eval_nll_loss": 0.4, "eval_mean_token_accuracy": 0.9}
    worse = {"eval_nll_loss": 2.6, "eval_mean_token_accuracy": 0.2}
    words = problems(start, worse, margins=MANY)["chosen falls"]
    assert "(perplexity 1.49 to 13.46); 90.0% of their tokens were the policy's first choice, 20.0% are now" in words
    assert problems(start, {**worse, "eval_mean_token_accuracy": 0.76}, margins=MANY) == {}
    assert problems(start, worse, margins=(1.0,) * 19) == {}  # of few responses' tokens


@pytest.mark.parametrize("is_finished", [True, False])
def test_chosen_responses_that_the_policy_would_no_longer_write_are_reported(is_finished: bool) -> None:
    found = problems(START, HARMED, margins=MANY, is_finished=is_finished)
    assert found.keys() == {"chosen falls"}
    assert "log-prob per token -0.4356 at the start" in found["chosen falls"]
    assert "77.2% of their tokens were the policy's first choice" in found["chosen falls"]
    assert "The margin grows only because the rejected ones fall even more" in found["chosen falls"]


def test_training_values_serve_where_there_was_no_evaluation() -> None:
    falling = [{"nll_loss": 1.0 + 0.4 * k} for k in range(10)]
    assert "(perplexity 3.32 to 81.45)" in problems(*falling)["chosen falls"]
    assert problems(*falling[:6]) == {}


def test_answers_that_were_right_and_no_longer_are_are_reported() -> None:
    start, end = {"eval_exact_match": 23 / 60}, {"eval_exact_match": 9 / 60}
    words = problems(start, end, margins=(1.0,) * 60)["answers change"]
    assert "in 15% of the held-out records, and did so in 38% before" in words
    assert problems(start, {"eval_exact_match": 18 / 60}, margins=(1.0,) * 60) == {}
    assert problems(start, end, margins=(1.0,) * 15) == {}


def singles(*, good: Sequence[float] = (), bad: Sequence[float] = ()) -> list[ScoredPair]:
    """Single responses with these rewards."""
    return [ScoredPair(f"good-{i}", reward, math.nan, 10, 0) for i, reward in enumerate(good)] + [
        ScoredPair(f"bad-{i}", math.nan, reward, 0, 10) for i, reward in enumerate(bad)
    ]


def test_answers_of_single_responses_that_get_worse_are_reported() -> None:
    metrics = [{"step": 0, "eval_exact_match": 0.9}, {"step": 100, "eval_exact_match": 0.05}]
    words = find_problems(metrics, pairs=singles(good=[-1.0] * 60))["answers change"]
    assert "in 5% of the held-out records, and did so in 90% before" in words
    assert find_problems(metrics, pairs=singles(good=[-1.0] * 19, bad=[1.0] * 60)) == {}  # of bad ones there is no answer


def test_single_bad_responses_with_a_higher_reward_than_good_ones_are_reported_once_the_run_has_ended() -> None:
    metrics = [{"step": 100, "eval_rewards/chosen": 0.0}]
    low, high = [-1.0, 1.0] * 30, [0.0, 2.0] * 30
    swapped = singles(good=low, bad=high)
    assert find_problems(metrics, pairs=swapped)["coin toss"] == (
        "Held-out bad responses have the higher reward: 1 in the mean, good ones 0. Are good and bad swapped in the data?"
    )
    assert find_problems(metrics, pairs=swapped, is_finished=False) == {}
    assert find_problems(metrics, pairs=singles(good=high, bad=low)) == {}
    assert find_problems(metrics, pairs=singles(good=low, bad=low)) == {}
    assert find_problems(metrics, pairs=singles(good=low[:19], bad=high)) == {}


def test_likelihoods_that_prefer_the_chosen_responses_less_than_at_the_start_are_reported() -> None:
    start = {"eval_accuracy/likelihood": 0.7}
    words = problems(start, {"eval_accuracy/likelihood": 0.6}, margins=MANY)["likelihood accuracy falls"]
    assert "in 60% of the held-out pairs, and did so in 70% before" in words
    assert problems(start, {"eval_accuracy/likelihood": 0.66}, margins=MANY) == {}


def test_training_accuracy_far_above_the_held_out_one_is_reported() -> None:
    line = {"rewards/accuracies": 0.97, "eval_rewards/accuracies": 0.7}
    assert problems(line, margins=MANY)["memorised"].startswith("Accuracy is 0.97 on training records but 0.7 on held-out ones")
    assert "memorised" not in problems(line, margins=(1.0,) * 9)  # 0.7 of nine pairs may be chance


def test_a_held_out_loss_past_its_minimum_is_reported() -> None:
    words = problems({"eval_loss": 0.6}, {"eval_loss": 0.5}, {"eval_loss": 0.8})["eval loss rises"]
    assert words.startswith("Held-out loss was lowest at step 10 (0.5) and has risen to 0.8")


def test_pairs_that_were_decided_early_and_then_only_stretched_are_reported() -> None:
    lines = [
        {"eval_rewards/accuracies": accuracy, "eval_nll_loss": loss}
        for accuracy, loss in ((0.5, 1.0), (0.9, 0.9), (1.0, 1.0), (1.0, 1.1), (1.0, 1.3))
    ]
    assert "since step 20 of 40" in problems(*lines, margins=MANY)["saturated"]
    assert problems(*lines[:4], margins=MANY) == {}  # half of that run was before
    still = [{**line, "eval_nll_loss": 1.0} for line in lines]
    assert problems(*still, margins=MANY) == {}


def test_margins_that_follow_length_are_reported_from_twenty_pairs_on() -> None:
    line = {"eval_rewards/margins": 1.0}
    margins, lengths = (1.0, 2.0) * 10, (3, 6) * 10
    assert (
        "(correlation +1.00): much of what was learned is to prefer longer"
        in problems(line, margins=margins, extra_tokens=lengths)["length"]
    )
    assert "prefer shorter" in problems(line, margins=margins, extra_tokens=lengths[::-1])["length"]
    assert problems(line, margins=margins[1:], extra_tokens=lengths[1:]) == {}
    assert problems(line, margins=(1.0,) * 20, extra_tokens=lengths) == {}  # margins don't vary
    assert problems(margins=margins, extra_tokens=lengths) == {}  # SFT


def by_length(*, right_longer: int, longer: int, right_shorter: int, shorter: int) -> dict[str, tuple[Any, ...]]:
    """Pairs of margin 1 and -1 whose chosen response is longer, then shorter, some of them by far."""
    margins = [1.0] * right_longer + [-1.0] * (longer - right_longer)
    margins += [1.0] * right_shorter + [-1.0] * (shorter - right_shorter)
    lengths = [400 if i % 20 == 0 else 2 for i in range(longer)] + [-400 if i % 20 == 0 else -2 for i in range(shorter)]
    return {"margins": tuple(margins), "extra_tokens": tuple(lengths)}


def test_accuracies_that_lie_far_apart_by_length_are_reported_though_a_few_long_responses_hide_the_correlation() -> None:
    line = {"eval_rewards/margins": 0.5}
    ruled_by_length = by_length(right_longer=150, longer=150, right_shorter=0, shorter=50)
    assert problems(line, **ruled_by_length)["length"] == (
        "Margins follow length (accuracy 1.00 where the chosen response is longer, 0.00 where it is shorter): much of what was "
        "learned is to prefer longer responses. Compare the accuracies in the section on length."
    )
    swapped = by_length(right_longer=10, longer=100, right_shorter=90, shorter=100)
    assert "accuracy 0.10 where the chosen response is longer, 0.90 where" in problems(line, **swapped)["length"]
    assert "prefer shorter" in problems(line, **swapped)["length"]
    sound = by_length(right_longer=95, longer=100, right_shorter=50, shorter=100)
    assert problems(line, **sound) == {}
    assert problems(line, **by_length(right_longer=100, longer=100, right_shorter=0, shorter=19)) == {}


def relying(fall: float, error: float, *, accuracy: float = 0.9, pairs: int = 400) -> dict[str, float]:
    """An evaluation in which the accuracy falls by this much on shuffled pictures."""
    reliance = {"": fall, "/stderr": error, "/pairs": pairs}
    line = {f"eval_image_reliance{end}": value for end, value in reliance.items()}
    return {**line, "eval_accuracy/likelihood/shuffled": 0.2, "eval_rewards/accuracies/shuffled": accuracy - fall}


def test_a_preference_that_does_not_come_from_the_pictures_is_reported() -> None:
    words = problems(relying(0.01, 0.005))["picture ignored"]
    assert "accuracy on 400 held-out pairs is 0.89, with their own 0.9" in words
    assert "mdpo" in words
    assert problems(relying(-0.01, 0.01))["picture ignored"]
    assert problems(relying(0.04, 0.01)) == {}  # two standard errors reach 0.06
    assert problems(relying(0.4, 0.03)) == {}


def test_where_there_is_no_preference_or_few_pairs_nothing_is_said_of_the_pictures() -> None:
    assert problems(relying(0.0, 0.0, accuracy=0.53)) == {}
    assert problems(relying(0.0, 0.0, accuracy=0.9, pairs=19)) == {}


def test_waiting_for_data_is_reported() -> None:
    assert "waited for data 45% of the time" in problems({"data_wait_fraction": 0.4}, {"data_wait_fraction": 0.5})["waits"]
