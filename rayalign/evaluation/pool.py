"""Rows through a pool of Ray Data's actors into parquet files: what a verb does to many rows with a model that is loaded once.

    groups = groups_of_rows(rows)                      # dicts with an "id" of their own; or groups_of_datasets(...)
    result = run_pool(groups, functools.partial(make_work, flags), Store.at("out"), schema=SCHEMA, settings=flags, cluster=...)
    for table in read_results(Store.at("out")): ...

`make_work` is called once in each actor and returns the function that does the work on some rows. `pool_folder` has the folder
that comes out. A group's rows are the same ones each time, whatever the number of actors, so that its batches are, too.
"""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray import cloudpickle

from rayalign.cluster import configure_ray_data, place_ray_data, report, reports_of
from rayalign.config.endings import RunFailed
from rayalign.config.sections import ClusterConfig
from rayalign.data.attempts import Attempt
from rayalign.data.remarks import printable
from rayalign.evaluation.groups import Group, Row
from rayalign.evaluation.pool_folder import (
    ATTEMPTS,
    DROPPED,
    ID,
    POSITION,
    ROWS,
    SUMMARY,
    done_rows,
    open_output,
    read_results,
    result_files,
)
from rayalign.evaluation.work import WHOLE_ATTEMPTS, Result, Work, attempted
from rayalign.formats.records import RecordError
from rayalign.progress import Progress, per_second
from rayalign.ray_errors import RAY_ERRORS, cause_in_words, user_error_in
from rayalign.ray_lines import quiet_logging
from rayalign.storage import Store

logger = logging.getLogger(__name__)

OUTCOME_SCHEMA = pa.schema(
    [(ID, pa.string()), (POSITION, pa.int64()), ("reason", pa.string()), ("field", pa.string()), ("detail", pa.string())]
)
"""What an actor reports: a line for each row, whose `reason` is null where it gave results; or one without an id, whose
`detail` says what ends the run. (Of an error that it raised Ray Data would lose the type and the text.)"""

GROUP = "group"
"""The column in which a group travels to an actor."""

LONGEST_DETAIL = 2000
SHOWN = 5
"""Reasons that a message lists."""


@dataclass(frozen=True)
class PoolResult:
    """The folder of the results; how many rows are in it, those of earlier starts included, and how many were dropped."""

    folder: Store
    num_rows: int
    num_dropped: int

    @property
    def output_dir(self) -> str:
        """The folder: an absolute path or a URL."""
        return self.folder.location

    @property
    def dataset(self) -> str:
        """The folder with the rows' parquet files: what --dataset takes."""
        return (self.folder / ROWS).location

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows, all `columns` or some of them, in a table for each file."""
        return read_results(self.folder, columns)


def run_pool(
    groups: Sequence[Group],
    make_work: Callable[[], Work],
    output: Store,
    *,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    cluster: ClusterConfig,
    what: str = "rows",
    overwrite: bool = False,
) -> PoolResult:
    """Does the work on all rows that have no results yet, on `cluster.num_workers` actors with their CPUs and GPUs; `schema`
    are the columns that the work's lines have besides ID and POSITION. Ray must run.

    `make_work` is pickled. What it raises ends the run, a ValueError as it is. `settings` are JSON: all that results depend on.
    `what` names the rows in log lines. Raises ValueError where the folder holds results of other settings and it is not to be
    overwritten, and where not one row gave results; RunFailed where the cluster failed.
    """
    started = time.monotonic()
    open_output(output, settings, overwrite=overwrite or not result_files(output))  # without a row nothing is lost
    done = done_rows(output)
    left = [group for group in (group.without(done) for group in groups) if group.num_rows]
    total = sum(group.num_rows for group in left)
    if done:
        logger.info("%d %s are done already, %d are left", len(done), what, total)
    for name in (SUMMARY, ATTEMPTS):
        (output / name).delete()
    dropped: list[dict[str, Any]] = []
    progress = Progress(total)
    try:
        for outcomes in _outcomes(left, make_work, output, schema, cluster):
            lines = outcomes.to_pylist()
            for line in lines:
                if line[ID] is None:
                    raise RunFailed(_going_on(line["detail"], output))
            dropped += [line for line in lines if line["reason"] is not None]
            if progress.add(outcomes.num_rows):
                logger.info("%s", progress.line(what))
    except RAY_ERRORS as error:
        if user_error := user_error_in(error):
            raise user_error from None
        raise RunFailed(_going_on(cause_in_words(error), output)) from error
    finally:
        (output / ATTEMPTS).delete()
        lines = sorted(dropped, key=lambda line: line.pop(POSITION))
        (output / DROPPED).write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode())
    num_rows = len(done) + total - len(dropped)
    if dropped:
        logger.warning("%s", _reasons(dropped, num_rows, what, output))
    if dropped and not num_rows:
        raise ValueError(f"Not one of {len(dropped)} {what} could be used. The first: {dropped[0]['detail']}")
    seconds = time.monotonic() - started
    if total:
        logger.info("%d %s in %.1f s (%s) into %s", total, what, seconds, per_second(total / seconds), output.location)
    (output / SUMMARY).write_json({"rows": num_rows, "dropped": len(dropped), "seconds": round(seconds, 1)})
    return PoolResult(output, num_rows, len(dropped))


def _going_on(what: str, output: Store) -> str:
    return f"{what.rstrip('.')}. What is done is kept in {output.location}; the same command goes on."


def _outcomes(
    groups: Sequence[Group], make_work: Callable[[], Work], output: Store, schema: pa.Schema, cluster: ClusterConfig
) -> Iterator[pa.Table]:
    if not groups:
        return
    configure_ray_data()
    place_ray_data(cluster.worker_labels)
    kind: dict[str, Any] = {"accelerator_type": cluster.accelerator_type} if cluster.accelerator_type else {}
    items = [{GROUP: cloudpickle.dumps(group)} for group in groups]
    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PoolActor,
        fn_constructor_kwargs={
            "make_work": make_work,
            "output": output,
            "schema": schema,
            "threads": max(1, int(cluster.cpus_per_worker)),
        },
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=min(cluster.most_workers, len(groups))),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
        **kind,
    )
    yield from reports_of(tasks, OUTCOME_SCHEMA)


class PoolActor:
    """Runs in Ray Data's actors: does the work on one group after another, and writes each one's results as a file. The work is
    made with the first group, so that what keeps a model from loading can be reported."""

    def __init__(self, make_work: Callable[[], Work], output: Store, schema: pa.Schema, threads: int) -> None:
        quiet_logging()
        import torch  # here: the driver has no use for it

        torch.set_num_threads(threads)
        self._make_work = make_work
        self._output = output
        self._schema = pa.schema([(ID, pa.string()), (POSITION, pa.int64()), *schema])

    def __call__(self, batch: pa.Table) -> pa.Table:
        group: Group = cloudpickle.loads(batch[GROUP][0].as_py())

        def lines() -> list[dict[str, Any]]:
            try:
                attempt = Attempt(self._output / ATTEMPTS / f"{_name(group)}.json", whole=WHOLE_ATTEMPTS)
                done = do_group(group, attempt, self._work, self._output / ROWS, self._schema)
                attempt.end()
                return done
            except OSError as error:
                return [{"reason": "run ended", "detail": printable(str(error), longest=LONGEST_DETAIL)}]

        return report(lines, OUTCOME_SCHEMA)

    @functools.cached_property
    def _work(self) -> Work:
        return self._make_work()


def do_group(group: Group, attempt: Attempt, work: Work, folder: Store, schema: pa.Schema) -> list[dict[str, Any]]:
    """Does the work on a group and writes its results into a folder; returns a line of OUTCOME_SCHEMA for each row."""
    rows = group.read()
    usable: dict[int, Row] = {i: row for i, row in enumerate(rows) if not isinstance(row, RecordError)}
    results = attempted(attempt, work, {group.keys[i]: row for i, row in usable.items()})
    found = dict(zip(usable, results, strict=True))
    lines: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    for i, (key, position) in enumerate(zip(group.keys, group.positions, strict=True)):
        row = rows[i]
        result: Result = row if isinstance(row, RecordError) else found[i]
        named = {ID: key, POSITION: position}
        outcomes.append(dict(named))
        if isinstance(result, RecordError):
            detail = printable(str(result), longest=LONGEST_DETAIL)
            outcomes[-1] |= {"reason": result.reason, "field": printable(result.field), "detail": detail}
        else:
            lines += [named | dict(line) for line in result]
    if lines:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), sink, dictionary_pagesize_limit=DICTIONARY_BYTES)
        (folder / f"{_name(group)}.parquet").write_bytes(sink.getvalue().to_pybytes())
    return outcomes


def _name(group: Group) -> str:
    """Of its files, by its rows: a group that is done once more after a process was lost replaces its own."""
    return f"{group.positions[0]:09}-{hashlib.sha256(chr(0).join(group.keys).encode()).hexdigest()[:12]}"


DICTIONARY_BYTES = 256 * 2**20
"""Of a column's distinct values, up to which equal ones, such as the pictures of one prompt's responses, are stored once."""


def _reasons(dropped: Sequence[Mapping[str, Any]], num_rows: int, what: str, output: Store) -> str:
    counts: dict[str, int] = {}
    for line in dropped:
        counts[line["reason"]] = counts.get(line["reason"], 0) + 1
    shown = sorted(counts.items(), key=lambda entry: -entry[1])[:SHOWN]
    lines = [f"  {count:>8}  {reason}" for reason, count in shown]
    total = num_rows + len(dropped)
    return "\n".join([f"{len(dropped)} of {total} {what} dropped, listed in {(output / DROPPED).location}:", *lines])
