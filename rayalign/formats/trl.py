"""TRL: prompt, chosen, rejected as text or messages, or chosen and rejected that hold the prompt; completion + label is KTO."""

from collections.abc import Mapping, Set
from typing import Any

from rayalign.formats import cells
from rayalign.formats.records import Message, PreferenceRecord, RecordError, build_record

NEEDS = "prompt, chosen, rejected"


def matches(columns: Set[str]) -> bool:
    return "chosen" in columns or {"prompt", "completion"} <= columns


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    column = "chosen" if "chosen" in row else "completion"
    given, given_images = _prompt(row)
    prompt, chosen, inline = _response(row, column, given)
    rejected = None
    if "rejected" in row:
        rejected_prompt, rejected, rejected_inline = _response(row, "rejected", given)
        if rejected_prompt != prompt or rejected_inline not in ((), inline):
            raise RecordError("prompts differ", f"only the last response may differ from {column!r}", field="rejected")
    source = "prompt" if "prompt" in row else column
    return build_record(
        id=id,
        messages=prompt,
        images=cells.all_images(row, given_images or inline),
        chosen=chosen,
        rejected=rejected,
        margin=cells.margin(row),
        label=cells.label(row),
        columns={"query": source, "history": source, "chosen": column},
    )


def _prompt(row: Mapping[str, Any]) -> tuple[list[Message], cells.Images]:
    """The `prompt` cell as messages; nothing where the responses hold it."""
    value = row.get("prompt", [])
    if isinstance(value, str):
        return [*cells.system_message(row), Message(role="user", content=cells.text(row, "prompt"))], ()
    messages, inline = cells.conversation(value, column="prompt")
    has_system = any(m.role == "system" for m in messages)
    return [*([] if has_system else cells.system_message(row)), *messages], inline


def _response(row: Mapping[str, Any], column: str, given: list[Message]) -> tuple[list[Message], str, cells.Images]:
    """The messages before a response, the response, and the images inside a conversation that holds its own prompt."""
    value = row[column]
    if isinstance(value, str):
        if "prompt" not in row:
            raise RecordError(
                "missing field", f"{column!r} is plain text, so the question must stand in a column of its own", field="prompt"
            )
        return given, cells.text(row, column), ()
    conversation, inline = cells.conversation(value, column=column)
    before, response = cells.split_response(conversation, column=column)
    if before[: len(given)] == given:
        return before, response, inline
    if (
        isinstance(row.get("prompt"), str) and before
    ):  # the text repeats the conversation's question; of it, only a system message is new
        return given[:-1] + before, response, inline
    return given + before, response, inline
