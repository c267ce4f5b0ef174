"""A response's text while it is generated: the same as when it is decoded whole, up to a stop text."""

import itertools
from typing import Any

import pytest

from rayalign.serving.response_text import ResponseText
from tests.tiny_families import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def pieces(tokenizer: Any, text: str, *stop: str) -> tuple[list[str], ResponseText]:
    """What each token of a text lets go, and at last what was held back."""
    response = ResponseText(tokenizer, stop)
    found = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        found.append(response.add(token))
        if response.stopped:
            return found, response
    return [*found, response.finish()], response


@pytest.mark.parametrize("text", ["The digit is two.", "  a\n b  ", "Größe: 日本 🐈‍⬛!", "", "   ", "one </s> two<pad>"])
def test_the_pieces_together_are_the_text_decoded_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, _ = pieces(tokenizer, text)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_no_piece_holds_half_a_character_or_white_space_that_may_end_the_response(tokenizer: Any) -> None:
    found, _ = pieces(tokenizer, "a 日本 b")
    said = list(itertools.accumulate(found))
    assert all("\ufffd" not in piece for piece in found)
    assert all(text == text.rstrip() for text in said)
    assert len([piece for piece in found if piece]) >= 4


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The digit is two.", ("digit",), "The"),
        ("The digit is two.", ("is two", "digit is"), "The"),  # the first in the text counts
        ("The digit is two.", ("The",), ""),
        ("The digit is two.", ("two!",), "The digit is two."),  # its beginning was held back for nothing
        ("a\n\nb", ("\n\n",), "a"),
        ("aab", ("ab",), "a"),
    ],
)
def test_a_stop_text_ends_the_response_before_it(tokenizer: Any, text: str, stop: tuple[str, ...], expected: str) -> None:
    found, response = pieces(tokenizer, text, *stop)
    assert "".join(found) == expected
    assert response.stopped == (expected != text)
