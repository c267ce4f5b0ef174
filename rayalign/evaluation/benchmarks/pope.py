"""POPE: is an object in the picture? Objects that are not are drawn at random, by how frequent they are, or by what usually
stands beside those that are (Li et al. 2023, https://arxiv.org/abs/2305.10355)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.answers import yes_no_metrics
from rayalign.evaluation.benchmarks.benchmark import (
    YES_NO,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    find_files,
    image_of,
    is_right,
    is_yes,
    one_of,
    read_items,
    word_of,
)
from rayalign.storage import Store

FILES = (
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json of RUCAIBox/POPE beside val2014/, or the "
    "parquet files of lmms-lab/POPE"
)
CATEGORIES = ("random", "popular", "adversarial")
IMAGES = ("", "val2014", "images", "coco/val2014")


def read(place: Store) -> Contents:
    """The questions of all files of the folder. Raises ValueError."""
    files = find_files(place, (".json", ".jsonl", ".parquet"), word="", needs=FILES)
    items, left_out = read_items([file for file in files if _is_pope(file, alone=len(files) == 1)] or files, _parse)
    return Contents(items, left_out, place, IMAGES)


def _is_pope(file: Store, *, alone: bool) -> bool:
    return alone or file.name.endswith(".parquet") or "pope" in file.name.lower()


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    category = word_of(row, "category") if "category" in row else _category_of(file)
    numbered_within = category if "category" in row else file.name.partition(".")[0]
    yield Item(
        id=f"{numbered_within}/{word_of(row, 'question_id', 'id')}",
        query=word_of(row, "text", "question"),
        images=(image_of(row["image"], column="image") if "image" in row else f"{word_of(row, 'image_source')}.jpg",),
        responses=YES_NO,
        answer="Yes" if is_yes(one_of(row, "label", "answer"), column="label") else "No",
        facts={"category": category},
    )


def _category_of(file: Store) -> str:
    return next((category for category in CATEGORIES if category in file.name.lower()), file.name.partition(".")[0])


def metrics(answers: Sequence[Said]) -> Metrics:
    """Accuracy, precision, recall and F1 of yes, and the share of yes; over all, and by category where there are
    several.

    As the benchmark has it, a text without a no or not is a yes.
    """
    told = [_told(answer) for answer in answers]
    found = yes_no_metrics(told, positive="Yes")
    categories = dict.fromkeys(answer.item.facts["category"] for answer in told)
    for category in categories if len(categories) > 1 else ():
        inside = [answer for answer in told if answer.item.facts["category"] == category]
        found |= {f"{name}/{category}": value for name, value in yes_no_metrics(inside, positive="Yes").items()}
    return found


def _told(answer: Said) -> Said:
    return dataclasses.replace(answer, text=answer.text or "Yes")


def _is_right(answer: Said) -> bool:
    return is_right(_told(answer))


POPE = Benchmark("POPE", "https://arxiv.org/abs/2305.10355", FILES, read, of_choices=metrics, is_right=_is_right)
