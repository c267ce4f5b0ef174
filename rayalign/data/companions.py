"""Rows that an algorithm compares a batch's pairs with beside the pairs' own, and what the rest of a run must know of them.

An algorithm's `needs` name its companion. The sampler fetches what the rows are made of, `stream` makes them with each batch,
the reference's stored log-probs hold them where they can, and the estimate counts them: all by the members below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

    from rayalign.data.batch import CompanionRows, ImageProcessing, PairBatch
    from rayalign.data.store import EncodedPair
    from rayalign.models.family import RowLayout

# Algorithms are read for `--help`, too, and name their companions: what rows are made with is imported where they are made.


class Companion(Protocol):
    """How a companion's rows are made, and what they are like.

    `name` is what keys of stored log-probs call it. `needs_partner`: rows are made of a pair and of the pair after it in the
    epoch's order. `is_stable_over_epochs`: a pair's row is the same in every epoch, so that the reference's log-probs of it can
    be stored. `shares_images`: the rows look at the batch's own images; else they bring images of their own, and only pairs
    with images have a row. `has_rejected`: rows are `[prompt | chosen | rejected]`, else `[prompt | chosen]`.
    """

    name: ClassVar[str]
    needs_partner: ClassVar[bool]
    is_stable_over_epochs: ClassVar[bool]
    shares_images: ClassVar[bool]
    has_rejected: ClassVar[bool]

    def rows(
        self,
        batch: PairBatch,
        pairs: Sequence[EncodedPair],
        partners: Sequence[EncodedPair],
        *,
        layout: RowLayout,
        process_images: ImageProcessing,
    ) -> CompanionRows | None:
        """The rows beside `batch`, which is made of `pairs`; None where no pair has one. `partners`, in the same order, are
        there where `needs_partner`."""
        ...


def with_companion(
    batch: PairBatch,
    companion: Companion | None,
    pairs: Sequence[EncodedPair],
    partners: Sequence[EncodedPair] = (),
    *,
    layout: RowLayout,
    process_images: ImageProcessing,
) -> PairBatch:
    """The batch of `pairs` with the companion's rows beside it."""
    if companion is None:
        return batch
    rows = companion.rows(batch, pairs, partners, layout=layout, process_images=process_images)
    return dataclasses.replace(batch, companion=rows)


@dataclass(frozen=True)
class Mismatched:
    """Each prompt followed by the responses to another one, which KTO estimates a KL divergence from. Whose responses they are
    depends on the epoch's order."""

    name: ClassVar[str] = "mismatched"
    needs_partner: ClassVar[bool] = True
    is_stable_over_epochs: ClassVar[bool] = False
    shares_images: ClassVar[bool] = True
    has_rejected: ClassVar[bool] = True

    def rows(
        self,
        batch: PairBatch,
        pairs: Sequence[EncodedPair],
        partners: Sequence[EncodedPair],
        *,
        layout: RowLayout,
        process_images: ImageProcessing,
    ) -> CompanionRows | None:
        """A row for each pair. The images are the batch's own, shared with it: its `image_features` serve both."""
        import torch

        from rayalign.data.batch import CompanionRows, assemble
        from rayalign.models.family import ImageInputs

        crossed = [
            dataclasses.replace(pair, chosen_ids=partner.chosen_ids, rejected_ids=partner.rejected_ids, reference=None)
            for pair, partner in zip(pairs, partners, strict=True)
        ]
        images = ImageInputs(batch.image_inputs, batch.image_lengths, batch.image_grids)
        rows = assemble(crossed, layout=layout, process_images=lambda contents, alone: images)
        return CompanionRows(rows, torch.arange(len(pairs)))


@dataclass(frozen=True)
class Damaged:
    """`[prompt | chosen]` of the pairs that have images, with damaged ones in their place, which mDPO prefers the true ones to.
    A pair's damage depends on its id alone."""

    name: ClassVar[str] = "damaged"
    needs_partner: ClassVar[bool] = False
    is_stable_over_epochs: ClassVar[bool] = True
    shares_images: ClassVar[bool] = False
    has_rejected: ClassVar[bool] = False

    def rows(
        self,
        batch: PairBatch,
        pairs: Sequence[EncodedPair],
        partners: Sequence[EncodedPair],
        *,
        layout: RowLayout,
        process_images: ImageProcessing,
    ) -> CompanionRows | None:
        """A row for each pair that has images, each of them damaged in its own way, so that none is shared."""
        import torch

        from rayalign.data.batch import CompanionRows, assemble_changed
        from rayalign.data.reference_store import ReferenceLogps
        from rayalign.images.damage import damage_image

        numbers = [number for number, pair in enumerate(pairs) if pair.images]
        if not numbers:
            return None
        with_images = []
        for number in numbers:
            pair = pairs[number]
            reference = None if pair.reference is None else ReferenceLogps(pair.reference.companion, [], [])
            with_images.append(dataclasses.replace(pair, rejected_ids=[], reference=reference))

        def damage(image: Image, pair: int, number: int) -> Image:
            return damage_image(image, seed=f"{with_images[pair].id}/{number}")

        rows = assemble_changed(with_images, damage, layout=layout, process_images=process_images)
        return CompanionRows(rows, torch.tensor(numbers))
