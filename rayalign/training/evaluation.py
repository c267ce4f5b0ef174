"""What held-out pairs say of a policy beside the algorithm's own metrics: which response it finds likelier, by the log-probs
that the loss has computed anyway, and whether its preference comes from the pictures.

Formulas are those of the field's evaluations of preference models; a tie counts one half.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from torch import Tensor

from rayalign.algorithms import LossOutput
from rayalign.algorithms.terms import nll_metric, wins
from rayalign.data.batch import PairBatch
from rayalign.ops.logprobs import PairLogps
from rayalign.policy.policy import Policy
from rayalign.training.metric_names import BY_REWARD_MODEL, BY_SUM, BY_TOKEN, IMPLICIT_REWARD, SHUFFLED

PairValues = Mapping[str, Mapping[str, float]]
"""By the pairs' ids, their own values by metric."""


class WatchedForward:
    """A policy as a loss sees it, which keeps what the loss computes of `batch` itself (not of its companion)."""

    def __init__(self, policy: Policy, batch: PairBatch) -> None:
        self._policy = policy
        self.batch = batch
        self.pair_logps: PairLogps | None = None
        self.pair_reference: PairLogps | None = None
        self.pair_values: tuple[Tensor, Tensor] | None = None

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return self._policy.image_features(batch)

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        logps = self._policy.logps(batch, images)
        if batch is self.batch:
            self.pair_logps = logps
        return logps

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        logps = self._policy.reference_logps(batch, images)
        if batch is self.batch:
            self.pair_reference = logps
        return logps

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        self.pair_values = self._policy.values(batch, images)
        return self.pair_values


def with_preferences(output: LossOutput, forward: WatchedForward) -> LossOutput:
    """A loss's output on held-out pairs with the accuracies of this module beside its own metrics; a pair of one response has
    none.

    `drift` is the sum over the chosen response of log p - log p_ref; `mean_token_accuracy` the share of its tokens that are the
    policy's first choice, and `exact_match` whether all are, so that the greedy answer would be the same; `nll_loss` and
    `logps/rejected` are added where the algorithm has none of its own.
    """
    pair_metrics, missing = dict(output.pair_metrics), dict(output.missing)
    mean_metrics = dict(output.mean_metrics)
    if forward.pair_values is not None:
        chosen_value, rejected_value = forward.pair_values
        pair_metrics[BY_REWARD_MODEL] = wins(chosen_value - rejected_value)
    logps = forward.pair_logps
    if logps is not None:
        no_chosen, no_rejected = logps.chosen.tokens == 0, logps.rejected.tokens == 0
        pair_metrics |= accuracies(logps)
        missing |= dict.fromkeys((BY_SUM, BY_TOKEN), no_chosen | no_rejected)
        if "logps/rejected" not in pair_metrics:
            pair_metrics["logps/rejected"] = logps.rejected.total
            missing["logps/rejected"] = no_rejected
        mean_metrics = nll_metric(logps.chosen) | mean_metrics
        if logps.chosen.first_choices is not None:
            mean_metrics["mean_token_accuracy"] = (logps.chosen.first_choices.sum(), logps.chosen.tokens.sum())
            pair_metrics["exact_match"] = (logps.chosen.first_choices == logps.chosen.tokens).to(logps.chosen.total)
            missing["exact_match"] = no_chosen
        if forward.pair_reference is not None:
            pair_metrics["drift"] = logps.chosen.total - forward.pair_reference.chosen.total
            missing["drift"] = no_chosen
    return dataclasses.replace(output, pair_metrics=pair_metrics, mean_metrics=mean_metrics, missing=missing)


def accuracies(logps: PairLogps) -> dict[str, Tensor]:
    """[B] each: whether the chosen response is the likelier one, as a whole and per token; nan for a single response."""
    return {
        BY_SUM: wins(logps.chosen.total - logps.rejected.total),
        BY_TOKEN: wins(logps.chosen.average - logps.rejected.average),
    }


def shuffled_accuracies(policy: Policy, batch: PairBatch, *, beside_reference: bool) -> dict[str, Tensor]:
    """[B] each: the accuracies of a batch whose pictures are those of other records; `beside_reference`: the implicit reward's,
    too, for which the reference looks at the same pictures."""
    images = policy.image_features(batch)
    if policy.value_head is not None:
        chosen_value, rejected_value = policy.values(batch, images)
        return {BY_REWARD_MODEL: wins(chosen_value - rejected_value)}
    logps = policy.logps(batch, images)
    found = accuracies(logps)
    if beside_reference:
        reference = policy.reference_logps(batch, images)
        chosen_logratios = logps.chosen.total - reference.chosen.total
        rejected_logratios = logps.rejected.total - reference.rejected.total
        found[IMPLICIT_REWARD] = wins(chosen_logratios - rejected_logratios)
    return found


def response_tokens(batch: PairBatch) -> tuple[list[int], list[int]]:
    """The number of tokens of each pair's chosen response and of each rejected one; 0 where there is none."""
    tokens = batch.response_ids.bincount(minlength=2 * batch.num_pairs).tolist()
    return tokens[: batch.num_pairs], tokens[batch.num_pairs :]


def image_metrics(true: PairValues, shuffled: PairValues) -> dict[str, float]:
    """What the accuracies of the pairs of `shuffled`, whose pictures were those of other records, say beside their `true` ones.

    Each accuracy on shuffled pictures; and by how much they lower the one that stands nearest to the training (the implicit
    reward's, the reward model's, else the likelihood's): `image_reliance`, with its standard error and the number of pairs.
    """
    metrics: dict[str, float] = {}
    for name in (BY_TOKEN, BY_SUM, BY_REWARD_MODEL, IMPLICIT_REWARD):
        falls = [true[pair_id][name] - values[name] for pair_id, values in shuffled.items() if name in values]
        if not falls:
            continue
        accuracy = statistics.fmean(values[name] for values in shuffled.values() if name in values)
        mean = statistics.fmean(falls)
        deviation = math.sqrt(statistics.fmean((fall - mean) ** 2 for fall in falls) / len(falls))  # NaN ends statistics.pstdev
        metrics |= {name + SHUFFLED: accuracy, "image_reliance": mean}
        metrics |= {"image_reliance/stderr": deviation, "image_reliance/pairs": len(falls)}
    return metrics
