"""What a model's own text says to a closed question."""

import pytest

from rayalign.evaluation.benchmarks.answers import letter_in, yes_or_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("Yes, there is no doubt.", "Yes"),
        ("There is not a cat in the image.", "No"),
        ("The image has no dog. Yes, it has a cat.", "No"),
        ("I think yes", "Yes"),
        ("A cat.", None),
        ("", None),
        ("Nothing else.", None),
    ],
)
def test_yes_and_no_are_found_in_the_first_sentence(text: str, expected: str | None) -> None:
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" (C) a cat", "C"),
        ("B. a dog", "B"),
        ("The answer is D", "D"),
        ("Answer: A", "A"),
        ("It must be C because of its ears", "C"),
        ("A dog is to the left", None),
        ("There is A dog", None),
        ("A dog, so B", "B"),
        ("B or C", None),
        ("E", None),
        ("None of them", None),
    ],
)
def test_a_letter_is_found_where_it_stands_for_an_option(text: str, expected: str | None) -> None:
    assert letter_in(text, ("A", "B", "C", "D")) == expected


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "**{}**",
        "`{}`",
        "__{}__",
        '"{}"',
        "[{}]",
        "{};",
        "{} (cat)",
        "{} - cat",
        "{} \u2014 cat",
        "**{}** cat",
        "{}\nBecause the cat",
        "{}\nbecause the cat",
        "Answer: **{}**",
        "**Answer:** {}",
        "Answer:\n\n**{}**",
        "The answer is **{}**, not D.",
        "\\boxed{{{}}}",
        "$\\boxed{{\\text{{{}}}}}$",
        "The correct one would be **{}**.",
        "I would take {}",
        "{} is the right one.",
        "{} because of its ears",
        "It must be {} since it has ears",
    ],
)
def test_all_letters_are_read_alike(form: str) -> None:
    assert [letter_in(form.format(letter), ("A", "B", "C", "D")) for letter in "ABC"] == ["A", "B", "C"]


@pytest.mark.parametrize("form", ["{} or D", "{} and D are both right"])
def test_two_letters_are_none_alike(form: str) -> None:
    assert [letter_in(form.format(letter), ("A", "B", "C", "D")) for letter in "ABC"] == [None, None, None]
