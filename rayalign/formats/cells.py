"""Typed values out of a raw row's cells, with errors that name the column; what the record formats share."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from typing import Any, Literal, TypeVar

import numpy as np

from rayalign.formats.pictures import looks_like_picture, names_video_or_audio
from rayalign.formats.records import IMAGE_MARK, Message, RecordError, Unreadable

T = TypeVar("T")

Images = tuple[str | bytes, ...]

ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role names of the formats, and ours."""

COMMON_COLUMNS = frozenset(("system", "images", "image", "rejected_images", "rejected_image", "margin", "label"))
"""Columns that every format reads."""

LOSS_KEYS = ("loss", "weight", "loss_scale")
"""By how much a message is to be trained, as ms-swift and OpenAI write it."""

MESSAGE_KEYS = frozenset(("role", "from", "content", "value", *LOSS_KEYS))
"""What is read of a message."""

UNSUPPORTED_KEY = re.compile(r"(?:reasoning|thinking|thought|tool|function)s?(?:_\w+)?|refusal", re.IGNORECASE)
"""Keys of a message that hold some of what the model says or hears, and that nothing reads."""

IMAGE_KEYS = ("bytes", "path", "url")
"""Where an object has its image, in this order."""

PART_KEYS = frozenset(("type", "text", "image", "image_url", "base64", *IMAGE_KEYS))
"""What is read of a part of a message's content."""

MAX_DEPTH = 32


def plain(value: Any, *, column: str, depth: int = 0) -> Any:
    """A cell as Python's own types: NumPy arrays as lists, bytes-like objects as bytes.

    Raises RecordError for lists and objects that are nested more than MAX_DEPTH deep, which no record is.
    """
    if depth > MAX_DEPTH:
        raise RecordError(
            "nested too deeply", f"lists and objects stand more than {MAX_DEPTH} deep in each other", field=column
        )
    match value:
        case np.ndarray() | np.generic():
            return plain(value.tolist(), column=column, depth=depth)
        case bytearray() | memoryview():
            return bytes(value)
        case Mapping():
            return {key: plain(item, column=column, depth=depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, column=column, depth=depth + 1) for item in value]
    return value


def text(row: Mapping[str, Any], column: str) -> str:
    """A text cell that must be there."""
    if column not in row:
        raise RecordError(
            "missing field", f"the row has no such column or an empty cell there; it has {', '.join(row)}", field=column
        )
    return as_text(row[column], column=column)


def optional_text(row: Mapping[str, Any], column: str) -> str | None:
    """A text cell, or None where it is absent."""
    return text(row, column) if column in row else None


def as_text(value: Any, *, column: str) -> str:
    """A value that must be text, and valid Unicode: JSON can spell half a surrogate pair, which no tokenizer takes."""
    if isinstance(value, Unreadable):
        raise RecordError(value.reason, value.words, field=column)
    if not isinstance(value, str):
        raise RecordError("wrong type", f"expected text, found {type(value).__name__} {_shown(value)}", field=column)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError("not UTF-8", f"half a surrogate pair at character {error.start}", field=column) from None
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell counts as absent: None, and NaN, which pandas writes for it."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a cell is missing, or a text, list or object without anything in it."""
    return is_missing(value) or (isinstance(value, (str, bytes, list, tuple, Mapping, Set)) and len(value) == 0)


def says_nothing(value: Any) -> bool:
    """Whether a value under some key is what stands there for none: an empty or blank one, false, zero."""
    return is_empty(_stripped(value)) or (isinstance(value, (bool, int, float)) and not value)


def one_of(row: Mapping[str, Any], columns: Sequence[str], read: Callable[[str], T], *, what: str) -> tuple[str, T] | None:
    """Of columns that mean the same the first filled one, and what `read` makes of its cell; None where the row has none.

    Raises RecordError where several are filled and don't say the same.
    """
    present = [column for column in columns if column in row]
    found = {column: read(column) for column in [c for c in present if not is_empty(row[c])] or present[:1]}
    for column, value in found.items():
        first = next(iter(found))
        if _stripped(value) != _stripped(found[first]):
            words = f"the row has both {first!r} and {column!r}, and they differ; keep one"
            raise RecordError(f"ambiguous {what}", words, field=column)
    return next(iter(found.items()), None)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """The `system` cell as a message; nothing where it is absent or blank."""
    content = optional_text(row, "system")
    return [Message(role="system", content=content)] if content and content.strip() else []


def with_system(row: Mapping[str, Any], messages: Sequence[Message], *, column: str) -> list[Message]:
    """The messages of a column behind the system message of the `system` cell; one of their own that is blank gives way to it.

    Raises RecordError where there are two that differ.
    """
    given = system_message(row)
    if not (given and messages and messages[0].role == "system"):
        return [*given, *messages]
    own = messages[0].content.strip()
    if own and own != given[0].content.strip():
        words = f"the row has both 'system' and a system message in {column!r}, and they differ; keep one"
        raise RecordError("ambiguous system", words, field="system")
    return [*given, *messages[1:]]


def images(row: Mapping[str, Any]) -> Images:
    """The images of `images` or `image`: one or a list of paths, URLs, data: URIs, base64, bytes or {"bytes", "path"}."""
    found = one_of(row, ("images", "image"), lambda column: as_images(row[column], column=column), what="images")
    return found[1] if found else ()


def as_images(value: Any, *, column: str) -> Images:
    """One image or a list of images; an empty string means none."""
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(_as_image(item, column=column) for item in value)
    return (_as_image(value, column=column),)


def _as_image(value: Any, *, column: str) -> str | bytes:
    if isinstance(value, Mapping):
        filled = [value[key] for key in IMAGE_KEYS if value.get(key)]
        if not filled:
            raise RecordError("image missing", "an image has neither bytes nor a path", field=column)
        value = filled[0]
    if not isinstance(value, (str, bytes)):
        raise RecordError(
            "wrong type",
            f"expected a path, URL, base64 text or bytes, found {type(value).__name__} {_shown(value)}",
            field=column,
        )
    if not value:
        raise RecordError("image missing", "an image is empty", field=column)
    return value


def conversation(value: Any, *, column: str) -> tuple[list[Message], Images]:
    """A list of {"role", "content"} or {"from", "value"} as messages, with the images that stand inside content lists."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError(
            "wrong type", f"expected a list of messages, found {type(value).__name__} {_shown(value)}", field=column
        )
    messages: list[Message] = []
    inline: list[str | bytes] = []
    for item in value:
        role, content = role_of(item, column=column), _either(item, ("content", "value"), column=column)
        if role not in ROLES.values():
            raise RecordError("unknown role", f"{role!r} is none of {', '.join(ROLES)}", field=column)
        _refuse_beside(item, MESSAGE_KEYS, of="a message", column=column)
        if isinstance(content, list):
            content, found = _content_list(content, column=column)
            inline.extend(found)
        messages.append(Message(role=role, content=as_text(content, column=column)))
    if messages and messages[-1].role == "assistant":
        _require_whole_loss(value[-1], column=column)
    return messages, tuple(inline)


def role_of(message: Mapping[str, Any], *, column: str) -> Any:
    """The role that a message names under `role` or `from`, in our words; what stands there where that is none.

    Raises RecordError where both name one, and these differ.
    """
    named = [message.get(key) for key in ("role", "from")]
    ours = [ROLES.get(role, role) if isinstance(role, str) else role for role in named]
    return _either({"role": ours[0], "from": ours[1]}, ("role", "from"), column=column)


def _either(message: Mapping[str, Any], keys: tuple[str, str], *, column: str) -> Any:
    """The filled one of two keys of a message that mean the same; raises RecordError where both are, and differ."""
    first, second = message.get(keys[0]), message.get(keys[1])
    if second is None or (is_empty(second) and not is_missing(first)):
        return first
    if is_empty(first):
        return second
    if first != second:
        words = f"a message has both {keys[0]!r} and {keys[1]!r}, and they differ; keep one"
        raise RecordError("ambiguous message", words, field=column)
    return first


def _refuse_beside(item: Mapping[str, Any], read: Set[str], *, of: str, column: str) -> None:
    """Raises RecordError for a message or a part of one with content under a key that nothing reads."""
    for key, value in item.items():
        if key in read or says_nothing(value):
            continue
        if looks_like_picture(key, value):
            words = f"{of} holds pictures under {key!r}; put them into 'images' of the row, or into the message's content"
            raise RecordError("unsupported content", words, field=column)
        if UNSUPPORTED_KEY.fullmatch(key) or names_video_or_audio(key):
            words = f"{of} holds {key!r}, which can't be trained on; take it out, or write what it says into the content"
            raise RecordError("unsupported content", words, field=column)


def _require_whole_loss(message: Mapping[str, Any], *, column: str) -> None:
    """Raises RecordError for a response that shall not be trained, or not as any other is."""
    for key in LOSS_KEYS:
        if not is_missing(value := message.get(key)) and value not in (1, "1"):
            words = f"{key!r} of the last message is {_shown(value)}, and the whole response is trained; take it out"
            raise RecordError("unsupported content", words, field=column)


def unread_keys(value: Any) -> Iterator[str]:
    """The filled keys that nothing reads of the messages, of the parts of their content, and of the images in a cell."""
    for item in [value] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        if not isinstance(item, Mapping):
            continue
        is_message = "role" in item or "from" in item
        read = MESSAGE_KEYS if is_message else PART_KEYS
        yield from (str(key) for key, cell in item.items() if key not in read and not says_nothing(cell))
        if is_message:
            yield from unread_keys(item.get("content"))


def _content_list(parts: Sequence[Any], *, column: str) -> tuple[str, Images]:
    """[{"type": "image"}, {"type": "text", "text": ...}] as text with marks, and the images named in the parts."""
    pieces: list[str] = []
    inline: list[str | bytes] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "image_url"):
            raise RecordError("unsupported content", f"expected a text or image part, found {_shown(part)}", field=column)
        _refuse_beside(part, PART_KEYS, of="a part of a message", column=column)
        found = _image_of_part(part, column=column)
        if kind == "text":
            pieces.append(as_text(part.get("text"), column=column))
        else:
            pieces.append(IMAGE_MARK)
            inline.extend(found)
        if found if kind == "text" else not is_empty(part.get("text")):
            words = f"a part of the type {kind!r} holds an image and a text; give each a part of its own"
            raise RecordError("unsupported content", words, field=column)
    return "".join(pieces), tuple(inline)


def _image_of_part(part: Mapping[str, Any], *, column: str) -> Images:
    """The image that a part of a message holds; raises RecordError where it holds several."""
    found = [_as_image(part[key], column=column) for key in ("image", "image_url", "base64") if part.get(key)]
    if any(part.get(key) for key in IMAGE_KEYS):
        found.append(_as_image(part, column=column))
    if any(ref != found[0] for ref in found):
        raise RecordError("ambiguous images", "a part of a message holds two images, and they differ; keep one", field=column)
    return tuple(found[:1])


def all_images(row: Mapping[str, Any], inline: Images) -> Images:
    """The images of the row's columns, or those inside its content lists."""
    listed = images(row)
    if listed and inline and listed != inline:
        raise RecordError(
            "ambiguous images", "images stand both in their column and inside the messages; keep one", field="images"
        )
    return listed or inline


def refuse_other_rejected_images(row: Mapping[str, Any], images: Images) -> None:
    """Raises RecordError for a rejected response with other images than the chosen one's `images`."""
    for column in ("rejected_images", "rejected_image"):
        if column in row and as_images(row[column], column=column) not in ((), images):
            words = "the rejected response has other images than the chosen one"
            raise RecordError("unsupported content", words, field=column)


def split_response(messages: Sequence[Message], *, column: str) -> tuple[list[Message], str]:
    """A conversation as the messages before its last one, and that last one, which must be the assistant's."""
    if not messages or messages[-1].role != "assistant":
        raise RecordError("missing field", "the last message must be the assistant's response", field=column)
    return list(messages[:-1]), messages[-1].content


def label(row: Mapping[str, Any]) -> bool | None:
    """KTO's verdict: true for a desirable response."""
    value = row.get("label")
    if is_missing(value):
        return None
    if isinstance(value, (bool, int, float, Decimal)) and value in (0, 1):
        return bool(value)
    raise RecordError("wrong type", f"expected true or false, found {_shown(value)}", field="label")


def margin(row: Mapping[str, Any]) -> float | None:
    """By how much the chosen response is better."""
    value = row.get("margin")
    if is_missing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise RecordError("wrong type", f"expected a number, found {_shown(value)}", field="margin")
    try:
        return float(value)
    except OverflowError:
        raise RecordError("bad margin", "the number is too large", field="margin") from None


def _shown(value: Any) -> str:
    """The start of a value, short enough for an error."""
    words = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return words if len(words) <= 60 else f"{words[:60]}..."
