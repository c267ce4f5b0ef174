"""The prompts of records, whose own responses don't count, and the columns in which a pool's results carry them along.

The columns are those of the native record format, so that the results are a data set: any verb reads them by --dataset.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from rayalign.data.rows import Sources
from rayalign.formats.cells import plain
from rayalign.formats.columns import renamed, require_pictures_read, unread_columns
from rayalign.formats.parse import parse_row
from rayalign.formats.records import PreferenceRecord, record_errors
from rayalign.images.fetch import looks_like_base64
from rayalign.storage import Store, is_url

PLACEHOLDER = "Yes."
"""Stands where a record must have a response and none is wanted."""

PROMPT_FIELDS = [
    pa.field("system", pa.string()),
    pa.field("query", pa.string()),
    pa.field("history", pa.list_(pa.list_(pa.string()))),
    pa.field("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    pa.field("extra", pa.string()),
]
"""A prompt: its turns with `<image>` marks, its images, whose paths are absolute, and as JSON what else its row held."""


def with_response(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row that holds a prompt alone with a response, as its format has it; any other as it is."""
    filled = {name: value for name, value in row.items() if value is not None}
    if "chosen" in filled:
        return row
    match filled:
        case {"messages": messages}:
            turns = plain(messages, column="messages")
            is_open = isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user"
            return {**row, "messages": [*turns, {"role": "assistant", "content": PLACEHOLDER}]} if is_open else row
        case {"conversations": turns}:
            turns = plain(turns, column="conversations")
            is_open = isinstance(turns, list) and turns and isinstance(turns[-1], dict)
            speaker = turns[-1].get("from", turns[-1].get("role")) if is_open else None
            return {**row, "chosen": PLACEHOLDER} if speaker in ("human", "user") else row
        case {"query": _}:
            return row if "response" in filled else {**row, "response": PLACEHOLDER}
        case {"prompt": _}:
            return row if "completion" in filled else {**row, "chosen": PLACEHOLDER}
        case {"question": _}:
            return {**row, "chosen": PLACEHOLDER}
    return row


def prompt_of(row: Mapping[str, Any], sources: Sources, *, text_only: bool) -> PreferenceRecord:
    """The prompt of a row as `groups.FileRows` reads it: of a record of any format, or of one that lacks a response. The
    record that is returned has PLACEHOLDER as its response. Raises RecordError for what is wrong with the row."""
    with record_errors():
        raw = with_response(renamed(row["row"], sources.columns))
        record = parse_row(raw, id=row["id"])
        if not text_only:
            require_pictures_read(raw, record)
    return record.model_copy(update={"chosen": PLACEHOLDER, "rejected": None, "label": None, "margin": None})


def prompt_columns(record: PreferenceRecord, row: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    """The columns of PROMPT_FIELDS of a record, and the row that it was made of."""
    messages = list(record.messages)
    system = messages.pop(0).content if messages[0].role == "system" else None
    *history, last = messages
    rounds = zip(history[::2], history[1::2], strict=True)
    start = sources.image_root or row["folder"]
    return {
        "system": system,
        "query": last.content,
        "history": [[query.content, response.content] for query, response in rounds],
        "images": [_image(ref, start) for ref in record.images],
        "extra": _extra(row["row"], sources),
    }


def _image(ref: str | bytes, start: str) -> dict[str, Any]:
    if isinstance(ref, bytes):
        return {"bytes": ref, "path": None}
    if ref.startswith("data:") or is_url(ref) or looks_like_base64(ref):
        return {"bytes": None, "path": ref}
    local = Store(start).local_path
    return {"bytes": None, "path": os.path.join(local, ref) if local is not None else (Store(start) / ref).location}


def _extra(row: Mapping[str, Any], sources: Sources) -> str | None:
    """What the record's format does not read of a row, as far as JSON holds it: such as an answer that a scorer knows."""
    if isinstance(row.get("extra"), str):
        return str(row["extra"])
    raw = with_response(renamed(row, sources.columns))
    names = [name for name in unread_columns(raw) if name not in ("id", "position")]
    kept = {}
    for name in names:
        try:
            kept[name] = json.loads(json.dumps(plain(raw[name], column=name)))
        except (TypeError, ValueError):
            continue
    return json.dumps(kept) if kept else None
