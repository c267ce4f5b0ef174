"""What --truncation_strategy takes from a record, by its lengths alone."""

from typing import get_args, get_type_hints

import pytest

from rayalign.config.sections import DataConfig
from rayalign.data.truncation import Cut, TruncationStrategy, count_older_rounds, next_cut, without_oldest_round
from rayalign.formats.records import Message


def conversation(*contents: str, system: str | None = None) -> list[Message]:
    turns = [Message(role="assistant" if i % 2 else "user", content=content) for i, content in enumerate(contents)]
    return [*([Message(role="system", content=system)] if system else []), *turns]


@pytest.mark.parametrize(
    ("strategy", "prompt", "older_rounds", "cut"),
    [
        *((strategy, 15, 1, "nothing") for strategy in get_args(TruncationStrategy)),  # 15 + 5 tokens are 20
        ("delete", 16, 1, "record"),
        ("left", 16, 1, "oldest round"),
        ("left", 16, 0, "record"),  # the last question is never cut
        ("right", 16, 1, "responses"),
        ("right", 19, 1, "responses"),  # one token is left of each
        ("right", 20, 1, "record"),  # nothing would be left
        ("raise", 16, 1, "run"),
    ],
)
def test_a_record_longer_than_twenty_tokens_loses_what_the_strategy_says(
    strategy: TruncationStrategy, prompt: int, older_rounds: int, cut: Cut
) -> None:
    assert next_cut(prompt, 5, older_rounds=older_rounds, max_length=20, strategy=strategy) == cut


def test_every_strategy_of_the_flag_is_known() -> None:
    assert get_type_hints(DataConfig)["truncation_strategy"] == TruncationStrategy


def test_the_oldest_round_goes_with_its_images_and_the_system_message_stays() -> None:
    messages = conversation("<image> a <image>", "b", "c <image>", "d", "e", system="s")
    assert count_older_rounds(messages) == 2
    left, images = without_oldest_round(messages, [1, 2, 3])
    assert left == conversation("c <image>", "d", "e", system="s")
    assert images == [3]
    assert count_older_rounds(left) == 1
    left, images = without_oldest_round(left, images)
    assert (left, images) == (conversation("e", system="s"), [])
    assert count_older_rounds(left) == 0
    assert len(messages) == 6  # what is given stays as it is
