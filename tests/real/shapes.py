"""Preference pairs about easy-vqa's drawings (64 x 64, a coloured shape each), right by its own labels.

Answers are drawn before the picture, and both have the same wording: nothing but the picture tells which one is right.
"""

import json
import random
from pathlib import Path
from typing import Any, Literal

from tests.real.wheels import EASY_VQA, unpacked

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
QUESTIONS = (
    (COLOURS, "What color is the shape?", "The shape is {}."),
    (SHAPES, "What shape is in the image?", "The image shows a {}."),
)
Split = Literal["train", "test"]


def pictures(split: Split) -> dict[Path, tuple[str, str]]:
    """Colour and shape of each picture for which easy-vqa's "what" questions and their answers say both."""
    folder = unpacked(EASY_VQA) / "easy_vqa" / "data" / split
    found: dict[int, set[str]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        if question.startswith("what"):
            found.setdefault(image, set()).update((answer, *question.strip("?").split()))
    labels = {}
    for image in sorted(found):
        colours, shapes = found[image].intersection(COLOURS), found[image].intersection(SHAPES)
        if colours and shapes:
            (colour,), (shape,) = colours, shapes
            labels[folder / "images" / f"{image}.png"] = (colour, shape)
    return labels


def write_pairs(path: Path, split: Split, count: int, *, seed: int) -> Path:
    """Writes `count` records, of a colour and of a shape in turn."""
    draw = random.Random(seed)
    labels = pictures(split)
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps(_pair(labels, i % 2, draw)) + "\n")
    return path


def _pair(labels: dict[Path, tuple[str, str]], kind: int, draw: random.Random) -> dict[str, Any]:
    words, question, answer = QUESTIONS[kind]
    right, wrong = draw.sample(words, 2)
    picture = draw.choice([picture for picture, described in labels.items() if described[kind] == right])
    return {
        "query": f"<image>{question}",
        "response": answer.format(right),
        "rejected_response": answer.format(wrong),
        "images": [str(picture)],
    }
