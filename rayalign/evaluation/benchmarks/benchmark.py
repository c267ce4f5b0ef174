"""What a benchmark is: questions read from the field's own files, and metrics of what a model said to them.

A question has options, of which the likeliest and the one that the model writes count; or two responses, of which a scorer
should prefer the first; or neither, and then the model's own text counts.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rayalign.evaluation.statistics import Estimate, estimate, wins
from rayalign.formats.cells import plain
from rayalign.formats.records import RecordError, record_errors
from rayalign.sources.rows import read_rows
from rayalign.storage import Store

Metrics = dict[str, float | Estimate]

Kind = Literal["choice", "pair", "open"]

YES_NO = ("Yes", "No")

SEED = 42
"""Of the bootstrap's draws."""


@dataclass(frozen=True)
class Item:
    """A question. `responses`: the options, of which `answer` is the right one; or, without an answer, the better response and
    the worse one; or none. Images are paths under the benchmark's image folder, or bytes; `facts` are what metrics need of it
    beside. Questions of one `unit` are drawn together, since a metric looks at all of them at once; empty: it is its own."""

    id: str
    query: str
    images: tuple[str | bytes, ...] = ()
    responses: tuple[str, ...] = ()
    answer: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""

    @property
    def kind(self) -> Kind:
        if self.answer is not None:
            return "choice"
        return "pair" if self.responses else "open"


@dataclass(frozen=True)
class LeftOut:
    """A row of a benchmark's files that is no question that can be asked, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """What a benchmark's files hold: its questions, the rows that can't be used, the place of its files, below which its images
    may be (`image_places`), and what else its metrics need (`shared`): word lists, a judge's prompt."""

    items: tuple[Item, ...]
    left_out: tuple[LeftOut, ...]
    place: Store
    image_places: tuple[str, ...] = ("", "images")
    shared: Any = None


@dataclass(frozen=True)
class Said:
    """What a model answers to a question: its own text, or the option that this means; None where it means none of them."""

    item: Item
    text: str | None


@dataclass(frozen=True)
class Preferred:
    """By how much a scorer prefers the better one of a question's two responses."""

    item: Item
    margin: float


def is_right(answer: Said) -> bool:
    """Whether an answer is the right option."""
    return answer.text == answer.item.answer


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the shelf. `files` says in words what its folder holds; each kind of its questions has its metrics.

    `of_choices` gets the options that a model chose, `of_pairs` a scorer's margins, `of_texts` the model's own texts and what
    `Contents.shared` is. Where `judge_prompt` makes a prompt of a text, `of_texts` gets what a judge says to that, in its
    place. `max_new_tokens` bounds the model's texts. `is_right` tells which options count as right ones.
    """

    title: str
    paper: str
    files: str
    read: Callable[[Store], Contents]
    of_choices: Callable[[Sequence[Said]], Metrics] | None = None
    of_pairs: Callable[[Sequence[Preferred]], Metrics] | None = None
    of_texts: Callable[[Sequence[Said], Any], Metrics] | None = None
    judge_prompt: Callable[[Said, Any], str] | None = None
    max_new_tokens: int = 16
    is_right: Callable[[Said], bool] = is_right


def find_file(place: Store, names: Sequence[str], *, needs: str) -> Store:
    """The first file of these names in a folder or below its data/; `place` itself where it is a file. Raises ValueError."""
    if place.exists() and not place.is_dir():
        return place
    found = next((folder / name for folder in (place, place / "data") for name in names if (folder / name).exists()), None)
    if found is None:
        raise ValueError(f"{place.location}: holds no {' or '.join(names)}. It needs {needs}.")
    return found


def find_files(place: Store, suffixes: Sequence[str], *, word: str, needs: str) -> list[Store]:
    """The files with these suffixes whose names hold a word, in a folder or below its data/; `place` itself where it is a
    file. Raises ValueError."""
    if place.exists() and not place.is_dir():
        return [place]
    for folder in (place, place / "data"):
        found = [file for file in folder.list() if file.name.endswith(tuple(suffixes)) and word in file.name.lower()]
        if found:
            return found
    raise ValueError(f"{place.location}: holds no file for this benchmark. It needs {needs}.")


def image_folder(contents: Contents, image_root: Store | None = None) -> Store:
    """The folder that a benchmark's image paths start from: of its `image_places`, then `image_root`, the first in which the
    first image is that is in any of them. Raises ValueError where all are empty of its images."""
    folder = contents.place if contents.place.is_dir() else contents.place.parent
    images = list(dict.fromkeys(image for item in contents.items for image in item.images if isinstance(image, str)))
    if not images:
        return folder
    tried = [folder / name if name else folder for name in contents.image_places]
    tried += [image_root] if image_root is not None else []
    found = next((place for image in images for place in tried if (place / image).exists()), None)
    if found is None:
        which = f"The image {images[0]} is" if len(images) == 1 else f"The {len(images)} images ({images[0]}, ...) are"
        places = ", ".join(place.location for place in tried)
        raise ValueError(f"{which} in none of {places}. Put the benchmark's images there, or pass --image_root.")
    return found


def read_items(
    files: Sequence[Store], parse: Callable[[Mapping[str, Any], Store], Iterable[Item]]
) -> tuple[tuple[Item, ...], tuple[LeftOut, ...]]:
    """The items that `parse` makes of each row of some files, and the rows that it fails at, however it does. An id that is
    there more often than once gets a number behind it.

    Raises ValueError for a file that holds no usable row.
    """
    items: dict[str, Item] = {}
    left_out: list[LeftOut] = []
    for file in files:
        before = len(items)
        for number, row in read_rows(file.location):
            try:
                if isinstance(row, RecordError):
                    raise row
                with record_errors():
                    filled = {name: plain(value, column=name) for name, value in row.items() if value is not None}
                    parsed = list(parse(filled, file))
                for item in parsed:
                    own = _new_id(item.id, items)
                    items[own] = dataclasses.replace(item, id=own)
            except RecordError as error:
                left_out.append(LeftOut(f"{file.name}, row {number}", str(error)))
        if len(items) == before:
            first = f" First: {left_out[-1].place}: {left_out[-1].reason}." if left_out else " It is empty."
            raise ValueError(f"{file.location}: holds no question that can be asked.{first}")
    return tuple(items.values()), tuple(left_out)


def _new_id(own: str, taken: Container[str]) -> str:
    return own if own not in taken else next(name for n in itertools.count(2) if (name := f"{own}~{n}") not in taken)


def read_json(file: Store, kind: type) -> Any:
    """A whole JSON file; raises ValueError where it holds something else than a `kind`."""
    value = file.read_json()
    if not isinstance(value, kind):
        raise ValueError(
            f"{file.location}: expected a JSON {'list' if kind is list else 'object'}. Take the benchmark's own file."
        )
    return value


def one_of(row: Mapping[str, Any], *columns: str) -> Any:
    """The cell of the first of these columns that the row has. Raises RecordError."""
    for column in columns:
        if column in row:
            return row[column]
    raise RecordError("missing field", f"the row has none of {', '.join(columns)}; it has {', '.join(row)}", field=columns[0])


def word_of(row: Mapping[str, Any], *columns: str) -> str:
    """The same as a text, whatever its type."""
    value = one_of(row, *columns)
    return value.strip() if isinstance(value, str) else json.dumps(value)


def image_of(value: Any, *, column: str) -> str | bytes:
    """An image's cell: a path, bytes, or {"bytes", "path"}. Raises RecordError."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, bytes)) or not value:
        raise RecordError("image missing", "expected a path or the bytes of an image", field=column)
    return value.removeprefix("./") if isinstance(value, str) else value


def is_yes(value: Any, *, column: str) -> bool:
    """A yes/no label: yes or no in any case, 1 or 0. Raises RecordError."""
    match str(value).strip().lower():
        case "yes" | "1" | "true":
            return True
        case "no" | "0" | "false":
            return False
    raise RecordError("wrong type", f"expected yes or no, found {value!r}", field=column)


def accuracy_by(rights: Sequence[float], groups: Sequence[str], *, name: str = "accuracy") -> dict[str, Estimate]:
    """The mean of all values, and of those of each group as `name`/group."""
    metrics = {name: estimate(rights, seed=SEED)}
    for group in sorted(set(groups)):
        inside = [right for right, own in zip(rights, groups, strict=True) if own == group]
        metrics[f"{name}/{group}"] = estimate(inside, seed=SEED)
    return metrics


def win_of(scored: Preferred) -> float:
    """1 where the better response is preferred, one half for a tie, else 0."""
    return float(wins([scored.margin])[0])
