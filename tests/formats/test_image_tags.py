"""Images inside of the text, in every format: <img>path</img>, and what other tools and models write for one."""

from typing import Any

import pytest

from rayalign.formats.parse import parse_row
from rayalign.formats.records import Message, PreferenceRecord, RecordError
from rayalign.serving.conversation import record_of

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
        ("<IMG>a.png</IMG>What?", "<image>What?", ("a.png",)),
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


PLACEHOLDERS = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_pad|>",
    "<|image|>",
    "<|begin_of_image|><|image|><|end_of_image|>",
    "<|image_1|>",
    "<image_1>",
    "<image 1>",
    "<image/>",
    "<Image>",
    "<image_placeholder>",
    "<ImageHere>",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "<img><IMG_CONTEXT></img>",
    "[IMG]",
)


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
@pytest.mark.parametrize("format", rows(""))
def test_what_others_write_for_an_image_is_a_mark_where_there_is_one(format: str, placeholder: str) -> None:
    row = rows(f"What is {placeholder}here?")[format]
    assert parse(row | {"images": ["a.png"]}).messages[-1].content == "What is <image>here?"
    for images in ([], ["a.png", "b.png"]):
        with pytest.raises(RecordError) as caught:
            parse(row | {"images": images})
        assert caught.value.reason == "image mark count"
        assert caught.value.words == (
            f"{placeholder} stands for an image in the text, and the number of images is {len(images)}; write <image> where "
            "each image goes, or take it out"
        )


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("<image_1>and<image_2>", "<image>and<image>"),
        ("<|image_0|>and<|image_1|>", "<image>and<image>"),
        ("<|image|>and<|image|>", "<image>and<image>"),
        ("<image><image>Which is <image 2>?", "<image><image>Which is <image 2>?"),  # every image has a mark: this is a name
        ("<image_2>and<image_1>", None),
        ("<image_1>and<image_1>", None),
        ("<image_1>and[IMG]", None),
        ("<image>and<image_2>", None),
    ],
)
def test_several_placeholders_are_marks_where_they_are_alike_and_in_order(text: str, marked: str | None) -> None:
    row = rows(text)["ms-swift 2"] | {"images": ["a.png", "b.png"]}
    if marked is not None:
        assert parse(row).messages[-1].content == marked
        return
    with pytest.raises(RecordError, match="stands for an image in the text, and the number of images is 2"):
        parse(row)


@pytest.mark.parametrize(
    "placeholder", ["<video>", "<audio>", "<|video_pad|>", "<|AUDIO|>", "<|audio_1|>", "<video_placeholder>"]
)
def test_what_stands_for_a_video_or_a_sound_drops_the_record(placeholder: str) -> None:
    for images in ([], ["a.png"]):
        with pytest.raises(RecordError) as caught:
            parse(rows(f"{placeholder}What?")["ms-swift 2"] | {"images": images})
        words = f"query: {placeholder} stands for a video or a sound, and records hold text and images only"
        assert (caught.value.reason, str(caught.value)) == ("unsupported content", words)


@pytest.mark.parametrize(
    "text",
    ["![x](0.png)?", "<video controls>?", "[img]", "[IMG]https://host/a.png[/IMG]", "<image_name>", "<images>", "<|im_start|>"],
)
def test_what_may_be_the_subject_of_a_question_stays(text: str) -> None:
    assert parse(rows(text)["ms-swift 2"]).messages[-1].content == text
    assert parse(rows(text)["ms-swift 2"] | {"images": ["a.png"]}).messages[-1].content == f"<image>{text}"


def test_placeholders_stay_in_what_is_said_to_a_served_model_and_in_responses() -> None:
    said = "<image_1> and <video>"
    row = rows("What?")["ms-swift 2"] | {"response": said, "system": said, "history": [["Who?", said]]}
    record = parse(row)
    assert (record.chosen, [message.content for message in record.messages]) == (said, [said, "Who?", said, "What?"])
    assert record_of([Message(role="user", content=said)], [], "A cat.").messages[0].content == said
