"""The quickstart's task: pictures of four real digit scans, what is said about them, and the records that say it.

The scans are scikit-learn's `digits` (1,797 of them, 8x8). The digits of a picture are drawn uniformly and wrong answers name
look-alikes, each the look-alike of its own look-alike: so no digit is more often wrong than another, and the text of an answer
alone does not tell whether it is right.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

Digits = NDArray[np.int64]

SLOTS = 4
SCAN_SIDE = 16  # a scan, twice enlarged
PICTURE_SIDE = 2 * SCAN_SIDE
QUESTION = "Which digits are shown?"
CAPTION_REQUEST = "Describe what you see."
ANSWER_START = "The digits are"
CAPTION_STARTS = ("The picture shows", "Here are digits")
LOOKALIKES = np.array([2, 7, 0, 8, 9, 6, 5, 1, 3, 4])
HELD_OUT_SCANS = 300
TUNING_SCANS = 250
"""Scans that were kept apart to choose the quickstart's settings; neither trained nor tested on."""


class Pictures(NamedTuple):
    """Files, relative to the records' folder, and the digits [n, 4] that they show."""

    files: list[str]
    digits: Digits


class Pairs(NamedTuple):
    """Preference pairs: picture numbers [n], and the digits [n, 4] of the chosen and the rejected answer."""

    picture: Digits
    chosen: Digits
    rejected: Digits


def words(start: str, digits: Sequence[int] | Digits) -> str:
    return f"{start} {' '.join(str(digit) for digit in digits)}."


def answer(digits: Sequence[int] | Digits) -> str:
    """What the models are taught to say."""
    return words(ANSWER_START, digits)


def read_answer(text: str) -> list[int] | None:
    """The digits that an answer names; None where it is not of the answers' form."""
    found = re.fullmatch(rf"{ANSWER_START} (\d) (\d) (\d) (\d)\.", text.strip())
    return [int(digit) for digit in found.groups()] if found else None


def split_scans(seed: int) -> tuple[Digits, Digits]:
    """Scan numbers for training and for testing: held-out pictures are made of handwriting that was never trained on."""
    order = np.random.default_rng(seed).permutation(1797)
    return order[HELD_OUT_SCANS + TUNING_SCANS :], order[:HELD_OUT_SCANS]


def make_pictures(folder: Path, name: str, scans: Digits, count: int, seed: int) -> Pictures:
    """Writes `count` pictures of 2x2 scans below `folder / name`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    data, draw = load_digits(), np.random.default_rng(seed)
    by_digit = [scans[data.target[scans] == digit] for digit in range(10)]
    digits, files = draw.integers(0, 10, (count, SLOTS)), []
    for number, row in enumerate(digits):
        picture = Image.new("L", (PICTURE_SIDE, PICTURE_SIDE))
        for slot, digit in enumerate(row):
            scan = Image.fromarray((data.images[draw.choice(by_digit[digit])] * 255 / 16).astype(np.uint8))
            corner = (SCAN_SIDE * (slot % 2), SCAN_SIDE * (slot // 2))
            picture.paste(scan.resize((SCAN_SIDE, SCAN_SIDE), Image.Resampling.BILINEAR), corner)
        files.append(f"{name}/{number:05}.png")
        picture.convert("RGB").save(folder / files[-1])
    return Pictures(files, digits)


def careless_labels(digits: Digits, rate: float, seed: int) -> Digits:
    """The digits with each one replaced by its look-alike with probability `rate`."""
    wrong = np.random.default_rng(seed).random(digits.shape) < rate
    return np.where(wrong, LOOKALIKES[digits], digits)


def write_answers(path: Path, pictures: Pictures, told: Digits) -> None:
    """Records for SFT: one answer each."""
    _write(path, [_record(file, digits) for file, digits in zip(pictures.files, told, strict=True)])


def write_pairs(path: Path, pictures: Pictures, pairs: Pairs) -> None:
    """Records for whatever learns from pairs."""
    rows = zip(pairs.picture, pairs.chosen, pairs.rejected, strict=True)
    records = [_record(pictures.files[n], chosen, rejected_response=answer(rejected)) for n, chosen, rejected in rows]
    _write(path, records)


def write_labelled(path: Path, pictures: Pictures, pairs: Pairs, seed: int) -> None:
    """Records for KTO: one response of each pair, drawn by lot, and whether it is the chosen one."""
    is_chosen = np.random.default_rng(seed).random(len(pairs.picture)) < 0.5
    told = np.where(is_chosen[:, None], pairs.chosen, pairs.rejected)
    rows = zip(pairs.picture, told, is_chosen.tolist(), strict=True)
    _write(path, [_record(pictures.files[n], digits, label=label) for n, digits, label in rows])


def _record(file: str, digits: Digits, **others: object) -> dict[str, object]:
    return {"query": QUESTION, "response": answer(digits), **others, "images": [file]}


def _write(path: Path, records: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def text_only_accuracy(training: Pairs, held_out: Pairs) -> float:
    """How often a classifier that never sees a picture (bag of 1- to 4-grams) prefers the chosen answer of a held-out pair."""
    bag = CountVectorizer(ngram_range=(1, 4), token_pattern=r"\S+", binary=True)
    texts = [answer(digits) for digits in [*training.chosen, *training.rejected]]
    labels = np.repeat([1, 0], len(training.chosen))
    model = LogisticRegression(max_iter=300).fit(bag.fit_transform(texts), labels)
    chosen, rejected = (
        model.decision_function(bag.transform([answer(digits) for digits in side]))
        for side in (held_out.chosen, held_out.rejected)
    )
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
