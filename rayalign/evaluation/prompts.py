"""The prompts of records, whose own responses don't count, and the columns in which a pool's results carry them along.

The columns are those of the native record format, so that the results are a data set: any verb reads them by --dataset.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayalign.config.plugins import Plugin
from rayalign.data.rows import Sources
from rayalign.formats.cells import is_missing, plain, role_of
from rayalign.formats.columns import columns_beside, renamed, require_pictures_read
from rayalign.formats.parse import Format, own_formats, parse_row
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


OF_RESPONSES = ("rejected", "rejected_response", "rejected_messages", "rejected_images", "rejected_image", "label", "margin")
"""Columns that say something of a row's responses, and nothing of its prompt."""


@functools.lru_cache(maxsize=2)
def formats_of(plugins: tuple[Plugin, ...]) -> tuple[Format, ...]:
    """The record formats that plugins bring."""
    return own_formats(plugins)


def with_response(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with PLACEHOLDER as its only response, where its format has one: its own ones don't count, whatever they are."""
    filled = {name: value for name, value in row.items() if not is_missing(value) and name not in OF_RESPONSES}
    if "chosen" in filled:
        filled.pop("completion", None)  # which would be another response
        if isinstance(filled["chosen"], str) and not {"prompt", "question", "conversations"} & filled.keys():
            return row  # two texts that hold their prompt: where it ends, only both together tell
        return {**filled, "chosen": _answered(filled, "chosen") if "conversations" not in filled else PLACEHOLDER}
    match filled:
        case {"messages": messages}:
            return {**filled, "messages": _answered(filled, "messages")} if _turns(messages) else row
        case {"conversations": turns}:
            prompt = _turns(turns)
            return {**filled, "conversations": prompt[:-1] if _ends_with_response(prompt) else turns, "chosen": PLACEHOLDER}
        case {"prompt": _, "completion": _}:
            return {**filled, "completion": _answered(filled, "completion")}
        case {"query": _}:
            return {**filled, "response": PLACEHOLDER}
        case {"prompt": _} | {"question": _}:
            return {**filled, "chosen": PLACEHOLDER}
    return row


def _answered(row: Mapping[str, Any], column: str) -> Any:
    """PLACEHOLDER as a cell's response: of messages the last one, behind those that belong to the prompt."""
    turns = _turns(row[column])
    if not turns:
        return PLACEHOLDER
    prompt = turns[:-1] if _ends_with_response(turns) else turns
    return [*prompt, {"role": "assistant", "content": PLACEHOLDER}]


def _turns(value: Any) -> list[Any]:
    """A cell's messages; empty where it holds something else."""
    turns = plain(value, column="messages")
    return turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []


def _ends_with_response(turns: Sequence[Mapping[str, Any]]) -> bool:
    return bool(turns) and role_of(turns[-1], column="messages") == "assistant"


def prompt_of(row: Mapping[str, Any], sources: Sources, *, text_only: bool) -> PreferenceRecord:
    """The prompt of a row as `groups.FileRows` reads it: of a record of any format, or of one that lacks a response. The
    record that is returned has PLACEHOLDER as its response. Raises RecordError for what is wrong with the row."""
    own = formats_of(sources.plugins)
    with record_errors():
        raw = _filled(renamed(row["row"], sources.columns), own)
        record = parse_row(raw, id=row["id"], own=own)
        if not text_only:
            require_pictures_read(raw, record, own)
    return record.model_copy(update={"chosen": PLACEHOLDER, "rejected": None, "label": None, "margin": None})


def _filled(raw: Mapping[str, Any], own: Sequence[Format]) -> Mapping[str, Any]:
    """`with_response`, but of a plugin's format the row as it is, which only the plugin knows how to fill."""
    columns = {name for name, value in raw.items() if not is_missing(value)}
    return raw if any(format.matches(columns) for format in own) else with_response(raw)


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
    if isinstance(row.get("extra"), str) and _is_object(row["extra"]):
        return str(row["extra"])
    own = formats_of(sources.plugins)
    raw = renamed(row, sources.columns)
    raw = {**raw, **_filled(raw, own)}
    names = [name for name in columns_beside(raw, own) if name not in ("id", "position")]
    kept = {}
    for name in names:
        try:
            kept[name] = json.loads(json.dumps(plain(raw[name], column=name)))
        except (TypeError, ValueError):
            continue
    return json.dumps(kept) if kept else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
