"""What looks wrong in a run, in plain words and with what to do about it: warnings for the log and for the page of `report`."""

import math
import statistics
from collections.abc import Mapping, Sequence

from rayalign.report.charts import Point, format_number
from rayalign.report.pairs import ScoredPair, accuracy_of, correlation, what_they_are

Metrics = Sequence[Mapping[str, float]]

WORSE_PERPLEXITY, FAR_WORSE_PERPLEXITY = 1.25, 10
"""By these factors the chosen responses' perplexity rose: noticeably, and by more than in any sound run. On three seeds of the
quickstart's task, whose chosen responses are often wrong, it rose by up to 3 in models that answered better than before, by 4.8
in one that did so at five times the rate, and by 30 to 223 in those that could no longer answer."""

FEWER_FIRST_CHOICES = 0.15
"""By more than this fell the share of the chosen responses' tokens that are the policy's first choice in models that could no
longer answer (by 0.56); in sound runs of the same task by up to 0.05."""

SMALL_RELIANCE = 0.05
"""An accuracy that falls by less than this on shuffled pictures (two standard errors included) does not come from them."""

ACCURACIES_APART = 0.5
"""So far apart are the accuracies on longer and on shorter chosen responses of a policy that goes by length."""

SATURATED = 0.995
"""A held-out accuracy with nothing left to gain."""

JUDGED = ("rewards/", "logps/", "accuracy/", "nll_loss")
"""How the names begin of what a policy says of responses: numbers in every sound run."""

FEW_PAIRS = 20
"""Of fewer pairs nothing is said that the next few could turn round."""


def curve(metrics: Metrics, name: str) -> list[Point]:
    """A metric over steps; where a resumed run logged a step again, the later line counts."""
    return sorted({line["step"]: line[name] for line in metrics if name in line}.items())


def find_problems(
    metrics: Metrics, *, pairs: Sequence[ScoredPair], is_finished: bool = True, model_step: float = math.inf
) -> dict[str, str]:
    """A sentence or two for all that looks unhealthy, by kind; `pairs` are the held-out records as the last evaluation scored
    them. What more steps may still mend is told of a finished run only. What the model says of responses is judged up to
    `model_step`, of which its weights are."""
    whole, metrics = metrics, [line for line in metrics if line["step"] <= model_step]
    num_pairs = sum(math.isfinite(pair.margin) for pair in pairs)
    num_chosen = sum(pair.tokens_chosen > 0 for pair in pairs)
    found = {
        "not finite": _not_finite(whole),
        "no gradient": _no_gradient(whole),
        "chosen falls": _chosen_falls(metrics, num_chosen=num_chosen),
        "answers change": _answers_change(metrics, num_chosen=num_chosen),
        "likelihood accuracy falls": _likelihood_accuracy_falls(metrics, num_pairs=num_pairs),
        "memorised": _memorised(metrics, num_pairs=num_pairs),
        "eval loss rises": _eval_loss_rises(metrics),
        "saturated": _saturated(metrics, num_pairs=num_pairs),
        "length": _follows_length(pairs) if curve(metrics, "eval_rewards/margins") else "",
        "picture ignored": _picture_ignored(metrics),
        "waits": _waits_for_data(whole),
    }
    if is_finished:
        found["coin toss"] = _coin_toss(metrics, num_pairs=num_pairs) or _prefers_bad(pairs)
    return {kind: words for kind, words in found.items() if words}


def what_cannot_be_told(pairs: Sequence[ScoredPair]) -> str:
    """A sentence for what the held-out records are too few to show; empty where they are enough."""
    if not pairs:
        return (
            "No held-out record was evaluated (--val_dataset, --dataset_test_ratio): whether the policy is better on records "
            "that it has not seen can't be told."
        )
    if len(pairs) >= FEW_PAIRS:
        return ""
    noise = 1 / math.sqrt(len(pairs))
    return (
        f"Held-out {what_they_are(pairs)}: only {len(pairs):,}, of which an accuracy is known to ± {noise:.2f} at best. "
        "What fewer than 20 can't show is not warned of."
    )


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
    names = sorted({name for line in metrics for name in line if name.removeprefix("eval_").startswith(JUDGED)})
    for name in ("loss", "eval_loss", "grad_norm", *names):
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


def _prefers_bad(pairs: Sequence[ScoredPair]) -> str:
    """Of records that are single responses all: whether bad ones have the higher reward, by more than two standard errors."""
    good = [pair.reward_chosen for pair in pairs if math.isfinite(pair.reward_chosen)]
    bad = [pair.reward_rejected for pair in pairs if math.isfinite(pair.reward_rejected)]
    if any(pair.has_both for pair in pairs) or min(len(good), len(bad)) < FEW_PAIRS:
        return ""
    means = statistics.fmean(good), statistics.fmean(bad)
    noise = 2 * math.sqrt(statistics.variance(good) / len(good) + statistics.variance(bad) / len(bad))
    if means[1] - means[0] <= noise:
        return ""
    return (
        f"Held-out bad responses have the higher reward: {format_number(means[1])} in the mean, good ones "
        f"{format_number(means[0])}. Are good and bad swapped in the data?"
    )


def _chosen_falls(metrics: Metrics, *, num_chosen: int) -> str:
    """Preference losses lower the chosen responses' log-probs in sound runs, too, within bounds."""
    losses = _start_and_end(metrics, "nll_loss")
    if losses is None:
        return ""
    rise, choices = losses[1] - losses[0], _start_and_end(metrics, "mean_token_accuracy")
    fewer_choices = choices is not None and num_chosen >= FEW_PAIRS and choices[0] - choices[1] > FEWER_FIRST_CHOICES
    if not (rise >= math.log(FAR_WORSE_PERPLEXITY) or (rise > 0 and fewer_choices)):
        return ""
    perplexities = [format_number(round(math.exp(min(loss, 50)), 2)) for loss in losses]
    words = (
        f"The chosen responses became less likely: log-prob per token {format_number(-losses[0])} at the start, "
        f"{format_number(-losses[1])} now (perplexity {perplexities[0]} to {perplexities[1]})"
    )
    if choices:
        words += f"; {choices[0]:.1%} of their tokens were the policy's first choice, {choices[1]:.1%} are now"
    margins = _start_and_end(metrics, "rewards/margins")
    if margins is not None and margins[1] > margins[0]:
        words += ". The margin grows only because the rejected ones fall even more"
    return (
        f"{words}. What the policy writes gets worse: read its answers. A larger weight of the chosen responses' likelihood "
        "(--rpo_alpha, --cpo_alpha), with a reference a larger --beta, or a lower --learning_rate counters this."
    )


def _answers_change(metrics: Metrics, *, num_chosen: int) -> str:
    shares = _fallen_share(metrics, "eval_exact_match", num_records=num_chosen)
    if shares is None:
        return ""
    return (
        f"The policy would answer with exactly the chosen response in {shares[1]:.0%} of the held-out records, and did so in "
        f"{shares[0]:.0%} before the training: its answers get worse. A lower --learning_rate or fewer steps helps."
    )


def _likelihood_accuracy_falls(metrics: Metrics, *, num_pairs: int) -> str:
    shares = _fallen_share(metrics, "eval_accuracy/likelihood", num_records=num_pairs)
    if shares is None:
        return ""
    return (
        f"The policy finds the chosen response the likelier one in {shares[1]:.0%} of the held-out pairs, and did so in "
        f"{shares[0]:.0%} before: by its own likelihoods it prefers them less than at the start. A lower --learning_rate or "
        "fewer steps helps."
    )


def _fallen_share(metrics: Metrics, name: str, *, num_records: int) -> tuple[float, float] | None:
    """The first and the last value of a share of some held-out records, where it fell by more than 0.03 and two standard
    errors."""
    points = _finite(metrics, name)
    if len(points) < 2 or num_records < FEW_PAIRS:
        return None
    (_, start), (_, end) = points[0], points[-1]
    noise = 2 * math.sqrt((start * (1 - start) + end * (1 - end)) / num_records)
    return (start, end) if start - end > max(0.03, noise) else None


def _memorised(metrics: Metrics, *, num_pairs: int) -> str:
    train, held_out = _finite(metrics, "rewards/accuracies"), _finite(metrics, "eval_rewards/accuracies")
    if not train or not held_out:
        return ""
    late = _mean(train[-max(1, len(train) // 5) :])
    noise = 1 / math.sqrt(num_pairs) if num_pairs else 0.0
    if late - held_out[-1][1] <= max(0.15, noise):
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


def _saturated(metrics: Metrics, *, num_pairs: int) -> str:
    """Held-out pairs that are all decided early, after which margins only grow at the cost of the chosen responses."""
    accuracies, losses = _finite(metrics, "eval_rewards/accuracies"), dict(_finite(metrics, "eval_nll_loss"))
    if not accuracies or num_pairs < FEW_PAIRS:
        return ""
    last = accuracies[-1][0]
    since = next((step for step, _ in accuracies if all(value >= SATURATED for at, value in accuracies if at >= step)), last)
    if since > last / 2 or losses.get(last, 0.0) - losses.get(since, math.inf) < math.log(WORSE_PERPLEXITY):
        return ""
    return (
        f"Held-out accuracy has been {format_number(accuracies[-1][1])} since step {format_number(since)} of "
        f"{format_number(last)}, and since then margins grew while the chosen responses became less likely: the pairs have "
        "nothing more to teach. Stop there, or take harder pairs."
    )


def _follows_length(pairs: Sequence[ScoredPair]) -> str:
    """By the correlation, or by the accuracies: a few margins or lengths far off hide the one, a common bias the other."""
    known = [pair for pair in pairs if math.isfinite(pair.margin)]
    if len(known) < FEW_PAIRS:
        return ""
    found = correlation([(pair.extra_tokens, pair.margin) for pair in known])
    if abs(found) >= 0.5:
        leaning, evidence = found, f"correlation {found:+.2f}"
    else:
        longer, shorter = ([pair.margin for pair in known if sign * pair.extra_tokens > 0] for sign in (1, -1))
        if min(len(longer), len(shorter)) < FEW_PAIRS:
            return ""
        right, wrong = accuracy_of(longer), accuracy_of(shorter)
        leaning = right - wrong
        noise = 2 * math.sqrt(right * (1 - right) / len(longer) + wrong * (1 - wrong) / len(shorter))
        if abs(leaning) < ACCURACIES_APART or abs(leaning) <= noise:
            return ""
        evidence = f"accuracy {right:.2f} where the chosen response is longer, {wrong:.2f} where it is shorter"
    kind = "longer" if leaning > 0 else "shorter"
    return (
        f"Margins follow length ({evidence}): much of what was learned is to prefer {kind} responses. "
        "Compare the accuracies in the section on length."
    )


def _picture_ignored(metrics: Metrics) -> str:
    found = [_finite(metrics, f"eval_image_reliance{end}") for end in ("", "/stderr", "/pairs")]
    if not all(found):
        return ""
    fall, error, pairs = (points[-1][1] for points in found)
    accuracy = next(
        (
            points[-1][1]
            for name in ("rewards/accuracies", "accuracy/reward_model", "accuracy/likelihood")
            if (points := _finite(metrics, f"eval_{name}/shuffled"))
        ),
        math.nan,
    )
    is_a_coin_toss = not accuracy + fall - 0.5 > 1 / math.sqrt(pairs)
    if pairs < FEW_PAIRS or is_a_coin_toss or fall + 2 * error > SMALL_RELIANCE:
        return ""
    return (
        f"The pictures hardly matter: with those of other records the accuracy on {pairs:,.0f} held-out pairs is "
        f"{format_number(accuracy)}, with their own {format_number(accuracy + fall)}. What was learned can be told from the "
        "texts alone. Pairs whose responses differ in what the picture shows help, and mdpo, which also prefers the true "
        "picture to a damaged one."
    )


def _waits_for_data(metrics: Metrics) -> str:
    waits = _finite(metrics, "data_wait_fraction")
    if not waits or _mean(waits) <= 0.3:
        return ""
    words = f"Workers waited for data {_mean(waits):.0%} of the time"
    return f"{words}: give the cluster more CPUs, or shrink images with --max_pixels."
