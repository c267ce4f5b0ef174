"""RLAIF-V's parquet rows: question, chosen, rejected, image {bytes, path}, and columns on their origin, which are not used."""

from collections.abc import Mapping, Set
from typing import Any

from rayalign.formats import cells
from rayalign.formats.records import Message, PreferenceRecord, build_record

NEEDS = "question, chosen, rejected, image"
READS = frozenset(("question", "chosen", "rejected"))


def matches(columns: Set[str]) -> bool:
    return {"question", "chosen"} <= columns and "prompt" not in columns


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    question = Message(role="user", content=cells.text(row, "question"))
    return build_record(
        id=id,
        messages=[*cells.system_message(row), question],
        images=cells.images(row),
        chosen=cells.text(row, "chosen"),
        rejected=cells.optional_text(row, "rejected"),
        margin=cells.margin(row),
        label=cells.label(row),
        columns={"query": "question", "history": "question"},
    )
