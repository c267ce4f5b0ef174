"""What the losses are made of: the logistic loss, likelihood of the chosen responses, and the metrics of a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayalign.ops.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.ops.logprobs import SequenceLogps


def logistic_loss(margin: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), elementwise: the Bradley-Terry likelihood of a preference whose label is
    wrong with probability e."""
    right = -F.logsigmoid(margin)
    if label_smoothing == 0:
        return right
    return right * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing


def negative_log_likelihood(chosen: SequenceLogps) -> Tensor:
    """[]: cross-entropy of the chosen responses, summed over their tokens; divide by the step's `chosen_tokens`."""
    return -chosen.total.sum()


def nll_metric(chosen: SequenceLogps) -> dict[str, tuple[Tensor, Tensor]]:
    """`nll_loss`, the mean over response tokens."""
    return {"nll_loss": (-chosen.total.detach().sum(), chosen.tokens.sum())}


def wins(margins: Tensor) -> Tensor:
    """1 where a margin is above 0, 0 where it is below, and a half for a tie: their mean is an accuracy. NaN stays NaN, whose
    sign torch calls 0."""
    return torch.where(margins.isnan(), margins, (torch.sign(margins) + 1) / 2)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """`rewards/*` of pairs [B], from the rewards of both responses."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": wins(chosen - rejected),
    }


def logp_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """`logps/*` of pairs [B], as the algorithm uses them: sums or means over response tokens."""
    return {"logps/chosen": chosen.detach(), "logps/rejected": rejected.detach()}
