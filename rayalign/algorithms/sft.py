"""Supervised fine-tuning on the chosen responses: the stage before preference optimisation."""

from dataclasses import dataclass
from typing import ClassVar

from rayalign.algorithms.algorithm import Needs, PolicyForward, StepOutput, Survey
from rayalign.algorithms.terms import negative_log_likelihood, nll_metric
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepTotals


@dataclass(frozen=True)
class SFT:
    """SFT"""

    name: ClassVar[str] = "sft"
    needs: ClassVar[Needs] = Needs(responses="chosen", dropout=True)

    def step(self, policy: PolicyForward, batch: PairBatch, totals: StepTotals, survey: Survey | None = None) -> StepOutput:
        """Token-mean cross-entropy of the chosen responses, over all response tokens of the optimizer step."""
        chosen = policy.logps(batch, policy.image_features(batch)).chosen
        return StepOutput(
            loss_share=negative_log_likelihood(chosen) / totals.chosen_tokens,
            pair_metrics={"logps/chosen": chosen.total.detach()},
            mean_metrics=nll_metric(chosen),
        )
