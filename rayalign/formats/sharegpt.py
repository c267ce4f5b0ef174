"""ShareGPT as LLaMA-Factory reads it: conversations of {from, value}, chosen, rejected, images; with `label`, KTO."""

from collections.abc import Mapping, Set
from typing import Any

from rayalign.formats import cells
from rayalign.formats.records import PreferenceRecord, RecordError, build_record

NEEDS = "conversations, chosen, rejected"
READS = frozenset(("conversations", "chosen", "rejected", "rejected_response"))


def matches(columns: Set[str]) -> bool:
    return "conversations" in columns


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    messages, inline = cells.conversation(row["conversations"], column="conversations")
    if "chosen" in row:
        prompt, chosen = messages, _response(row["chosen"], column="chosen")
    else:
        prompt, chosen = cells.split_response(messages, column="conversations")
    found = cells.one_of(
        row, ("rejected", "rejected_response"), lambda column: _response(row[column], column=column), what="rejected responses"
    )
    rejected_column, rejected = found or ("rejected_response", None)
    return build_record(
        id=id,
        messages=cells.with_system(row, prompt, column="conversations"),
        images=cells.all_images(row, inline),
        chosen=chosen,
        rejected=rejected,
        margin=cells.margin(row),
        label=cells.label(row),
        columns={
            "query": "conversations",
            "history": "conversations",
            "chosen": "chosen" if "chosen" in row else "conversations",
            "rejected": rejected_column,
        },
    )


def _response(value: Any, *, column: str) -> str:
    """A response as text, as one message, or as a list of one message."""
    if isinstance(value, str):
        return cells.as_text(value, column=column)
    messages, _ = cells.conversation(value, column=column)
    before, response = cells.split_response(messages, column=column)
    if before:
        raise RecordError(
            "wrong type", f"expected one response, found a conversation of {len(messages)} messages", field=column
        )
    return response
