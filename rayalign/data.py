"""Ray Data: reads, validates and encodes records into the cache, and streams them to the workers in plan order.

`prepare` runs once for a data set and model: read -> validate -> encode -> shards on shared storage, on every CPU of the
cluster. `pairs_in_order` is what a train worker iterates: look up -> decode -> batch, prefetched across steps and epochs.
"""

import contextlib
import functools
import hashlib
import json
import logging
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data

from rayalign.batch import PairBatch, assemble
from rayalign.config import DataConfig
from rayalign.encode import Encoder, EncoderSpec, image_processing
from rayalign.formats import parse_row
from rayalign.formats.files import Dataset, read_rows, resolve_dataset, spans_of
from rayalign.formats.rows import Span
from rayalign.images import fetch_image
from rayalign.plan import StepPlan, look_up
from rayalign.prepared import INDEX_SCHEMA, EncodedPair, PreparedData, Rows, from_batch, write_shard
from rayalign.records import RecordError, require_pair
from rayalign.storage import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

SPAN_ROWS = 256
"""Rows that one task reads, encodes and writes as one shard."""

PROGRESS_SECONDS = 5
CACHE_VERSION = 1
"""Part of every cache key; raised when the meaning of cached data changes."""

DROPPED_FIELDS = [("reason", pa.string()), ("field", pa.string()), ("detail", pa.string())]
OUTCOME_SCHEMA = pa.schema([*INDEX_SCHEMA, *DROPPED_FIELDS])
"""What a task reports: a line of the index for each pair written, or the reason (not null) for each record dropped."""


@dataclass(frozen=True)
class PrepareTask:
    """Rows `span` of one file, of which `rows` (None: all) are wanted."""

    dataset: int
    file: int
    span: Span
    rows: tuple[int, ...] | None


@dataclass(frozen=True)
class Sources:
    """The data sets of one --dataset or --val_dataset and how their images are found."""

    datasets: tuple[Dataset, ...]
    image_root: str | None
    allow_image_urls: bool


def prepare(arguments: Sequence[str], spec: EncoderSpec, config: DataConfig, cache: Store) -> PreparedData:
    """The encoded data set for some --dataset arguments: from the cache, or made now on the cluster.

    Raises ValueError where a data set can't be found, and where more than `max_dropped_fraction` of its rows are unusable.
    """
    sources = Sources(tuple(resolve_dataset(a) for a in arguments), config.image_root, config.allow_image_urls)
    store = cache / cache_key(sources, spec, config)
    found = PreparedData.find(store)
    if found is None:
        found = _prepare_now(sources, spec, config, store)
    else:
        logger.info("Data: %d records of %s, encoded before, from %s", found.num_rows, " ".join(arguments), store.location)
    return found


def cache_key(sources: Sources, spec: EncoderSpec, config: DataConfig) -> str:
    """Names an encoded data set by everything it depends on: the files (place, size, time of change), the draw, the images'
    rules, the processor and model settings."""
    drawn = any(dataset.sample is not None for dataset in sources.datasets)
    parts = {
        "version": CACHE_VERSION,
        "files": [[(f.location, f.size, f.modified) for f in dataset.files] for dataset in sources.datasets],
        "draw": [[dataset.sample for dataset in sources.datasets], config.data_seed] if drawn else None,
        "images": [sources.image_root, sources.allow_image_urls],
        "encoder": spec.fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def table_of_reasons(dropped: Iterable[Mapping[str, Any]], num_rows: int) -> str:
    """A few lines that say how many records fell for which reason."""
    reasons = Counter(line["reason"] for line in dropped)
    lines = [f"  {count:>8}  {reason}" for reason, count in reasons.most_common()]
    total = sum(reasons.values())
    share = total / num_rows if num_rows else 0.0
    return "\n".join([f"{total} of {num_rows} records dropped ({share:.1%}):", *lines])


def _prepare_now(sources: Sources, spec: EncoderSpec, config: DataConfig, store: Store) -> PreparedData:
    started = time.monotonic()
    tasks = _cut_into_tasks(sources, config.data_seed)
    total = sum(task.span.num_rows if task.rows is None else len(task.rows) for task in tasks)
    attempt = uuid.uuid4().hex[:12]
    prepare_rows = functools.partial(_prepare_rows, tasks=ray.put(tasks), sources=sources, spec=spec, folder=store / attempt)
    _settle_context()
    numbers = ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
    outcomes = numbers.map_batches(prepare_rows, batch_size=1, batch_format="pyarrow", zero_copy_batch=True)
    tables, done, told = [], 0, started
    with _user_errors():
        for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            table = cast(pa.Table, batch)
            tables.append(table.cast(OUTCOME_SCHEMA))
            done += table.num_rows
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                rate = done / (told - started)
                logger.info("Data: %d of %d records encoded, %.0f/s, %.0f s to go", done, total, rate, (total - done) / rate)
    outcome = pa.concat_tables(tables) if tables else OUTCOME_SCHEMA.empty_table()
    is_dropped = pa.compute.is_valid(outcome["reason"])
    dropped = [_dropped_line(line, sources) for line in outcome.filter(is_dropped).to_pylist()]
    dropped.sort(key=lambda line: (line["dataset"], line["file"], line["row"]))
    if dropped:
        logger.warning("Data: %s", table_of_reasons(dropped, total))
    index = outcome.filter(pa.compute.invert(is_dropped)).select(INDEX_SCHEMA.names)
    if len(dropped) > config.max_dropped_fraction * total or not index.num_rows:
        raise TooManyDropped(
            f"{table_of_reasons(dropped, total)}\nThat is more than --max_dropped_fraction {config.max_dropped_fraction:g} "
            f"allows. "
            f"First: {_first_dropped(dropped)}. Mend the data, or raise the limit.",
            dropped,
        )
    data = PreparedData.finish(store, attempt=attempt, index=index, dropped=dropped)
    seconds = time.monotonic() - started
    logger.info("Data: %d records encoded in %.1f s (%.0f/s) into %s", data.num_rows, seconds, total / seconds, store.location)
    return data


class TooManyDropped(ValueError):
    """More records are unusable than allowed; `dropped` lists them."""

    def __init__(self, message: str, dropped: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.dropped = list(dropped)


def _first_dropped(dropped: Sequence[Mapping[str, Any]]) -> str:
    return "{file}, row {row}: {reason} ({detail})".format(**dropped[0]) if dropped else "the data sets are empty"


def _dropped_line(line: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    dataset = sources.datasets[line["dataset"]]
    return {
        "dataset": dataset.argument,
        "file": dataset.files[line["file"]].location,
        "row": line["source_row"],
        "reason": line["reason"],
        "field": line["field"],
        "detail": line["detail"],
    }


def _cut_into_tasks(sources: Sources, seed: int) -> list[PrepareTask]:
    """The work of a preparation; files are scanned side by side, and #N draws are made here."""
    scan = ray.remote(spans_of)
    files = [(d, f, file) for d, dataset in enumerate(sources.datasets) for f, file in enumerate(dataset.files)]
    with _user_errors():
        spans: list[list[Span]] = ray.get([scan.remote(file, SPAN_ROWS) for _, _, file in files])
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


def _draw(num_rows: int, dataset: Dataset, seed: int) -> Rows | None:
    if dataset.sample is None:
        return None
    if dataset.sample > num_rows:
        raise ValueError(f"--dataset {dataset.argument}: {dataset.sample} records are asked for, and there are {num_rows}.")
    name = int.from_bytes(hashlib.sha256(dataset.argument.encode()).digest()[:4], "big")
    return np.sort(np.random.default_rng([seed, name]).choice(num_rows, dataset.sample, replace=False))


def _prepare_rows(batch: pa.Table, *, tasks: Any, sources: Sources, spec: EncoderSpec, folder: Store) -> pa.Table:
    """Runs in Ray Data's processes: reads, validates and encodes the rows of one task, and writes them as one shard."""
    number = batch["item"][0].as_py()
    task: PrepareTask = _fetch(tasks)[number]
    dataset = sources.datasets[task.dataset]
    file = dataset.files[task.file]
    shard = f"shard_{number:06d}.arrow"
    pairs: list[EncodedPair] = []
    outcomes: list[dict[str, Any]] = []
    for row, content in read_rows(file, task.span, task.rows):
        outcome: dict[str, Any] = {"dataset": task.dataset, "file": task.file, "source_row": row}
        try:
            if isinstance(content, RecordError):
                raise content
            pair = _encode_row(content, f"{_file_label(sources, task)}:{row}", Store(file.location).parent, sources, spec)
        except RecordError as error:
            outcome |= {"reason": error.reason, "field": error.field, "detail": str(error)}
        else:
            outcome |= {"id": pair.id, "shard": shard, "position": len(pairs)}
            outcome |= {f"{part}_tokens": len(getattr(pair, f"{part}_ids")) for part in ("prompt", "chosen", "rejected")}
            pairs.append(pair)
        outcomes.append(outcome)
    if pairs:
        write_shard(folder / shard, pairs)
    return pa.Table.from_pylist(outcomes, schema=OUTCOME_SCHEMA)


def _file_label(sources: Sources, task: PrepareTask) -> str:
    """What a file's records are called after; numbered where several files could have the same name."""
    name = sources.datasets[task.dataset].files[task.file].name
    several = sum(len(dataset.files) for dataset in sources.datasets) > 1
    return f"{task.dataset}.{task.file}/{name}" if several else name


def _encode_row(row: Mapping[str, Any], row_id: str, folder: Store, sources: Sources, spec: EncoderSpec) -> EncodedPair:
    record = parse_row(row, id=row_id)
    if spec.with_rejected:
        require_pair(record)
    root = Store.at(sources.image_root) if sources.image_root else None
    images = [fetch_image(i, folder=folder, image_root=root, allow_urls=sources.allow_image_urls) for i in record.images]
    return _encoder(spec).encode(record, images)


@functools.lru_cache(maxsize=2)
def _encoder(spec: EncoderSpec) -> Encoder:
    return Encoder(spec)


@functools.lru_cache(maxsize=2)
def _fetch(tasks: Any) -> list[PrepareTask]:
    fetched: list[PrepareTask] = ray.get(tasks)
    return fetched


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """A ValueError raised in a remote process (the user can mend it) arrives as itself, without the layers around it."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__cause__ or getattr(cause, "cause", None)
        if cause is None:
            raise
        raise ValueError(str(cause.args[0]) if cause.args else str(cause)) from None


def _settle_context() -> None:
    """Ray Data's settings for the data sets that this process builds next."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # the order is planned, timing must not change it
    context.enable_progress_bars = False  # they flood job logs; stages log a line with rate and time to go


def pairs_in_order(
    data: PreparedData, plan: StepPlan, spec: EncoderSpec, *, rank: int, start_step: int, pin_memory: bool = False
) -> Iterator[tuple[int, PairBatch]]:
    """A worker's (step, micro-batch) from `start_step` to the end of the run, always a few ahead of the training."""
    chunks = plan.chunks(start_step)
    if not chunks:
        return iter(())
    lines = [{"first": steps.start, "last": steps.stop} for steps in chunks]
    _settle_context()
    find = functools.partial(look_up, data=data, settings=plan.settings, rank=rank)
    # Look-ups wait for storage and hardly compute: without a CPU of their own they can't take one from a train worker, nor
    # wait for one for ever where the workers hold them all.
    tables = ray.data.from_items(lines, override_num_blocks=len(lines)).map_batches(
        find, batch_size=None, batch_format="pyarrow", num_cpus=0, compute=ray.data.TaskPoolStrategy(size=min(2, len(lines)))
    )
    make_batch = batch_maker(spec)

    def batches() -> Iterator[tuple[int, PairBatch]]:
        arriving = iter(tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        for steps in chunks:
            sizes = [(step, len(rows)) for step in steps for rows in plan.micro_batches(step, rank)]
            pairs = from_batch(next(arriving)) if sizes else []
            for step, size in sizes:
                batch = make_batch(pairs[:size])
                del pairs[:size]
                yield step, batch.pin_memory() if pin_memory else batch

    return ahead(batches(), depth=2)


def held_out_pairs(data: PreparedData, micro_batches: Sequence[Rows], spec: EncoderSpec) -> Iterator[PairBatch]:
    """Batches of given rows, a few ahead of their use."""
    reader, make_batch = data.reader(), batch_maker(spec)
    return ahead((make_batch(from_batch(reader.read(rows))) for rows in micro_batches), depth=2)


def batch_maker(spec: EncoderSpec) -> Callable[[Sequence[EncodedPair]], PairBatch]:
    """The function that decodes images and builds tensors, for one model."""
    tokenizer = spec.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return functools.partial(
        assemble, with_rejected=spec.with_rejected, pad_token_id=pad, process_images=image_processing(spec)
    )


def ahead(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """The same items, made in a thread that stays up to `depth` items ahead; its exceptions are raised here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0.2)
                return

    def produce() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001  # raised again where the items are used
            put((False, error))

    threading.Thread(target=produce, name="batches-ahead", daemon=True).start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
