"""Tiny twins of benchmarks' files, and answers to their questions."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayalign.evaluation.benchmarks.benchmark import Contents, Item, Metrics, Preferred, Said
from rayalign.evaluation.statistics import Estimate


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


PICTURE = _png()


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet file whose images are bytes, as the hub's data sets have them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), file)


def picture(path: str | None = None) -> dict[str, Any]:
    """A picture's cell in a parquet file of the hub."""
    return {"bytes": PICTURE, "path": path}


def put_pictures(folder: Path, *names: str) -> None:
    """Pictures where a benchmark's files name them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)


def said(contents: Contents, texts: Mapping[str, str | None]) -> list[Said]:
    """Answers by the questions' ids, all of which must be there."""
    items = items_of(contents)
    assert items.keys() >= texts.keys(), sorted(items)
    return [Said(items[own], text) for own, text in texts.items()]


def preferred(contents: Contents, margins: Mapping[str, float]) -> list[Preferred]:
    """Margins by the questions' ids."""
    items = items_of(contents)
    return [Preferred(items[own], margin) for own, margin in margins.items()]


def items_of(contents: Contents) -> dict[str, Item]:
    return {item.id: item for item in contents.items}


def values(metrics: Metrics) -> dict[str, float]:
    """Metrics without their intervals."""
    return {name: value.value if isinstance(value, Estimate) else value for name, value in metrics.items()}
