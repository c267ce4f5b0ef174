"""What looks wrong in a run, in plain words and with what to do about it: the warnings at the top of the page of `report`."""

import math
from collections.abc import Mapping, Sequence

from rayalign.report.charts import Point, format_number

Metrics = Sequence[Mapping[str, float]]


def curve(metrics: Metrics, name: str) -> list[Point]:
    """A metric over steps; where a resumed run logged a step again, the later line counts."""
    return sorted({line["step"]: line[name] for line in metrics if name in line}.items())


def find_problems(metrics: Metrics, *, margins: Sequence[float], length_correlation: float) -> dict[str, str]:
    """A sentence or two for all that looks unhealthy, by kind; `margins` are the held-out pairs', nan for single responses."""
    known = [value for value in margins if math.isfinite(value)]
    found = {
        "not finite": _not_finite(metrics),
        "no gradient": _no_gradient(metrics),
        "coin toss": _coin_toss(metrics, num_pairs=len(known)),
        "chosen falls": _chosen_falls(metrics),
        "memorised": _memorised(metrics),
        "eval loss rises": _eval_loss_rises(metrics),
        "length": _follows_length(length_correlation, num_pairs=len(known)),
        "waits": _waits_for_data(metrics),
    }
    return {kind: words for kind, words in found.items() if words}


def _finite(metrics: Metrics, name: str) -> list[Point]:
    return [(step, value) for step, value in curve(metrics, name) if math.isfinite(value)]


def _mean(points: Sequence[Point]) -> float:
    return sum(value for _, value in points) / len(points)


def _start_and_end(metrics: Metrics, name: str) -> tuple[float, float] | None:
    """First and last held-out value; without two of them, the mean of the first and last fifth of the training values."""
    held_out = _finite(metrics, f"eval_{name}")
    if len(held_out) >= 2:
        return held_out[0][1], held_out[-1][1]
    points = _finite(metrics, name)
    fifth = len(points) // 5
    return (_mean(points[:fifth]), _mean(points[-fifth:])) if fifth else None


def _not_finite(metrics: Metrics) -> str:
    for name in ("loss", "eval_loss", "grad_norm"):
        points = curve(metrics, name)
        steps = [step for step, value in points if not math.isfinite(value)]
        if steps:
            return (
                f"Not finite (NaN or infinite): {name}, at {len(steps):,} of {len(points):,} logged steps, first at step "
                f"{format_number(steps[0])}. The weights after that step cannot be trusted. A lower --learning_rate, or "
                "--dtype bfloat16 instead of float16, helps."
            )
    return ""


def _no_gradient(metrics: Metrics) -> str:
    norms = curve(metrics, "grad_norm")
    if norms and all(value == 0 for _, value in norms):
        return "The gradient was exactly zero at every logged step: nothing is being learned. Check --lora_target_modules."
    return ""


def _coin_toss(metrics: Metrics, *, num_pairs: int) -> str:
    accuracies = _finite(metrics, "eval_rewards/accuracies")
    if not accuracies:
        return ""
    accuracy = accuracies[-1][1]
    noise = 1 / math.sqrt(num_pairs) if num_pairs else 0.0  # two standard errors of a fair coin
    if abs(accuracy - 0.5) <= max(0.03, noise):
        words = f"Held-out accuracy is {format_number(accuracy)}, no better than a coin toss can give"
        return f"{words} (0.5 ± {format_number(round(noise, 2))} with {num_pairs:,} pairs)." if num_pairs else f"{words}."
    if accuracy < 0.5:
        words = f"Held-out accuracy is {format_number(accuracy)}: the policy prefers the rejected responses."
        return f"{words} Are chosen and rejected swapped in the data?"
    return ""


def _chosen_falls(metrics: Metrics) -> str:
    logps, accuracies = _start_and_end(metrics, "logps/chosen"), _start_and_end(metrics, "rewards/accuracies")
    if logps is None or accuracies is None:
        return ""
    if logps[1] >= logps[0] - 0.1 * abs(logps[0]) or accuracies[1] <= accuracies[0] + 0.02:
        return ""
    return (
        f"The chosen responses became less likely (log-prob {format_number(logps[0])} to {format_number(logps[1])}) while "
        f"accuracy rose ({format_number(accuracies[0])} to {format_number(accuracies[1])}): margins grow by making the "
        "rejected responses even less likely, and what the policy writes may get worse. A larger weight of the chosen "
        "response's likelihood (--rpo_alpha, --cpo_alpha), with a reference a larger --beta, or a lower --learning_rate "
        "counters this."
    )


def _memorised(metrics: Metrics) -> str:
    train, held_out = _finite(metrics, "rewards/accuracies"), _finite(metrics, "eval_rewards/accuracies")
    if not train or not held_out:
        return ""
    late = _mean(train[-max(1, len(train) // 5) :])
    if late - held_out[-1][1] <= 0.15:
        return ""
    return (
        f"Accuracy is {format_number(late)} on training records but {format_number(held_out[-1][1])} on held-out ones: "
        "the policy memorises. Fewer epochs, a lower --learning_rate or more records help."
    )


def _eval_loss_rises(metrics: Metrics) -> str:
    losses = _finite(metrics, "eval_loss")
    if not losses:
        return ""
    best_step, best = min(losses, key=lambda point: point[1])
    if losses[-1][1] <= best + 0.1 * abs(best):
        return ""
    return (
        f"Held-out loss was lowest at step {format_number(best_step)} ({format_number(best)}) and has risen to "
        f"{format_number(losses[-1][1])} since: a shorter run would have been better."
    )


def _follows_length(correlation: float, *, num_pairs: int) -> str:
    if num_pairs < 20 or not abs(correlation) >= 0.5:
        return ""
    kind = "longer" if correlation > 0 else "shorter"
    return (
        f"Margins follow length (correlation {correlation:+.2f}): much of what was learned is to prefer {kind} responses. "
        "Compare the accuracies in the section on length."
    )


def _waits_for_data(metrics: Metrics) -> str:
    waits = _finite(metrics, "data_wait_fraction")
    if not waits or _mean(waits) <= 0.3:
        return ""
    words = f"Workers waited for data {_mean(waits):.0%} of the time"
    return f"{words}: give the cluster more CPUs, or shrink images with --max_pixels."
