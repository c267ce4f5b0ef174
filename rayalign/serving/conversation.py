"""A conversation from outside as the record that is encoded: nothing in its text is taken for an image."""

from collections.abc import Sequence

from rayalign.formats.cells import as_text
from rayalign.formats.records import IMAGE_MARK, IMAGE_TAG, Message, PreferenceRecord, RecordError, build_record

COLUMNS = {"query": "messages", "chosen": "responses"}
"""What errors call the parts of a request."""


def require_plain(text: str) -> str:
    """The text; raises RecordError where it is no valid Unicode, or holds what stands for an image in a record."""
    as_text(text, column="messages")
    tag = IMAGE_TAG.search(text)
    if IMAGE_MARK in text or tag:
        held = tag.group()[:40] if tag else IMAGE_MARK
        raise RecordError(
            "image mark in text", f"{held} stands for an image in rayalign's records: take it out of the text", field="messages"
        )
    return text


def record_of(messages: Sequence[Message], images: Sequence[bytes], response: str) -> PreferenceRecord:
    """The record of a conversation, whose `<image>` marks stand for the images, and a response. Raises RecordError."""
    chosen = as_text(response, column="responses")
    return build_record(id="request", messages=messages, images=images, chosen=chosen, columns=COLUMNS, marks_only=True)
