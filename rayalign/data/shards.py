"""A shard's bytes: pairs and their pictures, written by the tasks of a preparation, read at random.

A shard holds one Arrow record batch per pair, and before it those of the pair's pictures that no pair before it has: each
picture is there once, however many pairs show it. A pair with its own pictures is one read, with another for each picture that
an earlier pair has, on a disk and on an object store alike. `index` has the pairs' places.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence

import pyarrow as pa

from rayalign.data.checked import CheckedFile, Place
from rayalign.data.pairs import ENCODED_SCHEMA, EncodedPair, to_batch
from rayalign.storage import Store

PICTURES = pa.field(
    "pictures",
    pa.list_(pa.struct(list(zip(Place._fields, (pa.int64(), pa.int64(), pa.uint32()), strict=True)))),
    nullable=False,
)
IMAGES_COLUMN = ENCODED_SCHEMA.get_field_index("images")
STORED_SCHEMA = ENCODED_SCHEMA.set(IMAGES_COLUMN, PICTURES)
"""A pair as a shard holds it: with a `checked.Place` of the shard for each image."""

TAIL = 8
"""Bytes behind a pair's record batch, which say how long that is."""

SHARD_BYTES = 64 * 2**20
"""Of pairs and pictures, after which a task begins another shard. The task holds a shard twice while it writes it."""


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"shard_{shard:06d}.arrow"


def write_shard(file: Store, pairs: Sequence[EncodedPair]) -> list[Place]:
    """Writes pairs as one shard; returns the place of each, with the pictures before it, for the index."""
    without_images = to_batch(pairs, ENCODED_SCHEMA.remove(IMAGES_COLUMN))
    pictures: dict[str, Place] = {}
    parts: list[bytes] = []
    places = []
    end = 0
    for row, pair in enumerate(pairs):
        start, first = end, len(parts)
        for digest, image in zip(pair.image_hashes, pair.images, strict=True):
            if digest not in pictures:
                pictures[digest] = Place(end, len(image), zlib.crc32(image))
                parts.append(image)
                end += len(image)
        of_pair = pa.array([[pictures[digest]._asdict() for digest in pair.image_hashes]], PICTURES.type)
        batch = without_images.slice(row, 1).add_column(IMAGES_COLUMN, PICTURES, of_pair).serialize().to_pybytes()
        parts += [batch, len(batch).to_bytes(TAIL, "little")]
        end += len(batch) + TAIL
        checksum = functools.reduce(lambda before, part: zlib.crc32(part, before), parts[first:], 0)
        places.append(Place(start, end - start, checksum))
    file.write_bytes(b"".join(parts))
    return places


class ShardWriter:
    """Writes the pairs of a task into shards of about SHARD_BYTES, which get the given numbers one after another."""

    def __init__(self, folder: Store, numbers: Iterator[int]) -> None:
        self._folder, self._numbers = folder, numbers
        self._lines: list[dict[str, int]] = []
        self._begin()

    def _begin(self) -> None:
        self._pairs: list[EncodedPair] = []
        self._pictures: dict[str, bytes] = {}
        self._bytes = 0

    def add(self, pair: EncodedPair) -> None:
        for digest, image in zip(pair.image_hashes, pair.images, strict=True):
            if digest not in self._pictures:
                self._pictures[digest] = image
                self._bytes += len(image)
        images = [self._pictures[digest] for digest in pair.image_hashes]  # one of several with the same content is kept
        self._pairs.append(dataclasses.replace(pair, images=images))
        self._bytes += 4 * (pair.num_tokens + len(pair.eval_rejected_ids)) + len(pair.conversation)
        if self._bytes >= SHARD_BYTES:
            self._write()

    def finish(self) -> list[dict[str, int]]:
        """Of each pair, in the order in which they came, its shard's number and its place, as the index has them."""
        if self._pairs:
            self._write()
        return self._lines

    def _write(self) -> None:
        number = next(self._numbers)
        places = write_shard(self._folder / shard_name(number), self._pairs)
        self._lines += [{"shard": number, **place._asdict()} for place in places]
        self._begin()


def read_pair(file: CheckedFile, place: Place) -> pa.RecordBatch:
    """The pair at a place of a shard, as a row of ENCODED_SCHEMA. Raises DamagedFile."""
    content, (start, size, _) = file.read(place), place
    tail = size - TAIL
    batch = pa.py_buffer(content[tail - int.from_bytes(content[tail:], "little") : tail])
    stored = pa.ipc.read_record_batch(batch, STORED_SCHEMA)

    def picture(at: Place) -> bytes:
        is_here = start <= at.start and at.start + at.size <= start + size
        return content[at.start - start : at.start - start + at.size] if is_here else file.read(at)

    images = [picture(Place(**at)) for at in stored["pictures"][0].as_py()]
    return stored.set_column(IMAGES_COLUMN, ENCODED_SCHEMA.field("images"), pa.array([images], pa.list_(pa.binary())))
