"""Supervised fine-tuning on the chosen responses: the stage before preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rayalign.algorithms.algorithm import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import negative_log_likelihood, nll_metric

if TYPE_CHECKING:
    from rayalign.data.batch import PairBatch
    from rayalign.data.sampler import StepCounts


@dataclass(frozen=True)
class SFT:
    """SFT"""

    name: ClassVar[str] = "sft"
    needs: ClassVar[Needs] = Needs(responses="chosen", dropout=True)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        """Token-mean cross-entropy of the chosen responses, over all response tokens of the optimizer step."""
        chosen = policy.logps(batch, policy.image_features(batch)).chosen
        return LossOutput(
            loss=negative_log_likelihood(chosen) / counts.chosen_tokens,
            pair_metrics={"logps/chosen": chosen.total.detach()},
            mean_metrics=nll_metric(chosen),
        )
