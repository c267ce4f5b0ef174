"""The preference record: what `formats` makes of a raw row and `data.encode` turns into tokens, and what can be wrong with it.

Every problem of a single record is a `RecordError`: the record is dropped and counted under the error's reason.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from rayalign.formats.placeholders import IMAGE_PLACEHOLDER, VIDEO_OR_AUDIO_PLACEHOLDER, with_marks

IMAGE_MARK = "<image>"
"""Marks in a user message where an image goes."""

IMAGE_TAG = re.compile(r"<img>([^<>\n]*)</img>", re.IGNORECASE)
"""An image's path inside of the text, as ms-swift 1 and Qwen-VL write it."""

LARGEST_MARGIN = 1e6
"""Beyond it a single record would drown the step's loss, and near 1e38 make it infinite."""

Responses = Literal["chosen", "both", "either"]
"""Which responses an algorithm trains on: the chosen one; both of a pair; or either, a pair's both or a labelled one."""


class RecordError(ValueError):
    """A record that can't be used: `reason` is a short phrase to count by, `field` names the cell, str() says it in full."""

    def __init__(self, reason: str, words: str = "", *, field: str = "") -> None:
        super().__init__(": ".join(part for part in (field, words or reason) if part))
        self.reason = reason
        self.words = words
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(RecordError, field=self.field), (self.reason, self.words)


@dataclass(frozen=True)
class Unreadable:
    """Stands for a cell that has no value of Python's: a date before the year 1, bytes that should be text. A row may hold one
    in a column that nothing reads."""

    reason: str
    words: str


PANIC = "PanicException"
"""What libraries in Rust, as tokenizers, raise where their code gives up: no Exception, and each has a class of its own."""


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, and nobody wants the program to end."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC


@contextmanager
def record_errors(*, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within it, whatever goes wrong is a fault of the one record at hand, and raised as its RecordError: texts, templates,
    processors and decoders of hostile content fail in any way. Exceptions of the types `passing` are raised as they are."""
    try:
        yield
    except RecordError:
        raise
    except passing:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        words = " ".join(str(error).split())
        raise RecordError("unusable record", f"{type(error).__name__}: {words[:300]}") from error


class Message(pydantic.BaseModel):
    """One turn of a conversation; images stand in the text as `<image>` marks."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class PreferenceRecord(pydantic.BaseModel):
    """A prompt with its images, the chosen response and, for pairs, the rejected one; always usable once it exists.

    `messages` is everything before the trained response. `images` holds a path, URL, data: URI, base64 or the bytes of each
    image, in the order of the `<image>` marks. `build_record` is the constructor that reports in the words of the row's own
    columns.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    messages: tuple[Message, ...]
    images: tuple[str | bytes, ...] = ()
    chosen: str
    rejected: str | None = None
    margin: float | None = None
    label: bool | None = None

    @pydantic.model_validator(mode="after")
    def _is_usable(self, info: pydantic.ValidationInfo) -> "PreferenceRecord":
        columns: Mapping[str, str] = info.context or {}
        _check_conversation(self.messages, columns)
        _check_responses(self.chosen, self.rejected, columns)
        _check_marks(self, columns)
        if self.margin is not None and not abs(self.margin) <= LARGEST_MARGIN:
            words = f"{self.margin} is no number between -{LARGEST_MARGIN:g} and {LARGEST_MARGIN:g}"
            raise RecordError("bad margin", words, field=columns.get("margin", "margin"))
        return self


def build_record(
    *,
    id: str,
    messages: Sequence[Message],
    images: Sequence[str | bytes],
    chosen: str,
    rejected: str | None = None,
    margin: float | None = None,
    label: bool | None = None,
    columns: Mapping[str, str] | None = None,
    marks_only: bool = False,
) -> PreferenceRecord:
    """Makes a record, with missing `<image>` marks put in front of the first round's query. An `<img>path</img>` in the text
    becomes a mark, and its path an image; what other tools write for an image becomes a mark, too. With `marks_only`, texts
    with either stay as they are.

    `columns` says what the row calls `system`, `query`, `history`, `images`, `chosen`, `rejected` and `margin`, for the errors.
    Raises RecordError.
    """
    if not marks_only:
        messages, images = _read_images_in_text(messages, images, columns or {})
    values = {
        "id": id,
        "messages": place_marks(messages, len(images)),
        "images": tuple(images),
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
        "label": label,
    }
    try:
        return PreferenceRecord.model_validate(values, context=columns)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, RecordError):
            raise cause from None
        field = str(first["loc"][0]) if first["loc"] else ""
        raise RecordError("wrong type", first["msg"], field=(columns or {}).get(field, field)) from None


def _read_images_in_text(
    messages: Sequence[Message], images: Sequence[str | bytes], columns: Mapping[str, str]
) -> tuple[Sequence[Message], Sequence[str | bytes]]:
    """The messages with marks where their texts name or stand for images, and the record's images."""
    tagged = [path for message in messages for path in _paths_in(message.content, columns)]
    if tagged:
        if images and tuple(images) != tuple(tagged):
            words = "images stand both in their column and as <img>...</img> in the text, and they differ; keep one"
            raise RecordError("ambiguous images", words, field=columns.get("images", "images"))
        images = tagged
        messages = [m.model_copy(update={"content": IMAGE_TAG.sub(IMAGE_MARK, m.content)}) for m in messages]
    return _with_marks(messages, len(images), columns), images


def _paths_in(text: str, columns: Mapping[str, str]) -> list[str]:
    """What the `<img>path</img>` of a text name; raises RecordError for an empty one."""
    paths = [path.strip() for path in IMAGE_TAG.findall(text)]
    if not all(paths):
        raise RecordError("image missing", "an <img></img> in the text is empty", field=columns.get("query", "query"))
    return paths


def _with_marks(messages: Sequence[Message], num_images: int, columns: Mapping[str, str]) -> Sequence[Message]:
    """The messages with `<image>` marks where the user's texts hold what other tools write for an image; where every image has
    a mark, as they are. Raises RecordError where that can't be done, and for what stands for a video or a sound."""
    texts, field = [m.content for m in messages if m.role == "user"], columns.get("query", "query")
    if other := next(filter(None, map(VIDEO_OR_AUDIO_PLACEHOLDER.search, texts)), None):
        words = f"{other.group()} stands for a video or a sound, and records hold text and images only"
        raise RecordError("unsupported content", words, field=field)
    num_marks = sum(text.count(IMAGE_MARK) for text in texts)
    found = next(filter(None, map(IMAGE_PLACEHOLDER.search, texts)), None)
    if found is None or (num_images and num_marks >= num_images):
        return messages
    marked = None if num_marks else with_marks(texts, IMAGE_MARK, num_images)
    if marked is None:
        words = (
            f"{found.group()} stands for an image in the text, and the number of images is {num_images}; write {IMAGE_MARK} "
            "where each image goes, or take it out"
        )
        raise RecordError("image mark count", words, field=field)
    contents = iter(marked)
    return [m.model_copy(update={"content": next(contents)}) if m.role == "user" else m for m in messages]


def place_marks(messages: Sequence[Message], num_images: int) -> tuple[Message, ...]:
    """The messages with as many `<image>` marks as images: missing ones go in front of the first user message."""
    missing = num_images - sum(m.content.count(IMAGE_MARK) for m in messages if m.role == "user")
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if missing <= 0 or first is None:
        return tuple(messages)
    marked = Message(role="user", content=IMAGE_MARK * missing + messages[first].content)
    return (*messages[:first], marked, *messages[first + 1 :])


def require_pair(record: PreferenceRecord) -> None:
    """Raises RecordError for a record without a rejected response, which every algorithm that compares two responses needs."""
    if record.rejected is None:
        raise RecordError(
            "missing field",
            "the record has one response only, and this algorithm compares a chosen with a rejected one; "
            "add the column, or train with sft (or kto, with a label)",
            field="rejected_response",
        )
    _check_label_of_pair(record)


def require_label(record: PreferenceRecord) -> None:
    """Raises RecordError for a record that says of no response whether it is good: neither a pair nor a labelled response."""
    if record.rejected is None and record.label is None:
        raise RecordError(
            "missing field",
            "the record has one response and does not say whether it is good; add label (true or false), or a rejected "
            "response",
            field="label",
        )
    _check_label_of_pair(record)


def _check_label_of_pair(record: PreferenceRecord) -> None:
    if record.rejected is not None and record.label is False:
        raise RecordError(
            "contradictory label",
            "the chosen response is labelled as bad, although there is a rejected one; remove the label, or keep one response",
            field="label",
        )


def require_desirable(record: PreferenceRecord) -> None:
    """Raises RecordError for a response labelled as bad, which must not be imitated."""
    if record.label is False:
        raise RecordError("undesirable response", "the response is labelled as bad, and sft imitates responses", field="label")


def require(record: PreferenceRecord, responses: Responses) -> None:
    """Raises RecordError for a sound record that lacks what rows with these responses hold."""
    match responses:
        case "chosen":
            require_desirable(record)
        case "both":
            require_pair(record)
        case "either":
            require_label(record)


def _check_conversation(messages: Sequence[Message], columns: Mapping[str, str]) -> None:
    """Raises RecordError unless the messages are [system], user, assistant, user, ..., user, none of them empty."""
    query, history = columns.get("query", "query"), columns.get("history", "messages")
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise RecordError("missing field", "there is no question to respond to", field=query)
    roles = [m.role for m in turns]
    if roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))] or roles[-1] != "user":
        raise RecordError(
            "roles not alternating",
            f"{', '.join(m.role for m in messages)}: before the trained response come user and assistant in turn, "
            "from user to user, after at most one system message",
            field=history,
        )
    for number, message in enumerate(turns, start=1):
        if message.content.strip():
            continue
        if message.role == "assistant":
            raise RecordError("empty response", f"the response of round {number // 2} is empty", field=history)
        last = number == len(turns)
        raise RecordError("empty query", "the question is empty", field=query if last else history)


def _check_responses(chosen: str, rejected: str | None, columns: Mapping[str, str]) -> None:
    names = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
    for name, response in zip(names, (chosen, rejected), strict=True):
        if response is None:
            continue
        if not response.strip():
            raise RecordError("empty response", "the response is empty", field=name)
        if IMAGE_MARK in response or IMAGE_TAG.search(response):
            held = IMAGE_MARK if IMAGE_MARK in response else "<img>...</img>"
            raise RecordError(
                "image mark in response", f"a response can't hold an image, but this one holds {held}", field=name
            )
    if rejected is not None and chosen.strip() == rejected.strip():
        raise RecordError(
            "identical responses", f"the response equals {names[0]}, so there is nothing to prefer", field=names[1]
        )


def _check_marks(record: PreferenceRecord, columns: Mapping[str, str]) -> None:
    for message in record.messages:
        if message.role != "user" and IMAGE_MARK in message.content:
            field = columns.get("system", "system") if message.role == "system" else columns.get("history", "messages")
            reason = "image mark in system" if message.role == "system" else "image mark in response"
            raise RecordError(reason, f"{IMAGE_MARK} can stand in user messages only", field=field)
    marks, images = sum(m.content.count(IMAGE_MARK) for m in record.messages), len(record.images)
    if marks != images:
        words = f"the text holds {marks} {IMAGE_MARK} marks, and the number of images is {images}"
        raise RecordError("image mark count", words, field=columns.get("images", "images"))
