"""The record's invariants, and what is said where one is broken."""

import math
import pickle

import pydantic
import pytest

from rayalign.formats.records import (
    Message,
    PreferenceRecord,
    RecordError,
    build_record,
    place_marks,
    record_errors,
    require_desirable,
    require_label,
    require_pair,
)

QUESTION = Message(role="user", content="What is this?")


def build(**changes: object) -> PreferenceRecord:
    values: dict[str, object] = {"id": "a:0", "messages": [QUESTION], "images": [], "chosen": "A cat.", "rejected": "A dog."}
    return build_record(**{**values, **changes})  # type: ignore[arg-type]


def test_error_survives_pickling_with_reason_field_and_words() -> None:
    error = pickle.loads(pickle.dumps(RecordError("too long", "30 tokens, the limit is 20", field="messages")))
    assert (type(error), error.reason, error.field) == (RecordError, "too long", "messages")
    assert str(error) == "messages: 30 tokens, the limit is 20"


def test_error_without_words_or_field_says_its_reason() -> None:
    assert str(RecordError("image missing")) == "image missing"


def test_records_and_messages_are_frozen_and_survive_pickling() -> None:
    record = build(images=[b"\x89PNG"], margin=0.5, label=True)
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        record.chosen = "x"


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
        PreferenceRecord(id="a", messages=(QUESTION,), chosen="b", winner="c")  # type: ignore[call-arg]


def test_a_record_made_directly_is_checked_too() -> None:
    with pytest.raises(pydantic.ValidationError, match="the text holds 0 <image> marks, and the number of images is 1"):
        PreferenceRecord(id="a", messages=(QUESTION,), images=("a.png",), chosen="b")


def test_missing_marks_go_in_front_of_the_first_rounds_query() -> None:
    messages = [
        Message(role="system", content="Be brief."),
        Message(role="user", content="And <image>?"),
        Message(role="assistant", content="A cat."),
        Message(role="user", content="Sure?"),
    ]
    record = build(messages=messages, images=["a.png", "b.png", "c.png"])
    assert [m.content for m in record.messages] == ["Be brief.", "<image><image>And <image>?", "A cat.", "Sure?"]


def test_marks_that_are_there_stay_where_they_are() -> None:
    messages = (Message(role="user", content="Look: <image> and <image>."),)
    assert place_marks(messages, 2) == messages


def test_an_image_alone_is_a_question() -> None:
    assert build(messages=[Message(role="user", content="")], images=["a.png"]).messages[0].content == "<image>"


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"messages": []}, "missing field", "query: there is no question to respond to"),
        ({"messages": [Message(role="system", content="x")]}, "missing field", "query: there is no question to respond to"),
        ({"messages": [Message(role="user", content=" \n")]}, "empty query", "query: the question is empty"),
        (
            {"messages": [QUESTION, QUESTION]},
            "roles not alternating",
            "messages: user, user: before the trained response come user and assistant in turn, from user to user, "
            "after at most one system message",
        ),
        (
            {"messages": [QUESTION, Message(role="assistant", content="A.")]},
            "roles not alternating",
            "messages: user, assistant: before the trained response come user and assistant in turn, from user to user, "
            "after at most one system message",
        ),
        (
            {"messages": [QUESTION, Message(role="assistant", content=" "), QUESTION]},
            "empty response",
            "messages: the response of round 1 is empty",
        ),
        ({"chosen": " \t"}, "empty response", "chosen: the response is empty"),
        ({"rejected": ""}, "empty response", "rejected: the response is empty"),
        (
            {"chosen": "A dog.", "rejected": " A dog.\n"},
            "identical responses",
            "rejected: the response equals chosen, so there is nothing to prefer",
        ),
        (
            {"rejected": "See <image>"},
            "image mark in response",
            "rejected: a response can't hold an image, but this one holds <image>",
        ),
        (
            {"messages": [Message(role="system", content="<image>"), QUESTION]},
            "image mark in system",
            "system: <image> can stand in user messages only",
        ),
        (
            {"messages": [QUESTION, Message(role="assistant", content="<image>"), QUESTION]},
            "image mark in response",
            "messages: <image> can stand in user messages only",
        ),
        (
            {"messages": [Message(role="user", content="<image><image>")], "images": ["a.png"]},
            "image mark count",
            "images: the text holds 2 <image> marks, and the number of images is 1",
        ),
        ({"margin": math.nan}, "bad margin", "margin: nan is no number between -1e+06 and 1e+06"),
        ({"margin": math.inf}, "bad margin", "margin: inf is no number between -1e+06 and 1e+06"),
        ({"margin": -1.1e6}, "bad margin", "margin: -1100000.0 is no number between -1e+06 and 1e+06"),
        ({"chosen": 5}, "wrong type", "chosen: Input should be a valid string"),
        ({"margin": True}, "wrong type", "margin: Input should be a valid number"),
        ({"label": "yes"}, "wrong type", "label: Input should be a valid boolean"),
    ],
)
def test_a_broken_invariant_is_a_record_error_that_names_the_field(changes: dict[str, object], reason: str, words: str) -> None:
    with pytest.raises(RecordError) as caught:
        build(**changes)
    assert (caught.value.reason, str(caught.value)) == (reason, words)


def test_errors_use_the_rows_own_column_names() -> None:
    with pytest.raises(RecordError, match=r"^rejected_response: the response equals response, so there is nothing to prefer$"):
        build(rejected="A cat.", columns={"chosen": "response", "rejected": "rejected_response"})


def test_a_pair_is_required_only_on_demand() -> None:
    require_pair(build())
    with pytest.raises(RecordError) as caught:
        require_pair(build(rejected=None))
    assert (caught.value.reason, caught.value.field) == ("missing field", "rejected_response")
    assert str(caught.value) == (
        "rejected_response: the record has one response only, and this algorithm compares a chosen with a rejected one; "
        "add the column, or train with sft (or kto, with a label)"
    )


@pytest.mark.parametrize(("rejected", "label"), [("A dog.", None), ("A dog.", True), (None, True), (None, False)])
def test_a_pair_and_a_labelled_response_both_say_what_is_good(rejected: str | None, label: bool | None) -> None:
    require_label(build(rejected=rejected, label=label))


@pytest.mark.parametrize(
    ("rejected", "label", "reason", "words"),
    [
        (
            None,
            None,
            "missing field",
            "label: the record has one response and does not say whether it is good; add label (true or false), or a rejected "
            "response",
        ),
        (
            "A dog.",
            False,
            "contradictory label",
            "label: the chosen response is labelled as bad, although there is a rejected one; remove the label, or keep one "
            "response",
        ),
    ],
)
def test_a_record_that_does_not_say_what_is_good_is_refused(
    rejected: str | None, label: bool | None, reason: str, words: str
) -> None:
    with pytest.raises(RecordError) as caught:
        require_label(build(rejected=rejected, label=label))
    assert (caught.value.reason, caught.value.field, str(caught.value)) == (reason, "label", words)


def test_a_pair_whose_chosen_response_is_labelled_as_bad_is_refused_by_what_compares_too() -> None:
    require_pair(build(rejected="A dog.", label=True))
    with pytest.raises(RecordError, match="the chosen response is labelled as bad"):
        require_pair(build(rejected="A dog.", label=False))


@pytest.mark.parametrize("rejected", ["A dog.", None])
def test_only_a_response_labelled_as_bad_is_not_imitated(rejected: str | None) -> None:
    for label in (None, True):
        require_desirable(build(rejected=rejected, label=label))
    with pytest.raises(RecordError) as caught:
        require_desirable(build(rejected=rejected, label=False))
    assert (caught.value.reason, caught.value.field) == ("undesirable response", "label")
    assert str(caught.value) == "label: the response is labelled as bad, and sft imitates responses"


class PanicException(BaseException):
    """As the libraries in Rust have one each, of no class that could be imported."""


def test_a_library_that_panics_over_a_record_drops_it_and_an_interrupt_ends_the_program() -> None:
    with pytest.raises(RecordError, match=r"^PanicException: byte index 3 is not a char boundary$"), record_errors():
        raise PanicException("byte index 3 is not a char boundary")
    for ending in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ending), record_errors():
            raise ending
