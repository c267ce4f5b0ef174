"""The curves of the page: which metrics are drawn beside each other, what they are called, and what to look for."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayalign.report.charts import Colour, Point, Series, line_chart
from rayalign.report.health import Metrics, curve
from rayalign.report.markup import section

SAME_SHARE = 0.02
"""Two curves that nowhere differ by more than this share of their largest value look the same."""

BOTH_SIDES: tuple[tuple[str, str, Colour], ...] = (("chosen", "chosen", "blue"), ("rejected", "rejected", "orange"))
ONE_VALUE: tuple[tuple[str, str, Colour], ...] = (("", "", "blue"),)


@dataclass(frozen=True)
class Chart:
    """A chart: its title, its metrics' name up to the part that differs between them, and those: (end of the name, label,
    colour). `is_share`: values from 0 to 1, of which one half is what guessing gives. `repeats`: a metric that this one may be
    equal to; then it is left out."""

    title: str
    name: str
    curves: tuple[tuple[str, str, Colour], ...] = ONE_VALUE
    is_share: bool = False
    repeats: str = ""


@dataclass(frozen=True)
class Group:
    """Charts under a heading; `looks` say what to look for, each beside the metric that it is about."""

    title: str
    charts: tuple[Chart, ...]
    looks: tuple[tuple[str, str], ...]


LIKELIHOODS: tuple[tuple[str, str, Colour], ...] = (
    ("likelihood", "sum of log-probs", "blue"),
    ("per_token", "per token", "orange"),
    ("likelihood/shuffled", "sum, with other records\u2019 pictures", "grey"),
)
GROUPS = (
    Group(
        "What it learned",
        (
            Chart("Loss", "loss"),
            Chart("Accuracy by likelihood", "accuracy/", LIKELIHOODS, is_share=True),
            Chart("Accuracy of {reward}", "rewards/accuracies", is_share=True),
            Chart("Chosen tokens that are its first choice", "mean_token_accuracy"),
            Chart("Greedy answers equal to the chosen response", "exact_match"),
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
            Chart("Margin", "rewards/margins"),
            Chart("Rewards", "rewards/", BOTH_SIDES),
            Chart("Log-probs of the responses", "logps/", BOTH_SIDES),
            Chart("NLL of the chosen response", "nll_loss", repeats="loss"),
            Chart("Drift from the reference", "drift"),
            Chart("KL estimate", "kl"),
            Chart("Log odds ratio", "log_odds_ratio"),
            Chart("Log odds of the chosen response", "log_odds_chosen"),
            Chart("Accuracy of true against damaged images", "conditional/accuracies", is_share=True),
            Chart("Margin of true over damaged images", "conditional/margins"),
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
            Chart("Gradient norm", "grad_norm"),
            Chart("Learning rate", "learning_rate"),
            Chart("Pairs per second", "pairs_per_second"),
            Chart("Fraction of time spent waiting for data", "data_wait_fraction"),
            Chart("Fraction of the batches that is padding", "padding_fraction"),
            Chart("Steps skipped by float16", "skipped_steps"),
        ),
        (
            ("grad_norm", "gradient norms without lasting jumps"),
            ("data_wait_fraction", "little time spent waiting for data"),
        ),
    ),
)


def curves_section(metrics: Metrics, *, reward_name: str) -> str:
    """All groups of charts that have something to show; `reward_name` is what gives the rewards."""
    names = {name.removeprefix("eval_") for line in metrics for name in line}
    parts = []
    for group in GROUPS:
        charts = [_chart(chart, metrics, reward_name) for chart in group.charts]
        if any(charts):
            *looks, last = [words for name, words in group.looks if name in names] or [""]
            words = f"Look for {', '.join(looks)}{', and ' if looks else ''}{last}." if last else ""
            parts.append(section(group.title, words, f'<div class="charts">{"".join(charts)}</div>'))
    return "".join(parts)


def _chart(chart: Chart, metrics: Metrics, reward_name: str) -> str:
    """A chart of what is known, training lines thin and held-out ones thick."""
    if chart.repeats and _same(_both(chart.name, metrics), _both(chart.repeats, metrics)):
        return ""
    held_out = [(f"{label} held-out".strip(), curve(metrics, f"eval_{chart.name}{end}"), c) for end, label, c in chart.curves]
    train = [(f"{label} training".strip(), curve(metrics, f"{chart.name}{end}"), c) for end, label, c in chart.curves]
    alone: Colour | None = "grey" if any(points for _, points, _ in held_out) and len(chart.curves) == 1 else None
    series = [Series(label, points, alone or colour) for label, points, colour in train]
    series += [Series(label, points, colour, "marked") for label, points, colour in held_out]
    return line_chart(
        chart.title.format(reward=reward_name),
        series,
        x_label="step",
        y_range=(0.0, 1.0) if chart.is_share else None,
        mark=0.5 if chart.is_share else None,
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
