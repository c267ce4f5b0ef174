"""Raw rows become encoded pairs: a task's are read, renamed, parsed, checked, encoded and written as one shard, or several.

Whatever is wrong with a row drops that row. `prepare` runs this in the cluster's processes; nothing here needs a cluster.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayalign.config.plugins import Plugin
from rayalign.data.attempts import Attempt
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.index import INDEX_SCHEMA
from rayalign.data.pairs import Rows
from rayalign.data.remarks import SEEN_SCHEMA, ColumnsSeen, printable
from rayalign.data.shards import ShardWriter
from rayalign.data.truncation import RecordTooLong
from rayalign.formats.columns import Renames, renamed, require_pictures_read
from rayalign.formats.parse import Format, own_formats, parse_row
from rayalign.formats.records import PreferenceRecord, RecordError, record_errors, require
from rayalign.images.fetch import fetch_images
from rayalign.sources.files import Dataset, read_rows
from rayalign.sources.rows import Row, Span
from rayalign.storage import Store

if TYPE_CHECKING:
    from rayalign.data.encode import Encoded, Encoder

DROPPED_FIELDS = [("reason", pa.string()), ("field", pa.string()), ("detail", pa.string())]
OUTCOME_SCHEMA = pa.schema([*INDEX_SCHEMA, *DROPPED_FIELDS, *SEEN_SCHEMA])
"""What a task reports: a line of the index for each pair written, or the reason (not null) for each record dropped; and what
was seen in either's row."""

LONGEST_DETAIL = 2000
"""Characters of what is said about a dropped record."""


@dataclass(frozen=True, eq=False)
class FilePart:
    """The rows in some neighbouring spans of one file, of which `rows` (None: all) are wanted."""

    dataset: int
    file: int
    spans: tuple[Span, ...]
    rows: Rows | None

    @property
    def num_rows(self) -> int:
        return sum(span.num_rows for span in self.spans) if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class PrepareTask:
    """The rows in parts of some neighbouring files."""

    parts: tuple[FilePart, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def rows_of_part(part: FilePart, sources: "Sources") -> Iterator[tuple[int, Row]]:
    """The numbers and contents of a part's rows, or the RecordErrors of those that can't be read."""
    file = sources.datasets[part.dataset].files[part.file]
    wanted = None if part.rows is None else part.rows.tolist()
    return itertools.chain.from_iterable(read_rows(file, span, wanted) for span in part.spans)


def _rows_of(task: PrepareTask, sources: "Sources") -> Iterator[tuple[FilePart, Store, int, Row]]:
    """A task's rows, each behind its part and the folder of its file."""
    for part in task.parts:
        dataset = sources.datasets[part.dataset]
        folder = dataset.folder_of(dataset.files[part.file])
        for number, row in rows_of_part(part, sources):
            yield part, folder, number, row


@dataclass(frozen=True)
class Sources:
    """The data sets of one --dataset or --val_dataset, how their images are found, the plugins that read their rows, and the
    columns that are renamed before."""

    datasets: tuple[Dataset, ...]
    image_root: str | None
    allow_image_urls: bool
    plugins: tuple[Plugin, ...] = ()
    columns: Renames = ()


def write_task(
    task: PrepareTask,
    into: Store,
    numbers: Iterator[int],
    sources: Sources,
    spec: EncoderSpec,
    *,
    attempt: Attempt | None = None,
) -> list[dict[str, Any]]:
    """Writes a task's pairs into shards of a folder, which get the given numbers; returns a line of OUTCOME_SCHEMA for each of
    its rows. `attempt`: where a process ended over these rows before."""
    shards = ShardWriter(into, numbers)
    outcomes: list[dict[str, Any]] = []
    seen = ColumnsSeen(sources.columns, _own_formats(sources.plugins))
    for part, folder, row, content in _rows_of(task, sources):
        outcome: dict[str, Any] = {"dataset": part.dataset, "file": part.file, "source_row": row}
        try:
            own = f"{file_label(sources, part)}:{row}"
            if attempt is not None:
                attempt.begin(own)
            if isinstance(content, RecordError):
                raise content
            with record_errors():
                outcome |= seen.add(content)
            pair, crosses = encode_row(content, id=own, folder=folder, sources=sources, spec=spec)
        except RecordError as error:
            outcome |= {
                "reason": error.reason,
                "field": printable(error.field),
                "detail": printable(str(error), longest=LONGEST_DETAIL),
            }
        else:
            outcome |= {"id": pair.id, "num_images": len(pair.images), "crosses_seam": crosses}
            outcome |= {f"{side}_tokens": len(getattr(pair, f"{side}_ids")) for side in ("prompt", "chosen", "rejected")}
            shards.add(pair)
        outcomes.append(outcome)
    written = (outcome for outcome in outcomes if "id" in outcome)
    for outcome, place in zip(written, shards.finish(), strict=True):
        outcome |= place
    return outcomes


def file_label(sources: Sources, part: FilePart) -> str:
    """What a file's records are called after; numbered where several files could have the same name."""
    name = sources.datasets[part.dataset].files[part.file].name
    several = len(sources.datasets) > 1 or len(sources.datasets[0].files) > 1
    return f"{part.dataset}.{part.file}/{name}" if several else name


def encode_row(row: Mapping[str, Any], *, id: str, folder: Store, sources: Sources, spec: EncoderSpec) -> "Encoded":
    """A raw row, encoded for training; `folder` is its data set's. Raises RecordError where it can't be used, and what
    `encode_record` raises."""
    encoder = _encoder(spec)  # what keeps the model from encoding anything is no fault of the row
    record = record_of(row, id=id, sources=sources, spec=spec)
    require(record, spec.responses)
    return encode_record(record, folder=folder, sources=sources, encoder=encoder)


def record_of(row: Mapping[str, Any], *, id: str, sources: Sources, spec: EncoderSpec) -> PreferenceRecord:
    """The record that a raw row holds. Raises RecordError for whatever is wrong with it, a picture that nothing would read
    among it."""
    own = _own_formats(sources.plugins)
    with record_errors():
        row = renamed(row, sources.columns)
        record = parse_row(row, id=id, own=own)
        if not spec.family.text_only:
            require_pictures_read(row, record, own)
        return record


def encode_record(record: PreferenceRecord, *, folder: Store, sources: Sources, encoder: "Encoder") -> "Encoded":
    """A record with its images, encoded; relative paths start from `folder`, unless there is an image root.

    Raises RecordError for whatever is wrong with it; RecordTooLong, and an OSError of failing storage, pass through.
    """
    root = Store.at(sources.image_root) if sources.image_root else None
    with record_errors(passing=(OSError,)):  # of failing storage, with which no other row fares better
        images = fetch_images(record.images, folder=folder, image_root=root, allow_urls=sources.allow_image_urls)
    with record_errors(passing=(RecordTooLong,)):
        return encoder.encode_seen(record, images)


@functools.lru_cache(maxsize=2)
def _own_formats(plugins: tuple[Plugin, ...]) -> tuple[Format, ...]:
    return own_formats(plugins)


@functools.lru_cache(maxsize=2)
def _encoder(spec: EncoderSpec) -> "Encoder":
    from rayalign.data.encode import Encoder  # here: a driver imports this module, too, and encodes nothing

    return Encoder(spec)
