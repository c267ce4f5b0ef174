"""The losses that `--loss_type` of DPO names, each a function of a batch's scores; a new one is a function and a line of the
table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from rayalign.algorithms.algorithm import StepStatistics
from rayalign.algorithms.terms import logistic_loss
from rayalign.ops.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.ops.logprobs import PairLogps

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True)
class LossSettings:
    """The numbers that losses take, by the names of their flags."""

    beta: float
    label_smoothing: float
    discopop_tau: float


@dataclass(frozen=True)
class RankPartners:
    """What AOT compares each pair with, each [B]: of the step's sorted reference gaps, chosen and rejected log-ratios, those at
    the ranks of the pair's own gap, rejected and chosen log-ratio."""

    gap: Tensor
    chosen_logratios: Tensor
    rejected_logratios: Tensor


@dataclass(frozen=True)
class PairScores:
    """What the losses see of B pairs, each [B].

    `*_logratios`: of policy to reference, log p - log p_ref, summed over response tokens; `*_score`: the same seen through the
    f-divergence; `*_tokens`: lengths of the responses; `gap`: log p_chosen - log p_rejected of the policy; `partners` only
    where a loss is one of RANKED.
    """

    chosen_logratios: Tensor
    rejected_logratios: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    gap: Tensor
    partners: RankPartners | None

    @property
    def delta(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def delta_per_token(self) -> Tensor:
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens


Loss: TypeAlias = "Callable[[PairScores, LossSettings], Tensor]"


def sigmoid(scores: PairScores, settings: LossSettings) -> Tensor:
    """-log sigmoid(beta d): equation 7 of https://arxiv.org/abs/2305.18290; with smoothing, its authors' conservative DPO."""
    return logistic_loss(settings.beta * scores.delta, label_smoothing=settings.label_smoothing)


def sigmoid_norm(scores: PairScores, settings: LossSettings) -> Tensor:
    """-log sigmoid(beta d) with log-ratios per token, as in Tulu 3 (https://arxiv.org/abs/2411.15124, section 5.1.2)."""
    return logistic_loss(settings.beta * scores.delta_per_token)


def hinge(scores: PairScores, settings: LossSettings) -> Tensor:
    """max(0, 1 - beta d): SLiC's calibration (https://arxiv.org/abs/2309.06657, equation 10)."""
    return torch.relu(1 - settings.beta * scores.delta)


def ipo(scores: PairScores, settings: LossSettings) -> Tensor:
    """(d - 1 / (2 beta))^2, with log-ratios per token: equation 17 of https://arxiv.org/abs/2310.12036, whose tau is beta."""
    return (scores.delta_per_token - 1 / (2 * settings.beta)) ** 2


def exo_pair(scores: PairScores, settings: LossSettings) -> Tensor:
    """KL of the policy's preference to the label's, (1 - e, e): equation 16 of https://arxiv.org/abs/2402.00856."""
    z, smoothing = settings.beta * scores.delta, settings.label_smoothing
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-smoothing))
    return right + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(smoothing))


def nca_pair(scores: PairScores, settings: LossSettings) -> Tensor:
    """Each response against noise: https://arxiv.org/abs/2402.05369, the pairwise NCA."""
    chosen, rejected = settings.beta * scores.chosen_logratios, settings.beta * scores.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(scores: PairScores, settings: LossSettings) -> Tensor:
    """The sigmoid loss without the bias of labels that are wrong with probability e < 1/2: rDPO
    (https://arxiv.org/abs/2403.00409)."""
    z, smoothing = settings.beta * scores.delta, settings.label_smoothing
    return (smoothing * F.logsigmoid(-z) - (1 - smoothing) * F.logsigmoid(z)) / (1 - 2 * smoothing)


def bco_pair(scores: PairScores, settings: LossSettings) -> Tensor:
    """Each response as good or bad by itself: https://arxiv.org/abs/2404.04656, with a reward shift of 0."""
    return -F.logsigmoid(settings.beta * scores.chosen_logratios) - F.logsigmoid(-settings.beta * scores.rejected_logratios)


def sppo_hard(scores: PairScores, settings: LossSettings) -> Tensor:
    """Log-ratios pulled to +-1 / (2 beta): equation 4.7 of https://arxiv.org/abs/2405.00675 with certain preferences."""
    return (scores.chosen_logratios - 0.5 / settings.beta) ** 2 + (scores.rejected_logratios + 0.5 / settings.beta) ** 2


def aot(scores: PairScores, settings: LossSettings) -> Tensor:
    """The step's sorted gaps of the policy against those of the reference: AOT for paired data
    (https://arxiv.org/abs/2406.05882)."""
    assert scores.partners is not None
    difference = scores.gap - scores.partners.gap
    return logistic_loss(settings.beta * difference, label_smoothing=settings.label_smoothing)


def aot_unpaired(scores: PairScores, settings: LossSettings) -> Tensor:
    """The step's sorted chosen log-ratios against its sorted rejected ones: AOT for unpaired data (as above)."""
    assert scores.partners is not None

    def loss(difference: Tensor) -> Tensor:
        return logistic_loss(settings.beta * difference, label_smoothing=settings.label_smoothing)

    # Every term of the step's sum has one chosen and one rejected side, mostly of two pairs. A pair adds up its two terms, each
    # with the other side held fixed: the gradients of the whole, and twice its value.
    both = loss(scores.chosen_logratios - scores.partners.rejected_logratios) + loss(
        scores.partners.chosen_logratios - scores.rejected_logratios
    )
    return both - both.detach() / 2


def apo_zero(scores: PairScores, settings: LossSettings) -> Tensor:
    """Chosen responses up, rejected ones down: equation 7 of https://arxiv.org/abs/2408.06266."""
    return 1 - torch.sigmoid(settings.beta * scores.chosen_logratios) + torch.sigmoid(settings.beta * scores.rejected_logratios)


def apo_down(scores: PairScores, settings: LossSettings) -> Tensor:
    """Both down, the rejected one more: equation 8 of https://arxiv.org/abs/2408.06266."""
    lead = scores.chosen_logratios - scores.rejected_logratios
    return torch.sigmoid(settings.beta * scores.chosen_logratios) + 1 - torch.sigmoid(settings.beta * lead)


def discopop(scores: PairScores, settings: LossSettings) -> Tensor:
    """Logistic and exponential loss blended by the margin itself: equation 5 of https://arxiv.org/abs/2406.08414."""
    z = settings.beta * scores.delta
    blend = torch.sigmoid(z / settings.discopop_tau)
    # exp(-z) sigmoid(z / tau) in one: for a pair that is far off the first is infinite and the second 0, which makes NaN.
    exponential = torch.exp(F.logsigmoid(z / settings.discopop_tau) - z)
    return -F.logsigmoid(z) * (1 - blend) + exponential


PAIR_LOSSES: Mapping[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sigmoid_norm),
    )
}
"""Each gives the loss of every pair, [B]."""

SFT_LOSS = "sft"
"""The one loss that is not a mean over pairs: the token-mean likelihood of the chosen responses."""

SMOOTHED = frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"})
"""Losses that `--label_smoothing` changes."""

BY_DIVERGENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", SFT_LOSS})
"""Losses that see the log-ratios through `--f_divergence_type`; the others are derived for the reverse KL."""

RANKED = frozenset({"aot", "aot_unpaired"})
"""Losses that compare a pair with others of the step."""

REFERENCE_FREE = BY_DIVERGENCE | RANKED
"""Losses that see chosen log-ratios only beside rejected ones. The others hold each log-ratio against 0, and without a
reference it is a log-prob, far below: their gradients vanish or have a wrong sign."""

REFERENCE_FREE_DIVERGENCES = ("reverse_kl", "js_divergence")
"""Divergences that stay near the log-ratio itself where it is far below 0; the others grow exponentially there, and are cut off
(LARGEST_EXPONENT)."""


LARGEST_EXPONENT = 40.0
"""Log-ratios are cut off here before the exponential: the square of e^40 is still far below float32's largest number, e^88."""


def divergence_score(log_ratio: Tensor, *, divergence: Divergence, alpha: float) -> Tensor:
    """f'(u) of the log-ratio log u, up to a constant: what takes its place under another divergence than the reverse KL
    (https://arxiv.org/abs/2309.16240, table 1)."""
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -torch.expm1((-log_ratio).clamp(max=LARGEST_EXPONENT))
        case "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        case "alpha_divergence":
            if alpha == 1:
                return log_ratio
            return torch.expm1(((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)


def discounted(logps: PairLogps, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Log-probs [B] of both responses; with `ld_alpha` the tokens beyond the shorter one's length count that much: LD-DPO
    (https://arxiv.org/abs/2409.06411)."""
    if ld_alpha is None:
        return logps.chosen.total, logps.rejected.total
    chosen, rejected = (side.shared + ld_alpha * (side.total - side.shared) for side in (logps.chosen, logps.rejected))
    return chosen, rejected


def rank_partners(statistics: StepStatistics, batch: PairBatch) -> RankPartners:
    """The partners of a batch's pairs; `statistics.whole` [P, 4]: chosen and rejected log-probs of the policy, then of the
    reference."""
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps = statistics.whole.unbind(1)
    own = slice(statistics.first, statistics.first + batch.num_pairs)
    gap = policy_chosen_logps - policy_rejected_logps
    reference_gap = reference_chosen_logps - reference_rejected_logps
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    return RankPartners(
        gap=reference_gap.sort().values[_ranks(gap)][own],
        chosen_logratios=chosen_logratios.sort().values[_ranks(rejected_logratios)][own],
        rejected_logratios=rejected_logratios.sort().values[_ranks(chosen_logratios)][own],
    )


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value among all of them, from the smallest."""
    return values.argsort(stable=True).argsort()
