"""Kahneman-Tversky Optimization (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306): responses that are each good or bad
by themselves; a pair is one of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import logp_metrics, nll_metric, reward_metrics
from rayalign.config.flags import check_bounds, flag
from rayalign.data.companions import Mismatched
from rayalign.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


def kto_losses(chosen_logratios: Tensor, rejected_logratios: Tensor, kl: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """[B] each: 1 - sigmoid(beta (r - z)) of desirable and 1 - sigmoid(beta (z - r)) of undesirable responses, with r the
    log-ratio of policy to reference and z [] the KL estimate: the paper's lambda - v(x, y), with lambda = 1."""
    return 1 - torch.sigmoid(beta * (chosen_logratios - kl)), 1 - torch.sigmoid(beta * (kl - rejected_logratios))


@dataclass(frozen=True)
class KTO:
    """KTO"""

    name: ClassVar[str] = "kto"
    needs: ClassVar[Needs] = Needs(responses="either", companion=Mismatched(), reference=True, statistics=True)

    beta: float = flag(0.1, "Strength of the pull to the reference: higher keeps closer to it.", above=0)
    desirable_weight: float = flag(1.0, "Weight of the good responses' losses.", at_least=0)
    undesirable_weight: float = flag(1.0, "Weight of the bad responses' losses.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)

    def statistics(self, policy: PolicyForward, batch: PairBatch) -> Tensor:
        """[B, 2]: sum of the log-ratios of another prompt's responses put to a pair's prompt, and how many they are. The mean
        over the step is the KL estimate z of section 4.1, clamped at 0."""
        assert batch.companion is not None
        images = policy.image_features(batch)
        mismatched = batch.companion.batch
        logps, reference = policy.logps(mismatched, images), policy.reference_logps(mismatched, images)
        chosen_logratios = logps.chosen.total - reference.chosen.total
        rejected_logratios = logps.rejected.total - reference.rejected.total
        counts = (logps.chosen.tokens > 0).to(chosen_logratios) + (logps.rejected.tokens > 0).to(chosen_logratios)
        return torch.stack([chosen_logratios + rejected_logratios, counts], dim=1)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        assert statistics is not None
        images = policy.image_features(batch)
        reference = policy.reference_logps(batch, images)
        logps = policy.logps(batch, images)
        chosen_logratios = logps.chosen.total - reference.chosen.total
        rejected_logratios = logps.rejected.total - reference.rejected.total
        ratio, count = statistics.whole.to(chosen_logratios).sum(0)
        kl = (ratio / count).clamp(min=0)
        desirable, undesirable = kto_losses(chosen_logratios, rejected_logratios, kl, beta=self.beta)
        no_chosen, no_rejected = logps.chosen.tokens == 0, logps.rejected.tokens == 0
        losses = self.desirable_weight * desirable * ~no_chosen + self.undesirable_weight * undesirable * ~no_rejected
        rewards = reward_metrics(self.beta * chosen_logratios, self.beta * rejected_logratios)
        not_both = no_chosen | no_rejected
        return LossOutput(
            loss=losses.sum() / counts.responses,
            pair_metrics=rewards | logp_metrics(logps.chosen.total, logps.rejected.total),
            mean_metrics={"kl": (kl * batch.num_pairs, torch.tensor(batch.num_pairs)), **nll_metric(logps.chosen)},
            missing={
                **{f"{name}/chosen": no_chosen for name in ("rewards", "logps")},
                **{f"{name}/rejected": no_rejected for name in ("rewards", "logps")},
                **{f"rewards/{name}": not_both for name in ("margins", "accuracies")},
            },
        )
