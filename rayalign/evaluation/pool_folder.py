"""The folder of results that a pool's rows are written into: whose settings it holds, what is in it, and how it is read.

    rows/*.parquet   the results, a file for each group: `id` and `position` of the row, and the columns of the schema
    dropped.jsonl    the rows that gave none, each with its reason
    settings.json    what the results depend on: a start with other settings is refused
    summary.json     counts; it is written last

A file is there whole or not at all, and a row whose id is in one is done: the same command goes on after any end.
"""

import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayalign.config.yaml_files import flags_of_run
from rayalign.data.remarks import printable
from rayalign.storage import Store

ID, POSITION = "id", "position"
"""Columns of all results: the row's key, and its place among all rows."""

ROWS, DROPPED, SETTINGS, SUMMARY = "rows", "dropped.jsonl", "settings.json", "summary.json"

ATTEMPTS = "attempts"
"""What workers are at: a note for each group, gone when the pool has ended."""

READERS = 16
"""Files that are read at a time."""

OF_ANOTHER = "which would be lost. Choose another folder."
SHOWN = 5
"""Settings that a message lists."""


def open_output(output: Store, settings: Mapping[str, Any], *, overwrite: bool, names: Collection[str] = ()) -> None:
    """Notes the settings in the folder, or compares them with those of what is in it. `names` are what the verb writes there
    beside what a pool does.

    Raises ValueError where they differ, and where the folder holds something else, such as a training run or another verb's
    results; `overwrite` deletes what the same verb wrote, and nothing else.
    """
    now = json.loads(json.dumps(settings))
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output.location} is a file: pass a folder, which may be new.")
    note = output / SETTINGS
    written = (SUMMARY, DROPPED, ROWS, ATTEMPTS, *names)
    if note.exists():
        before = note.read_json_object()
        if _verb(before) != _verb(now):
            raise ValueError(f"--output_dir {output.location} holds the results of {_verb(before)}, {OF_ANOTHER}")
    else:
        others = [name for name in written if (output / name).exists()]
        if others:
            raise ValueError(
                f"--output_dir {output.location} holds the {others[0]} of something else, such as a training run, {OF_ANOTHER}"
            )
        if flags_of_run(output):
            raise ValueError(f"--output_dir {output.location} is the folder of a training run, {OF_ANOTHER}")
    if overwrite:
        for name in (*written, SETTINGS):  # the note last: without it nothing tells whose the rest is
            (output / name).delete()
    if not note.exists():
        note.write_json(now)
        return
    if before != now:
        lines = "".join(f"\n  {line}" for line in itertools.islice(_changes(before, now), SHOWN))
        raise ValueError(f"--output_dir {output.location} holds results that were made with other settings:{lines}\n{REMEDY}")


def _verb(settings: Mapping[str, Any]) -> str:
    """Whose settings they are; those of rounds hold a training's flags and no verb."""
    return str(settings.get("verb") or ("iterate" if "rlhf_type" in settings else "evaluate or of something else"))


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs in two settings, each in a line: not a whole list of files where one of them has changed."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        inner = [(key, before.get(key), now.get(key)) for key in sorted({*before, *now})]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = [(number, *values) for number, values in enumerate(zip(before, now, strict=True))]
    else:
        yield f"{name}: {printable(str(before), longest=300)} -> {printable(str(now), longest=300)}"
        return
    for key, one, other in inner:
        if one != other:
            yield from _changes(one, other, f"{name} {key}".strip())


REMEDY = "Pass --overwrite true to delete them, or another --output_dir."


def is_finished(output: Store) -> bool:
    """Whether a pool came to its end in this folder."""
    return (output / SUMMARY).exists()


def read_results(output: Store, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The results of a pool, all `columns` or some of them, in a table for each file. Files are in the order of their first
    rows; a row that was dropped by an earlier start is in a file of its own."""
    files = result_files(output)
    with ThreadPoolExecutor(READERS) as threads:
        for start in range(0, len(files), READERS):  # a file system's own reads wait for each other otherwise
            yield from threads.map(functools.partial(_read, columns=columns), files[start : start + READERS])


def result_files(output: Store) -> list[Store]:
    """The files of results, in the order of their first rows."""
    return [file for file in (output / ROWS).list() if file.name.endswith(".parquet") and not file.name.startswith(".")]


def _read(file: Store, *, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(file.read_bytes()), columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.location} is damaged ({error}). Delete it; the same command makes it anew.") from None


def done_rows(output: Store) -> set[str]:
    """The ids of the rows that have results."""
    return {key for table in read_results(output, [ID]) for key in table[ID].to_pylist()}
