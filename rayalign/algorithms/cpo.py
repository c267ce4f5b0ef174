"""Contrastive Preference Optimization (Xu et al. 2024, https://arxiv.org/abs/2401.08417): DPO with a uniform reference, held to
the data by the chosen responses' likelihood."""

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


def cpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[B]: -log sigmoid(beta (log p_chosen - log p_rejected)), of the responses' summed log-probs: the
    paper's L_prefer."""
    return logistic_loss(beta * (chosen - rejected), label_smoothing=label_smoothing)


@dataclass(frozen=True)
class CPO:
    """CPO"""

    name: ClassVar[str] = "cpo"
    needs: ClassVar[Needs] = Needs()

    beta: float = flag(0.1, "Scale of the log-probabilities' difference.", above=0)
    cpo_alpha: float = flag(
        1.0, "Weight of the chosen responses' token-mean negative log-likelihood; 0 turns it off.", at_least=0
    )
    label_smoothing: float = flag(0.0, "Probability that a preference label is wrong.", at_least=0, at_most=0.5)

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        logps = policy.logps(batch, policy.image_features(batch))
        chosen, rejected = logps.chosen.total, logps.rejected.total
        losses = cpo_loss(chosen, rejected, beta=self.beta, label_smoothing=self.label_smoothing)
        nll = negative_log_likelihood(logps.chosen)
        return LossOutput(
            loss=losses.sum() / counts.pairs + self.cpo_alpha * nll / counts.chosen_tokens,
            pair_metrics=reward_metrics(self.beta * chosen, self.beta * rejected) | logp_metrics(chosen, rejected),
            mean_metrics=nll_metric(logps.chosen),
        )
