"""ms-swift 2.x, the native format: system, query, response, rejected_response, images, history; with `label`, KTO."""

from collections.abc import Mapping, Set
from typing import Any

from rayalign.formats import cells
from rayalign.formats.records import Message, PreferenceRecord, RecordError, build_record

NEEDS = "query, response, rejected_response"
READS = frozenset(("query", "response", "rejected_response", "history"))


def matches(columns: Set[str]) -> bool:
    return bool({"query", "response", "rejected_response"} & columns)


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    messages = cells.system_message(row) + _history(row.get("history", []))
    messages.append(Message(role="user", content=cells.text(row, "query")))
    return build_record(
        id=id,
        messages=messages,
        images=cells.images(row),
        chosen=cells.text(row, "response"),
        rejected=cells.optional_text(row, "rejected_response"),
        margin=cells.margin(row),
        label=cells.label(row),
        columns={"history": "history", "chosen": "response", "rejected": "rejected_response"},
    )


def _history(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RecordError("wrong type", "expected a list of [query, response] pairs", field="history")
    messages = []
    for query, response in value:
        messages.append(Message(role="user", content=cells.as_text(query, column="history")))
        messages.append(Message(role="assistant", content=cells.as_text(response, column="history")))
    return messages
