"""Small preference data with real image files, for tests that run the whole path."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def colour_rows(folder: Path, count: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in the native format: the colour of a picture; every fifth one without a picture, every seventh with a history."""
    draw = random.Random(seed)
    for i in range(count):
        right, wrong = draw.sample(sorted(COLOURS), 2)
        row: dict[str, Any] = {
            "query": f"Which colour is picture {i}?",
            "response": f"It is {right}.",
            "rejected_response": f"It is {wrong}.",
        }
        if i % 5:
            name = f"{i}_{right}.png"
            Image.new("RGB", (40 + i % 3 * 10, 50), COLOURS[right]).save(folder / name)
            row["images"] = [name]
        if i % 7 == 0:
            row |= {"system": "Answer in one sentence.", "history": [["Hello.", "Hello, what is it?"]]}
        yield row


def write_rows(folder: Path, count: int, *, seed: int = 0, extra_lines: tuple[str, ...] = ()) -> Path:
    """Writes train.jsonl with its pictures; `extra_lines` are appended as they stand."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in colour_rows(folder, count, seed=seed)]
    path = folder / "train.jsonl"
    path.write_text("\n".join([*lines, *extra_lines]) + "\n")
    return path
