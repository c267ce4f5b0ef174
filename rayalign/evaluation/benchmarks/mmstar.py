"""MMStar: questions with options that can't be answered without the picture, asked with and without it (Chen et al. 2024,
https://arxiv.org/abs/2403.20330)."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    accuracy_by,
    find_file,
    image_of,
    is_right,
    one_of,
    read_items,
    word_of,
)
from rayalign.evaluation.statistics import estimate
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = "mmstar.parquet of Lin-Chen/MMStar"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
LETTER = re.compile(r"(?:^|[\s,;(])([A-H])\s?[:.)]")
SEED = 42


def read(place: Store) -> Contents:
    """The questions, each with its picture and once more without. Raises ValueError."""
    file = find_file(place, ("mmstar.parquet", "mmstar.jsonl"), needs=FILES)
    items, left_out = read_items([file], _parse)
    return Contents(items, left_out, place, ("", "images"))


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    question, answer = word_of(row, "question"), word_of(row, "answer").upper()
    letters = tuple(dict.fromkeys(LETTER.findall(question.partition("Options:")[2] or question)))
    if answer not in letters:
        raise RecordError("unknown option", f"the answer {answer} is none of the options {', '.join(letters)}", field="answer")
    own = word_of(row, "index", "id")
    item = Item(
        id=own,
        query=f"{question}\n{INSTRUCTION}",
        images=(image_of(one_of(row, "image"), column="image"),),
        responses=letters,
        answer=answer,
        facts={"category": word_of(row, "category"), "blind": False},
        unit=own,
    )
    yield item
    yield dataclasses.replace(item, id=f"{item.id}/blind", images=(), facts={**item.facts, "blind": True})


def metrics(answers: Sequence[Said]) -> Metrics:
    """Accuracy, by category and without the picture, and how much the picture adds to what was answered both ways."""
    seeing = [answer for answer in answers if not answer.item.facts["blind"]]
    blind = [answer for answer in answers if answer.item.facts["blind"]]
    found: Metrics = {}
    if seeing:
        found |= accuracy_by(
            [float(is_right(answer)) for answer in seeing], [answer.item.facts["category"] for answer in seeing]
        )
    if blind:
        found["accuracy/blind"] = estimate([is_right(answer) for answer in blind], seed=SEED)
    without = {answer.item.unit: is_right(answer) for answer in blind}
    gains = [is_right(answer) - without[answer.item.unit] for answer in seeing if answer.item.unit in without]
    if gains:
        found["multimodal_gain"] = sum(gains) / len(gains)
    return found


MMSTAR = Benchmark("MMStar", "https://arxiv.org/abs/2403.20330", FILES, read, of_choices=metrics)
