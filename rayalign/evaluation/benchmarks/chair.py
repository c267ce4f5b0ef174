"""CHAIR: objects in captions that are not in the picture (Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156).

What is in a picture is told by COCO's boxes and by what people named in their captions of it.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rayalign.evaluation.benchmarks.benchmark import (
    SEED,
    Benchmark,
    Contents,
    Item,
    Metrics,
    Said,
    find_file,
    find_files,
    read_json,
)
from rayalign.evaluation.benchmarks.vocabulary import Vocabulary
from rayalign.evaluation.statistics import estimate
from rayalign.storage import Store

FILES = (
    "synonyms.txt of LisaAnne/Hallucination, instances_val2014.json and captions_val2014.json of COCO (also below "
    "annotations/), and the images to caption in val2014/"
)
QUERY = "Please describe this image in detail."
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
"""A baby or adult one is no person, also of those that are on no list."""

TOILET, SEAT = (re.compile(rf"\b{word}s?\b", re.IGNORECASE) for word in ("toilet", "seat"))


def read(place: Store) -> Contents:
    """A caption to write for each image that is in the image folder. Raises ValueError."""
    vocabulary = read_synonyms(find_file(place, ("synonyms.txt",), needs=FILES))
    annotations = place / "annotations" if (place / "annotations").exists() else place
    instances, captions = (
        read_json(find_files(annotations, (".json",), word=f"{kind}_", needs=FILES)[0], dict)
        for kind in ("instances", "captions")
    )
    objects = _objects(instances, captions, vocabulary)
    folder = next((place / name for name in ("val2014", "images") if (place / name).exists()), None)
    if folder is None:
        raise ValueError(f"{place.location}: holds neither val2014 nor images. It needs {FILES}.")
    there = set(folder.sizes())
    items = tuple(
        Item(str(image["id"]), QUERY, (image["file_name"],), facts={"objects": sorted(objects[image["id"]])})
        for image in instances["images"]
        if image["file_name"] in there
    )
    if not items:
        raise ValueError(f"{folder.location}: holds none of the images of {place.location}'s annotations. It needs {FILES}.")
    return Contents(items, (), place, (folder.name,), vocabulary)


def read_synonyms(file: Store) -> Vocabulary:
    """The names of objects: each line has an object and what it is called, too. Raises ValueError where there are none."""
    lines = [
        [name.strip() for name in line.split(",")] for line in file.read_bytes().decode().lower().splitlines() if line.strip()
    ]
    objects = {name: line[0] for line in lines for name in line if name}
    if not objects:
        raise ValueError(f"{file.location}: holds no names. Take the benchmark's own file.")
    alone: dict[str, str | None] = {f"{age} {name}": objects.get(name) for name in ANIMALS for age in ("baby", "adult")}
    alone |= {f"passenger {name}": objects.get(name) for name in ("jet", "train")}
    alone |= {"toilet seat": objects.get("toilet"), "bow tie": objects.get("tie"), "home plate": objects.get("home plate")}
    return Vocabulary({**objects, **alone})


def named_in(text: str, vocabulary: Vocabulary) -> list[str]:
    """The objects that a caption names. In one that names a toilet a seat is none: the benchmark takes it for the toilet's."""
    without_seats = SEAT.sub(" ", text) if TOILET.search(text) else text
    return vocabulary.find(without_seats)


def _objects(instances: dict[str, Any], captions: dict[str, Any], vocabulary: Vocabulary) -> dict[int, set[str]]:
    """The objects of each picture, by its number."""
    categories = {}
    for category in instances["categories"]:
        named = vocabulary.object_of(category["name"])
        if named is None:
            raise ValueError(f"synonyms.txt has no name for COCO's category {category['name']}. Take the benchmark's own file.")
        categories[category["id"]] = named
    objects: dict[int, set[str]] = defaultdict(set)
    for annotation in instances["annotations"]:
        objects[annotation["image_id"]].add(categories[annotation["category_id"]])
    for caption in captions["annotations"]:
        objects[caption["image_id"]].update(named_in(caption["caption"], vocabulary))
    return objects


def metrics(said: Sequence[Said], vocabulary: Vocabulary) -> Metrics:
    """CHAIR_s: the share of captions that name an object which is not there; CHAIR_i: the share of named objects that are not;
    recall: the share of objects that are named; and the captions' mean length, with which all three grow."""
    rows = []
    for one in said:
        there, named = set(one.item.facts["objects"]), named_in(one.text or "", vocabulary)
        rows.append((sum(name not in there for name in named), len(named), len(there & set(named)), len(there)))
    wrong, named_in_all, hits, there_in_all = (sum(column) for column in zip(*rows, strict=True))
    return {
        "CHAIR_s": estimate([row[0] > 0 for row in rows], seed=SEED),
        "CHAIR_i": wrong / named_in_all if named_in_all else 0.0,
        "recall": hits / there_in_all if there_in_all else 0.0,
        "words": sum(len((one.text or "").split()) for one in said) / len(said),
    }


CHAIR = Benchmark("CHAIR", "https://arxiv.org/abs/1809.02156", FILES, read, of_texts=metrics, max_new_tokens=512)
