"""What keeps workers in step where weights are sharded: then every forward and backward of a layer is one of all workers, and
a worker with fewer micro-batches than another, or rows of fewer kinds, runs fillers, which add nothing.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from rayalign.algorithms import Needs
from rayalign.data.batch import CompanionRows, PairBatch, assemble
from rayalign.data.companions import Companion
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.reference_store import ReferenceLogps
from rayalign.data.store import EncodedPair
from rayalign.models.family import ImageInputs
from rayalign.ops.logprobs import PairLogps
from rayalign.policy.policy import Policy
from rayalign.training.distributed import gather

FILLER = "filler"
FILLER_SIDE = 32
"""Pixels of a filler's picture, which image processors scale as they do others."""


@dataclass(frozen=True)
class Fillers:
    """Makes the fillers of a run: one row of the fewest tokens, and a picture that stands in none."""

    spec: EncoderSpec
    needs: Needs

    def batch(self, *, companion: bool, reference: bool, picture: bool) -> PairBatch:
        """A filler in place of a batch that has, or lacks, a companion, the reference's log-probs, and pictures."""
        rejected = self.needs.responses != "chosen"
        batch = self._row(rejected=rejected, reference=reference)
        return self.completed(batch, companion=companion, picture=picture)

    def completed(self, batch: PairBatch, *, companion: bool, picture: bool) -> PairBatch:
        """A batch with fillers for what it lacks: a companion, which belongs to none of its pairs, and a picture."""
        kind = self.needs.companion
        adds_picture = picture and not batch.image_inputs
        if adds_picture:
            batch = self._with_picture(batch)
        if kind is not None and companion:
            rows = batch.companion or self._companion(kind, reference=batch.reference_logps is not None)
            # Rows with pictures of their own are there for these alone.
            lacks_picture = adds_picture if kind.shares_images else not rows.batch.image_inputs
            if lacks_picture:
                rows = dataclasses.replace(rows, batch=self._with_picture(rows.batch))
            batch = dataclasses.replace(batch, companion=rows)
        return batch

    def _companion(self, kind: Companion, *, reference: bool) -> CompanionRows:
        rows = self._row(rejected=kind.has_rejected, reference=reference and kind.is_stable_over_epochs)
        return CompanionRows(rows, torch.empty(0, dtype=torch.int64))

    def _with_picture(self, batch: PairBatch) -> PairBatch:
        made = self._picture
        return dataclasses.replace(
            batch, image_inputs=made.tensors, image_lengths=made.lengths, image_grids=made.grids, image_features=None
        )

    @cached_property
    def _picture(self) -> ImageInputs:
        content = io.BytesIO()
        Image.new("RGB", (FILLER_SIDE, FILLER_SIDE)).save(content, format="PNG")
        return image_processing(self.spec)([content.getvalue()], [True])

    def _row(self, *, rejected: bool, reference: bool) -> PairBatch:
        token = self.spec.layout.pad_token_id
        number = int(rejected)
        logps = ReferenceLogps([0.0], [0.0] * number, []) if reference else None
        pair = EncodedPair(FILLER, [token] * 2, [token], [token] * number, [], [], reference=logps)
        return assemble([pair], layout=self.spec.layout, process_images=lambda contents, alone: ImageInputs())


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
        kinds = gather(None if batch is None else _kinds(batch))
        present = [kind for kind in kinds if kind is not None]
        if not present:
            return
        companion, reference, picture = (any(has) for has in zip(*present, strict=True))
        if batch is None:
            yield fillers.batch(companion=companion, reference=reference, picture=picture)
        else:
            yield fillers.completed(batch, companion=companion, picture=picture)


def _kinds(batch: PairBatch) -> tuple[bool, bool, bool]:
    """Whether a batch has a companion, the reference's log-probs, and pictures, on which its forwards depend."""
    return batch.companion is not None, batch.reference_logps is not None, bool(batch.image_inputs)


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
