"""Reward model (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155): a linear head on the last response token scores a
response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import logistic_loss, reward_metrics
from rayalign.config.flags import check_bounds, flag

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


def reward_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, *, center_rewards_coefficient: float) -> Tensor:
    """[B]: -log sigmoid(v_chosen - v_rejected - margin) + c (v_chosen + v_rejected)^2.

    Equation 1 of the paper; the margin is Llama 2's (https://arxiv.org/abs/2307.09288, equation 2), the centring that of
    https://arxiv.org/abs/2312.09244.
    """
    return logistic_loss(chosen - rejected - margins) + center_rewards_coefficient * (chosen + rejected) ** 2


@dataclass(frozen=True)
class RM:
    """RM"""

    name: ClassVar[str] = "rm"
    needs: ClassVar[Needs] = Needs(head="value")

    center_rewards_coefficient: float = flag(
        0.0, "Weight of the squared sum of a pair's rewards, which keeps rewards around 0.", at_least=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        """Records with a `margin` column demand that much of a lead; the others' margin is 0."""
        chosen, rejected = policy.values(batch, policy.image_features(batch))
        margins = batch.margins.to(chosen)
        losses = reward_loss(chosen, rejected, margins, center_rewards_coefficient=self.center_rewards_coefficient)
        return LossOutput(loss=losses.sum() / counts.pairs, pair_metrics=reward_metrics(chosen, rejected))
