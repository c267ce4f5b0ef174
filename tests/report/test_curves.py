import re

import pytest

from rayalign.report.curves import curves_section
from tests.report.test_page import Page

Lines = list[dict[str, float]]


def figures(metrics: Lines, *, reward_name: str = "the implicit reward") -> dict[str, str]:
    """Each figure by its title."""
    page = curves_section(metrics, reward_name=reward_name)
    found = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    return {re.findall("<b>(.*?)</b>", figure)[0]: figure for figure in found}


def course(name: str, *values: float, first: int = 0) -> Lines:
    return [{"step": first + step, name: value} for step, value in enumerate(values)]


def test_every_accuracy_is_called_what_it_is() -> None:
    names = ("accuracy/likelihood", "accuracy/per_token", "rewards/accuracies")
    metrics = [{"step": step, **{f"eval_{name}": 0.5 + step / 10 for name in names}} for step in (0, 3)]
    at_the_end = ("accuracy/likelihood/shuffled", "rewards/accuracies/shuffled", "image_reliance", "image_reliance/pairs")
    metrics.append({"step": 3, **{f"eval_{name}": 0.8 for name in at_the_end}})
    found = figures(metrics)
    assert list(found) == ["Accuracy by likelihood", "Accuracy of the implicit reward"]
    assert "with other records’ pictures held-out: 0.8" in found["Accuracy of the implicit reward"]
    text = Page(found["Accuracy by likelihood"]).text
    for label in ("sum of log-probs held-out", "per token held-out", "sum, with other records’ pictures held-out"):
        assert f"{label}: 0.8" in text
    assert "Accuracy of the reward model" in figures(metrics, reward_name="the reward model")


def test_held_out_curves_begin_at_the_start() -> None:
    found = figures([{"step": 0, "eval_loss": 0.7}, {"step": 1, "loss": 0.6}, {"step": 5, "eval_loss": 0.4}])
    assert "step 0\nheld-out: 0.7" in found["Loss"]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (course("padding_fraction", 0, 0, 0), "0 at all logged steps"),
        (course("padding_fraction", 0.0), "0 (training) at step 0"),
        (course("padding_fraction", 0.0, -0.0), "0 at all logged steps"),
        (course("eval_rewards/margins", 0), "0 (held-out) at step 0"),
        (course("rewards/chosen", 0, 0) + course("rewards/rejected", 0, 0), "0 at all logged steps"),
    ],
)
def test_nothing_but_zeros_is_said_in_words_and_not_drawn(metrics: Lines, words: str) -> None:
    (figure,) = figures(metrics).values()
    assert words in figure
    assert "<svg" not in figure


@pytest.mark.parametrize(
    "metrics",
    [
        course("padding_fraction", 0, 0, 0.1),
        course("rewards/accuracies", 0, 0, 0),  # 0 of 1 is something
        course("learning_rate", 1e-5, 1e-5),
        course("rewards/chosen", 0, 0) + course("rewards/rejected", 0, -1),
        course("eval_drift", 0, -1e-9),
    ],
)
def test_what_is_not_all_zero_is_drawn(metrics: Lines) -> None:
    (figure,) = figures(metrics).values()
    assert "<svg" in figure


@pytest.mark.parametrize(
    ("second", "titles"),
    [
        ((2.5, 2.0, 1.5), ["Loss"]),  # SFT's
        ((2.51, 2.01, 1.49), ["Loss"]),  # of windows whose steps have different numbers of tokens
        ((2.5, 2.0, 1.2), ["Loss", "NLL of the chosen response"]),
        ((2.5, 2.0), ["Loss", "NLL of the chosen response"]),
        ((2.5, 2.0, float("nan")), ["Loss", "NLL of the chosen response"]),
    ],
)
def test_a_likelihood_that_is_the_loss_is_not_drawn_again(second: tuple[float, ...], titles: list[str]) -> None:
    assert list(figures(course("loss", 2.5, 2.0, 1.5) + course("nll_loss", *second))) == titles


def test_two_metrics_of_zeros_are_both_named() -> None:
    assert len(figures(course("padding_fraction", 0, 0) + course("data_wait_fraction", 0, 0))) == 2


def test_benchmarks_have_a_chart_each_with_every_way_of_their_chief_metric() -> None:
    names = ("pope/accuracy", "pope/f1", "pope/text/accuracy", "chair/CHAIR_s", "popes/accuracy")
    metrics = [{"step": step, **{f"eval_{name}": step / 100 for name in names}} for step in (10, 20)]
    page = curves_section(metrics, reward_name="the implicit reward", benchmarks=["pope", "chair", "amber"])
    found = re.findall(r"<b>(.*?)</b>", page)
    assert found == ["pope: accuracy", "chair: CHAIR_s"]
    assert "text held-out: 0.2" in Page(page).text
    assert "f1" not in page


def test_every_group_says_what_to_look_for_in_what_it_shows() -> None:
    def words(*names: str) -> list[str]:
        page = curves_section([{"step": 1, **dict.fromkeys(names, 1.0)}], reward_name="the implicit reward")
        return re.findall(r"<h2>.*?</h2>(?:<p class=\"soft\">(.*?)</p>)?", page)

    assert words("loss", "grad_norm", "data_wait_fraction") == [
        "Look for a held-out loss that still falls where the training’s does.",
        "Look for gradient norms without lasting jumps, and little time spent waiting for data.",
    ]
    assert words("loss", "eval_accuracy/likelihood", "rewards/accuracies")[0] == (
        "Look for a held-out loss that still falls where the training’s does, an accuracy by likelihood above 0.5, which "
        "guessing has, and an accuracy of the reward above 0.5."
    )
    assert words("kl") == [""]
