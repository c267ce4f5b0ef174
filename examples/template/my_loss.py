"""A loss of your own: copy this file, change name, flags and formula, and train with it.

rayalign rlhf --plugin my_loss.py --rlhf_type squared_hinge --margin 2 --model FOLDER_OR_HUB_ID --dataset pairs.jsonl
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from rayalign.algorithms import LossOutput, Needs, PolicyForward, StepStatistics
from rayalign.algorithms.terms import reward_metrics
from rayalign.config.flags import check_bounds, flag
from rayalign.data.batch import PairBatch
from rayalign.data.sampler import StepCounts


@dataclass(frozen=True)
class SquaredHinge:
    """Squared hinge: max(0, m - (r_chosen - r_rejected))^2, with r = beta log(p / p_reference)"""

    name: ClassVar[str] = "squared_hinge"
    needs: ClassVar[Needs] = Needs(reference=True)

    beta: float = flag(0.1, "Scale of the rewards.", above=0)
    margin: float = flag(1.0, "Lead of the chosen response from which on a pair costs nothing: m.", above=0)

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(
        self, policy: PolicyForward, batch: PairBatch, counts: StepCounts, statistics: StepStatistics | None = None
    ) -> LossOutput:
        images = policy.image_features(batch)
        now, start = policy.logps(batch, images), policy.reference_logps(batch, images)
        chosen = self.beta * (now.chosen.total - start.chosen.total)  # [B]
        rejected = self.beta * (now.rejected.total - start.rejected.total)
        losses = F.relu(self.margin - (chosen - rejected)).square()
        # Divided by the pairs of the whole step, so that no cut into workers and micro-batches changes the update.
        return LossOutput(loss=losses.sum() / counts.pairs, pair_metrics=reward_metrics(chosen, rejected))


ALGORITHMS = (SquaredHinge,)
