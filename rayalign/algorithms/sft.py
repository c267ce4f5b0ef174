"""Supervised fine-tuning on the chosen responses: the stage before preference optimisation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rayalign.algorithms.algorithm import PolicyForward, StepOutput
from rayalign.batch import PairBatch
from rayalign.plan import StepTotals


@dataclass(frozen=True)
class SFT:
    """SFT"""

    name: ClassVar[str] = "sft"
    needs_reference: ClassVar[bool] = False
    with_rejected: ClassVar[bool] = False
    uses_dropout: ClassVar[bool] = True
    head: ClassVar[Literal["language", "value"]] = "language"

    def step(self, policy: PolicyForward, batch: PairBatch, totals: StepTotals) -> StepOutput:
        """Token-mean cross-entropy of the chosen responses, over all response tokens of the optimizer step."""
        logps = policy.logps(batch, policy.image_features(batch)).chosen
        nll = -logps.total.sum()
        return StepOutput(
            loss_share=nll / totals.chosen_tokens,
            pair_metrics={"logps/chosen": logps.total.detach()},
            token_metrics={"nll_loss": (nll.detach(), logps.tokens.sum())},
        )
