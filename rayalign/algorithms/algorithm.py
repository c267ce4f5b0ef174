"""What an algorithm is: a frozen dataclass of hyper-parameters with one method, the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from rayalign.config.flags import Section

if TYPE_CHECKING:
    from torch import Tensor

    from rayalign.data.batch import PairBatch
    from rayalign.data.companions import Companion
    from rayalign.data.sampler import StepCounts
    from rayalign.formats.records import Responses
    from rayalign.ops.logprobs import PairLogps


class PolicyForward(Protocol):
    """What a loss may ask of the policy; `images` is computed once and serves every forward of a batch."""

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]: ...

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps: ...

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps: ...

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class LossOutput:
    """What one micro-batch contributes to an optimizer step.

    `loss` [] is differentiable; the losses of all micro-batches of all workers add up to the step's loss. `pair_metrics`
    holds, for each metric, one value per pair [B] (detached), where `missing` [B] does not say that the pair has none;
    `mean_metrics` a (sum [], count []) over whatever the metric is a mean of.
    """

    loss: Tensor
    pair_metrics: Mapping[str, Tensor]
    mean_metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    missing: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepStatistics:
    """What `Algorithm.statistics` found, for all pairs of the optimizer step: `whole` [P, K]; this micro-batch's lines start at
    `first`."""

    whole: Tensor
    first: int

    def of(self, batch: PairBatch) -> Tensor:
        """The lines [B, K] of the micro-batch's own pairs."""
        return self.whole[self.first : self.first + batch.num_pairs]


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of the data, the policy and the loop.

    `responses`: which responses of a record its rows hold; `companion`: the other rows that its batches bring along;
    `statistics`: the loss of a pair depends on the other pairs of the step, whose statistics are taken first, of the
    companion's rows where there are some; `dropout`: False where two policies or two responses are compared, which dropout
    would make differ at step 0.
    """

    responses: Responses = "both"
    companion: Companion | None = None
    head: Literal["language", "value"] = "language"
    reference: bool = False
    statistics: bool = False
    dropout: bool = False

    @property
    def stable_companion(self) -> Companion | None:
        """The companion, if the reference's log-probs of its rows can be stored."""
        return self.companion if self.companion is not None and self.companion.is_stable_over_epochs else None

    @property
    def runs_reference_in_step(self) -> bool:
        """Whether the reference is run in the step even where its log-probs are stored: on a companion's rows that differ from
        epoch to epoch."""
        return self.reference and self.companion != self.stable_companion

    @property
    def trains_companion(self) -> bool:
        """Whether the loss has a gradient by the companion's rows, too, and not by the pairs' own alone."""
        return self.companion is not None and not self.statistics

    @property
    def brings_images(self) -> bool:
        """Whether a companion brings images of its own along, beside those of the pairs."""
        return self.companion is not None and not self.companion.shares_images


class Algorithm(Section, Protocol):
    """A training objective. Implementations are frozen dataclasses whose fields are their flags (`config.flags.flag`)."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs: ...

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        """Runs the policy on a micro-batch; losses are divided by `counts`, the counts of the whole optimizer step."""
        ...


@runtime_checkable
class AlgorithmWithStatistics(Algorithm, Protocol):
    """An algorithm whose `needs.statistics` may be true."""

    def statistics(self, policy: PolicyForward, batch: PairBatch) -> Tensor:
        """What the rest of the step must know of a micro-batch's pairs, [B, K]; called without a graph."""
        ...
