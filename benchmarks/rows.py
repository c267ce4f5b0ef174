"""How fast records become batches: encoding once, and what a train worker's stream delivers, against TRL's collator.

    python benchmarks/rows.py                   # 1,000 records with a photo of 640 x 480 each; some minutes
    python benchmarks/rows.py --pairs 24        # a smoke test, mostly imports and starts

Encoding is all that a run does before it trains: reading, checking and tokenizing records, fetching and checking images,
writing shards. It is done once for all epochs and runs with the same data. The stream then reads shards, decodes images and
builds tensors, as a worker's thread does it beside the training. TRL's collator tokenizes records, decodes images and builds
tensors anew whenever it meets them; it gets the same records, and its tensors hold every prompt and image twice. One process
and one thread on both sides of the second comparison; encoding has all cores.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from job import CASES, write_records
from machine import RESULTS, machine_facts, markdown_table, show, spread, write_json
from overhead import batches, own_cluster, quiet_libraries
from PIL import Image
from synthetic import save_model

from rayalign.algorithms import DPO
from rayalign.config.config import config_from_mapping
from rayalign.data.prepare import prepare_run
from rayalign.data.stream import sampler_of

BATCH_SIZE = 4


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


def rates_of(numbers: Iterator[int], *, seconds: float) -> float:
    """Pairs per second over some seconds, or to the end, without the first batch."""
    next(numbers)
    start, count = time.perf_counter(), 0
    for number in numbers:
        count += number
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="small", help="a model of job.py and the responses' lengths")
    parser.add_argument("--pairs", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement of batches")
    parser.add_argument("--output", type=Path, default=RESULTS / "rows.json")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    facts = machine_facts(threads=1)
    case = CASES[arguments.case]
    encoding: list[dict[str, float]] = []
    reading: dict[str, list[float]] = {"rayalign": [], "trl": []}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        model = save_model(folder / "model", case.shape)
        records = write_records(folder / "data", pairs=arguments.pairs, words=case.words)
        photo_bytes = sum(photo.stat().st_size for photo in (folder / "data" / "photos").iterdir())
        for number in range(arguments.rounds):
            flags: dict[str, Any] = {
                "model": str(model),
                "dataset": [str(records)],
                "output_dir": str(folder / "run"),
                "cache_dir": str(folder / f"cache{number}"),
                "batch_size": BATCH_SIZE,
                "dataset_test_ratio": 0,
            }
            config = config_from_mapping(DPO, flags)
            with own_cluster(config):
                start = time.perf_counter()
                data = prepare_run(config)
                taken = time.perf_counter() - start
            assert data.training.num_rows == arguments.pairs
            encoding.append({"rows": arguments.pairs / taken, "megabytes": photo_bytes / 1e6 / taken})
            sides = {
                "rayalign": (batch.num_pairs for _, batch in batches(sampler_of(config, data), data)),
                "trl": trl_batches(model, records),
            }
            for name, numbers in sorted(sides.items(), reverse=number % 2 == 1):
                reading[name].append(rates_of(numbers, seconds=arguments.seconds))
    report = {
        "machine": facts,
        "pairs": arguments.pairs,
        "photo_megabytes": round(photo_bytes / 1e6, 1),
        "encoding": {unit: spread([each[unit] for each in encoding]) for unit in ("rows", "megabytes")},
        "pairs_per_second": {name: spread(values) for name, values in reading.items()},
        "times_as_fast": spread([a / b for a, b in zip(reading["rayalign"], reading["trl"], strict=True)]),
    }
    write_json(arguments.output, report)
    header = [
        f"encoding, rows/s ({os.cpu_count()} cores)",
        "photos, MB/s",
        "rayalign's batches, pairs/s",
        "TRL's collator, pairs/s",
    ]
    row = [
        *(show(report["encoding"][unit]) for unit in ("rows", "megabytes")),
        *(show(report["pairs_per_second"][name]) for name in ("rayalign", "trl")),
        show(report["times_as_fast"]),
    ]
    print(markdown_table([*header, "times as fast"], [row]))


if __name__ == "__main__":
    main()
