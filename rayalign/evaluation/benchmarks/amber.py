"""AMBER: hallucinations in descriptions, and yes/no questions about what is there, its attributes and relations (Wang et al.
2023, https://arxiv.org/abs/2311.07397)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayalign.evaluation.benchmarks.answers import yes_no_metrics
from rayalign.evaluation.benchmarks.benchmark import (
    SEED,
    YES_NO,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    find_file,
    image_of,
    is_yes,
    one_of,
    read_items,
    read_json,
    word_of,
)
from rayalign.evaluation.benchmarks.vocabulary import Vocabulary
from rayalign.evaluation.statistics import estimate
from rayalign.formats.records import RecordError
from rayalign.storage import Store

FILES = (
    "annotations.json, relation.json, safe_words.txt and query_all.json of junyangwang0410/AMBER (as in its data/), and the "
    "images in image/"
)
INSTRUCTION = "Please answer yes or no."
DIMENSIONS = {"discriminative-hallucination": "existence", "discriminative-attribute": "attribute"}
"""By what a question's type begins with; the others are about relations."""


@dataclasses.dataclass(frozen=True)
class Words:
    """All names of objects, each standing for itself; the names that go with an object (`related`); and the names that count as
    right everywhere."""

    all: Vocabulary
    related: Mapping[str, Sequence[str]]
    safe: frozenset[str]


def read(place: Store) -> Contents:
    """The descriptions to write and the yes/no questions. Raises ValueError."""
    annotations = read_json(find_file(place, ("annotations.json",), needs=FILES), list)
    related = read_json(find_file(place, ("relation.json",), needs=FILES), dict)
    safe = find_file(place, ("safe_words.txt",), needs=FILES).read_bytes().decode().split("\n")
    names = ("query/query_all.json", "query_all.json", "query/query_generative.json", "query/query_discriminative.json")
    truths = {str(annotation["id"]): annotation for annotation in annotations if "id" in annotation}
    items, left_out = read_items([find_file(place, names, needs=FILES)], lambda row, file: _parse(row, truths, related))
    every = {name for own, others in related.items() for name in (own, *others)}
    words = Words(Vocabulary({name: name for name in every}), related, frozenset(filter(None, map(str.strip, safe))))
    return Contents(items, left_out, place, ("image", "images", "data/image", ""), words)


def _parse(row: Mapping[str, Any], truths: Mapping[str, Any], related: Mapping[str, Any]) -> Iterator[Item]:
    own = word_of(row, "id")
    if own not in truths:
        raise RecordError("missing field", f"annotations.json has no truth of the question {own}", field="id")
    truth, query = truths[own], word_of(row, "query")
    images = (image_of(one_of(row, "image"), column="image"),)
    kind = word_of(truth, "type")
    if kind == "generative":
        there, imagined = one_of(truth, "truth"), one_of(truth, "hallu")
        unknown = [name for name in (*there, *imagined) if name not in related]
        if unknown:
            raise RecordError("missing field", f"relation.json has no {unknown[0]}", field="truth")
        yield Item(own, query, images, facts={"truth": there, "hallu": imagined})
    else:
        answer = "Yes" if is_yes(one_of(truth, "truth"), column="truth") else "No"
        dimension = next((name for start, name in DIMENSIONS.items() if kind.startswith(start)), "relation")
        yield Item(own, f"{query} {INSTRUCTION}", images, YES_NO, answer, {"dimension": dimension})


def metrics_of_choices(answers: Sequence[Said]) -> Metrics:
    """Accuracy, and precision, recall and F1 of no, which denies a hallucination; over all and by dimension."""
    found = yes_no_metrics(answers, positive="No")
    for kind in dict.fromkeys(answer.item.facts["dimension"] for answer in answers):
        inside = [answer for answer in answers if answer.item.facts["dimension"] == kind]
        found |= {f"{name}/{kind}": value for name, value in yes_no_metrics(inside, positive="No").items()}
    return found


def metrics_of_texts(said: Sequence[Said], words: Words) -> Metrics:
    """CHAIR: the share of named objects that are not in the picture; Cover: the share of its objects that are named; Hal: the
    share of descriptions with an object that is not there; Cog: the share of the objects that people would imagine there which
    are named."""
    rows = []
    for one in said:
        named = words.all.find(one.text or "")
        truth, hallu = (_by_name(one.item.facts[key], words.related) for key in ("truth", "hallu"))
        covered = {truth[name] for name in named if name in truth and name not in words.safe}
        imagined = {hallu[name] for name in named if name in hallu and name not in truth and name not in words.safe}
        wrong = sum(name not in truth and name not in words.safe for name in named)
        targets = (len(set(one.item.facts["truth"])), len(set(one.item.facts["hallu"])))
        rows.append((wrong, len(named), len(covered), targets[0], len(imagined), targets[1]))
    wrong, named_in_all, covered, there, imagined, imaginable = (sum(column) for column in zip(*rows, strict=True))
    return {
        "CHAIR": wrong / named_in_all if named_in_all else 0.0,
        "Cover": covered / there if there else 0.0,
        "Hal": estimate([row[0] > 0 for row in rows], seed=SEED),
        "Cog": imagined / imaginable if imaginable else 0.0,
    }


def _by_name(objects: Sequence[str], related: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The object that each of its names stands for; an object's own name before others' related ones."""
    return {name: own for own in reversed(objects) for name in related[own]} | {own: own for own in objects}


AMBER = Benchmark(
    "AMBER",
    "https://arxiv.org/abs/2311.07397",
    FILES,
    read,
    of_choices=metrics_of_choices,
    of_texts=metrics_of_texts,
    max_new_tokens=512,
)
