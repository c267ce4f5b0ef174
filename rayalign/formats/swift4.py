"""ms-swift 4: `messages` that end with the chosen response, and rejected_response or rejected_messages; with `label`, KTO."""

from collections.abc import Mapping, Set
from typing import Any

from rayalign.formats import cells
from rayalign.formats.records import Message, PreferenceRecord, RecordError, build_record

NEEDS = "messages, rejected_response (or rejected_messages)"
READS = frozenset(("messages", "rejected_response", "rejected_messages"))


def matches(columns: Set[str]) -> bool:
    return "messages" in columns and "chosen" not in columns


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    messages, inline = cells.conversation(row["messages"], column="messages")
    prompt, chosen = cells.split_response(messages, column="messages")
    prompt = cells.with_system(row, prompt, column="messages")
    images = cells.all_images(row, inline)
    found = cells.one_of(
        row,
        ("rejected_messages", "rejected_response"),
        lambda column: _rejected(row, column, prompt, inline),
        what="rejected responses",
    )
    column, rejected = found or ("rejected_response", None)
    return build_record(
        id=id,
        messages=prompt,
        images=images,
        chosen=chosen,
        rejected=rejected,
        margin=cells.margin(row),
        label=cells.label(row),
        columns={"system": "messages", "query": "messages", "history": "messages", "chosen": "messages", "rejected": column},
    )


def _rejected(row: Mapping[str, Any], column: str, prompt: list[Message], images: cells.Images) -> str:
    """The rejected response: text, its message alone, or the whole conversation, which must agree with `messages` before it,
    and with the images inside of them."""
    value = row[column]
    if isinstance(value, str):
        return cells.as_text(value, column=column)
    conversation, inline = cells.conversation(value, column=column)
    before, response = cells.split_response(conversation, column=column)
    before = cells.with_system(row, before, column=column) if before else []
    without_system = [m for m in prompt if m.role != "system"]
    if before not in ([], prompt, without_system):
        raise RecordError("prompts differ", "only the last response may differ from 'messages'", field=column)
    if inline not in ((), images):
        raise RecordError("unsupported content", "the rejected response has other images than the chosen one", field=column)
    return response
