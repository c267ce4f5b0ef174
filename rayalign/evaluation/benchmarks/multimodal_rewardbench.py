"""Multimodal RewardBench: which of two responses experts prefer, in six fields (Yasunaga et al. 2025,
https://arxiv.org/abs/2502.14191)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
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
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = "data/all_data.json and data/images/ of facebookresearch/multimodal_rewardbench"


def read(place: Store) -> Contents:
    """The pairs. Raises ValueError."""
    file = find_file(place, ("all_data.json",), needs=FILES)
    items, left_out = read_items([file], _parse)
    return Contents(items, left_out, file, ("", "images"))


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    better = word_of(row, "Better")
    if better not in ("Output1", "Output2"):
        raise RecordError("wrong type", f"expected Output1 or Output2, found {better!r}", field="Better")
    worse = "Output2" if better == "Output1" else "Output1"
    own, category = word_of(row, "ID"), word_of(row, "Category")
    yield Item(
        id=own,
        query=word_of(row, "Text"),
        images=(image_of(one_of(row, "Image"), column="Image"),),
        responses=(word_of(row, better), word_of(row, worse)),
        facts={"category": _category(own.lower(), category)},
    )


def _category(own: str, category: str) -> str:
    """As the benchmark reports it: safety and reasoning in two parts, told apart by the ids."""
    if category == "safety":
        return "safety/bias" if own.startswith("pairs") else "safety/toxicity"
    if category == "reasoning":
        return "reasoning/math" if own.startswith("math") else "reasoning/coding"
    return category


def metrics(scored: Sequence[Preferred]) -> Metrics:
    """Accuracy, over all and by category."""
    return dict(accuracy_by([win_of(one) for one in scored], [one.item.facts["category"] for one in scored]))


MULTIMODAL_REWARDBENCH = Benchmark("Multimodal RewardBench", "https://arxiv.org/abs/2502.14191", FILES, read, of_pairs=metrics)
