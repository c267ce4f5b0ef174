"""What a data set's size costs a driver, a train worker and a store: rayalign's own functions on made-up indexes.

    python benchmarks/scale.py                                # 1e5 and 1e6 rows, and fetches from a slow S3 server
    python benchmarks/scale.py --rows 10000000                # takes 2 GB of disk
    python benchmarks/scale.py --before ../other/checkout     # what reads, by another version's code, too
    python benchmarks/scale.py --rows --no-fetches --tasks 10000    # a whole preparation on Ray, of tasks of 8 rows

Each measurement is a process of its own, whose anonymous memory is looked at from outside every few milliseconds; what it holds
before it begins is taken off. The S3 server is one of a few lines on loopback that keeps each request for --delay seconds.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORKERS, GLOBAL_BATCH = 256, 1024
FETCH_ROWS, SHARD_ROWS, STEPS = 16_384, 128, 64
"""Of the fetches, by as many workers as take 4 rows of a step each: in each window one has as many rows in as many shards as
one of WORKERS has of 1e7 rows."""


BUCKET = "bench"

TASK_ROWS = 8
"""Of a whole preparation's tasks, so that many are done soon."""


def settings_of(num_workers: int, global_batch: int) -> Any:
    from rayalign.data.sampler import SamplerSettings

    return SamplerSettings(global_batch, 1, num_workers, num_epochs=1, max_steps=None, seed=42, held_out_ratio=0.01)


def prepare(folder: str, rows: int) -> Callable[[], dict[str, Any]]:
    """The driver's part of a preparation: tasks, a draw of a tenth, what tasks report, index and manifest."""
    from rayalign.data import prepare, tasks
    from rayalign.data.index import write_index
    from rayalign.data.rows import Sources
    from rayalign.data.shards import shard_name
    from rayalign.data.store import PreparedData
    from rayalign.sources.files import Dataset, SourceFile
    from rayalign.sources.rows import Span
    from rayalign.storage import Store

    def work() -> dict[str, Any]:
        found = []
        spans = [Span(first, min(256, rows - first)) for first in range(0, rows, 256)]
        tasks._scan = lambda files: [spans]  # which tasks of the cluster do
        for sample in (None, rows // 10):
            dataset = Dataset("rows", "rows", (SourceFile("/rows.jsonl", 1, "1"),), sample)
            began = time.process_time()
            found.append(tasks.cut_into_tasks(Sources((dataset,), None, False), 0))
            print(f"cut: {time.process_time() - began:.2f} s", file=sys.stderr)
        store = Store(folder)
        for number in range(len(found[0])):
            (store / "one" / shard_name(number)).write_bytes(b"")
        began = time.process_time()
        sources = Sources((Dataset("rows", "rows", (SourceFile("/rows.jsonl", 1, "1"),), None),), None, False)
        index = write_index(store / "one", prepare.Outcomes(sources).kept(outcomes(found[0])))
        PreparedData.finish(store, attempt="one", index=index, dropped=[])
        seconds = time.process_time() - began
        return {"tasks": len(found[0]), "tasks_of_a_draw": len(found[1]), "index_cpu_seconds": round(seconds, 2)}

    return work


def outcomes(tasks: list[Any]) -> Iterator[Any]:
    """What tasks would report."""
    import numpy as np
    import pyarrow as pa

    from rayalign.data.rows import OUTCOME_SCHEMA

    for number, task in enumerate(tasks):
        size, first = task.num_rows, task.parts[0].spans[0].first_row
        lines = {
            "id": [f"rows.jsonl:{row}" for row in range(first, first + size)],
            "source_row": np.arange(first, first + size),
            "start": np.arange(size) * 3000,
            **dict.fromkeys(("dataset", "file"), np.zeros(size, np.int32)),
            "shard": np.full(size, number, np.int32),
            **dict.fromkeys(("size", "checksum", "prompt_tokens", "chosen_tokens", "rejected_tokens"), np.full(size, 200)),
            "num_images": np.ones(size, np.int32),
            "crosses_seam": np.zeros(size, bool),
        }
        arrays = [pa.array(lines[f.name], f.type) if f.name in lines else pa.nulls(size, f.type) for f in OUTCOME_SCHEMA]
        yield pa.Table.from_arrays(arrays, schema=OUTCOME_SCHEMA)


def worker(folder: str, rows: int) -> Callable[[], dict[str, Any]]:
    """A train worker's sampler and reader, two epochs' orders, and what it opens anew for two evaluations."""
    from rayalign.data.sampler import StepSampler
    from rayalign.data.store import PreparedData
    from rayalign.storage import Store

    manifest = json.loads(Path(folder, "manifest.json").read_bytes())
    data = PreparedData(Store(folder), "one", rows, tuple(sorted(manifest["sha256"].items())))

    def work() -> dict[str, Any]:
        began, read = time.process_time(), bytes_read()
        sampler, reader = StepSampler(data.token_counts(), settings_of(WORKERS, GLOBAL_BATCH)), data.reader()
        sampler.micro_batches(0, 0)
        sampler.micro_batches(sampler.steps_per_epoch, 0)
        started = time.process_time() - began, bytes_read() - read
        for _ in range(2):
            data.token_counts(), data.reader()
        assert reader
        return {
            "cpu_seconds": round(started[0], 2),
            "mb_read_at_the_start": round(started[1] / 1e6, 1),
            "mb_read_for_an_evaluation": round((bytes_read() - read - started[1]) / 2e6, 1),
        }

    return work


def bytes_read() -> int:
    """By this process's system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def store_pairs(url: str, rows: int) -> Callable[[], dict[str, Any]]:
    """Pairs of a picture of 4 kB each with the reference's log-probs, in shards of SHARD_ROWS rows."""
    import pyarrow as pa

    from rayalign.data.index import INDEX_SCHEMA, write_index
    from rayalign.data.pairs import EncodedPair
    from rayalign.data.reference_store import ReferenceLogps, write_reference_shard
    from rayalign.data.reference_store import shard_name as reference_name
    from rayalign.data.shards import shard_name, write_shard
    from rayalign.data.store import PreparedData
    from rayalign.storage import Store

    def work() -> dict[str, Any]:
        store = Store(url)
        lines = []
        for shard, first in enumerate(range(0, rows, SHARD_ROWS)):
            numbers = range(first, first + SHARD_ROWS)
            pairs = [EncodedPair(str(i), [5] * 150, [6] * 100, [7] * 100, [os.urandom(4000)], [str(i)]) for i in numbers]
            for pair, place in zip(pairs, write_shard(store / "one" / shard_name(shard), pairs), strict=True):
                tokens = {"prompt_tokens": 150, "chosen_tokens": 100, "rejected_tokens": 100}
                line = {"id": pair.id, "dataset": 0, "file": 0, "source_row": int(pair.id), "shard": shard}
                lines.append({**line, **place._asdict(), **tokens})
            logps = [ReferenceLogps([-1.0] * 100, [-1.0] * 100, [])] * SHARD_ROWS
            file = store / "one" / f"reference_by_{SHARD_ROWS}" / reference_name(shard)
            write_reference_shard(file, [pair.id for pair in pairs], logps)
            if SHARD_ROWS % 64 == 0:  # as versions write it that have no larger ones
                for part in range(SHARD_ROWS // 64):
                    ids = [pair.id for pair in pairs[64 * part : 64 * part + 64]]
                    small = store / "one" / "reference" / reference_name(shard * (SHARD_ROWS // 64) + part)
                    write_reference_shard(small, ids, logps[:64])
        index = write_index(store / "one", [pa.Table.from_pylist(lines, INDEX_SCHEMA)])
        PreparedData.finish(store, attempt="one", index=index, dropped=[])
        return {}

    return work


def fetch(url: str, rows: int) -> Callable[[], dict[str, Any]]:
    """Pairs per second of one of the two processes that fetch for a worker, whose turn is behind the URL."""
    import dataclasses

    import pyarrow as pa

    from rayalign.data.sampler import fetch_chunk
    from rayalign.data.store import PreparedData
    from rayalign.storage import Store

    url, turn = url[:-1], int(url[-1])
    data = PreparedData.find(Store(url))
    assert data is not None
    has_larger = Path(sys.modules["rayalign.data"].__file__ or "").with_name("index.py").exists()
    data = dataclasses.replace(data, reference=f"reference_by_{SHARD_ROWS}" if has_larger else "reference")
    settings = settings_of(rows // (4 * STEPS), rows // STEPS)

    def work() -> dict[str, Any]:
        began, pairs = time.perf_counter(), 0
        for first in range(16 * turn, STEPS, 32):
            chunk = pa.table({"first": [first], "last": [min(first + 16, STEPS - 1)]})
            pairs += fetch_chunk(chunk, data=data, settings=settings, rank=0).num_rows
        return {"pairs_per_second": round(pairs / (time.perf_counter() - began), 1)}

    return work


def driver(folder: str, rows: int) -> Callable[[], dict[str, Any]]:
    """A preparation as the command does it, on a Ray of its own, of rows without pictures in tasks of TASK_ROWS."""
    from runs import own_cluster
    from synthetic import TINY, save_model

    from rayalign.algorithms import DPO
    from rayalign.config.config import config_from_mapping
    from rayalign.data import tasks
    from rayalign.data.prepare import prepare_run

    place = Path(folder)
    data = place / "rows.jsonl"
    row = {"query": "Which?", "response": "a cat", "rejected_response": "a dog"}
    data.write_text("".join(json.dumps({**row, "id": number}) + "\n" for number in range(rows)))
    flags = {"model": str(save_model(place / "model", TINY)), "dataset": [str(data)], "output_dir": str(place / "run")}
    config = config_from_mapping(DPO, {**flags, "cache_dir": str(place / "cache"), "precompute_ref_log_probs": False})
    tasks.SPAN_ROWS = TASK_ROWS

    def work() -> dict[str, Any]:
        with own_cluster(config):
            began = time.perf_counter()
            found = prepare_run(config)
            return {"records": found.training.num_rows, "seconds": round(time.perf_counter() - began)}

    return work


PARTS: dict[str, Callable[[str, int], Callable[[], dict[str, Any]]]] = {
    "prepare": prepare,
    "worker": worker,
    "store": store_pairs,
    "fetch": fetch,
    "driver": driver,
}


def measured(part: str, place: str, rows: int, code: Path = ROOT, env: dict[str, str] | None = None) -> dict[str, Any]:
    """What a part finds in a process of its own, and the memory that it takes at its peak."""
    words = [sys.executable, __file__, "--part", part, "--place", place, "--rows", str(rows)]
    variables = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", **(env or {})}
    with subprocess.Popen(words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = peak = anonymous(process.pid)
        process.stdin.write("begin\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.003)
        found: dict[str, Any] = json.loads(process.stdout.read().splitlines()[-1])  # Ray prints there, too
    return {**found, "own_mb_at_peak": round((peak - before) / 1e6), "own_mb_before": round(before / 1e6)}


def anonymous(pid: int) -> int:
    """Bytes of a process that are no file's; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def sizes(rows: int, versions: dict[str, Path]) -> dict[str, Any]:
    from rayalign.data.reference_store import folder_name, shard_rows
    from rayalign.storage import Store

    with tempfile.TemporaryDirectory() as temporary:
        node = Path(temporary, "node")
        node.mkdir()
        folder = f"{temporary}/data"
        found = {"prepare": measured("prepare", folder, rows)}
        files = -(-rows // shard_rows(Store(f"/{folder_name('reference_x', Store(folder), rows)}")))
        for name, code in versions.items():
            for which in ("first", "next"):
                found[f"{which} worker of a node, {name}"] = measured("worker", folder, rows, code, {"TMPDIR": str(node)})
        return {
            "rows": rows,
            "reference_files": files,
            "index_mb": round(Path(folder, "one", "index.arrow").stat().st_size / 1e6),
            **found,
        }


def serve(folder: str, delay: float) -> None:
    """An S3 server of a folder's files that keeps each request for some seconds, in a process of its own."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                arrived = asyncio.get_running_loop().time()
                method, path, _ = head.split(" ", 2)
                content = Path(folder, path.partition("?")[0].removeprefix(f"/{BUCKET}/")).read_bytes()
                span = re.search(r"\r\nrange: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
                body = content[int(span[1]) : int(span[2]) + 1] if span else content
                await asyncio.sleep(arrived + delay - asyncio.get_running_loop().time())
                lines = [f"HTTP/1.1 {206 if span else 200} OK", f"Content-Length: {len(body)}", 'ETag: "0"']
                lines += [f"Content-Range: bytes {span[1]}-{int(span[1]) + len(body) - 1}/{len(content)}"] if span else []
                writer.write("\r\n".join([*lines, "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT", "\r\n"]).encode())
                writer.write(body if method == "GET" else b"")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


def fetches(rows: int, delay: float, versions: dict[str, Path]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        measured("store", f"{temporary}/data", rows)
        words = [sys.executable, __file__, "--part", "serve", "--place", temporary, "--delay", str(delay)]
        found = {}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
                env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"}
                for name, code in versions.items():
                    find = functools.partial(measured, "fetch", rows=rows, code=code, env=env)
                    with ThreadPoolExecutor(2) as threads:
                        both = list(threads.map(find, (f"s3://{BUCKET}/data{turn}" for turn in (0, 1))))
                    found[name] = {
                        "pairs_per_second": round(sum(figures["pairs_per_second"] for figures in both)),
                        "own_mb_at_peak": max(figures["own_mb_at_peak"] for figures in both),
                    }
            finally:
                server.kill()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--fetch-rows", type=int, default=FETCH_ROWS, help="of the data set that is fetched from")
    parser.add_argument("--delay", type=float, default=0.025, help="seconds that a request takes")
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    parser.add_argument("--no-fetches", action="store_true")
    parser.add_argument("--tasks", type=int, default=0, help="tasks of a whole preparation on Ray; 0: none")
    parser.add_argument("--part", choices=[*PARTS, "serve"], help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "serve":
        serve(arguments.place, arguments.delay)
        return
    if arguments.part:
        work = PARTS[arguments.part](arguments.place, arguments.rows[0])
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(work()))
        return
    versions = {"now": ROOT, **({"before": arguments.before} if arguments.before else {})}
    report: dict[str, Any] = {"sizes": [sizes(rows, versions) for rows in arguments.rows]}
    if not arguments.no_fetches:
        report["fetches"] = fetches(arguments.fetch_rows, arguments.delay, versions)
    if arguments.tasks:
        with tempfile.TemporaryDirectory() as temporary:
            report["driver"] = {"tasks": arguments.tasks, **measured("driver", temporary, arguments.tasks * TASK_ROWS)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
