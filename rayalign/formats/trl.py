"""TRL: prompt, chosen, rejected as text or messages, or chosen and rejected that hold the prompt; completion + label is KTO.

TRL's own code splits responses in plain text that hold their prompt. Importing it costs 0.7 s and 50 MiB in each process, so
only rows of that kind do; in responses of messages the prompt is the messages before the last, and no splitting is needed.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from rayalign.formats import cells
from rayalign.formats.records import IMAGE_MARK, Message, PreferenceRecord, RecordError, build_record

NEEDS = "prompt, chosen, rejected"
READS = frozenset(("prompt", "chosen", "rejected", "completion", "chat_template_kwargs"))

BESIDE_TEXTS = ("chosen", "rejected", "system", "images", "image")
"""What besides numbers a row of plain texts without a prompt may have: any other column could be its prompt."""


def matches(columns: Set[str]) -> bool:
    return "chosen" in columns or {"prompt", "completion"} <= columns


def parse(row: Mapping[str, Any], *, id: str) -> PreferenceRecord:
    if row.get("chat_template_kwargs"):
        raise RecordError("unsupported content", "a row can't change the chat template", field="chat_template_kwargs")
    if "prompt" not in row and all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
        row = {**row, **_split_texts(row)}
    given = _prompt(row)
    read = cells.one_of(row, ("chosen", "completion"), lambda column: _response(row, column, *given), what="responses")
    assert read is not None  # by `matches`
    column, chosen = read
    rejected = _response(row, "rejected", *given) if "rejected" in row else None
    if rejected is not None and (rejected.prompt != chosen.prompt or rejected.images not in ((), given[1], chosen.images)):
        raise RecordError("prompts differ", f"only the last response may differ from {column!r}", field="rejected")
    source = "prompt" if "prompt" in row else column
    return build_record(
        id=id,
        messages=chosen.prompt,
        images=cells.all_images(row, chosen.images),
        chosen=chosen.text,
        rejected=rejected.text if rejected is not None else None,
        margin=cells.margin(row),
        label=cells.label(row),
        columns={"query": source, "history": source, "chosen": column},
    )


class Response(NamedTuple):
    """A response with all that stands before it, and the images inside of that."""

    prompt: list[Message]
    text: str
    images: cells.Images


def _prompt(row: Mapping[str, Any]) -> tuple[list[Message], cells.Images]:
    """The `prompt` cell as messages; nothing where the responses hold it."""
    value = row.get("prompt", [])
    if isinstance(value, str):
        return [Message(role="user", content=cells.text(row, "prompt"))], ()
    return cells.conversation(value, column="prompt")


def _response(row: Mapping[str, Any], column: str, given: list[Message], images: cells.Images) -> Response:
    """What a column of responses holds: a text, a message, or a conversation that has the prompt in it, whole or in part.
    `given` and `images` are the `prompt` cell's."""
    value = row[column]
    if isinstance(value, str):
        if "prompt" not in row:
            raise RecordError(
                "missing field", f"{column!r} is plain text, so the question must stand in a column of its own", field="prompt"
            )
        return Response(cells.with_system(row, given, column="prompt"), cells.text(row, column), images)
    conversation, inline = cells.conversation(value, column=column)
    before, text = cells.split_response(conversation, column=column)
    if isinstance(row.get("prompt"), str) and before:
        _require_same_question(given[0].content, before, column=column)
    elif before[: len(given)] == given:  # the conversation holds the whole prompt
        if images and inline and inline[: len(images)] != images:
            raise RecordError("prompts differ", f"its images are others than those of {column!r}", field="prompt")
        inline = inline or images
    else:
        before, inline = given + before, images + inline
    return Response(cells.with_system(row, before, column=column), text, inline)


def _require_same_question(prompt: str, before: Sequence[Message], *, column: str) -> None:
    """Raises RecordError where a text that repeats a conversation's question, its first or its last one, is another."""
    questions = [message.content.replace(IMAGE_MARK, "").strip() for message in before if message.role == "user"]
    if prompt.replace(IMAGE_MARK, "").strip() not in questions[:1] + questions[-1:]:
        words = f"the text is neither the first nor the last question of {column!r}; take it out, or make them the same"
        raise RecordError("prompts differ", words, field="prompt")


def _split_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Two plain texts as the prompt that both begin with and what each says after it.

    TRL's `extract_prompt` splits where the texts begin to differ; where that is inside a word, the whole word goes to the
    responses. Raises RecordError where another column could be the prompt, and where the texts don't begin with the same word.
    """
    others = [name for name, value in row.items() if name not in BESIDE_TEXTS and value and not isinstance(value, (int, float))]
    if others:
        words = (
            f"'chosen' is plain text, and the question may stand in {' or '.join(others)}; call its column 'prompt', or leave "
            "out columns that aren't needed, if 'chosen' and 'rejected' begin with it"
        )
        raise RecordError("missing field", words, field="prompt")
    chosen, rejected = cells.text(row, "chosen"), cells.text(row, "rejected")
    if not chosen or chosen[:1] != rejected[:1]:
        raise _no_shared_prompt()
    from trl.data_utils import extract_prompt

    start = _start_of_word(chosen, rejected, len(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]))
    if not chosen[:start].strip():
        raise _no_shared_prompt()
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _start_of_word(chosen: str, rejected: str, place: int) -> int:
    """The last place up to `place` where a word begins in both texts, or the space before it, as TRL has it."""
    while place and not chosen[place - 1].isspace() and not (chosen[place].isspace() and rejected[place].isspace()):
        place -= 1
    return place - 1 if place and chosen[place - 1] == " " else place


def _no_shared_prompt() -> RecordError:
    words = (
        "the row has no prompt, and 'chosen' and 'rejected' don't begin with the same text; give the question a column of its "
        "own, called 'prompt'"
    )
    return RecordError("missing field", words, field="prompt")
