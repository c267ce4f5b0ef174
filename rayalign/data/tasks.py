"""The work of a preparation in tasks, each some rows of one file or of several small ones, which the cluster's processes do
side by side.

`prepare` hands them out, `rows` does one.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence, Set
from typing import TypeVar

import numpy as np
import ray

from rayalign.cluster import Stopped, outcome_of, result_of
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.pairs import Rows
from rayalign.data.rows import FilePart, PrepareTask, Sources, record_of, rows_of_part
from rayalign.formats.records import RecordError
from rayalign.sources.files import Dataset, SourceFile, spans_of
from rayalign.sources.rows import Span
from rayalign.sources.several import real_place

T = TypeVar("T")

SPAN_ROWS = 256
"""Rows that one task reads, encodes and writes as one shard, or several where their pictures are large."""

MOST_TASKS = 10_000
"""Of a larger data set, or one of more files, a task has several spans, and writes as many rows more: the driver takes
milliseconds for each task, and who reads opens fewer shards."""

TASKS_OF_A_PROCESS = 4
"""As long as each has no more work than this, another process would not pay: its start takes seconds, as some tasks do."""

TASKS_WITH_PICTURES = 2
"""The same of rows with pictures, which take three times as long or more."""

TASK_BYTES = 2**30
"""Memory of a process that encodes: 0.5 GB of libraries, a shard twice, and the pictures of a record while they are decoded."""

MOST_SCANS = 1_000
"""Tasks that scan files; of more files each scans several."""

SCANNED_HERE = 64 * 2**20
"""Bytes of files that the driver scans itself, in less time than a process of the cluster starts in."""


def cut_into_tasks(sources: Sources, seed: int) -> list[PrepareTask]:
    """The work of a preparation; files are scanned side by side, and #N draws are made here."""
    spans = iter(_scan([file for dataset in sources.datasets for file in dataset.files]))
    parts: list[FilePart] = []
    for number, dataset in enumerate(sources.datasets):
        parts += _parts_of(number, dataset, list(itertools.islice(spans, len(dataset.files))), seed)
    return [_task_of(some) for some in _in_groups(parts, -(-len(parts) // MOST_TASKS))]


def require_apart(training: Sources, held_out: Sources, *, seed: int) -> None:
    """Raises ValueError for held-out rows that are trained on, too: of files that both sides read, as the draws take them."""
    files, others = ({real_place(file) for d in sources.datasets for file in d.files} for sources in (training, held_out))
    both = files & others
    if not both:
        return
    trained, evaluated = (_rows_taken(sources, both, seed) for sources in (training, held_out))
    shared = {place: np.intersect1d(trained[place], rows) for place, rows in evaluated.items() if place in trained}
    count = sum(len(rows) for rows in shared.values())
    if count:
        place, rows = next((place, rows) for place, rows in shared.items() if len(rows))
        raise ValueError(
            f"--val_dataset {' '.join(dataset.argument for dataset in held_out.datasets)}: {count} of its "
            f"{sum(map(len, evaluated.values()))} records of files that --dataset reads, too, are trained on, such as row "
            f"{rows[0]} of {place}. Name other files, or leave --val_dataset out: --dataset_test_ratio of the records is held "
            "out then, and none of these is trained on."
        )


def _rows_taken(sources: Sources, places: Set[str], seed: int) -> dict[str, Rows]:
    """The rows that are read of the files in some places."""
    taken: dict[str, list[Rows]] = {}
    for part in (part for task in cut_into_tasks(sources, seed) for part in task.parts):
        place = real_place(sources.datasets[part.dataset].files[part.file])
        if place in places:
            whole = [np.arange(span.first_row, span.first_row + span.num_rows) for span in part.spans]
            taken.setdefault(place, []).extend(whole if part.rows is None else [part.rows])
    return {place: np.concatenate(rows) for place, rows in taken.items()}


def _parts_of(number: int, dataset: Dataset, spans: Sequence[Sequence[Span]], seed: int) -> Iterator[FilePart]:
    """A part for each span of a data set's files with rows that are wanted."""
    wanted = _draw(sum(span.num_rows for of_file in spans for span in of_file), dataset, seed)
    passed = 0
    for file, of_file in enumerate(spans):
        for span in of_file:
            rows = None
            if wanted is not None:
                first, end = np.searchsorted(wanted, (passed, passed + span.num_rows))
                rows = wanted[first:end] - passed + span.first_row
            if rows is None or len(rows):
                yield FilePart(number, file, (span,), rows)
            passed += span.num_rows


def _in_groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), max(size, 1)))


def _task_of(parts: Sequence[FilePart]) -> PrepareTask:
    of_files = itertools.groupby(parts, key=lambda part: (part.dataset, part.file))
    return PrepareTask(tuple(_joined(list(of_file)) for _, of_file in of_files))


def _joined(parts: Sequence[FilePart]) -> FilePart:
    """One part with the rows of several of a file."""
    rows = [part.rows for part in parts if part.rows is not None]
    spans = tuple(span for part in parts for span in part.spans)
    return FilePart(parts[0].dataset, parts[0].file, spans, np.concatenate(rows) if rows else None)


def processes_for(num_tasks: int, *, with_pictures: bool) -> int:
    """How many processes share the tasks, at the most."""
    return -(-num_tasks // (TASKS_WITH_PICTURES if with_pictures else TASKS_OF_A_PROCESS))


def has_pictures(tasks: Sequence[PrepareTask], sources: Sources, spec: EncoderSpec) -> bool:
    """Whether the first row has some; what is wrong with it is told where it is encoded."""
    _, row = next(rows_of_part(tasks[0].parts[0], sources))
    try:
        return not isinstance(row, RecordError) and bool(record_of(row, id="", sources=sources, spec=spec).images)
    except RecordError:
        return False


def memory_of_a_task() -> int:
    """The bytes to ask Ray for, so that it starts no more processes on a machine than fit: TASK_BYTES, or as much as the
    largest machine has."""
    of_nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(TASK_BYTES, max(of_nodes)))


def _scan(files: Sequence[SourceFile]) -> list[list[Span]]:
    """The spans of each file."""
    if sum(file.size for file in files) <= SCANNED_HERE:
        return [spans_of(file, SPAN_ROWS) for file in files]
    scan = ray.remote(_spans_of)
    some = _in_groups(files, -(-len(files) // MOST_SCANS))
    return [spans for outcome in ray.get([scan.remote(those) for those in some]) for spans in result_of(outcome)]


def _spans_of(files: Sequence[SourceFile]) -> list[list[Span]] | Stopped:
    return outcome_of(lambda: [spans_of(file, SPAN_ROWS) for file in files])


def _draw(num_rows: int, dataset: Dataset, seed: int) -> Rows | None:
    if dataset.sample is None:
        return None
    name = int.from_bytes(hashlib.sha256(dataset.name.encode()).digest()[:4], "big")
    return np.sort(np.random.default_rng([seed, name]).choice(num_rows, dataset.num_drawn(num_rows), replace=False))
