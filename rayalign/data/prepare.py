"""Ray Data on the cluster's side: reads, validates and encodes records into the cache.

`prepare` runs once for a data set and model: read -> validate -> encode -> shards on shared storage, on every CPU of the
cluster. `stream` brings them to the train workers.
"""

import functools
import hashlib
import itertools
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from rayalign.cluster import attempts_before, configure_ray_data, place_ray_data, report, reports_of
from rayalign.config.config import Config
from rayalign.config.plugins import Plugin
from rayalign.config.sections import DataConfig
from rayalign.data.attempts import Attempt
from rayalign.data.drops import TooManyDropped as TooManyDropped  # what others have of a preparation, they have from here
from rayalign.data.drops import check_drops
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.index import INDEX_SCHEMA, write_index
from rayalign.data.remarks import RowsSeen, remarks
from rayalign.data.rows import OUTCOME_SCHEMA, PrepareTask, Sources, write_task
from rayalign.data.sampler import nothing_held_out
from rayalign.data.shards import shard_name
from rayalign.data.store import PreparedData
from rayalign.data.tasks import cut_into_tasks, has_pictures, memory_of_a_task, processes_for, require_apart
from rayalign.formats.columns import parse_renames
from rayalign.formats.parse import own_formats
from rayalign.models.registry import REGISTERED_MODELS
from rayalign.models.source import ModelSource, resolve_model
from rayalign.progress import Progress, per_second
from rayalign.sources.several import require_records, resolve_datasets
from rayalign.storage import Store

logger = logging.getLogger(__name__)


CACHE_VERSION = 6
"""Part of every cache key; raised when the meaning of cached data changes."""


MOST_BLOCKS = 10_000
"""Of the tasks, which the driver takes milliseconds each for: where there are more files, a block has several tasks."""


@dataclass(frozen=True)
class RunData:
    """What a run trains and is evaluated on. `held_out` None: some of `training` is held out."""

    source: ModelSource
    spec: EncoderSpec
    training: PreparedData
    held_out: PreparedData | None


def prepare_run(config: Config) -> RunData:
    """The run's training and held-out records, encoded now or found in the cache; none is both.

    Raises ValueError for what the user can fix.
    """
    place_ray_data(config.cluster.data_labels)
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
    require_held_apart(config)
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
    elif words := nothing_held_out(training.num_rows, config.data.dataset_test_ratio):
        logger.warning("Data: %s", words)
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

    Raises ValueError where a data set can't be found or is empty, and where more than `max_dropped_fraction` of the rows of one
    are unusable, whenever they were encoded.
    """
    sources = _sources_of(arguments, config, plugins)
    store = cache / cache_key(sources, spec, config)
    found = PreparedData.find(store)
    found = _mended(found, sources, spec, config) if found is not None else None
    if found is None:
        found = _prepare_now(sources, spec, config, store)
    else:
        logger.info("Data: %d records of %s, encoded before, from %s", found.num_rows, " ".join(arguments), store.location)
        advice = f"(So it was when they were encoded; after a change of pictures alone, delete {store.location}.)"
        limit = config.max_dropped_fraction
        check_drops(*_drops_before(found, sources), limit=limit, advice=advice, say=logger.info)
    _say_remarks(found)
    return found


def require_held_apart(config: Config) -> None:
    """Raises ValueError where records of --val_dataset are trained on, too, and where a data set can't be found."""
    if config.data.val_dataset:
        sides = (_sources_of(side, config.data, config.plugins) for side in (config.data.dataset, config.data.val_dataset))
        require_apart(*sides, seed=config.data.data_seed)


def _sources_of(arguments: Sequence[str], config: DataConfig, plugins: tuple[Plugin, ...]) -> Sources:
    reading = tuple(plugin for plugin in plugins if plugin.formats)
    renames = parse_renames(config.columns, own_formats(reading))
    return Sources(resolve_datasets(arguments), config.image_root, config.allow_image_urls, reading, renames)


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


def _drops_before(data: PreparedData, sources: Sources) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Of data that were encoded before, maybe under other names of the same files: the records dropped, and the rows of each
    data set."""
    names = {file.location: dataset.argument for dataset in sources.datasets for file in dataset.files}
    dropped = [line | {"dataset": names[line["file"]]} for line in data.dropped()]
    counts, kept = Counter(line["dataset"] for line in dropped), data.rows_of_datasets()
    return dropped, {d.argument: kept[number] + counts[d.argument] for number, d in enumerate(sources.datasets)}


def _rows_now(tasks: Sequence[PrepareTask], sources: Sources) -> dict[str, int]:
    """The rows of each data set, by its argument. Raises ValueError where one has none."""
    counts = Counter[int]()
    for part in (part for task in tasks for part in task.parts):
        counts[part.dataset] += part.num_rows
    for number, dataset in enumerate(sources.datasets):
        require_records(dataset, counts[number])
    return {dataset.argument: counts[number] for number, dataset in enumerate(sources.datasets)}


def _prepare_now(sources: Sources, spec: EncoderSpec, config: DataConfig, store: Store) -> PreparedData:
    started = time.monotonic()
    _ = spec.layout  # a processor that can't be loaded is told before any process starts
    tasks = cut_into_tasks(sources, config.data_seed)
    num_rows = _rows_now(tasks, sources)
    total = sum(num_rows.values())
    arguments = [dataset.argument for dataset in sources.datasets]
    logger.info("Data: encoding %d records of %s", total, " ".join(arguments))
    attempt = uuid.uuid4().hex[:12]
    outcomes = Outcomes(sources)
    index = write_index(store / attempt, outcomes.kept(_encode(tasks, sources, spec, store / attempt, Progress(total))))
    dropped = sorted(outcomes.dropped, key=lambda line: (line["dataset"], line["file"], line["row"]))
    check_drops(dropped, num_rows, limit=config.max_dropped_fraction)
    looks_at_pictures = None if spec.family.text_only else spec.model
    said = remarks(outcomes.seen, arguments, sources.columns, looks_at_pictures=looks_at_pictures, responses=spec.responses)
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
    tasks = cut_into_tasks(sources, config.data_seed)
    numbers = sorted({shard % len(tasks) for shard in shards})
    shards = [shard for shard in data.shards() if shard % len(tasks) in numbers]  # all of a task, which writes them anew
    folder = data.folder / f"mended_{uuid.uuid4().hex[:12]}"
    outcomes = _encode(tasks, sources, spec, folder, Progress(data.num_rows), numbers=numbers)
    is_same = data.mend(shards, folder, pa.concat_tables(Outcomes(sources).kept(outcomes)))
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
) -> Iterator[pa.Table]:
    """Runs the tasks (those with some numbers) on the cluster; yields their outcomes in order, a line for each record."""
    prepare_rows = functools.partial(_prepare_rows, tasks=ray.put(tasks), sources=sources, spec=spec, folder=folder)
    configure_ray_data()
    wanted = list(range(len(tasks)) if numbers is None else numbers)
    if not wanted:
        return
    outcomes = ray.data.from_items(wanted, override_num_blocks=min(len(wanted), MOST_BLOCKS)).map_batches(
        prepare_rows,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        memory=memory_of_a_task(),
        compute=ray.data.TaskPoolStrategy(size=processes_for(len(wanted), with_pictures=has_pictures(tasks, sources, spec))),
    )
    for table in reports_of(outcomes, OUTCOME_SCHEMA):
        if progress.add(table.num_rows):
            logger.info("Data: %s", progress.line("records encoded"))
        yield table


class Outcomes:
    """What a driver keeps of its tasks' outcomes, which are of a data set of any size: the records dropped, and what was seen
    of each data set."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.dropped: list[dict[str, Any]] = []
        self.seen = [RowsSeen() for _ in sources.datasets]

    def kept(self, outcomes: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Passes the lines of the index on that are among the outcomes."""
        for outcome in outcomes:
            for number in outcome["dataset"].unique().to_pylist():
                self.seen[number].add(outcome.filter(pc.equal(outcome["dataset"], number)))
            is_dropped = pc.is_valid(outcome["reason"])
            self.dropped += [_dropped_line(line, self._sources) for line in outcome.filter(is_dropped).to_pylist()]
            yield outcome.filter(pc.invert(is_dropped)).select(INDEX_SCHEMA.names)


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


def _prepare_rows(batch: pa.Table, *, tasks: Any, sources: Sources, spec: EncoderSpec, folder: Store) -> pa.Table:
    """Runs in Ray Data's processes: reads, validates and encodes the rows of one task, and writes them as one shard or several,
    whose numbers are the task's own modulo the number of tasks."""
    number = batch["item"][0].as_py()

    def lines() -> list[dict[str, Any]]:
        fetched = _fetch(tasks)
        attempt = Attempt(folder / f"attempt_{number}.json" if attempts_before() else None)
        written = write_task(fetched[number], folder, itertools.count(number, len(fetched)), sources, spec, attempt=attempt)
        attempt.end()
        return written

    return report(lines, OUTCOME_SCHEMA)


@functools.lru_cache(maxsize=2)
def _fetch(tasks: Any) -> list[PrepareTask]:
    fetched: list[PrepareTask] = ray.get(tasks)
    return fetched
