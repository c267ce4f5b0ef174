"""<img>path</img> inside of the text: an image at its place, in every format."""

from typing import Any

import pytest

from rayalign.formats.parse import parse_row
from rayalign.formats.records import PreferenceRecord, RecordError

CHAT_END = {"role": "assistant", "content": "A cat."}


def rows(text: str) -> dict[str, dict[str, Any]]:
    user = {"role": "user", "content": text}
    return {
        "ms-swift 2": {"query": text, "response": "A cat.", "rejected_response": "A dog."},
        "ms-swift 4": {"messages": [user, CHAT_END], "rejected_response": "A dog."},
        "TRL": {"prompt": text, "chosen": "A cat.", "rejected": "A dog."},
        "TRL messages": {"prompt": [user], "chosen": [CHAT_END], "rejected": [{"role": "assistant", "content": "A dog."}]},
        "ShareGPT": {"conversations": [{"from": "human", "value": text}], "chosen": "A cat.", "rejected": "A dog."},
        "RLAIF-V": {"question": text, "chosen": "A cat.", "rejected": "A dog."},
    }


def parse(row: dict[str, Any]) -> PreferenceRecord:
    return parse_row(row, id="a")


@pytest.mark.parametrize("format", rows(""))
@pytest.mark.parametrize(
    ("text", "marked", "images"),
    [
        ("<img>a.png</img>What?", "<image>What?", ("a.png",)),
        ("What is <img>/x/my a.png</img> here?", "What is <image> here?", ("/x/my a.png",)),
        (
            "Picture 1: <img> a.png </img>\nPicture 2: <img>b</img>\n?",
            "Picture 1: <image>\nPicture 2: <image>\n?",
            ("a.png", "b"),
        ),
        ("<img>https://host/a?b=c&d</img>?", "<image>?", ("https://host/a?b=c&d",)),
        ("<img>data:image/png;base64,iVBORw0KGgo=</img>?", "<image>?", ("data:image/png;base64,iVBORw0KGgo=",)),
        ("What does <img> do?", "What does <img> do?", ()),
        ("What does <img src='a.png'></img> do?", "What does <img src='a.png'></img> do?", ()),
        ("Is a</img> right?", "Is a</img> right?", ()),
        ("<img><b>a</b></img>", "<img><b>a</b></img>", ()),
    ],
)
def test_a_tag_is_an_image_at_its_place(format: str, text: str, marked: str, images: tuple[str, ...]) -> None:
    record = parse(rows(text)[format])
    assert (record.messages[-1].content, record.images) == (marked, images)


@pytest.mark.parametrize("format", rows(""))
def test_a_tag_and_a_column_must_agree(format: str) -> None:
    row = rows("<img>a.png</img>What?")[format]
    assert parse(row | {"images": ["a.png"]}) == parse(row)
    assert parse(row | {"images": []}) == parse(row)
    for other in (["b.png"], ["a.png", "b.png"], [b"a.png"]):
        with pytest.raises(RecordError) as caught:
            parse(row | {"images": other})
        assert (caught.value.reason, str(caught.value)) == (
            "ambiguous images",
            "images: images stand both in their column and as <img>...</img> in the text, and they differ; keep one",
        )


def test_tags_in_the_history_come_first() -> None:
    row = rows("<img>b.png</img>And this?")["ms-swift 2"] | {"history": [["<img>a.png</img>What?", "A cow."]]}
    record = parse(row)
    assert record.images == ("a.png", "b.png")
    assert [message.content for message in record.messages] == ["<image>What?", "A cow.", "<image>And this?"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": "<img></img>What?"}, "image missing"),
        ({"query": "<img> </img>What?"}, "image missing"),
        ({"query": "<img>a.png</img><image>What?"}, "image mark count"),
        ({"query": "<img>a.png</img><image>What?", "images": ["a.png"]}, "image mark count"),
        ({"response": "<img>a.png</img>"}, "image mark in response"),
        ({"rejected_response": "See <img>a.png</img>."}, "image mark in response"),
        ({"history": [["What?", "<img>a.png</img>"]]}, "image mark in response"),
        ({"system": "<img>a.png</img>"}, "image mark in system"),
    ],
)
def test_a_tag_where_no_image_can_be_drops_the_record(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse(rows("What?")["ms-swift 2"] | changes)
    assert caught.value.reason == reason
