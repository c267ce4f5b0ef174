"""HallusionBench: yes/no questions about figures and about the same figures changed, some without any (Guan et al. 2024,
https://arxiv.org/abs/2310.14566)."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
    SEED,
    YES_NO,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    accuracy_by,
    find_files,
    image_of,
    is_yes,
    one_of,
    read_items,
    word_of,
)
from rayalign.evaluation.statistics import estimate
from rayalign.storage import Store

FILES = "HallusionBench.json beside hallusion_bench/ (its images), or the parquet files of lmms-lab/HallusionBench"
IMAGES = ("hallusion_bench", "", "images")


def read(place: Store) -> Contents:
    """The questions with and without a figure. Raises ValueError."""
    json_file = place / "HallusionBench.json"
    files = [json_file] if json_file.exists() else find_files(place, (".json", ".parquet"), word="", needs=FILES)
    items, left_out = read_items(files, _parse)
    sizes = {kind: Counter(item.facts[kind] for item in items) for kind in ("question", "figure")}
    counted = tuple(
        dataclasses.replace(item, facts={**item.facts, "sizes": {kind: sizes[kind][item.facts[kind]] for kind in sizes}})
        for item in items
    )
    return Contents(counted, left_out, place, IMAGES)


def _parse(row: Mapping[str, Any], file: Store) -> Iterator[Item]:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    category, subcategory, set_id, figure, question = (word_of(row, name) for name in names)
    image = f"{category}/{subcategory}/{set_id}_{figure}.png"
    has_image = word_of(row, "visual_input") != "0"
    yield Item(
        id="_".join((category, subcategory, set_id, figure, question)),
        query=word_of(row, "question"),
        images=((image_of(row["image"], column="image") if "image" in row else image),) if has_image else (),
        responses=YES_NO,
        answer="Yes" if is_yes(one_of(row, "gt_answer"), column="gt_answer") else "No",
        facts={
            "category": category,
            "figure": "_".join((category, subcategory, set_id, figure)),
            "question": "_".join((category, subcategory, set_id, question)),
            "without_figure": category == "VS" and figure == "0",
        },
        unit="_".join((category, subcategory, set_id)),
    )


def metrics(answers: Sequence[Said]) -> Metrics:
    """aAcc: of single questions, also by category; qAcc: of questions that are right about all their figures; fAcc: of figures
    about which all questions are right; those with a question that has no answer are left out of both. To a question without a
    figure, no clear answer is a right one."""
    found: Metrics = dict(
        accuracy_by([float(_is_right(a)) for a in answers], [a.item.facts["category"] for a in answers], name="aAcc")
    )
    seen = [answer for answer in answers if not answer.item.facts["without_figure"]]
    for name, kind, counted in (("qAcc", "question", answers), ("fAcc", "figure", seen)):
        if all_right := _all_right(counted, kind):
            found[name] = estimate(all_right, seed=SEED)
    return found


def _is_right(answer: Said) -> bool:
    if answer.text is None:
        return bool(answer.item.facts["without_figure"])
    return answer.text == answer.item.answer


def _all_right(answers: Sequence[Said], kind: str) -> list[bool]:
    """Of each question or figure all of whose answers are there, whether all are right."""
    rights: dict[str, list[bool]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for answer in answers:
        facts = answer.item.facts
        rights[facts[kind]].append(_is_right(answer))
        sizes[facts[kind]] = facts["sizes"][kind]
    return [all(inside) for name, inside in rights.items() if len(inside) == sizes[name]]


HALLUSION_BENCH = Benchmark(
    "HallusionBench", "https://arxiv.org/abs/2310.14566", FILES, read, of_choices=metrics, is_right=_is_right
)
