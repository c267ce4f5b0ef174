"""Ray Data on the cluster's side: reads, validates and encodes records into the cache.

`prepare` runs once for a data set and model: read -> validate -> encode -> shards on shared storage, on every CPU of the
cluster. `stream` brings them to the train workers.
"""

import functools
import hashlib
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from rayalign.cluster import Stopped, configure_ray_data, outcome_of, report, reports_of, result_of
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig
from rayalign.data.encode import Encoder, EncoderSpec
from rayalign.data.remarks import SEEN_SCHEMA, ColumnsSeen, printable, remarks, unread_pictures
from rayalign.data.store import INDEX_SCHEMA, EncodedPair, PreparedData, Rows, shard_name, write_shard
from rayalign.data.truncation import RecordTooLong
from rayalign.formats.columns import Renames, parse_renames, renamed, require_pictures_read
from rayalign.formats.parse import Format, own_formats, parse_row
from rayalign.formats.records import RecordError, record_errors, require
from rayalign.images.fetch import fetch_images
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, resolve_model
from rayalign.progress import Progress, per_second
from rayalign.sources.files import Dataset, SourceFile, read_rows, resolve_dataset, spans_of
from rayalign.sources.rows import Span
from rayalign.storage import Store

logger = logging.getLogger(__name__)

SPAN_ROWS = 256
"""Rows that one task reads, encodes and writes as one shard."""

CACHE_VERSION = 3
"""Part of every cache key; raised when the meaning of cached data changes."""

DROPPED_FIELDS = [("reason", pa.string()), ("field", pa.string()), ("detail", pa.string())]
OUTCOME_SCHEMA = pa.schema([*INDEX_SCHEMA, *DROPPED_FIELDS, *SEEN_SCHEMA])
"""What a task reports: a line of the index for each pair written, or the reason (not null) for each record dropped; and what
was seen in either's row."""

LONGEST_DETAIL = 2000
"""Characters of what is said about a dropped record."""


@dataclass(frozen=True)
class RunData:
    """What a run trains and is evaluated on. `held_out` None: some of `training` is held out."""

    source: ModelSource
    spec: EncoderSpec
    training: PreparedData
    held_out: PreparedData | None


@dataclass(frozen=True)
class PrepareTask:
    """Rows `span` of one file, of which `rows` (None: all) are wanted."""

    dataset: int
    file: int
    span: Span
    rows: tuple[int, ...] | None


@dataclass(frozen=True)
class Sources:
    """The data sets of one --dataset or --val_dataset, how their images are found, the plugins that read their rows, and the
    columns that are renamed before."""

    datasets: tuple[Dataset, ...]
    image_root: str | None
    allow_image_urls: bool
    plugins: tuple[Plugin, ...] = ()
    columns: Renames = ()


def prepare_run(config: Config) -> RunData:
    """The run's training and held-out records, encoded now or found in the cache.

    Raises ValueError for what the user can fix.
    """
    source = resolve_model(config.model, REGISTERED_MODELS)
    spec = EncoderSpec(
        model=source.base,
        responses=config.algorithm.needs.responses,
        max_length=config.data.max_length,
        truncation_strategy=config.data.truncation_strategy,
        max_pixels=config.data.max_pixels,
        trust_remote_code=config.model.trust_remote_code,
    )
    cache = cache_of(config)
    training = prepare(config.data.dataset, spec, config.data, cache, config.plugins)
    if spec.lent_template:
        logger.warning(
            "Model: %s brings no chat template; prompts are written with TRL's %s. A base model must learn its special tokens",
            source.base,
            spec.lent_template,
        )
    held_out = None
    if config.data.val_dataset:
        held_out = prepare(config.data.val_dataset, spec, config.data, cache, config.plugins)
    return RunData(source, spec, training, held_out)


def cache_of(config: Config) -> Store:
    """Where encoded records are kept: --cache_dir, or beside the run's folder."""
    if config.data.cache_dir:
        return Store.at(config.data.cache_dir)
    return Store.at(str(config.run.output_dir)).parent / ".rayalign_cache"


def prepare(
    arguments: Sequence[str], spec: EncoderSpec, config: DataConfig, cache: Store, plugins: tuple[Plugin, ...] = ()
) -> PreparedData:
    """The encoded data set for some --dataset arguments: from the cache, or made now on the cluster. Rows are read by the
    record formats of plugins, too.

    Raises ValueError where a data set can't be found, and where more than `max_dropped_fraction` of its rows are unusable.
    """
    reading = tuple(plugin for plugin in plugins if plugin.formats)
    renames = parse_renames(config.columns, own_formats(reading))
    datasets = tuple(resolve_dataset(a) for a in arguments)
    sources = Sources(datasets, config.image_root, config.allow_image_urls, reading, renames)
    store = cache / cache_key(sources, spec, config)
    found = PreparedData.find(store)
    found = _mended(found, sources, spec, config) if found is not None else None
    if found is None:
        found = _prepare_now(sources, spec, config, store)
    else:
        logger.info("Data: %d records of %s, encoded before, from %s", found.num_rows, " ".join(arguments), store.location)
    _say_remarks(found)
    return found


def _say_remarks(data: PreparedData) -> None:
    """What the preparation had to say about the data sets, now or when they were encoded."""
    for level, words in data.remarks():
        logger.log(level, "Data: %s", words)


def cache_key(sources: Sources, spec: EncoderSpec, config: DataConfig) -> str:
    """Names an encoded data set by everything it depends on: the files (place, size, time of change), the draw, the images'
    rules, the processor and model settings, the plugins that read rows, the renamed columns."""
    drawn = any(dataset.sample is not None for dataset in sources.datasets)
    parts = {
        "version": CACHE_VERSION,
        "files": [[(f.location, f.size, f.modified) for f in dataset.files] for dataset in sources.datasets],
        "draw": [[dataset.sample for dataset in sources.datasets], config.data_seed] if drawn else None,
        "images": [sources.image_root, sources.allow_image_urls],
        "encoder": spec.fingerprint(),
    }
    if sources.plugins:
        parts["plugins"] = [[plugin.name, hashlib.sha256(plugin.text).hexdigest()] for plugin in sources.plugins]
    if sources.columns:
        parts["columns"] = sorted(sources.columns)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def table_of_reasons(dropped: Iterable[Mapping[str, Any]], num_rows: int) -> str:
    """A few lines that say how many records were dropped for which reason."""
    reasons = Counter(line["reason"] for line in dropped)
    lines = [f"  {count:>8}  {reason}" for reason, count in reasons.most_common()]
    total = sum(reasons.values())
    share = total / num_rows if num_rows else 0.0
    return "\n".join([f"{total} of {num_rows} records dropped ({share:.1%}):", *lines])


def _prepare_now(sources: Sources, spec: EncoderSpec, config: DataConfig, store: Store) -> PreparedData:
    started = time.monotonic()
    tasks = _cut_into_tasks(sources, config.data_seed)
    total = sum(task.span.num_rows if task.rows is None else len(task.rows) for task in tasks)
    logger.info("Data: encoding %d records of %s", total, " ".join(dataset.argument for dataset in sources.datasets))
    attempt = uuid.uuid4().hex[:12]
    outcome = _encode(tasks, sources, spec, store / attempt, Progress(total))
    is_dropped = pa.compute.is_valid(outcome["reason"])
    dropped = [_dropped_line(line, sources) for line in outcome.filter(is_dropped).to_pylist()]
    dropped.sort(key=lambda line: (line["dataset"], line["file"], line["row"]))
    index = outcome.filter(pa.compute.invert(is_dropped)).select(INDEX_SCHEMA.names)
    _refuse_unread_pictures(dropped, outcome, sources, limit=config.max_dropped_fraction)
    if len(dropped) > config.max_dropped_fraction * total or not index.num_rows:
        raise TooManyDropped(
            f"{table_of_reasons(dropped, total)}\nThat is more than --max_dropped_fraction {config.max_dropped_fraction:g} "
            f"allows. First: {_first_dropped(dropped)}. Fix the data, or raise the limit.",
            dropped,
        )
    if dropped:
        logger.warning("Data: %s", table_of_reasons(dropped, total))
    arguments = [dataset.argument for dataset in sources.datasets]
    looks_at_pictures = None if spec.family.text_only else spec.model
    said = remarks(outcome, arguments, sources.columns, looks_at_pictures=looks_at_pictures)
    data = PreparedData.finish(store, attempt=attempt, index=index, dropped=dropped, remarks=said)
    seconds = time.monotonic() - started
    speed = per_second(total / seconds)
    logger.info("Data: %d records encoded in %.1f s (%s) into %s", data.num_rows, seconds, speed, store.location)
    return data


def _mended(data: PreparedData, sources: Sources, spec: EncoderSpec, config: DataConfig) -> PreparedData | None:
    """The data set, its damaged shards encoded again; None where that gives other pairs than before, as with other images."""
    shards = data.damaged_shards()
    if not shards:
        return data
    first = (data.folder / shard_name(shards[0])).location
    logger.warning("Data: encoding again %d of the shards, which are damaged or missing: %s", len(shards), first)
    tasks = _cut_into_tasks(sources, config.data_seed)
    folder = data.folder / f"mended_{uuid.uuid4().hex[:12]}"
    outcome = _encode(tasks, sources, spec, folder, Progress(data.num_rows), numbers=shards)
    index = outcome.filter(pa.compute.is_null(outcome["reason"])).select(INDEX_SCHEMA.names)
    is_same = data.mend(shards, folder, index)
    folder.delete()
    if not is_same:
        logger.warning("Data: that gives other pairs than before: encoding everything anew")
    return data if is_same else None


def _encode(
    tasks: Sequence[PrepareTask],
    sources: Sources,
    spec: EncoderSpec,
    folder: Store,
    progress: Progress,
    *,
    numbers: Sequence[int] | None = None,
) -> pa.Table:
    """Runs the tasks (those with some numbers) on the cluster; returns their outcomes, a line for each record."""
    prepare_rows = functools.partial(_prepare_rows, tasks=ray.put(tasks), sources=sources, spec=spec, folder=folder)
    configure_ray_data()
    wanted = list(range(len(tasks)) if numbers is None else numbers)
    outcomes = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
        prepare_rows, batch_size=1, batch_format="pyarrow", zero_copy_batch=True
    )
    tables = []
    for table in reports_of(outcomes, OUTCOME_SCHEMA):
        tables.append(table)
        if progress.add(table.num_rows):
            logger.info("Data: %s", progress.line("records encoded"))
    return pa.concat_tables(tables) if tables else OUTCOME_SCHEMA.empty_table()


def _refuse_unread_pictures(dropped: Sequence[Mapping[str, Any]], outcome: pa.Table, sources: Sources, *, limit: float) -> None:
    """Raises TooManyDropped where pictures of a data set stand in columns that nothing reads."""
    rows = Counter(sources.datasets[number].argument for number in outcome["dataset"].to_pylist())
    words = unread_pictures(dropped, rows, limit=limit)
    if words is not None:
        raise TooManyDropped(words, dropped)


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
    scan = ray.remote(_spans_of)
    files = [(d, f, file) for d, dataset in enumerate(sources.datasets) for f, file in enumerate(dataset.files)]
    spans = [result_of(outcome) for outcome in ray.get([scan.remote(file) for _, _, file in files])]
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


def _spans_of(file: SourceFile) -> list[Span] | Stopped:
    return outcome_of(lambda: spans_of(file, SPAN_ROWS))


def _draw(num_rows: int, dataset: Dataset, seed: int) -> Rows | None:
    if dataset.sample is None:
        return None
    name = int.from_bytes(hashlib.sha256(dataset.name.encode()).digest()[:4], "big")
    return np.sort(np.random.default_rng([seed, name]).choice(num_rows, dataset.num_drawn(num_rows), replace=False))


def _prepare_rows(batch: pa.Table, *, tasks: Any, sources: Sources, spec: EncoderSpec, folder: Store) -> pa.Table:
    """Runs in Ray Data's processes: reads, validates and encodes the rows of one task, and writes them as one shard."""
    number = batch["item"][0].as_py()
    shard = folder / shard_name(number)

    def lines() -> list[dict[str, Any]]:
        return [{**line, "shard": number} for line in _write_task(_fetch(tasks)[number], shard, sources, spec)]

    return report(lines, OUTCOME_SCHEMA)


def _write_task(task: PrepareTask, shard: Store, sources: Sources, spec: EncoderSpec) -> list[dict[str, Any]]:
    """Writes a task's pairs; returns a line of OUTCOME_SCHEMA for each of its rows."""
    file = sources.datasets[task.dataset].files[task.file]
    pairs: list[EncodedPair] = []
    outcomes: list[dict[str, Any]] = []
    seen = ColumnsSeen(sources.columns, _own_formats(sources.plugins))
    for row, content in read_rows(file, task.span, task.rows):
        outcome: dict[str, Any] = {"dataset": task.dataset, "file": task.file, "source_row": row}
        try:
            if isinstance(content, RecordError):
                raise content
            with record_errors():
                outcome |= seen.add(content)
            pair = _encode_row(content, f"{_file_label(sources, task)}:{row}", Store(file.location).parent, sources, spec)
        except RecordError as error:
            outcome |= {
                "reason": error.reason,
                "field": printable(error.field),
                "detail": printable(str(error), longest=LONGEST_DETAIL),
            }
        else:
            outcome |= {"id": pair.id, "num_images": len(pair.images)}
            outcome |= {f"{side}_tokens": len(getattr(pair, f"{side}_ids")) for side in ("prompt", "chosen", "rejected")}
            pairs.append(pair)
        outcomes.append(outcome)
    if pairs:
        written = (outcome for outcome in outcomes if "id" in outcome)
        for outcome, place in zip(written, write_shard(shard, pairs), strict=True):
            outcome |= place._asdict()
    return outcomes


def _file_label(sources: Sources, task: PrepareTask) -> str:
    """What a file's records are called after; numbered where several files could have the same name."""
    name = sources.datasets[task.dataset].files[task.file].name
    several = sum(len(dataset.files) for dataset in sources.datasets) > 1
    return f"{task.dataset}.{task.file}/{name}" if several else name


def _encode_row(row: Mapping[str, Any], row_id: str, folder: Store, sources: Sources, spec: EncoderSpec) -> EncodedPair:
    encoder = _encoder(spec)  # what keeps the model from encoding anything is no fault of the row
    root = Store.at(sources.image_root) if sources.image_root else None
    own = _own_formats(sources.plugins)
    with record_errors():
        row = renamed(row, sources.columns)
        record = parse_row(row, id=row_id, own=own)
        if not encoder.spec.family.text_only:
            require_pictures_read(row, record, own)
        require(record, spec.responses)
    with record_errors(passing=(OSError,)):  # of failing storage, with which no other row fares better
        images = fetch_images(record.images, folder=folder, image_root=root, allow_urls=sources.allow_image_urls)
    with record_errors(passing=(RecordTooLong,)):
        return encoder.encode(record, images)


@functools.lru_cache(maxsize=2)
def _own_formats(plugins: tuple[Plugin, ...]) -> tuple[Format, ...]:
    return own_formats(plugins)


@functools.lru_cache(maxsize=2)
def _encoder(spec: EncoderSpec) -> Encoder:
    return Encoder(spec)


@functools.lru_cache(maxsize=2)
def _fetch(tasks: Any) -> list[PrepareTask]:
    fetched: list[PrepareTask] = ray.get(tasks)
    return fetched
