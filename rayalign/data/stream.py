"""Ray Data on the workers' side: streams a worker's pairs to it in sampler order, as batches that are ready to run.

`prepare` encoded the records. Fetches run as Ray Data tasks; images are decoded and batches built in a thread of the train
worker, next to the device that needs them.
"""

import contextlib
import functools
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data

from rayalign.cluster import configure_ray_data
from rayalign.config.config import Config
from rayalign.data.batch import PairBatch, assemble
from rayalign.data.companions import Companion, with_companion
from rayalign.data.encoder_spec import EncoderSpec, image_processing
from rayalign.data.prepare import RunData
from rayalign.data.sampler import SamplerSettings, StepSampler, draw_rows, fetch_chunk, partners_in
from rayalign.data.shuffled_pictures import Pictures, with_pictures_of
from rayalign.data.store import EncodedPair, PreparedData, Rows, from_batch
from rayalign.models.registry import packs_rows

T = TypeVar("T")

MOST_CHUNKS = 5_000
"""Parts of a worker's pairs that one stream of Ray Data fetches, whose start takes milliseconds for each of them; a longer run
has several streams, one after another."""

NODE_ID = "ray.io/node-id"
"""The label that Ray gives each node."""


def sampler_of(config: Config, data: RunData, *, num_workers: int | None = None) -> StepSampler:
    """The order of the run, dealt to so many workers (default: to the most that it may have). Raises DamagedFile where an
    earlier start found cached files damaged that it needs."""
    for records in filter(None, (data.training, data.held_out)):
        records.require_undamaged()
    companion = config.algorithm.needs.companion
    settings = SamplerSettings(
        global_batch_size=config.global_batch_size,
        batch_size=config.optimizer.batch_size,
        num_workers=num_workers or config.cluster.most_workers,
        num_epochs=config.optimizer.num_train_epochs,
        max_steps=config.optimizer.max_steps,
        seed=config.data.data_seed,
        held_out_ratio=0.0 if data.held_out else config.data.dataset_test_ratio,
        with_partners=companion is not None and companion.needs_partner,
        max_tokens_per_batch=config.optimizer.max_tokens_per_batch,
        packs_rows=packs_rows(data.spec.family, config.model.attn_implementation),
    )
    return StepSampler(data.training.token_counts(), settings)


def held_out_rows(data: RunData, sampler: StepSampler) -> Rows:
    """The rows that are held out: all of the held-out data set, where there is one, else some of the records to train on."""
    return np.arange(data.held_out.num_rows) if data.held_out else sampler.held_out


def evaluated_rows(config: Config, data: RunData, sampler: StepSampler) -> Rows:
    """Those of the held-out rows that a run evaluates, the same ones each time."""
    rows = held_out_rows(data, sampler)
    return draw_rows(rows, at_most=config.run.max_eval_records, seed=config.data.data_seed)


def fetch_pairs(data: PreparedData, sampler: StepSampler, *, rank: int, start_step: int) -> Iterator[pa.Table]:
    """A worker's pairs from `start_step` to the end of the run, as tables of whole steps or parts of them. Ray Data starts at
    once and takes its seconds: what the first steps need is fetched here."""
    find = functools.partial(fetch_chunk, data=data, settings=sampler.settings, rank=rank)
    lines = [{"first": steps.start, "last": steps.stop} for steps in sampler.chunks(start_step)]
    others = ahead(_streamed(find, lines[1:]), depth=1) if len(lines) > 1 else ()
    return itertools.chain((find(pa.Table.from_pylist([line])) for line in lines[:1]), others)


def read_pairs(data: PreparedData, sampler: StepSampler, *, start_step: int) -> Iterator[pa.Table]:
    """The tables of `fetch_pairs` for a run's only worker, each read by this process as it is asked for: without Ray Data,
    which takes its seconds to start, but no sooner than they are needed."""
    for steps in sampler.chunks(start_step):
        line = pa.Table.from_pylist([{"first": steps.start, "last": steps.stop}])
        yield fetch_chunk(line, data=data, settings=sampler.settings, rank=0)


def pairs_in_order(
    tables: Iterator[pa.Table],
    sampler: StepSampler,
    spec: EncoderSpec,
    *,
    rank: int,
    start_step: int,
    companion: Companion | None = None,
    pin_memory: bool = False,
) -> Iterator[tuple[int, PairBatch]]:
    """A worker's (step, micro-batch) made of its `fetch_pairs` from the same step on, always a few ahead of the training."""
    make_batch = batch_maker(spec, companion)
    with_partners = sampler.settings.with_partners

    def batches() -> Iterator[tuple[int, PairBatch]]:
        # Ray Data may cut a fetched table in two or leave an empty one out: only the order of the pairs counts.
        pairs: list[EncodedPair] = []
        for step in range(start_step, sampler.num_steps):
            for rows in sampler.micro_batches(step, rank):
                count = len(rows) * (2 if with_partners else 1)
                while len(pairs) < count:
                    pairs += from_batch(next(tables))
                batch = make_batch(pairs[: len(rows)], pairs[len(rows) : count])
                del pairs[:count]
                yield step, batch.pin_memory() if pin_memory else batch

    return ahead(batches(), depth=2)


def _streamed(find: Callable[[pa.Table], pa.Table], lines: Sequence[Mapping[str, int]]) -> Iterator[pa.Table]:
    configure_ray_data()
    # Fetches wait for storage and hardly compute: without a CPU of their own they can't take one from a train worker, nor
    # wait for one for ever where the workers hold them all. They run beside their worker: what they need of the index is in the
    # node's memory already, and pairs don't travel.
    for start in range(0, len(lines), MOST_CHUNKS):
        some = list(lines[start : start + MOST_CHUNKS])
        tables = ray.data.from_items(some, override_num_blocks=len(some)).map_batches(
            find,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            label_selector={NODE_ID: ray.get_runtime_context().get_node_id()},
            compute=ray.data.TaskPoolStrategy(size=min(2, len(some))),
        )
        yield from tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def held_out_pairs(
    data: PreparedData,
    micro_batches: Sequence[Rows],
    spec: EncoderSpec,
    *,
    companion: Companion | None = None,
    order: Rows | None = None,
    seen: dict[int, Pictures] | None = None,
) -> Iterator[PairBatch]:
    """Batches of given rows, with both responses, a few ahead of their use; `order` has all held-out rows where each needs a
    partner. What `shuffle_pictures` must know of the rows is put into `seen`."""
    reader, make_batch = data.reader(), batch_maker(spec, companion)

    def batches() -> Iterator[PairBatch]:
        for rows in micro_batches:
            partners = from_batch(reader.read(partners_in(order, rows))) if order is not None else ()
            pairs = [pair.as_evaluated() for pair in from_batch(reader.read(rows))]
            if seen is not None:
                seen.update(zip(rows.tolist(), map(Pictures.of, pairs), strict=True))
            yield make_batch(pairs, partners)

    return ahead(batches(), depth=2)


def with_pictures_of_others(
    data: PreparedData, micro_batches: Sequence[Rows], partners: Mapping[int, int], spec: EncoderSpec
) -> Iterator[PairBatch]:
    """Batches of those of the given rows that have a partner, with the partner's pictures in place of their own."""
    reader, layout, process = data.reader(), spec.layout, image_processing(spec)

    def batches() -> Iterator[PairBatch]:
        for rows in micro_batches:
            own = [row for row in rows.tolist() if row in partners]
            if own:
                pairs = [pair.as_evaluated() for pair in from_batch(reader.read(own))]
                others = from_batch(reader.read([partners[row] for row in own]))
                yield with_pictures_of(pairs, others, layout=layout, process_images=process, max_pixels=spec.max_pixels)

    return ahead(batches(), depth=2)


def batch_maker(
    spec: EncoderSpec, companion: Companion | None = None
) -> Callable[[Sequence[EncodedPair], Sequence[EncodedPair]], PairBatch]:
    """The function that decodes images and builds tensors, for one model: from pairs, and their partners where the companion
    is made of these."""
    layout, process = spec.layout, image_processing(spec)

    def make_batch(pairs: Sequence[EncodedPair], partners: Sequence[EncodedPair] = ()) -> PairBatch:
        batch = assemble(pairs, layout=layout, process_images=process)
        return with_companion(batch, companion, pairs, partners, layout=layout, process_images=process)

    return make_batch


def ahead(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """The same items, made in a thread that starts at once and stays up to `depth` items ahead; its exceptions are raised
    where the items are taken."""
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

    def taken() -> Iterator[T]:
        while True:
            more, item = waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item

    threading.Thread(target=produce, name="batches-ahead", daemon=True).start()
    taking = taken()
    weakref.finalize(taking, stop.set)  # also where nothing was ever taken
    return taking
