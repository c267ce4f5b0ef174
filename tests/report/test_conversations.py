import re
from html.parser import HTMLParser

import pytest

from rayalign.report.conversations import SHOWN_IMAGES, Answers, Conversation, answers_section, card
from tests.report.test_page import HOSTILE, image_bytes


class Read(HTMLParser):
    """What a reader sees of some markup, in order: texts, and pictures by what they are called."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.seen.append(f"[{dict(attrs)['alt']}]")

    def handle_data(self, data: str) -> None:
        self.seen += [data.strip()] if data.strip() else []


def read(*turns: tuple[str, str], images: int = 0) -> list[str]:
    return Read(card("", Conversation(turns, "", "", (image_bytes(),) * images), [])).seen


def test_turns_are_read_one_by_one_with_their_roles_and_each_picture_at_its_place() -> None:
    turns = (
        ("system", "Be brief."),
        ("user", "Look: <image> and <image>\nWhat is it?"),
        ("assistant", "A cat."),
        ("user", "<image>And this?"),
    )
    assert read(*turns, images=3) == [
        *("system", "Be brief."),
        *("user", "Look:", "[picture 1 of 3]", "and", "[picture 2 of 3]", "What is it?"),
        *("assistant", "A cat."),
        *("user", "[picture 3 of 3]", "And this?"),
    ]


@pytest.mark.parametrize(
    ("text", "images", "seen"),
    [
        ("", 0, []),
        ("<image>", 1, ["[picture 1 of 1]"]),
        ("no mark", 1, ["no mark", "[picture 1 of 1]"]),
        ("one <image> two <image>", 1, ["one", "[picture 1 of 1]", "two", "<image>"]),
        ("<image><image>", 0, ["<image>", "<image>"]),
        ("<image >", 0, ["<image >"]),
        ("line\n\n<image>\n\nline", 1, ["line", "[picture 1 of 1]", "line"]),
        ("a  b\n  c", 0, ["a  b\n  c"]),
        (HOSTILE, 0, [HOSTILE]),
        (f"{HOSTILE}<image>{HOSTILE}", 1, [HOSTILE, "[picture 1 of 1]", HOSTILE]),
        ("<|im_start|>user\nسلام", 0, ["<|im_start|>user\nسلام"]),
        ("x" * 6000 + "<image>", 1, ["x" * 5000, "… and 1,000 more characters", "[picture 1 of 1]"]),
    ],
)
def test_a_turn_shows_its_text_and_all_pictures_whatever_it_holds(text: str, images: int, seen: list[str]) -> None:
    assert read(("user", text), images=images) == ["user", *seen]


def test_of_many_pictures_the_first_are_shown_and_the_others_named() -> None:
    number = SHOWN_IMAGES + 2
    seen = read(("user", "<image>" * number + "How many?"), images=number)
    assert seen[-4:] == [
        f"[picture {SHOWN_IMAGES} of {number}]",
        f"picture {SHOWN_IMAGES + 1} of {number} is not shown",
        f"picture {number} of {number} is not shown",
        "How many?",
    ]


SHOWN = {name: Conversation((("user", f"What is {name}?"),), f"good {name}", f"poor {name}") for name in ("c", "b", "a")}


def test_the_models_own_answers_stand_beside_the_responses_of_the_data() -> None:
    markup = answers_section(Answers({"b": "old words", "a": ""}, {"b": "new words"}), SHOWN)
    assert Read(markup).seen[2:] == [
        *("b", "user", "What is b?", "before training", "old words", "after training", "new words"),
        *("chosen", "good b", "rejected", "poor b"),
        *("a", "user", "What is a?", "before training", "(nothing: it ends at once)", "after training", "(not asked)"),
        *("chosen", "good a", "rejected", "poor a"),
    ]


def test_a_side_that_a_record_does_not_have_and_a_record_that_is_gone_are_left_out() -> None:
    single = {"a": Conversation((("user", "What?"),), "good", "")}
    markup = answers_section(Answers({"a": "x", "gone": "y"}), single)
    assert "rejected" not in markup
    assert "gone" not in markup
    assert answers_section(Answers({"gone": "y"}), single) == answers_section(Answers(), SHOWN) == ""


def test_a_model_that_could_not_be_asked_is_named_with_the_reason() -> None:
    text = " ".join(Read(answers_section(Answers(failed=f"TypeError: {HOSTILE}"), SHOWN)).seen)
    assert text == f"What the model itself answers It could not be asked: TypeError: {HOSTILE}"
    later = " ".join(Read(answers_section(Answers({"a": "x"}, failed="out of memory"), SHOWN)).seen)
    assert "The last ones could not be made: out of memory" in later
    assert re.search("before training x", later)
