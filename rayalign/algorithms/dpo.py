"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), with the NLL term of RPO."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from rayalign.algorithms.algorithm import PolicyForward, StepOutput
from rayalign.batch import PairBatch
from rayalign.config import check_bounds, flag
from rayalign.logprobs import PairLogps
from rayalign.plan import StepTotals


def dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """[B]: -log sigmoid(beta d) (1 - e) - log sigmoid(-beta d) e, with d = (policy - reference)(chosen) - (policy -
    reference)(rejected).

    Equation 7 of the paper; label smoothing e as in its repository and cDPO.
    """
    margin = beta * ((policy.chosen.total - reference.chosen.total) - (policy.rejected.total - reference.rejected.total))
    return -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing


@dataclass(frozen=True)
class DPO:
    """DPO"""

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True
    with_rejected: ClassVar[bool] = True
    uses_dropout: ClassVar[bool] = False
    head: ClassVar[Literal["language", "value"]] = "language"

    beta: float = flag(0.1, "Strength of the pull to the reference: higher keeps closer to it.", above=0)
    label_smoothing: float = flag(0.0, "Probability that a preference label is wrong.", at_least=0, at_most=0.5)
    rpo_alpha: float = flag(
        1.0, "Weight of the chosen responses' token-mean negative log-likelihood (RPO); 0 turns it off.", at_least=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    def step(self, policy: PolicyForward, batch: PairBatch, totals: StepTotals) -> StepOutput:
        images = policy.image_features(batch)
        reference = policy.reference_logps(batch, images)
        logps = policy.logps(batch, images)
        losses = dpo_loss(logps, reference, beta=self.beta, label_smoothing=self.label_smoothing)
        nll = -logps.chosen.total.sum()
        loss_share = losses.sum() / totals.pairs + self.rpo_alpha * nll / totals.chosen_tokens
        chosen = self.beta * (logps.chosen.total - reference.chosen.total).detach()
        rejected = self.beta * (logps.rejected.total - reference.rejected.total).detach()
        return StepOutput(
            loss_share=loss_share,
            pair_metrics={
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
                "logps/chosen": logps.chosen.total.detach(),
                "logps/rejected": logps.rejected.total.detach(),
            },
            token_metrics={"nll_loss": (nll.detach(), logps.chosen.tokens.sum())},
        )
