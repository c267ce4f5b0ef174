"""The work of a preparation in tasks, each some rows of one file, which the cluster's processes do side by side.

`prepare` hands them out, `rows` does one.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import ray

from rayalign.cluster import Stopped, outcome_of, result_of
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.rows import PrepareTask, Sources, record_of
from rayalign.data.store import Rows
from rayalign.formats.records import RecordError
from rayalign.sources.files import Dataset, SourceFile, read_rows, spans_of
from rayalign.sources.rows import Span

SPAN_ROWS = 256
"""Rows that one task reads, encodes and writes as one shard, or several where their pictures are large."""

TASKS_OF_A_PROCESS = 4
"""As long as each has no more work than this, another process would not pay: its start takes seconds, as some tasks do."""

TASKS_WITH_PICTURES = 2
"""The same of rows with pictures, which take three times as long or more."""

TASK_BYTES = 2**30
"""Memory of a process that encodes: 0.5 GB of libraries, a shard twice, and the pictures of a record while they are decoded."""

SCANNED_HERE = 64 * 2**20
"""Bytes of files that the driver scans itself, in less time than a process of the cluster starts in."""


def cut_into_tasks(sources: Sources, seed: int) -> list[PrepareTask]:
    """The work of a preparation; files are scanned side by side, and #N draws are made here."""
    files = [(d, f, file) for d, dataset in enumerate(sources.datasets) for f, file in enumerate(dataset.files)]
    spans = _scan([file for _, _, file in files])
    tasks = []
    for d, dataset in enumerate(sources.datasets):
        own = [(f, span) for (owner, f, _), of_file in zip(files, spans, strict=True) if owner == d for span in of_file]
        wanted = _draw(sum(span.num_rows for _, span in own), dataset, seed)
        passed = 0
        for f, span in own:
            inside = wanted[(wanted >= passed) & (wanted < passed + span.num_rows)] if wanted is not None else None
            rows = None if inside is None else tuple(int(row) for row in inside - passed + span.first_row)
            if rows is None or rows:
                tasks.append(PrepareTask(d, f, span, rows))
            passed += span.num_rows
    return tasks


def processes_for(num_tasks: int, *, with_pictures: bool) -> int:
    """How many processes share the tasks, at the most."""
    return -(-num_tasks // (TASKS_WITH_PICTURES if with_pictures else TASKS_OF_A_PROCESS))


def has_pictures(tasks: Sequence[PrepareTask], sources: Sources, spec: EncoderSpec) -> bool:
    """Whether the first row has some; what is wrong with it is told where it is encoded."""
    task = tasks[0]
    _, row = next(read_rows(sources.datasets[task.dataset].files[task.file], task.span, task.rows))
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
    return [result_of(outcome) for outcome in ray.get([scan.remote(file) for file in files])]


def _spans_of(file: SourceFile) -> list[Span] | Stopped:
    return outcome_of(lambda: spans_of(file, SPAN_ROWS))


def _draw(num_rows: int, dataset: Dataset, seed: int) -> Rows | None:
    if dataset.sample is None:
        return None
    name = int.from_bytes(hashlib.sha256(dataset.name.encode()).digest()[:4], "big")
    return np.sort(np.random.default_rng([seed, name]).choice(num_rows, dataset.num_drawn(num_rows), replace=False))
