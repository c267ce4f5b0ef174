"""What keeps workers in step where weights are sharded: then every forward and backward of a layer is one of all workers, and
a worker with fewer micro-batches than another, or rows of fewer kinds, runs fillers, which add nothing.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rayalign.algorithms import Needs
from rayalign.data.batch import CompanionRows, PairBatch, assemble
from rayalign.data.reference_store import ReferenceLogps
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs, RowLayout
from rayalign.ops.logprobs import PairLogps
from rayalign.policy.policy import Policy
from rayalign.training.distributed import gather

FILLER = "filler"


@dataclass(frozen=True)
class Fillers:
    """Makes the fillers of a run: one row of the fewest tokens, without images."""

    layout: RowLayout
    needs: Needs

    def batch(self, *, companion: bool, reference: bool) -> PairBatch:
        """A filler in place of a batch that has, or lacks, a companion and the reference's log-probs."""
        rejected = self.needs.responses != "chosen"
        batch = self._row(rejected=rejected, reference=reference)
        return self.with_companion(batch) if companion else batch

    def with_companion(self, batch: PairBatch) -> PairBatch:
        """A batch without a companion with a filler for one, which belongs to none of its pairs."""
        kind = self.needs.companion
        assert kind is not None
        known = batch.reference_logps is not None and kind.is_stable_over_epochs
        rows = self._row(rejected=kind.has_rejected, reference=known)
        return dataclasses.replace(batch, companion=CompanionRows(rows, torch.empty(0, dtype=torch.int64)))

    def _row(self, *, rejected: bool, reference: bool) -> PairBatch:
        token = self.layout.pad_token_id
        number = int(rejected)
        logps = ReferenceLogps([0.0], [0.0] * number, []) if reference else None
        pair = EncodedPair(FILLER, [token] * 2, [token], [token] * number, [], [], reference=logps)
        return assemble([pair], layout=self.layout, process_images=lambda contents, alone: ImageInputs())


def is_filler(batch: PairBatch) -> bool:
    return batch.ids == (FILLER,)


def in_step(batches: Iterable[PairBatch], fillers: Fillers | None) -> Iterator[PairBatch]:
    """This worker's batches, and fillers for as long as another worker has some; without `fillers` the batches alone. Every
    worker goes through it at the same time."""
    if fillers is None:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        kinds = gather(None if batch is None else (batch.companion is not None, batch.reference_logps is not None))
        present = [kind for kind in kinds if kind is not None]
        if not present:
            return
        companion, reference = (any(has) for has in zip(*present, strict=True))
        if batch is None:
            batch = fillers.batch(companion=companion, reference=reference)
        elif companion and batch.companion is None:
            batch = fillers.with_companion(batch)
        yield batch


class RecordedForward:
    """A policy as a loss sees it, which keeps what has a gradient. A filler's own loss may have none that is finite."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._outputs: list[Tensor] = []

    @property
    def nothing(self) -> Tensor:
        """0 [], whose backward runs those of all forwards."""
        return torch.stack([output.double().sum() for output in self._outputs]).sum() * 0

    def image_features(self, batch: PairBatch) -> tuple[Tensor, ...]:
        return self._policy.image_features(batch)

    def logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        logps = self._policy.logps(batch, images)
        self._outputs += [logps.chosen.total, logps.rejected.total]
        return logps

    def reference_logps(self, batch: PairBatch, images: tuple[Tensor, ...]) -> PairLogps:
        return self._policy.reference_logps(batch, images)

    def values(self, batch: PairBatch, images: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._policy.values(batch, images)
        self._outputs += [chosen, rejected]
        return chosen, rejected
