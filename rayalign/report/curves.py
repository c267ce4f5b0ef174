"""The curves of the page: which metrics are drawn beside each other, what they are called, and what to look for."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayalign.report.charts import Colour, Point, Series, line_chart
from rayalign.report.health import Metrics, curve
from rayalign.report.markup import section

SAME_SHARE = 0.02
"""Two curves that nowhere differ by more than this share of their largest value look the same."""

Curves = tuple[tuple[str, str, Colour], ...]
"""Metrics, what tells them apart in their chart, and their colours."""


@dataclass(frozen=True)
class Chart:
    """A chart and the metrics in it, each in training and on held-out records. `is_share`: values are from 0 to 1; `guess`:
    what guessing has. `repeats`: a metric that this one may be equal to; then it is left out."""

    title: str
    curves: Curves
    is_share: bool = False
    guess: float | None = None
    repeats: str = ""


def one(title: str, metric: str, *, is_share: bool = False, guess: float | None = None, repeats: str = "") -> Chart:
    """The chart of a single metric."""
    return Chart(title, ((metric, "", "blue"),), is_share, guess, repeats)


def both_sides(title: str, metric: str) -> Chart:
    """The chart of a metric that both responses have."""
    return Chart(title, ((f"{metric}/chosen", "chosen", "blue"), (f"{metric}/rejected", "rejected", "orange")))


@dataclass(frozen=True)
class Group:
    """Charts under a heading; `looks` say what to look for, each beside the metric that it is about."""

    title: str
    charts: tuple[Chart, ...]
    looks: tuple[tuple[str, str], ...]


OTHER_COLOURS: tuple[Colour, ...] = ("orange", "grey")
OTHERS = "with other records\u2019 pictures"
BY_LIKELIHOOD: Curves = (
    ("accuracy/likelihood", "sum of log-probs", "blue"),
    ("accuracy/per_token", "per token", "orange"),
    ("accuracy/likelihood/shuffled", f"sum, {OTHERS}", "grey"),
)
BY_REWARD: Curves = (
    ("rewards/accuracies", "", "blue"),
    ("rewards/accuracies/shuffled", OTHERS, "orange"),
    ("accuracy/reward_model/shuffled", OTHERS, "orange"),
)

GROUPS = (
    Group(
        "What it learned",
        (
            one("Loss", "loss"),
            Chart("Accuracy by likelihood", BY_LIKELIHOOD, is_share=True, guess=0.5),
            Chart("Accuracy of {reward}", BY_REWARD, is_share=True, guess=0.5),
            one("Chosen tokens that are its first choice", "mean_token_accuracy", is_share=True),
            one("Greedy answers equal to the chosen response", "exact_match", is_share=True),
        ),
        (
            ("loss", "a held-out loss that still falls where the training\u2019s does"),
            ("accuracy/likelihood", "an accuracy by likelihood above 0.5, which guessing has"),
            ("rewards/accuracies", "an accuracy of the reward above 0.5"),
            ("mean_token_accuracy", "first choices that are not lost: where they are, what the model writes breaks"),
            ("image_reliance", "a picture reliance above 0: the accuracy that is lost where records get others\u2019 pictures"),
        ),
    ),
    Group(
        "How likelihoods and rewards moved",
        (
            one("Margin", "rewards/margins"),
            both_sides("Rewards", "rewards"),
            both_sides("Log-probs of the responses", "logps"),
            one("NLL of the chosen response", "nll_loss", repeats="loss"),
            one("Drift from the reference", "drift"),
            one("KL estimate", "kl"),
            one("Log odds ratio", "log_odds_ratio"),
            one("Log odds of the chosen response", "log_odds_chosen"),
            one("Accuracy of true against damaged images", "conditional/accuracies", is_share=True, guess=0.5),
            one("Margin of true over damaged images", "conditional/margins"),
        ),
        (
            (
                "rewards/margins",
                "a margin that grows because the chosen responses gain, not only because the rejected ones lose",
            ),
            ("logps/chosen", "log-probs of the chosen responses that don\u2019t fall far"),
            ("drift", "a drift that comes to rest: one that goes on costs the model its language"),
        ),
    ),
    Group(
        "How it ran",
        (
            one("Gradient norm", "grad_norm"),
            one("Learning rate", "learning_rate"),
            one("Pairs per second", "pairs_per_second"),
            one("Fraction of time spent waiting for data", "data_wait_fraction"),
            one("Fraction of the batches that is padding", "padding_fraction"),
            one("Steps skipped by float16", "skipped_steps"),
        ),
        (
            ("grad_norm", "gradient norms without lasting jumps"),
            ("data_wait_fraction", "little time spent waiting for data"),
        ),
    ),
)


def curves_section(metrics: Metrics, *, reward_name: str, benchmarks: Sequence[str] = ()) -> str:
    """All groups of charts that have something to show; `reward_name` is what gives the rewards, `benchmarks` are the names of
    those of the checkpoints."""
    names = {name.removeprefix("eval_") for line in metrics for name in line}
    parts = []
    for group in GROUPS:
        charts = [_chart(chart, metrics, reward_name) for chart in group.charts]
        if any(charts):
            *looks, last = [words for name, words in group.looks if name in names] or [""]
            words = f"Look for {', '.join(looks)}{', and ' if looks else ''}{last}." if last else ""
            parts.append(section(group.title, words, f'<div class="charts">{"".join(charts)}</div>'))
    drawn = [_chart(chart, metrics, reward_name) for name in benchmarks for chart in _of_benchmark(name, metrics)]
    if drawn:
        words = "The chief figure of each benchmark, of every checkpoint; metrics.jsonl has the others."
        parts.append(section("Benchmarks", words, f'<div class="charts">{"".join(drawn)}</div>'))
    return "".join(parts)


def _of_benchmark(name: str, metrics: Metrics) -> list[Chart]:
    """The chart of a benchmark's first metric, in each way in which it is told; none before the first checkpoint was judged."""
    told = list(dict.fromkeys(key for line in metrics for key in line if key.startswith(f"eval_{name}/")))
    if not told:
        return []
    chief = told[0].removeprefix(f"eval_{name}/")
    ways = [key for key in told[1:] if key.endswith(f"/{chief}")][: len(OTHER_COLOURS)]
    others = [
        (key.removeprefix("eval_"), key.removeprefix(f"eval_{name}/").partition("/")[0], colour)
        for key, colour in zip(ways, OTHER_COLOURS, strict=False)
    ]
    return [Chart(f"{name}: {chief}", ((f"{name}/{chief}", "", "blue"), *others))]


def _chart(chart: Chart, metrics: Metrics, reward_name: str) -> str:
    """A chart of what is known, training lines thin and held-out ones thick."""
    if chart.repeats and _same(_both(chart.curves[0][0], metrics), _both(chart.repeats, metrics)):
        return ""
    series = []
    for metric, label, colour in chart.curves:
        train, held_out = curve(metrics, metric), curve(metrics, f"eval_{metric}")
        # A line without a name of its own is told from the held-out one by its colour.
        series.append(Series(f"{label} training".strip(), train, "grey" if held_out and not label else colour))
        series.append(Series(f"{label} held-out".strip(), held_out, colour, "marked"))
    return line_chart(
        chart.title.format(reward=reward_name),
        series,
        x_label="step",
        y_range=(0.0, 1.0) if chart.is_share else None,
        mark=chart.guess,
    )


def _both(name: str, metrics: Metrics) -> list[Point]:
    return [*curve(metrics, name), *curve(metrics, f"eval_{name}")]


def _same(some: Sequence[Point], others: Sequence[Point]) -> bool:
    """Whether two curves, each with training and held-out values, can't be told apart."""
    if not some or len(some) != len(others):
        return False
    largest = max(abs(value) for _, value in others)
    return largest > 0 and all(
        x == other_x and abs(value - other) <= SAME_SHARE * largest
        for (x, value), (other_x, other) in zip(some, others, strict=True)
    )
