"""What an algorithm is: a frozen dataclass of hyper-parameters with one method, the step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from rayalign.batch import PairBatch
from rayalign.logprobs import PairLogps
from rayalign.plan import StepTotals


class PolicyForward(Protocol):
    """What a step may ask of the policy; `images` is computed once and serves both forwards."""

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]: ...

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps: ...

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps: ...


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch contributes to an optimizer step.

    `loss_share` [] is differentiable; shares of all micro-batches of all workers add up to the step's loss. `pair_metrics`
    holds, for each metric, one value per pair [B] (detached); `token_metrics` a (sum [], count []) over response tokens.
    """

    loss_share: Tensor
    pair_metrics: Mapping[str, Tensor]
    token_metrics: Mapping[str, tuple[Tensor, Tensor]]


class Algorithm(Protocol):
    """A preference objective. Implementations are frozen dataclasses whose fields are their flags (`config.flag`)."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool]
    with_rejected: ClassVar[bool]
    """Whether rows hold the rejected response; False where only chosen ones are trained on."""
    uses_dropout: ClassVar[bool]
    """False where two policies are compared: dropout would make them differ at step 0."""
    head: ClassVar[Literal["language", "value"]]

    def step(self, policy: PolicyForward, batch: PairBatch, totals: StepTotals) -> StepOutput:
        """Runs the policy on a micro-batch; losses are divided by `totals`, the counts of the whole optimizer step."""
        ...
