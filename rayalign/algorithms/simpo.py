"""Simple Preference Optimization (Meng et al. 2024, https://arxiv.org/abs/2405.14734): the reward is the log-probability per
token, and the chosen one must lead by a margin. With the likelihood term of CPO, as in its guide; `--cpo_alpha 0` is the
paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import logistic_loss, logp_metrics, negative_log_likelihood, nll_metric, reward_metrics
from rayalign.config.flags import check_bounds, flag

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """[B]: -log sigmoid(beta (log p_chosen - log p_rejected) - gamma), of log-probs per token; equation 6 of the paper."""
    return logistic_loss(beta * (chosen - rejected) - gamma)


@dataclass(frozen=True)
class SimPO:
    """SimPO"""

    name: ClassVar[str] = "simpo"
    needs: ClassVar[Needs] = Needs()

    beta: float = flag(2.0, "Scale of the difference of log-probabilities per token.", above=0)
    simpo_gamma: float = flag(1.0, "Margin by which the chosen reward must lead the rejected one.", at_least=0)
    cpo_alpha: float = flag(
        1.0,
        "Weight of the chosen responses' token-mean negative log-likelihood; 0 turns it off, which is the paper's SimPO.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        logps = policy.logps(batch, policy.image_features(batch))
        chosen, rejected = logps.chosen.average, logps.rejected.average
        losses = simpo_loss(chosen, rejected, beta=self.beta, gamma=self.simpo_gamma)
        nll = negative_log_likelihood(logps.chosen)
        return LossOutput(
            loss=losses.sum() / counts.pairs + self.cpo_alpha * nll / counts.chosen_tokens,
            pair_metrics=reward_metrics(self.beta * chosen, self.beta * rejected) | logp_metrics(chosen, rejected),
            mean_metrics=nll_metric(logps.chosen),
        )
