"""Encoded records on storage: shards of pairs, one index, one manifest. Written by `prepare`, read at random by every worker.

A data set is complete or absent: the manifest is written last, and it names the files that count, with their hashes. A shard
holds one Arrow record batch per pair, and before it those of the pair's pictures that no pair before it has: each picture is
there once, however many pairs show it. The index says where a pair with its own pictures stands and what the checksum is: that
is one read, with another for each picture that an earlier pair has, on a disk and on an object store alike.
"""

import dataclasses
import functools
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayalign.data.checked import (
    CheckedFile,
    DamagedFile,
    Place,
    forget,
    names_noted,
    read_whole,
    require_undamaged,
    sha256_of,
    side_by_side,
)
from rayalign.data.reference_store import REFERENCE_SCHEMA, SIDES, STORED_NAMES, ReferenceLogps, ReferenceReader
from rayalign.storage import Store

logger = logging.getLogger(__name__)

Rows = NDArray[np.int64]

ENCODED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("chosen_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("image_hashes", pa.list_(pa.string()), nullable=False),
        pa.field("margin", pa.float64(), nullable=False),
        pa.field("eval_rejected_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("conversation", pa.string(), nullable=False),
    ]
)
"""One encoded pair. Images are the compressed bytes of the source. A response that a row doesn't have is empty: the rejected
one of SFT's rows, one of the two of a record with a single labelled response. `eval_rejected_ids`: the rejected response of
SFT's pairs, which is compared with the chosen one where the pair is held out, and never trained on. `conversation` is what the
prompt was made of, for people to read: JSON [[role, text], ...] with `<image>` where a picture stands."""

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


@dataclass(frozen=True)
class EncodedPair:
    """One row of ENCODED_SCHEMA: token ids of the prompt (image tokens expanded) and of both responses, and the images."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    images: list[bytes]
    image_hashes: list[str]
    margin: float = 0.0
    eval_rejected_ids: list[int] = field(default_factory=list)
    conversation: str = "[]"
    reference: ReferenceLogps | None = None
    """The log-probabilities under the reference, where they were computed beforehand; in columns of their own."""

    def as_evaluated(self) -> "EncodedPair":
        """The pair with both responses, where it was trained on with one of them only."""
        return dataclasses.replace(self, rejected_ids=self.eval_rejected_ids) if self.eval_rejected_ids else self

    @property
    def num_tokens(self) -> int:
        """Length of the row `[prompt | chosen | rejected]`."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dataset", pa.int32()),
        ("file", pa.int32()),
        ("source_row", pa.int64()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("size", pa.uint32()),
        ("checksum", pa.uint32()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)
"""One line per pair: where it came from (sort order), where it is (a shard's number, a `checked.Place`), how long it is."""

REFERENCE_COLUMNS = tuple(f"reference_{side}" for side in SIDES)
"""What the columns of REFERENCE_SCHEMA are called beside those of ENCODED_SCHEMA."""

OPEN_SHARDS = 64

INDEX, DROPPED, REMARKS, MANIFEST = "index.arrow", "dropped.json", "remarks.json", "manifest.json"


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the prepared rows, each [num_rows]."""

    prompt: Rows
    chosen: Rows
    rejected: Rows

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> "TokenCounts":
        """Those of some pairs."""
        sides = (
            [pair.prompt_ids for pair in pairs],
            [pair.chosen_ids for pair in pairs],
            [pair.rejected_ids for pair in pairs],
        )
        return cls(*(np.array([len(ids) for ids in side], dtype=np.int64) for side in sides))

    @property
    def num_rows(self) -> int:
        return len(self.prompt)

    def take(self, rows: Rows) -> "TokenCounts":
        """Those of some rows, in this order."""
        return TokenCounts(self.prompt[rows], self.chosen[rows], self.rejected[rows])

    def row_tokens(self, rows: Rows) -> Rows:
        """Lengths of the rows `[prompt | chosen | rejected]`."""
        tokens: Rows = self.prompt[rows] + self.chosen[rows] + self.rejected[rows]
        return tokens


def to_batch(pairs: Sequence[EncodedPair], schema: pa.Schema = ENCODED_SCHEMA) -> pa.RecordBatch:
    """Pairs as a record batch of ENCODED_SCHEMA, or some columns of it; a field that is missing or misspelt is an error, not a
    null."""
    columns = [[getattr(pair, name) for pair in pairs] for name in schema.names]
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    batch.validate(full=True)
    for column, name in zip(batch.columns, schema.names, strict=True):
        assert column.null_count == 0, f"{name} is null"
    return batch


def from_batch(batch: pa.RecordBatch | pa.Table) -> list[EncodedPair]:
    """The pairs of a record batch or table with ENCODED_SCHEMA's columns, and REFERENCE_COLUMNS where it has them."""
    rows = batch.select(ENCODED_SCHEMA.names).to_pylist()
    if not set(REFERENCE_COLUMNS) <= set(batch.schema.names):
        return [EncodedPair(**row) for row in rows]
    references = zip(*(batch[column].to_pylist() for column in REFERENCE_COLUMNS), strict=True)
    return [EncodedPair(**row, reference=ReferenceLogps(*logps)) for row, logps in zip(rows, references, strict=True)]


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


@dataclass(frozen=True)
class PreparedData:
    """A complete encoded data set. Pickles as its location; opens files only where it is read. `reference` names the folder
    beside the shards whose log-probabilities are read along with the pairs."""

    store: Store
    attempt: str
    num_rows: int
    hashes: tuple[tuple[str, str], ...] = ()
    """The SHA-256 of each file beside the shards, by its name."""
    reference: str | None = None

    @classmethod
    def find(cls, store: Store) -> "PreparedData | None":
        """The data set of a cache folder; None where there is none, or only the remains of an unfinished or damaged one.
        (Single shards may be damaged: `damaged_shards`.)"""
        try:
            manifest = (store / MANIFEST).read_json_object()
            found = cls._of_manifest(store, manifest)
            if found.index().num_rows != found.num_rows:
                raise DamagedFile(f"{(store / MANIFEST).location} is damaged: the index has another number of records.")
            for name in (DROPPED, REMARKS):
                found._read(name)
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("Data: encoding anew what was encoded before: %s", error)
            return None
        return found

    @classmethod
    def _of_manifest(cls, store: Store, manifest: Mapping[str, Any]) -> "PreparedData":
        """Raises DamagedFile where the manifest is none of this folder's."""
        match manifest:
            case {"key": store.name, "attempt": str(attempt), "num_rows": int(num_rows), "sha256": dict(hashes)}:
                if set(hashes) == {INDEX, DROPPED, REMARKS} and re.fullmatch("[0-9a-z]+", attempt):
                    return cls(store, attempt, num_rows, tuple(sorted(hashes.items())))
        raise DamagedFile(f"{(store / MANIFEST).location} is no list of this folder's files.")

    @classmethod
    def finish(
        cls,
        store: Store,
        *,
        attempt: str,
        index: pa.Table,
        dropped: Sequence[Mapping[str, Any]],
        remarks: Sequence[tuple[int, str]] = (),
    ) -> "PreparedData":
        """Completes a data set whose shards stand under `attempt`: writes the index, the dropped records, what there is to say
        about them all, then the manifest.

        Raises ValueError where shards that the index names are not there: on another machine's disk, or lost.
        """
        index = in_order(index)
        _require_shards(store / attempt, index)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            writer.write_table(index)
        contents = {
            INDEX: sink.getvalue().to_pybytes(),
            DROPPED: json.dumps(list(dropped), indent=2).encode(),
            REMARKS: json.dumps(list(remarks), indent=2).encode(),
        }
        for name, content in contents.items():
            (store / attempt / name).write_bytes(content)
        hashes = {name: sha256_of(content) for name, content in sorted(contents.items())}
        manifest = {"key": store.name, "attempt": attempt, "num_rows": index.num_rows, "sha256": hashes}
        (store / MANIFEST).write_json(manifest)
        return cls._of_manifest(store, manifest)

    @property
    def folder(self) -> Store:
        return self.store / self.attempt

    def _read(self, name: str) -> bytes:
        return read_whole(self.folder / name, dict(self.hashes)[name])

    def index(self) -> pa.Table:
        """INDEX_SCHEMA, sorted by source: the order that row numbers count in. Raises DamagedFile."""
        return pa.ipc.open_file(pa.py_buffer(self._read(INDEX))).read_all()

    def dropped(self) -> list[dict[str, Any]]:
        """The records left out, each with dataset, row, reason and detail. Raises DamagedFile."""
        dropped: list[dict[str, Any]] = json.loads(self._read(DROPPED))
        return dropped

    def remarks(self) -> list[tuple[int, str]]:
        """What the preparation had to say about the data set: logging's level and words. Raises DamagedFile."""
        return [(level, words) for level, words in json.loads(self._read(REMARKS))]

    def shards(self) -> list[int]:
        """The numbers of all shards, sorted."""
        numbers: list[int] = np.unique(self.index()["shard"].to_numpy()).tolist()
        return numbers

    def damaged_shards(self) -> list[int]:
        """The shards that are missing, end too early, or were found damaged by a run."""
        index = self.index()
        shards, inside = np.unique(index["shard"].to_numpy(), return_inverse=True)
        needed = np.zeros(len(shards), np.int64)
        np.maximum.at(needed, inside, index["start"].to_numpy() + index["size"].to_numpy().astype(np.int64))
        sizes, noted = self.folder.sizes(), names_noted(self.folder)
        names = [shard_name(shard) for shard in shards]
        wrong = [name in noted or sizes.get(name, -1) < size for name, size in zip(names, needed, strict=True)]
        return list(itertools.compress(shards.tolist(), wrong))

    def mend(self, shards: Sequence[int], folder: Store, index: pa.Table) -> bool:
        """Puts shards that were written anew into `folder` in the place of damaged ones, where their pairs are the same to the
        byte; returns whether they are. `index` has the lines of INDEX_SCHEMA for them."""
        mine = self.index()
        if not in_order(index).equals(mine.filter(pa.compute.is_in(mine["shard"], pa.array(shards, pa.int32())))):
            return False
        names = [shard_name(shard) for shard in shards]
        for name in names:
            (self.folder / name).write_bytes((folder / name).read_bytes())
        forget(self.folder, names)
        return True

    def require_undamaged(self) -> None:
        """Raises DamagedFile where a run has found files of this data set damaged that were not made anew yet."""
        require_undamaged(self.folder)
        if self.reference:
            require_undamaged(self.folder / self.reference)

    def token_counts(self) -> TokenCounts:
        index = self.index()
        columns = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
        return TokenCounts(*(index[name].to_numpy().astype(np.int64) for name in columns))

    def reader(self) -> "PairReader":
        return PairReader(self)


def _require_shards(folder: Store, index: pa.Table) -> None:
    written = {file.name for file in folder.list()}
    missing = sorted({shard_name(number) for number in index["shard"].unique().to_pylist()} - written)
    if missing:
        raise ValueError(
            f"{folder.location}: lacks {len(missing)} of the shards that were written there, such as {missing[0]}. Do all "
            "nodes see the same folder? Give a --cache_dir on a file system that all of them mount, or a URL."
        )


def in_order(index: pa.Table) -> pa.Table:
    """Lines of INDEX_SCHEMA sorted by source."""
    return (
        index.cast(INDEX_SCHEMA).sort_by([(name, "ascending") for name in ("dataset", "file", "source_row")]).combine_chunks()
    )


class PairReader:
    """Fetches pairs by row number; keeps the most recently used shards open."""

    def __init__(self, data: PreparedData) -> None:
        index = data.index()
        self._folder = data.folder
        self._places = [index[name].to_numpy() for name in ("shard", *Place._fields)]
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._reference = ReferenceReader(data.folder / data.reference) if data.reference else None

    def read(self, rows: Rows | Sequence[int]) -> pa.Table:
        """The pairs with these row numbers, in this order, as a table of ENCODED_SCHEMA, and of REFERENCE_COLUMNS where there
        is a reference. Raises DamagedFile."""
        table = pa.Table.from_batches(side_by_side(self._read_row, rows, self._folder), schema=ENCODED_SCHEMA)
        if self._reference is None:
            return table
        logps = self._reference.read(rows, table["id"].to_pylist())
        for side, column in zip(SIDES, REFERENCE_COLUMNS, strict=True):
            field = REFERENCE_SCHEMA.field(STORED_NAMES[side])
            table = table.append_column(field.with_name(column), logps[field.name])
        return table

    def _read_row(self, row: int) -> pa.RecordBatch:
        shard, *place = (int(values[row]) for values in self._places)
        file = self._open(shard)
        content, (start, size, _) = file.read(Place(*place)), place
        tail = size - TAIL
        batch = pa.py_buffer(content[tail - int.from_bytes(content[tail:], "little") : tail])
        stored = pa.ipc.read_record_batch(batch, STORED_SCHEMA)

        def picture(at: Place) -> bytes:
            is_here = start <= at.start and at.start + at.size <= start + size
            return content[at.start - start : at.start - start + at.size] if is_here else file.read(at)

        images = [picture(Place(**at)) for at in stored["pictures"][0].as_py()]
        return stored.set_column(IMAGES_COLUMN, ENCODED_SCHEMA.field("images"), pa.array([images], pa.list_(pa.binary())))

    def _open_shard(self, shard: int) -> CheckedFile:
        return CheckedFile(self._folder / shard_name(shard))
