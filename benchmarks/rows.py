"""How fast records become batches: encoding once, and what a train worker's stream delivers, against TRL's collator.

    python benchmarks/rows.py                   # 1,000 records with a photo of 640 x 480 each, 20,000 of text; some minutes
    python benchmarks/rows.py --pairs 24 --texts 24     # a smoke test, mostly imports and starts

Encoding is all that a run does before it trains: reading, checking and tokenizing records, fetching and checking images,
writing shards. It is done once for all epochs and runs with the same data. Two figures: what one process encodes in a second of
processor time once it is started, and the whole preparation on a cluster, in which the start of processes takes seconds.

The stream then reads shards, decodes images and builds tensors, as a worker's thread does it beside the training. TRL's
collator tokenizes records, decodes images and builds tensors anew whenever it meets them; it gets the same records, and its
tensors hold every prompt and image twice. One process and one thread on both sides; the whole preparation has all cores.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import in_turn, machine_facts, parser_of, ratios, seconds_of, set_up, show, spread, table, write_json
from PIL import Image
from runs import batches, own_cluster
from synthetic import QUESTION, RECORDS_CASES, save_model, write_records

from rayalign.algorithms import DPO
from rayalign.config.config import Config, config_from_mapping
from rayalign.data.encoder_spec import EncoderSpec
from rayalign.data.prepare import RunData, prepare_run
from rayalign.data.rows import Sources, write_task
from rayalign.data.stream import sampler_of
from rayalign.data.tasks import cut_into_tasks
from rayalign.sources.files import resolve_dataset
from rayalign.storage import Store

BATCH_SIZE = 4


def write_texts(records: Path, number: int) -> Path:
    """As many records without pictures, each with a question of its own; their responses are those of `records`."""
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    texts = []
    for i in range(number):
        question = {"role": "user", "content": f"{QUESTION}, line {i}"}
        responses = {side: lines[i % len(lines)][side] for side in ("chosen", "rejected")}
        texts.append(json.dumps({"prompt": [question], **responses}))
    file = records.with_name("texts.jsonl")
    file.write_text("\n".join(texts) + "\n")
    return file


def trl_batches(model: Path, records: Path) -> Iterator[int]:
    """The number of pairs of each batch that TRL's collator has made."""
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    collate = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(model))
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for start in itertools.count(0, BATCH_SIZE):
        examples = []
        for line in lines[start : start + BATCH_SIZE]:
            examples.append({**line, "images": [Image.open(records.parent / name) for name in line["images"]]})
        if not examples:
            return
        assert collate(examples)["pixel_values"].ndim
        yield len(examples)


def rate_of(numbers: Iterator[int], *, seconds: float) -> float:
    """Pairs per second over some seconds, or to the end, without the first batch."""
    next(numbers)
    start, count = time.perf_counter(), 0
    for number in numbers:
        count += number
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def steady_rate(dataset: Path, model: Path, shards: Path) -> float:
    """Rows that this process encodes and writes in a second of processor time, without its first task."""
    sources = Sources((resolve_dataset(str(dataset)),), image_root=None, allow_image_urls=False)
    spec = EncoderSpec(str(model), responses="both")
    tasks = cut_into_tasks(sources, seed=0)
    numbers = itertools.count()
    write_task(tasks[0], Store(str(shards)), numbers, sources, spec)
    started, rows = time.process_time(), 0
    for task in tasks[1:13] or tasks:
        rows += len(write_task(task, Store(str(shards)), numbers, sources, spec))
    return rows / (time.process_time() - started)


def main() -> None:
    parser = parser_of(__doc__, output="rows.json", rounds=3)
    parser.add_argument("--case", choices=RECORDS_CASES, default="small", help="a model and the responses' lengths")
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--texts", type=int, default=20_000, help="records without pictures")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement of batches")
    arguments = parser.parse_args()
    set_up(threads=1)
    facts = machine_facts(threads=1)
    case = RECORDS_CASES[arguments.case]
    encoded: list[tuple[Config, RunData]] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        model = save_model(folder / "model", case.shape)
        records = write_records(folder / "data", pairs=arguments.pairs, words=case.words)
        texts = write_texts(records, arguments.texts)
        megabytes = sum(photo.stat().st_size for photo in (folder / "data" / "photos").iterdir()) / 1e6

        def encode(dataset: Path, number: int) -> float:
            """Seconds of a preparation that finds nothing prepared; the data set has this number of records."""
            flags: dict[str, Any] = {
                "model": str(model),
                "dataset": [str(dataset)],
                "output_dir": str(folder / "run"),
                "cache_dir": str(folder / f"cache{len(encoded)}"),
                "batch_size": BATCH_SIZE,
                "dataset_test_ratio": 0,
            }
            config = config_from_mapping(DPO, flags)
            with own_cluster(config):
                taken = seconds_of(lambda: encoded.append((config, prepare_run(config))))
            assert encoded[-1][1].training.num_rows == number
            return taken.wall

        def stream() -> float:
            config, data = encoded[-1]
            numbers = (batch.num_pairs for _, batch in batches(sampler_of(config, data), data))
            return rate_of(numbers, seconds=arguments.seconds)

        def collate() -> float:
            return rate_of(trl_batches(model, records), seconds=arguments.seconds)

        def steady(dataset: Path) -> list[float]:
            return [steady_rate(dataset, model, folder / "shards") for _ in range(arguments.rounds)]

        steady_texts, steady_photos = steady(texts), steady(records)
        encoding_texts = [encode(texts, arguments.texts) for _ in range(arguments.rounds)]
        encoding = [encode(records, arguments.pairs) for _ in range(arguments.rounds)]
        sides: dict[str, Callable[[], float]] = {"rayalign": stream, "trl": collate}
        reading = in_turn(sides, rounds=arguments.rounds)
    report = {
        "machine": facts,
        "pairs": arguments.pairs,
        "texts": arguments.texts,
        "photo_megabytes": round(megabytes, 1),
        "steady": {"photos": spread(steady_photos), "texts": spread(steady_texts)},
        "encoding": {
            "rows": spread([arguments.pairs / seconds for seconds in encoding]),
            "megabytes": spread([megabytes / seconds for seconds in encoding]),
        },
        "encoding_texts": spread([arguments.texts / seconds for seconds in encoding_texts]),
        "pairs_per_second": {name: spread(values) for name, values in reading.items()},
        "times_as_fast": ratios(reading["rayalign"], reading["trl"]),
    }
    write_json(arguments.output, report)
    columns = {
        "encoding, rows/s of a core": lambda found: show(found["steady"]["photos"]),
        "of text only": lambda found: show(found["steady"]["texts"]),
        f"with the start, rows/s ({os.cpu_count()} cores)": lambda found: show(found["encoding"]["rows"]),
        "of text only, with the start": lambda found: show(found["encoding_texts"]),
        "photos, MB/s": lambda found: show(found["encoding"]["megabytes"]),
        "rayalign's batches, pairs/s": lambda found: show(found["pairs_per_second"]["rayalign"]),
        "TRL's collator, pairs/s": lambda found: show(found["pairs_per_second"]["trl"]),
        "times as fast": lambda found: show(found["times_as_fast"]),
    }
    print(table(columns, [report]))


if __name__ == "__main__":
    main()
