"""Data sets of hostile rows: every record format in every container, with known good rows among them, the same for each seed.

`write` makes the files, `faults` says what is wrong with what became of them.
"""

import csv
import io
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.pictures import LARGEST_SIDE, hostile_pictures, large_pictures, sound_pictures
from tests.hostile.rows import Draw, as_reference, drawn_row, swift2
from tests.hostile.values import BROKEN_LINES, ODD_COLUMNS, TEXT_TYPES

ROWS_OF_A_FILE, ROWS_OF_A_PARQUET_FILE = 400, 12


@dataclass(frozen=True)
class Written:
    """A data set on disk: how many rows each file holds, which of them must be kept, and which must be dropped."""

    folder: Path
    rows: Mapping[str, int]
    good: frozenset[tuple[str, int]]
    bad: frozenset[tuple[str, int]]

    @property
    def num_rows(self) -> int:
        return sum(self.rows.values())


def write_lines(draw: Draw, path: Path, count: int) -> list[str]:
    """JSON lines, some of them no JSON; returns what each row is."""
    kinds: list[str] = []
    with path.open("wb") as file:
        if draw.random.random() < 0.5:
            file.write(b"\xef\xbb\xbf")
        for _ in range(count):
            row, kind = drawn_row(draw)
            line = json.dumps(row, ensure_ascii=draw.random.random() < 0.5).encode(errors="surrogatepass")
            if kind == "odd" and draw.random.random() < 0.3:
                line = draw.random.choice(BROKEN_LINES)(line)
            kinds.append(kind)
            file.write(line + draw.random.choice((b"\n", b"\r\n", b"\n\n", b" \n")))
    return kinds


def write_array(draw: Draw, path: Path, count: int) -> list[str]:
    """A JSON array, spaced in every way."""
    kinds, elements = [], []
    for _ in range(count):
        row, kind = drawn_row(draw)
        if kind == "odd" and draw.random.random() < 0.2:
            row = draw.random.choice((None, 1, "text", [row], [], True))
        kinds.append(kind)
        elements.append(json.dumps(row, indent=draw.random.choice((None, 2))))
    path.write_text("\ufeff [\n" + ",\r\n ".join(elements) + "\n]\n")
    return kinds


def write_csv(draw: Draw, path: Path, count: int) -> list[str]:
    """ms-swift's columns as CSV; lists stand there as JSON."""
    columns = ("query", "response", "rejected_response", "images", "system", "history", "margin", "note")
    kinds = []
    with path.open("wb") as file:
        file.write((",".join(columns) + "\r\n").encode("utf-8-sig"))
        for _ in range(count):
            row, kind = drawn_row(draw)
            while kind == "good" and not {"query", "response"} <= set(row):
                row, kind = swift2(draw, [draw.random.choice(draw.sound)]), "good"
            cells = [
                cell if isinstance(cell := row.get(name, ""), str) else json.dumps(cell) if cell else "" for name in columns
            ]
            if kind == "bad" and not {"query", "response"} <= set(row):
                kind = "odd"
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator=draw.random.choice(("\n", "\r\n"))).writerow(cells)
            line = buffer.getvalue().encode(errors="surrogatepass")
            if kind == "odd" and draw.random.random() < 0.3:
                line = draw.random.choice(
                    (b"a,b\n", b"," * 50 + b"\n", b'a"b,c\n', b"\xff\xfe,b,c\n", b"\0,b,c\n", b'"a" b,c,d\n')
                )
            if max(map(len, cells)) > 100_000:
                kind = "odd"
            kinds.append(kind)
            file.write(line)
    return kinds


def write_parquet(draw: Draw, path: Path, count: int) -> list[str]:
    """A parquet file with columns of one odd type; some hold the rows' texts, some stand beside them."""
    rows = [swift2(draw, [draw.random.choice(draw.sound)]) for _ in range(count)]
    for row in rows:
        row["history"] = row.get("history", [])
    name, values, kind = draw.random.choice(ODD_COLUMNS)
    cells = [draw.random.choice(values) for _ in rows]
    columns: dict[str, pa.Array] = {
        "query": pa.array([row["query"] for row in rows], draw.random.choice(TEXT_TYPES)),
        "response": pa.array([row["response"] for row in rows], draw.random.choice(TEXT_TYPES)),
        "rejected_response": pa.array([row["rejected_response"] for row in rows], draw.random.choice(TEXT_TYPES)),
        "images": pa.array([[as_reference(draw, image, "struct") for image in row["images"]] for row in rows]),
        name: pa.array(cells) if kind is None else pa.array(cells, kind),
    }
    table = pa.table(columns)
    pq.write_table(
        table, path, row_group_size=draw.random.choice((1, 7, 1000)), compression=draw.random.choice(("none", "zstd"))
    )
    return ["good" if name == "extra" else "odd"] * count


WRITERS: Mapping[str, Callable[[Draw, Path, int], list[str]]] = {"jsonl": write_lines, "json": write_array, "csv": write_csv}


def write(folder: Path, num_rows: int, *, seed: int, special_tokens: Sequence[str], side: int = LARGEST_SIDE) -> Written:
    """Writes a data set of about as many rows, with its pictures, below a folder."""
    folder.mkdir(parents=True)
    draw = _draw(folder, seed, special_tokens, side)
    kinds: dict[str, list[str]] = {}
    share = max(20, min(ROWS_OF_A_FILE, num_rows // 8))
    number = 0
    while (left := num_rows - sum(map(len, kinds.values()))) > 0:
        suffix = ("jsonl", "json", "csv", "parquet")[number % 4]
        count = min(left, share)
        if suffix == "parquet":
            for part in range(max(1, count // ROWS_OF_A_PARQUET_FILE)):
                name = f"{number}_{part}.parquet"
                kinds[name] = write_parquet(draw, folder / name, ROWS_OF_A_PARQUET_FILE)
        else:
            name = f"{number}.{suffix}"
            kinds[name] = WRITERS[suffix](draw, folder / name, count)
        number += 1
    marked = {
        kind: frozenset((n, i) for n, own in kinds.items() for i, k in enumerate(own) if k == kind) for kind in ("good", "bad")
    }
    return Written(folder, {name: len(own) for name, own in kinds.items()}, marked["good"], marked["bad"])


def _draw(folder: Path, seed: int, special_tokens: Sequence[str], side: int) -> Draw:
    """The pictures on disk, and beside them what is no picture."""
    pictures = folder / "pictures"
    pictures.mkdir()
    named: dict[str, dict[str, bytes]] = {"sound": {}, "hostile": {}, "large": {}}
    for group, contents in (("sound", sound_pictures()), ("hostile", hostile_pictures()), ("large", large_pictures(side))):
        (pictures / group).mkdir()
        for name, content in contents.items():
            (pictures / group / name).write_bytes(content)
            named[group][f"pictures/{group}/{name}"] = content
    (folder.parent / "secret.png").write_bytes(sound_pictures()["rgb.png"])
    for link, target in (
        ("outside.png", "../../secret.png"),
        ("loop.png", "loop.png"),
        ("dangling.png", "nothing.png"),
        ("zero.png", "/dev/zero"),
        ("memory.png", "/proc/self/mem"),
    ):
        (pictures / link).symlink_to(target)
    os.mkfifo(pictures / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(pictures, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.png")
        os.close(here)
    groups = {group: list(contents) for group, contents in named.items()}
    return Draw(
        random.Random(seed), special_tokens, **groups, contents={k: v for group in named.values() for k, v in group.items()}
    )


def faults(written: Written, kept: Sequence[tuple[str, int]], dropped: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the outcome of a preparation: rows lost, listed twice or without words, good ones dropped, bad ones
    kept; rows are (file, number)."""
    said = {(Path(line["file"]).name, int(line["row"])): line for line in dropped}
    times = Counter([*kept, *((Path(line["file"]).name, int(line["row"])) for line in dropped)])
    every = [(name, row) for name, count in written.rows.items() for row in range(count)]
    found = [f"{place}: listed {times[place]} times" for place in every if times[place] != 1]
    found += [f"{place}: there is no such row" for place in times if place not in set(every)]
    for place, line in said.items():
        if place in written.good:
            found.append(f"{place}: a good row was dropped: {line['reason']}: {line['detail']}")
        if not (line["reason"] and line["detail"]):
            found.append(f"{place}: dropped without words")
    return found + [f"{place}: a bad row was kept" for place in kept if place in written.bad]
