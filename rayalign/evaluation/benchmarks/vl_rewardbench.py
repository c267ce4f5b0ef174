"""VL-RewardBench: which of two responses people prefer: general questions, hallucinations, reasoning (Li et al. 2024,
https://arxiv.org/abs/2411.17451)."""

import re
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
    find_files,
    image_of,
    one_of,
    read_items,
    win_of,
    word_of,
)
from rayalign.evaluation.statistics import macro_average
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = "the parquet file of MMInstruction/VL-RewardBench (data/test-00000-of-00001.parquet)"

GROUPS = {
    "RLAIF": "hallucination",
    "RLHF": "hallucination",
    "hallucination": "hallucination",
    "mathverse": "reasoning",
    "mmmu": "reasoning",
}
"""By what an id begins with; the others are general."""

GENERAL = "general"


def read(place: Store) -> Contents:
    """The pairs. Raises ValueError."""
    files = find_files(place, (".parquet", ".jsonl"), word="", needs=FILES)
    items, left_out = read_items(files, _parse)
    return Contents(items, left_out, place, ("", "images"))


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    responses, ranking = one_of(row, "response"), one_of(row, "human_ranking", "ranking")
    if not isinstance(responses, list) or len(responses) != 2:
        raise RecordError("wrong type", "expected two responses", field="response")
    if ranking not in ([0, 1], [1, 0]):
        raise RecordError("wrong type", f"expected [0, 1] or [1, 0], found {ranking}", field="human_ranking")
    own = word_of(row, "id")
    yield Item(
        id=own,
        query=word_of(row, "query"),
        images=(image_of(one_of(row, "image", "image_path"), column="image"),),
        responses=(responses[ranking.index(0)], responses[ranking.index(1)]),
        facts={"group": GROUPS.get(re.split("[-_]", own, maxsplit=1)[0], GENERAL)},
    )


def metrics(scored: Sequence[Preferred]) -> Metrics:
    """Accuracy, over all and by group, and the mean of the three groups, where each of them has a pair with a score."""
    rights, groups = [win_of(one) for one in scored], [one.item.facts["group"] for one in scored]
    found: Metrics = dict(accuracy_by(rights, groups))
    if {GENERAL, *GROUPS.values()} == set(groups):
        found["accuracy/macro"] = macro_average(rights, groups, seed=SEED)
    return found


VL_REWARDBENCH = Benchmark("VL-RewardBench", "https://arxiv.org/abs/2411.17451", FILES, read, of_pairs=metrics)
