"""mDPO (Wang et al. 2024, https://arxiv.org/abs/2406.11839): DPO that can't be learnt from the text alone.

Beside the usual preference, the chosen response must be likelier with its images than with damaged ones, and likelier than
under the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import logistic_loss, logp_metrics, nll_metric, reward_metrics, wins
from rayalign.config.flags import check_bounds, flag
from rayalign.data.companions import Damaged
from rayalign.ops.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


def conditional_loss(chosen_logratios: Tensor, damaged_logratios: Tensor, *, beta: float) -> Tensor:
    """[b]: -log sigmoid(beta (r - r')), with r and r' the log-ratios of policy to reference of the same response, given the
    images and given the damaged ones: the paper's L_CoPO."""
    return logistic_loss(beta * (chosen_logratios - damaged_logratios))


def anchor_loss(chosen_logratios: Tensor, *, beta: float, delta: float) -> Tensor:
    """[B]: -log sigmoid(beta r - delta): the chosen response's reward must exceed delta: the paper's L_AncPO."""
    return -F.logsigmoid(beta * chosen_logratios - delta)


@dataclass(frozen=True)
class MDPO:
    """mDPO"""

    name: ClassVar[str] = "mdpo"
    needs: ClassVar[Needs] = Needs(companion=Damaged(), reference=True)

    beta: float = flag(0.1, "Strength of the pull to the reference: higher keeps closer to it.", above=0)
    conditional_weight: float = flag(1.0, "Weight of preferring the images to damaged ones.", at_least=0)
    anchor_weight: float = flag(1.0, "Weight of keeping the chosen responses' rewards above --anchor_delta.", at_least=0)
    anchor_delta: float = flag(0.0, "Reward that the chosen responses are held above.")

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        """Pairs without images have no conditional preference; its sum is divided by all pairs of the step all the same."""
        images = policy.image_features(batch)
        reference = policy.reference_logps(batch, images)
        logps = policy.logps(batch, images)
        chosen_logratios = logps.chosen.total - reference.chosen.total
        rejected_logratios = logps.rejected.total - reference.rejected.total
        losses = logistic_loss(self.beta * (chosen_logratios - rejected_logratios)).sum()
        losses = losses + self.anchor_weight * anchor_loss(chosen_logratios, beta=self.beta, delta=self.anchor_delta).sum()
        means: dict[str, tuple[Tensor, Tensor]] = {}
        if batch.companion is not None:
            rows, damaged_batch = batch.companion.rows, batch.companion.batch
            images = policy.image_features(damaged_batch)
            damaged_reference = policy.reference_logps(damaged_batch, images)
            damaged_logratios = policy.logps(damaged_batch, images).chosen.total - damaged_reference.chosen.total
            with_images = chosen_logratios[rows]
            losses = losses + self.conditional_weight * conditional_loss(with_images, damaged_logratios, beta=self.beta).sum()
            lead = self.beta * (with_images - damaged_logratios).detach()
            count = torch.tensor(len(rows))
            means = {"conditional/margins": (lead.sum(), count), "conditional/accuracies": (wins(lead).sum(), count)}
        return LossOutput(
            loss=losses / counts.pairs,
            pair_metrics=reward_metrics(self.beta * chosen_logratios, self.beta * rejected_logratios)
            | logp_metrics(logps.chosen.total, logps.rejected.total),
            mean_metrics=means | nll_metric(logps.chosen),
        )
