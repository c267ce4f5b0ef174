"""MM-RLHF-RewardBench: the best response against each of the others, ranked by people (Zhang et al. 2025,
https://arxiv.org/abs/2502.10391)."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
    SEED,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Preferred,
    accuracy_by,
    find_file,
    image_of,
    one_of,
    read_items,
    win_of,
    word_of,
)
from rayalign.evaluation.statistics import estimate
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = "mm_reward_bench.jsonl and images/ of yifanzhang114/MM-RLHF-RewardBench"
CATEGORIES = ("mcq", "long", "short", "safety")
"""Told by the images' paths."""


def read(place: Store) -> Contents:
    """The pairs; those about a video are left out. Raises ValueError."""
    file = find_file(place, ("mm_reward_bench.jsonl",), needs=FILES)
    items, left_out = read_items([file], _parse)
    sizes = Counter(item.facts["question"] for item in items)
    counted = tuple(dataclasses.replace(item, facts={**item.facts, "size": sizes[item.facts["question"]]}) for item in items)
    return Contents(counted, left_out, file, ("", "images"))


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    if not row.get("image") and row.get("video"):
        raise RecordError("video", "the question is about a video, and only pictures are read", field="video")
    image, own = image_of(one_of(row, "image"), column="image"), word_of(row, "id")
    yield Item(
        id=own,
        query=word_of(row, "prompt"),
        images=(image,),
        responses=(word_of(row, "chosen"), word_of(row, "rejected")),
        facts={"question": own, "category": _category(str(image))},
        unit=own,
    )


def _category(image: str) -> str:
    return next((category for category in CATEGORIES if category in image), "other")


def metrics(scored: Sequence[Preferred]) -> Metrics:
    """ACC: of single pairs, also by category; ACC+: of questions whose best response is preferred to each of the others;
    those with a pair that has no score are left out of it."""
    found: Metrics = {}
    categories = [one.item.facts["category"] for one in scored]
    found |= accuracy_by([win_of(one) for one in scored], categories, name="ACC")
    for name, inside in {
        "": scored,
        **{f"/{c}": [o for o in scored if o.item.facts["category"] == c] for c in categories},
    }.items():
        if all_right := _all_right(inside):
            found[f"ACC+{name}"] = estimate(all_right, seed=SEED)
    return found


def _all_right(scored: Sequence[Preferred]) -> list[bool]:
    """Of each question all of whose pairs have a score, whether all are right."""
    rights: dict[str, list[bool]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for one in scored:
        question = one.item.facts["question"]
        rights[question].append(one.margin > 0)
        sizes[question] = one.item.facts["size"]
    return [all(inside) for question, inside in rights.items() if len(inside) == sizes[question]]


MM_RLHF_REWARDBENCH = Benchmark("MM-RLHF-RewardBench", "https://arxiv.org/abs/2502.10391", FILES, read, of_pairs=metrics)
