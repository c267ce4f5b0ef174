"""What becomes of a record that is longer than --max_length: one rule, for the encoder and for the estimate of lengths where
there is no tokenizer."""

from collections.abc import Sequence
from typing import Literal, TypeVar

from rayalign.formats.records import IMAGE_MARK, Message

T = TypeVar("T")

TruncationStrategy = Literal["delete", "left", "right", "raise"]
"""See --truncation_strategy."""

Cut = Literal["nothing", "oldest round", "responses", "record", "run"]
"""What goes: `oldest round` and then perhaps more; the tails of the `responses` beyond `max_length` - prompt tokens; the whole
`record`; or the `run` stops."""


class RecordTooLong(ValueError):
    """A record that does not fit, where --truncation_strategy raise ends the run for it."""


def next_cut(prompt: int, response: int, *, older_rounds: int, max_length: int, strategy: TruncationStrategy) -> Cut:
    """What a record has to lose that has so many tokens in its prompt and in its longest response, and so many rounds of
    question and response before its last question."""
    if prompt + response <= max_length:
        return "nothing"
    match strategy:
        case "raise":
            return "run"
        case "left" if older_rounds:
            return "oldest round"
        case "right" if prompt < max_length:
            return "responses"
    return "record"


def count_older_rounds(messages: Sequence[Message]) -> int:
    """The rounds of question and response before the last question."""
    return (len(messages) - _first_turn(messages)) // 2


def without_oldest_round(messages: Sequence[Message], images: Sequence[T]) -> tuple[list[Message], list[T]]:
    """A conversation without its oldest question and the response to it, and the images without theirs."""
    start = _first_turn(messages)
    dropped = sum(message.content.count(IMAGE_MARK) for message in messages[start : start + 2])
    return [*messages[:start], *messages[start + 2 :]], list(images[dropped:])


def _first_turn(messages: Sequence[Message]) -> int:
    return 1 if messages[0].role == "system" else 0
