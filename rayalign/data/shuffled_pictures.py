"""Held-out pairs with the pictures of other records: where a policy is as right about these, its preference does not come from
what it sees."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rayalign.data.batch import ImageProcessing, PairBatch, assemble_changed
from rayalign.data.store import EncodedPair
from rayalign.images.fetch import image_size, open_image
from rayalign.models.family import RowLayout

MOST_TRIES = 64
"""Records looked at to find one with other pictures, of each kind."""


@dataclass(frozen=True)
class Pictures:
    """What is known of a record's pictures: the hash of each, and its width and height in pixels."""

    hashes: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, pair: EncodedPair) -> "Pictures":
        return cls(tuple(pair.image_hashes), tuple(image_size(content) for content in pair.images))


def shuffle_pictures(seen: Mapping[int, Pictures], *, seed: int) -> dict[int, int]:
    """For each row with pictures another row that has as many and none of the same, where there is one: one with pictures of
    the same sizes before any other. The same for any order of `seen`."""
    draw = np.random.default_rng([seed, 0x51CC])
    order = draw.permutation(sorted(row for row, pictures in seen.items() if pictures.hashes)).tolist()
    by_size, by_number = defaultdict(list), defaultdict(list)
    for row in order:
        by_size[seen[row].sizes].append(row)
        by_number[len(seen[row].sizes)].append(row)
    alike = {row: (rows, k) for rows in by_size.values() for k, row in enumerate(rows)}
    as_many = {row: (rows, k) for rows in by_number.values() for k, row in enumerate(rows)}
    partners = {}
    for row in order:
        for rows, position in (alike[row], as_many[row]):
            behind = (rows[(position + k) % len(rows)] for k in range(1, min(len(rows), MOST_TRIES + 1)))
            other = next((found for found in behind if set(seen[found].hashes).isdisjoint(seen[row].hashes)), None)
            if other is not None:
                partners[row] = other
                break
    return partners


def with_pictures_of(
    pairs: Sequence[EncodedPair],
    others: Sequence[EncodedPair],
    *,
    layout: RowLayout,
    process_images: ImageProcessing,
    max_pixels: int | None,
) -> PairBatch:
    """The batch of `pairs` with the pictures of `others`, each scaled to the size of the one in whose place it stands, so that
    it takes as many tokens. There are no stored log-probs of the reference for it."""
    changed = [
        dataclasses.replace(pair, images=other.images, reference=None) for pair, other in zip(pairs, others, strict=True)
    ]

    def to_size(image: Image.Image, pair: int, number: int) -> Image.Image:
        size = open_image(pairs[pair].images[number], max_pixels=max_pixels).size
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    return assemble_changed(changed, to_size, layout=layout, process_images=process_images)
