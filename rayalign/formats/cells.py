"""Typed values out of a raw row's cells, with errors that name the column; what the record formats share."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rayalign.formats.pictures import looks_like_picture
from rayalign.formats.records import IMAGE_MARK, Message, RecordError, Unreadable

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

MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "tool_calls"))
"""What is read of a message."""

MAX_DEPTH = 32

INLINE_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64")


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


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """The `system` cell as a message; nothing where it is absent or blank."""
    content = optional_text(row, "system")
    return [Message(role="system", content=content)] if content and content.strip() else []


def images(row: Mapping[str, Any]) -> Images:
    """The images of `images` or `image`: one or a list of paths, URLs, data: URIs, base64, bytes or {"bytes", "path"}."""
    found = {column: as_images(row[column], column=column) for column in ("images", "image") if column in row}
    filled = [refs for refs in found.values() if refs]
    if len(filled) == 2 and filled[0] != filled[1]:
        raise RecordError("ambiguous images", "the row has both 'images' and 'image', and they differ; keep one", field="image")
    return filled[0] if filled else ()


def as_images(value: Any, *, column: str) -> Images:
    """One image or a list of images; an empty string means none."""
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(_as_image(item, column=column) for item in value)
    return (_as_image(value, column=column),)


def _as_image(value: Any, *, column: str) -> str | bytes:
    if isinstance(value, Mapping):
        filled = [value[key] for key in ("bytes", "path", "url") if value.get(key)]
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
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError("unknown role", f"{role!r} is none of {', '.join(ROLES)}", field=column)
        if item.get("tool_calls"):
            raise RecordError("unsupported content", "tool calls can't be trained on", field=column)
        _refuse_pictures_beside(item, column=column)
        if isinstance(content, list):
            content, found = _content_list(content, column=column)
            inline.extend(found)
        messages.append(Message(role=ROLES[role], content=as_text(content, column=column)))
    return messages, tuple(inline)


def _refuse_pictures_beside(message: Mapping[str, Any], *, column: str) -> None:
    """Raises RecordError for a message with pictures in a key of its own, where nothing would read them."""
    for key, value in message.items():
        if key not in MESSAGE_KEYS and looks_like_picture(key, value):
            words = f"a message holds pictures under {key!r}; put them into 'images' of the row, or into the message's content"
            raise RecordError("unsupported content", words, field=column)


def _content_list(parts: Sequence[Any], *, column: str) -> tuple[str, Images]:
    """[{"type": "image"}, {"type": "text", "text": ...}] as text with marks, and the images named in the parts."""
    pieces: list[str] = []
    inline: list[str | bytes] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            pieces.append(as_text(part.get("text"), column=column))
        elif kind in ("image", "image_url"):
            pieces.append(IMAGE_MARK)
            inline.extend(_as_image(part[key], column=column) for key in INLINE_IMAGE_KEYS if part.get(key))
        else:
            raise RecordError("unsupported content", f"expected a text or image part, found {_shown(part)}", field=column)
    return "".join(pieces), tuple(inline)


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
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    raise RecordError("wrong type", f"expected true or false, found {_shown(value)}", field="label")


def margin(row: Mapping[str, Any]) -> float | None:
    """By how much the chosen response is better."""
    value = row.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError("wrong type", f"expected a number, found {_shown(value)}", field="margin")
    try:
        return float(value)
    except OverflowError:
        raise RecordError("bad margin", "the number is too large", field="margin") from None


def _shown(value: Any) -> str:
    """The start of a value, short enough for an error."""
    words = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return words if len(words) <= 60 else f"{words[:60]}..."
