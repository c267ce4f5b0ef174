"""Rows of every record format: good ones, which must be kept, and others, some changes away from a good one."""

import base64
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.hostile.values import REFERENCES, TEXTS, VALUES

Row = dict[str, Any]
SHARE_OF_GOOD_ROWS, SHARE_OF_BAD_ROWS, SHARE_OF_LARGE_PICTURES = 0.3, 0.25, 0.01
SENTENCES = (
    "Which colour is it?",
    "Was sieht man hier?",
    "图像里有什么?",
    "ما هذا؟",
    "What is 2 < 3 & '4'?",
    'A\tcat,\n"it" says.',
)


@dataclass
class Draw:
    """What rows are drawn from: random numbers, the model's special tokens, and the pictures on disk by their names."""

    random: random.Random
    special_tokens: Sequence[str]
    sound: Sequence[str]
    hostile: Sequence[str]
    large: Sequence[str]
    contents: Mapping[str, bytes]
    number: int = 0

    def text(self) -> str:
        """A text that no other row has."""
        self.number += 1
        return f"{self.random.choice(SENTENCES)} {self.number}"


# Formats: a sound row of each


def swift2(draw: Draw, images: list[Any]) -> Row:
    row: Row = {"query": draw.text(), "response": draw.text(), "rejected_response": draw.text(), "images": images}
    if draw.random.random() < 0.3:
        row |= {"system": draw.text(), "history": [[draw.text(), draw.text()]]}
    return row


def swift4(draw: Draw, images: list[Any]) -> Row:
    messages = [{"role": "user", "content": draw.text()}, {"role": "assistant", "content": draw.text()}]
    return {"messages": messages, "rejected_response": draw.text(), "images": images}


def sharegpt(draw: Draw, images: list[Any]) -> Row:
    return {
        "conversations": [{"from": "human", "value": draw.text()}],
        "chosen": {"from": "gpt", "value": draw.text()},
        "rejected": {"from": "gpt", "value": draw.text()},
        "images": images,
    }


def rlaif_v(draw: Draw, images: list[Any]) -> Row:
    return {"question": draw.text(), "chosen": draw.text(), "rejected": draw.text(), "image": images[0] if images else None}


def trl(draw: Draw, images: list[Any]) -> Row:
    return {"prompt": draw.text(), "chosen": draw.text(), "rejected": draw.text(), "images": images}


def trl_messages(draw: Draw, images: list[Any]) -> Row:
    asked = {"role": "user", "content": draw.text()}
    answers = [[asked, {"role": "assistant", "content": draw.text()}] for _ in range(2)]
    return {"chosen": answers[0], "rejected": answers[1], "images": images}


FORMATS: Sequence[Callable[[Draw, list[Any]], Row]] = (swift2, swift4, sharegpt, rlaif_v, trl, trl_messages)


def good_row(draw: Draw) -> Row:
    """A row that must be kept, whatever stands around it; its images are of any sound kind."""
    make = draw.random.choice(FORMATS)
    images = [draw.random.choice(draw.sound) for _ in range(draw.random.randrange(1 if make is rlaif_v else 3))]
    return make(draw, [as_reference(draw, name, draw.random.choice(("path", "path", "data", "base64"))) for name in images])


def as_reference(draw: Draw, name: str, kind: str) -> Any:
    """A picture in one of the ways in which a row may hold it."""
    content = draw.contents[name]
    match kind:
        case "data":
            return "data:image/png;base64," + base64.b64encode(content).decode()
        case "base64":
            return base64.b64encode(content).decode()
        case "struct":
            return {"bytes": content, "path": None}
    return name


def set_somewhere(draw: Draw, value: Any, new: Any) -> Any:
    """The value with something in it, at any depth, put in place of what was there."""
    if isinstance(value, dict) and value and draw.random.random() < 0.8:
        key = draw.random.choice(sorted(value))
        return {**value, key: set_somewhere(draw, value[key], new)}
    if isinstance(value, list) and value and draw.random.random() < 0.8:
        i = draw.random.randrange(len(value))
        return [*value[:i], set_somewhere(draw, value[i], new), *value[i + 1 :]]
    return new


def texts_of(row: Row) -> list[str]:
    """The columns of a row whose cells are its texts."""
    return [name for name, value in row.items() if name not in ("images", "image") and value]


def other_value(draw: Draw, row: Row) -> Row:
    name = draw.random.choice(sorted(row))
    return {**row, name: set_somewhere(draw, row[name], draw.random.choice(VALUES))}


def other_text(draw: Draw, row: Row) -> Row:
    text = draw.random.choice(TEXTS)
    name = draw.random.choice(texts_of(row))
    whole = text if draw.random.random() < 0.5 else f"{draw.text()}{text}"
    return {**row, name: set_somewhere(draw, row[name], whole)}


def special_token(draw: Draw, row: Row) -> Row:
    name = draw.random.choice(texts_of(row))
    return {**row, name: set_somewhere(draw, row[name], f"{draw.text()} {draw.random.choice(draw.special_tokens)}")}


def lost_column(draw: Draw, row: Row) -> Row:
    lost = draw.random.choice(sorted(row))
    return {name: value for name, value in row.items() if name != lost}


def odd_columns(draw: Draw, row: Row) -> Row:
    names = (
        "",
        " ",
        "\ud800",
        "x" * 20_000,
        "__class__",
        "query ",
        "image_path",
        "videos",
        "tools",
        "label",
        "margin",
        "rejected_images",
    )
    return {**row, draw.random.choice(names): draw.random.choice((*VALUES, *TEXTS, *REFERENCES))}


def two_formats(draw: Draw, row: Row) -> Row:
    return {**row, **draw.random.choice(FORMATS)(draw, [])}


def nested(draw: Draw, row: Row) -> Row:
    value: Any = "x"
    for _ in range(draw.random.choice((40, 150, 400))):
        value = [value] if draw.random.random() < 0.5 else {"a": value}
    return {**row, draw.random.choice([*sorted(row), "extra"]): value}


def too_many_images(draw: Draw, row: Row) -> Row:
    return {**row, "images": [draw.random.choice(draw.sound)] * draw.random.choice((20, 300, 5000))}


def with_image(row: Row, reference: Any) -> Row:
    column = "image" if "image" in row else "images"
    return {**row, column: reference if column == "image" else [reference]}


def bad_reference(draw: Draw, row: Row) -> Row:
    return with_image(row, draw.random.choice(REFERENCES[1:]))


def bad_picture(draw: Draw, row: Row) -> Row:
    return with_image(row, draw.random.choice(draw.hostile))


def large_picture(draw: Draw, row: Row) -> Row:
    name = draw.random.choice(draw.large)
    return {**row, "images": [name] * draw.random.choice((1, 1, 2, 30))} if "images" in row else with_image(row, name)


def no_pair(draw: Draw, row: Row) -> Row:
    """Texts that can't be compared: the same twice, or none."""
    empty = draw.random.choice(("", " ", None))
    columns = [name for name in ("rejected_response", "rejected") if name in row]
    return {**row, columns[0]: empty} if columns else {}


BAD: Sequence[Callable[[Draw, Row], Row]] = (bad_reference, bad_picture, no_pair)
"""Changes after which a row must be dropped."""

ODD: Sequence[Callable[[Draw, Row], Row]] = (
    other_value,
    other_text,
    special_token,
    lost_column,
    odd_columns,
    two_formats,
    nested,
    too_many_images,
)
"""Changes after which a row may be kept or dropped."""


def drawn_row(draw: Draw) -> tuple[Row, str]:
    """A row, and whether it is `good`, `bad` or may be either (`odd`)."""
    dice = draw.random.random()
    if dice < SHARE_OF_GOOD_ROWS:
        return good_row(draw), "good"
    row = draw.random.choice(FORMATS)(draw, [draw.random.choice(draw.sound)])
    if (dice := dice - SHARE_OF_GOOD_ROWS) < SHARE_OF_BAD_ROWS:
        return draw.random.choice(BAD)(draw, row), "bad"
    if dice - SHARE_OF_BAD_ROWS < SHARE_OF_LARGE_PICTURES:
        return large_picture(draw, row), "odd"
    for _ in range(draw.random.choice((1, 1, 2, 3))):
        if texts_of(row):
            row = draw.random.choice(ODD)(draw, row)
    return row, "odd"
