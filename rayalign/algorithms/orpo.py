"""Odds Ratio Preference Optimization (Hong et al. 2024, https://arxiv.org/abs/2403.07691): SFT on the chosen responses, and a
penalty where the rejected one's odds come near; no reference, no stage before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import logistic_loss, logp_metrics, negative_log_likelihood, nll_metric, reward_metrics
from rayalign.config.flags import check_bounds, flag
from rayalign.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, without cancellation near 0 nor far from it (Maechler 2012, equation 7). A probability of 1
    counts as 1 less than the smallest step of the type, and keeps that gradient: no infinity and no NaN."""
    below_zero = x - (x - x.clamp(max=-torch.finfo(x.dtype).eps)).detach()
    near, far = torch.log(-torch.expm1(below_zero)), torch.log1p(-torch.exp(below_zero))
    return near.where(below_zero > -math.log(2), far)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[B]: log of the odds p / (1 - p) of chosen over rejected, p = e^(log-prob per token); equations 4 and 5 of the paper."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


@dataclass(frozen=True)
class ORPO:
    """ORPO"""

    name: ClassVar[str] = "orpo"
    needs: ClassVar[Needs] = Needs()

    beta: float = flag(0.1, "Weight of the odds ratio term beside the likelihood of the chosen responses (lambda).", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        logps = policy.logps(batch, policy.image_features(batch))
        chosen, rejected = logps.chosen.average, logps.rejected.average
        log_odds = log_odds_ratio(chosen, rejected)
        ratio_losses = logistic_loss(log_odds)
        nll = negative_log_likelihood(logps.chosen)
        return LossOutput(
            loss=nll / counts.chosen_tokens + self.beta * ratio_losses.sum() / counts.pairs,
            pair_metrics={
                **reward_metrics(self.beta * chosen, self.beta * rejected),
                **logp_metrics(chosen, rejected),
                "log_odds_ratio": -ratio_losses.detach(),
                "log_odds_chosen": log_odds.detach(),
            },
            mean_metrics=nll_metric(logps.chosen),
        )
